"""Whether metrics of features agree with those of prdc and torchmetrics, and features with torch-fidelity's, to 1e-6.

Run it where these are installed beside ours, which need not be where ours is developed:

    python3 -m venv .venv-metrics
    .venv-metrics/bin/pip install . prdc torchmetrics
    .venv-metrics/bin/pip install --no-deps torch-fidelity
    .venv-metrics/bin/python benchmarks/metrics_peers.py

Inception-v3 is compared with weights drawn at random, or those of the file that is named: images of three sizes, the
largest difference of a feature by the largest feature. It prints each pair of numbers with their relative difference,
and ends with exit code 1 if one exceeds the limit.
"""

import importlib.util
import sys
import tempfile
import types
import warnings
from pathlib import Path

import torch
from prdc import compute_prdc
from torch import Tensor, nn

from ancestral.measure.metrics import coverage, distances
from ancestral.nets.inception import Inception
from ancestral.rng import randn, stream

SPEC = importlib.util.find_spec("torch_fidelity")
assert SPEC, "torch-fidelity is not installed: the first lines of this file say how"
sys.modules["torch_fidelity"] = types.ModuleType("torch_fidelity")  # its own first lines would import torchvision
sys.modules["torch_fidelity"].__path__ = list(SPEC.submodule_search_locations or ())

from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3  # noqa: E402
from torchmetrics.image.fid import FrechetInceptionDistance  # noqa: E402
from torchmetrics.image.kid import KernelInceptionDistance  # noqa: E402

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


def inception(weights: Path | None) -> dict[str, float]:
    """The difference of Inception's features of images of some sizes, smaller and larger than those it sees."""
    ours = Inception().eval()
    with tempfile.TemporaryDirectory() as folder:
        path = weights or Path(folder) / "drawn.pth"
        if weights is None:
            torch.save(drawn(ours) | {"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}, path)
        state = torch.load(path, weights_only=True)
        theirs = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=str(path))
    ours.load_state_dict({name: each for name, each in state.items() if not name.startswith("fc.")})
    found = {}
    for height, width in ((32, 32), (28, 40), (400, 350)):
        x = torch.from_numpy(stream(height).integers(0, 256, (2, 3, height, width), dtype="uint8"))
        with torch.no_grad():
            expected, features = theirs(x)[0], ours(x.float())
        found[f"{height}x{width}"] = float((features - expected).abs().max() / expected.abs().max())
    return found


def drawn(network: Inception) -> dict[str, Tensor]:
    """Weights with which activations neither vanish nor grow, and moments that are not those of a new layer."""
    state = network.state_dict()
    for i, (name, each) in enumerate(state.items()):
        noise = randn(each.shape, stream(2, i), dtype=torch.float32)
        if name.endswith("conv.weight"):
            each.copy_(noise * (2 / each[0].numel()) ** 0.5)
        elif each.is_floating_point():
            each.copy_(0.1 * noise + name.endswith(("bn.weight", "running_var")))
    return state


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
    for size, difference in inception(Path(sys.argv[1]) if sys.argv[1:] else None).items():
        worst = max(worst, difference)
        print(f"Inception-v3 of torch-fidelity, images of {size:8s} relative difference {difference:.1e}")
    return int(worst > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
