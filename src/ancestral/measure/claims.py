"""What is said of the four families, as numbers: each claim a function with its definition and its reference.

GANs are unstable and leave modes out: `spread`, `oscillation`, `modes.modes` and `stacked`. A VAE optimises a
surrogate, and its latents are smooth: `gap_chain`, `line`. A flow's density is normalised: `integral`; that it inverts
is `Flow.round_trip`. The bound of a diffusion model is tight: `tightness`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ancestral.data import Data
from ancestral.diffusion.likelihood import mean_and_stderr
from ancestral.diffusion.model import Diffusion
from ancestral.errors import OptionError
from ancestral.protocol import HasDensity, HasLatent
from ancestral.vae.model import VAE

AT_ONCE = 4096
"""Points whose density is asked for at a time."""


@dataclass(frozen=True)
class Spread:
    """A number over seeds of training, lower being better.

    Attributes:
        mean: over the runs that ended.
        deviation: between them.
        worst: of all runs; infinite if one failed, for no number is worse than none.
        failed: share of the runs that did not end in a model.
    """

    mean: float
    deviation: float
    worst: float
    failed: float


def spread(values: Sequence[float | None]) -> Spread:
    """How far runs from different seeds lie apart; a run that failed is None, and is counted and not left out.

    Reference: Lucic et al. (2018), are GANs created equal, section 5, for the spread over seeds as what to report.

    Raises:
        OptionError: if there are fewer than two runs.

    Example:
        >>> spread([1.0, 3.0, None, 2.0])
        Spread(mean=2.0, deviation=1.0, worst=inf, failed=0.25)
    """
    if len(values) < 2:
        raise OptionError(f"received {len(values)} runs: a spread is over 2 seeds at least")
    ended = torch.tensor([value for value in values if value is not None], dtype=torch.float64)
    failed = 1 - len(ended) / len(values)
    mean = float(ended.mean()) if len(ended) else math.nan
    deviation = float(ended.std()) if len(ended) > 1 else math.nan
    return Spread(mean, deviation, math.inf if failed else float(ended.max()), failed)


def oscillation(distances: Sequence[float]) -> tuple[float, float]:
    """How restless the end of training is: of a distance at successive checkpoints, lower being better.

    Returns:
        The deviation over the last quarter of the checkpoints, and by how much the last one is above the best of all;
        both in the units of the distance. Relative to a mean they would say nothing of a model whose distance,
        unbiased, is about zero.

    Raises:
        OptionError: if there are fewer than 8 checkpoints.

    Example:
        >>> oscillation([8.0, 4.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0])
        (0.0, 0.0)
    """
    if len(distances) < 8:
        raise OptionError(f"received {len(distances)} checkpoints: give 8 at least, for two in the last quarter")
    all_of_them = torch.tensor(distances, dtype=torch.float64)
    last = all_of_them[-(len(distances) // 4) :]
    return float(last.std()), float(last[-1] - all_of_them.min())


@dataclass(frozen=True)
class Stacked:
    """Triples of classes that samples of three stacked images show.

    Attributes:
        triples: how many are met, of C^3.
        kl: KL(q || u) in nats, with q the shares of the triples and u the uniform law over all of them.
        of_data: KL of as many triples drawn from u, in expectation: what a perfect model would show.
    """

    triples: int
    kl: float
    of_data: float


def stacked(x: Tensor, data: Data) -> Stacked:
    """Which triples of classes are in images of three channels, told for each channel by its nearest neighbour.

    The expectation of KL(q || u) for n exact draws is about (C^3 - 1) / 2n where n is large.

    Reference: Metz et al. (2017), unrolled GANs, section 3.3; Lin et al. (2018), section 4.2; Miller (1955), the bias.

    Args:
        x: samples in the data's units, shape (n, 3, H, W).
        data: single images with labels, of shape (1, H, W).

    Raises:
        OptionError: if the data has no labels, or the samples are of another shape.
    """
    classes = data.facts.classes
    if classes is None or data.train_labels is None or tuple(x.shape[1:]) != (3, *data.facts.shape[1:]):
        raise OptionError(
            f"received samples of shape {tuple(x.shape)} and {data.facts.name} of shape {data.facts.shape}: give three "
            "channels for images of one, with labels"
        )
    train = data.train.double().flatten(1)
    parts = torch.split(x.double().flatten(2).flatten(0, 1), AT_ONCE)
    nearest = torch.cat([torch.cdist(part, train).argmin(1) for part in parts])
    label, C = data.train_labels[nearest].view(-1, 3), len(classes)
    counts = torch.bincount((label * torch.tensor([C * C, C, 1])).sum(1), minlength=C**3).double()
    q = counts / counts.sum()
    kl = float(torch.special.xlogy(q, q * C**3).sum())
    return Stacked(int((counts > 0).sum()), kl, _uniform_kl(len(x), C**3))


def _uniform_kl(n: int, cells: int) -> float:
    """E[KL(q || u)] of n draws from the uniform law over some cells, each count binomial."""
    k = torch.arange(1, n + 1, dtype=torch.float64)
    log_choose = math.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)
    log_p = log_choose - k * math.log(cells) + torch.special.xlog1py(n - k, torch.tensor(-1 / cells, dtype=k.dtype))
    return float(cells * (log_p.exp() * torch.special.xlogy(k / n, k * cells / n)).sum())


def gap_chain(
    model: VAE, x: Tensor, *, draws: Sequence[int] = (10, 100, 1000), chains: int = 16, steps: int = 500, rng: int = 0
) -> dict[str, tuple[float, float]]:
    """The surrogate of a VAE and what it stands for: ELBO <= IW-k <= ... <= AIS <= log p(x), in expectation.

    Reference: Burda et al. (2016), theorem 1, for the order; Wu et al. (2017), section 3, for annealing as a yardstick.

    Args:
        model: trained.
        x: examples in the data's units, shape (B, *shape).
        draws: numbers k of importance samples, increasing.
        chains: of the annealing, for each example.
        steps: temperatures of each.
        rng: a seed.

    Returns:
        Mean over the examples and its standard error, in nats, by name, in that order.
    """
    widest = model.bound(x, draws=draws[-1], rng=rng)
    found = {"ELBO": mean_and_stderr(widest.elbo.nats)}
    for k in draws:
        found[f"IW-{k}"] = mean_and_stderr(model.bound(x, draws=k, rng=rng).importance.nats)
    found["AIS"] = mean_and_stderr(model.anneal(x, chains=chains, steps=steps, rng=rng).importance.nats)
    return {name: (float(mean), float(stderr)) for name, (mean, stderr) in found.items()}


@dataclass(frozen=True)
class Line:
    """A walk between two examples, by the units of the straight distance between its ends.

    Attributes:
        length: of the walk; 1 for one that is straight.
        jump: the longest of its steps, times their number; 1 for one that is straight and even.
    """

    length: float
    jump: float


def line(model: HasLatent, x: Tensor, y: Tensor, *, steps: int = 16) -> Line:
    """How smooth examples are along straight lines between latents, averaged over pairs of ends.

    A line between examples themselves has length and jump 1. Rounding to levels makes a walk longer than it would be.

    Reference: Karras et al. (2019), section 4.1, perceptual path length; here of values, over whole walks.

    Args:
        model: with latents.
        x: ends in the data's units, shape (B, *shape).
        y: as many other ends.
        steps: of a walk.
    """
    z_x, z_y = model.encode(x), model.encode(y)
    walk = torch.stack([model.decode(torch.lerp(z_x, z_y, i / steps)).double().flatten(1) for i in range(steps + 1)])
    each = walk.diff(dim=0).norm(dim=2)
    ends = (walk[-1] - walk[0]).norm(dim=1).clamp(min=torch.finfo(torch.float64).tiny)
    return Line(float((each.sum(0) / ends).mean()), float((each.amax(0) * steps / ends).mean()))


def integral(model: HasDensity, low: Tensor, high: Tensor, *, points: int = 400) -> float:
    """The integral of p over a rectangle of the plane by the midpoint rule: 1 where all of the probability is in it.

    Args:
        model: of points of the plane, with a density.
        low: the lower corner, in the data's units, shape (2,).
        high: the upper corner.
        points: a side.

    Raises:
        OptionError: if the corners are not of the plane.
    """
    if low.shape != (2,) or high.shape != (2,):
        raise OptionError(
            f"received corners of shape {tuple(low.shape)} and {tuple(high.shape)}: give two numbers each"
        )
    sides = [torch.linspace(float(a), float(b), 2 * points + 1)[1::2] for a, b in zip(low, high, strict=True)]
    nodes = torch.cartesian_prod(*sides)
    nats = torch.cat([model.log_prob(part).nats.double() for part in torch.split(nodes, AT_ONCE)])
    return float(nats.exp().sum() * (high - low).double().prod() / points**2)


def tightness(
    model: Diffusion, x: Tensor, *, entropy: float | None = None, rng: int = 0
) -> dict[str, tuple[float, float]]:
    """How far the bound of a diffusion model stands above the likelihood along its ODE, and above the data's entropy.

    Reference: Song et al. (2021), table 2, for the two side by side.

    Args:
        model: trained.
        x: examples in the data's units, shape (B, *shape).
        entropy: of their law in nats, where it is known.
        rng: a seed.

    Returns:
        Mean over the examples and its standard error, in nats, by name: bound, ODE, bound - ODE, and bound - entropy.
    """
    bound, ode = model.bound(x, rng=rng).nats, model.flow(x, rng=rng).nats.cpu()
    found = {"bound": bound, "ODE": ode, "bound - ODE": bound - ode}
    if entropy is not None:
        found["bound - entropy"] = bound - entropy
    pairs = {name: mean_and_stderr(nats) for name, nats in found.items()}
    return {name: (float(mean), float(stderr)) for name, (mean, stderr) in pairs.items()}
