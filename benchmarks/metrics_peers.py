"""Whether metrics of features agree with those of prdc and torchmetrics, on the same features, to 1e-6.

Run it where these are installed beside ours, which need not be where ours is developed:

    python3 -m venv .venv-metrics
    .venv-metrics/bin/pip install . prdc torchmetrics
    .venv-metrics/bin/python benchmarks/metrics_peers.py

It prints each pair of numbers with their relative difference, and ends with exit code 1 if one exceeds the limit.
"""

import sys
import warnings

import torch
from prdc import compute_prdc
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from ancestral.measure.metrics import coverage, distances
from ancestral.rng import randn, stream

N, D, K = 500, 16, 5
LIMIT = 1e-6


class Given(nn.Module):
    """Features in the place of a network, for they are compared and not made."""

    num_features = D

    def forward(self, x: Tensor) -> Tensor:
        """(B, D) -> (B, D)."""
        return x


def peers(x: Tensor, y: Tensor) -> dict[str, float]:
    """What the peers make of samples x and examples y."""
    found = {f"{k} of prdc": float(v) for k, v in compute_prdc(y.numpy(), x.numpy(), nearest_k=K).items()}
    fid = FrechetInceptionDistance(feature=Given(), normalize=True).set_dtype(torch.float64)
    kid = KernelInceptionDistance(feature=Given(), subsets=1, subset_size=N, normalize=True).set_dtype(torch.float64)
    for metric in (fid, kid):
        metric.update(y, real=True)
        metric.update(x, real=False)
    return {**found, "FD of torchmetrics": float(fid.compute()), "KID of torchmetrics": float(kid.compute()[0])}


def main() -> int:
    """Compare them all, and say whether any differs."""
    warnings.simplefilter("ignore")
    x, y = (scale * randn((N, D), stream(seed), dtype=torch.float64) for seed, scale in ((0, 1.2), (1, 1.0)))
    balls = coverage.neighbourhoods(x, y, k=K)
    ours = {f"{name} of prdc": getattr(balls, name).value for name in ("precision", "recall", "density", "coverage")}
    ours |= {"FD of torchmetrics": distances.frechet(x, y).value, "KID of torchmetrics": distances.kid(x, y).value}
    worst = 0.0
    for name, theirs in peers(x, y).items():
        difference = abs(ours[name] - theirs) / abs(theirs)
        worst = max(worst, difference)
        print(f"{name:22s} theirs {theirs:.10f}   ours {ours[name]:.10f}   relative difference {difference:.1e}")
    return int(worst > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
