"""Whether samples approach the law: errors by evaluations, beside those of exact samples.

A verdict asks for four times the steps to be as good as exact samples, or closer to them by a power of the steps.
"""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from ancestral import toys
from ancestral.diffusion.denoise import exact
from ancestral.diffusion.grids import Grid
from ancestral.diffusion.process import Process
from ancestral.diffusion.sample import Sampler
from ancestral.errors import OptionError
from ancestral.measure.certification.certificate import Floor, Point
from ancestral.measure.certification.order import whole
from ancestral.measure.certification.subjects import STANDARD_ERRORS, Found
from ancestral.rng import randn, stream, streams

BUDGETS = (5, 10, 20, 50)
"""Evaluations of the network at which the errors of a law are shown."""

FINE, AFFORDED, CLOSER = 80, 600, 0.6
"""Steps of the verdict on a law, evaluations it may take at most, and what must be left of the error after four times
the steps, if that is still above exact samples: 1/4 of it is for order 1, 1/2 for order 1/2. A sampler that keeps a
tolerance gains nothing by steps, and has a sixth."""

REPEATS, SOME = 48, 512
"""Sets of exact samples from which a noise floor is estimated, and samples between which distances are taken."""


def mixture_64() -> toys.Mixture:
    """Three Gaussians in 64 dimensions, each with variances from 1 down to 0.01 along axes of its own.

    Example:
        >>> mixture_64().dim
        64
    """
    rng = stream(64)
    means = randn((3, 64), rng, dtype=torch.float64)
    axes, _ = torch.linalg.qr(randn((3, 64, 64), rng, dtype=torch.float64))
    covs = axes * torch.logspace(0, -2, 64, dtype=torch.float64) @ axes.mT
    return toys.Mixture("mixture-64", torch.tensor([0.5, 0.3, 0.2]), means, (covs + covs.mT) / 2)


ORACLES: dict[str, tuple[Callable[[], toys.Toy], int, int]] = {
    "gaussian": (lambda: toys.named("gaussian"), 1024, 16_384),
    "mixture": (toys.mixture, 1024, 16_384),
    "mixture-64": (mixture_64, 256, 4096),
}
"""Laws, and how many samples of each the errors are measured on: in short, and thoroughly."""


class Oracle(NamedTuple):
    """A law with its noise floor.

    Attributes:
        law: of which everything is known.
        samples: how many the errors are measured on.
        reference: exact samples, for distances.
        mean, std: of the errors of as many exact samples, made even; shape (3,).
        floor: what is shown of them.
    """

    law: toys.Toy
    samples: int
    reference: Tensor
    mean: Tensor
    std: Tensor
    floor: Floor


@cache
def oracle(law: toys.Toy, n: int, seed: int) -> Oracle:
    """The law with the errors of `REPEATS` sets of n exact samples."""
    reference = law.sample(2 * SOME, rng=stream(seed, 1))
    exact_ones = torch.stack([errors(law, law.sample(n, rng=stream(seed, 2, i)), reference) for i in range(REPEATS)])
    mean, covariance, energy = exact_ones.median(0).values.tolist()
    floor = Floor(oracle=law.name, samples=n, repeats=REPEATS, mean=mean, covariance=covariance, energy=energy)
    return Oracle(law, n, reference, even(exact_ones).mean(0), even(exact_ones).std(0), floor)


def oracles(thorough: bool, seed: int) -> dict[str, Oracle]:
    """All laws of `ORACLES` with their noise floors."""
    return {name: oracle(make(), many if thorough else few, seed) for name, (make, few, many) in ORACLES.items()}


def errors(law: toys.Toy, x: Tensor, reference: Tensor) -> Tensor:
    """Of the mean, of the covariance, and the energy distance, shape (3,).

    |m - E[x_0]| / sqrt(tr Cov[x_0]),   |S - Cov[x_0]|_F / |Cov[x_0]|_F,   sqrt(2 E|X - Y| - E|X - X'| - E|Y - Y'|),
    the last from the first `SOME` of the samples X, and exact ones Y.

    Reference: Székely & Rizzo (2013), eq. 2.5.
    """
    mean = (x.mean(0) - law.mean).norm() / law.cov.trace().sqrt()
    covariance = (x.T.cov() - law.cov).norm() / law.cov.norm()
    some = x[:SOME]
    between, within = torch.cdist(some, reference).mean(), torch.pdist(some).sum() * 2 / len(some) ** 2
    own = torch.pdist(reference).sum() * 2 / len(reference) ** 2
    return torch.stack([mean, covariance, (2 * between - within - own).clamp(min=0).sqrt()])


def even(errors: Tensor) -> Tensor:
    """Norms of many small errors made nearly normal: the cube root of the square. Reference: Wilson & Hilferty (1931).

    A threshold in standard deviations then has the rate of a normal law, in 2 dimensions and in 64.
    """
    return errors ** (2 / 3)


def grade(sampler: Sampler, grid: Grid, process: Process, given: Oracle, seed: int) -> Found:
    """The numbers of a `certificate.LawRow`, and what is wrong with them.

    A failure is measured once more, on four times the samples with other noise, and is one only if it is there again:
    an event of probability p among right samplers becomes one of p^2.
    """
    cost, keeps_a_tolerance = _cost(sampler, process), sampler.order is None and not sampler.stochastic
    fine = max(4, min(FINE, _affordable(cost, AFFORDED // 6 if keeps_a_tolerance else AFFORDED)))
    point = _measured(sampler, grid, process, given, seed)
    points = [point(n) for n in (_affordable(cost, budget) for budget in BUDGETS) if n]
    found, faults = _verdict(point(fine // 4), point(fine), given)
    if faults:
        again = oracle(given.law, 4 * given.samples, seed + 1)
        point = _measured(sampler, grid, process, again, seed + 1)
        found, faults = _verdict(point(fine // 4), point(fine), again)
    return {"points": points, **found}, faults


def _measured(sampler: Sampler, grid: Grid, process: Process, given: Oracle, seed: int) -> Callable[[int], Point]:
    """Steps -> the errors of so many.

    Samples start at exact draws of x_T, so that what the process has not forgotten is no error of the sampler.
    """
    denoiser = exact(given.law, process, "x0")
    alpha_T, sigma_T = (float(c) for c in process(1.0))
    x_T = given.law.diffused(alpha_T, sigma_T).sample(given.samples, rng=stream(seed, 3))

    @cache
    def point(n: int) -> Point:
        times, denoiser.asked = grid(process, n), 0
        if len(times) != n:
            raise OptionError(f"the grid has {len(times)} times where {n} were asked for")
        x = whole(sampler(denoiser, x_T, times, rng=stream(seed, 4, n)), x_T)
        mean, covariance, energy = errors(given.law, x, given.reference).tolist()
        asked = round(denoiser.asked / len(x))
        return Point(evaluations=asked, steps=n, mean=mean, covariance=covariance, energy=energy)

    return point


def _verdict(coarse: Point, fine: Point, given: Oracle) -> Found:
    """Whether the errors of `fine` are those of exact samples, or on their way there from those of `coarse`."""
    far, near, floor = (
        torch.tensor([each.mean, each.covariance, each.energy], dtype=torch.float64)
        for each in (coarse, fine, given.floor)
    )
    excess = (even(near) - given.mean) / given.std
    closer = near.square() - floor.square() <= CLOSER**2 * (far.square() - floor.square())
    faults = [
        f"the {name} is {float(excess[i]):.0f} standard errors off after {fine.steps} steps ({float(near[i]):.3f}, "
        f"exact samples {float(floor[i]):.3f}), and hardly more after {coarse.steps} ({float(far[i]):.3f})"
        for i, name in enumerate(("mean", "covariance", "energy distance"))
        if excess[i] > STANDARD_ERRORS and not closer[i]
    ]
    return {"coarse": coarse, "fine": fine, "excess": float(excess.max())}, faults


def _cost(sampler: Sampler, process: Process) -> tuple[float, float]:
    """Evaluations of one step to the data, and of each step before it, on the default grid."""
    denoiser = exact(toys.named("gaussian"), process, "x0")
    x = randn((2, 2), stream(0), dtype=torch.float64) * process.prior_var() ** 0.5
    counts = []
    for n in (1, 5):
        denoiser.asked = 0
        sampler(denoiser, x, n, rng=streams(0, 2))
        counts.append(denoiser.asked / len(x))
    return counts[0], (counts[1] - counts[0]) / 4


def _affordable(cost: tuple[float, float], budget: int) -> int:
    """The most steps that take at most so many evaluations, of which every step takes one; 0 if none does."""
    last, each = cost
    return min(budget, 1 + int((budget - last) / max(each, 1.0) + 1e-9)) if last <= budget else 0
