"""Laws of which the denoiser is known exactly, the starts and solutions that solvers are judged by, and the figures.

All are noised by one process: the chain of DDPM, 1000 linear betas. A walk is given x_T ~ N(0, I), taken as a draw at
the first time of its grid, and is judged where it ends against the probability-flow ODE that was followed from the same
x_T at t = 1 to the same noise: none, or that of the first step of the chain where a scheduler stops there. So a grid
that begins late, or ends early, counts against the walk, as it does for whoever samples.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ancestral import ode
from ancestral.data import load
from ancestral.diffusion.process import CONSTRAINTS, Process, linear
from ancestral.rng import randn, stream
from ancestral.toys import Mixture

PROCESS: Process = linear()
SIGMA_MIN = float(torch.exp(-0.5 * PROCESS.log_snr(1 / 1000)))
"""sigma / alpha of the first step of the chain, 0.01."""

STARTS = 70
"""Names the starts that are judged, which nothing was designed on: another number whenever something is."""

LEAST = 1e-5
"""sigma / alpha at which the reference takes its last step, to no noise: its error is of the order of the square."""


class FiniteSet:
    """Points of equal weight: the empirical law of a data set. Its denoiser is a softmax over the points."""

    def __init__(self, points: Tensor) -> None:
        self.points = points.double()
        self.halves = self.points.square().sum(1) / 2

    def posterior_mean(self, x_t: Tensor, alpha: Any, sigma: Any) -> Tensor:
        """E[x_0 | x_t] = softmax_i [(alpha x_t y_i - alpha^2 |y_i|^2 / 2) / sigma^2] y_i."""
        alpha, sigma = (torch.as_tensor(c, dtype=torch.float64).reshape(-1, 1) for c in (alpha, sigma))
        logits = (alpha * (x_t @ self.points.T) - alpha**2 * self.halves) / sigma**2
        return logits.softmax(1) @ self.points

    def sample(self, n: int, *, rng: Any) -> Tensor:
        """n of the points, with replacement."""
        return self.points[torch.from_numpy(rng.integers(len(self.points), size=n))]


class Asked:
    """A law whose denoiser counts how often it is asked."""

    def __init__(self, law: Any) -> None:
        self.law, self.asked = law, 0

    def posterior_mean(self, x_t: Tensor, alpha: Any, sigma: Any) -> Tensor:
        """E[x_0 | x_t]."""
        self.asked += 1
        return self.law.posterior_mean(x_t, alpha, sigma)


@dataclass(frozen=True)
class Problem:
    """A law to be sampled by every solver.

    Attributes:
        name: of the row.
        law: with `posterior_mean` and `sample`.
        centres: which of these an end is nearest to says in which basin it is, shape (K, D).
        starts: how many deterministic walks there are.
        draws: how many stochastic ones.
        named: the stream of the starts.
    """

    name: str
    law: Any
    centres: Tensor
    starts: int
    draws: int
    named: int = STARTS

    @cached_property
    def x_T(self) -> Tensor:
        """The starts, float64."""
        return randn((self.starts, self.centres.shape[1]), stream(self.named), dtype=torch.float64)

    @cached_property
    def solutions(self) -> dict[float, Tensor]:
        """Where the probability-flow ODE takes the starts, by the sigma / alpha of the end: `SIGMA_MIN`, or 0."""
        return solve(self.law, self.x_T)

    @cached_property
    def exact(self) -> tuple[Tensor, float]:
        """Four times as many exact draws as stochastic walks, and the mean distance between two of them."""
        y = self.law.sample(4 * self.draws, rng=stream(8))
        return y, float(distances(y, y).mean())

    def error(self, x: Tensor, end: float) -> dict[str, float]:
        """Of walks that ended at x: RMS over all, the median start, and the share that is in another basin."""
        truth = self.solutions[end]
        if not x.isfinite().all():
            return {"rms": float("nan"), "median": float("nan"), "elsewhere": float("nan")}
        each = (x - truth).square().mean(1)
        elsewhere = torch.cdist(x, self.centres).argmin(1) != torch.cdist(truth, self.centres).argmin(1)
        return {
            "rms": float(each.mean().sqrt()),
            "median": float(each.median().sqrt()),
            "elsewhere": float(elsewhere.double().mean()),
        }


def solve(law: Any, x_T: Tensor, tolerance: float = 1e-10) -> dict[float, Tensor]:
    """The probability-flow ODE of the process in log-SNR, dx/d lambda = alpha/2 (x_0_hat - alpha x), from t = 1."""
    level = CONSTRAINTS["variance-preserving"]

    def slope(log_snr: Tensor, x: Tensor, index: Tensor) -> Tensor:
        alpha, sigma = level(log_snr)
        return alpha[:, None] / 2 * (law.posterior_mean(x, alpha, sigma) - alpha[:, None] * x)

    found, x, at = {}, x_T, float(PROCESS.log_snr(1.0))
    for ratio in (SIGMA_MIN, LEAST):
        to = float(-2 * torch.tensor(ratio, dtype=torch.float64).log())
        x = ode.dormand_prince(slope, x, at, to, rtol=tolerance, atol=tolerance, max_step=1.0, max_steps=20_000).x
        found[ratio], at = x, to
    alpha, sigma = (float(c) for c in level(torch.tensor(at, dtype=torch.float64)))
    return {SIGMA_MIN: found[SIGMA_MIN], 0.0: law.posterior_mean(x, alpha, sigma)}


def mixture(name: str, dim: int, components: int, spread: float, widest: float, narrowest: float) -> Mixture:
    """Components of random weights, means and directions, with variances from widest to narrowest in each."""
    rng = stream(dim, components)
    weights = torch.from_numpy(rng.uniform(0.5, 1.5, components))
    axes, _ = torch.linalg.qr(randn((components, dim, dim), rng, dtype=torch.float64))
    values = torch.logspace(0, 1, dim, base=narrowest / widest, dtype=torch.float64) * widest
    scale = torch.from_numpy(rng.uniform(0.5, 1.5, (components, 1)))
    means = spread * randn((components, dim), rng, dtype=torch.float64)
    return Mixture(name, weights, means, (axes * (scale * values)[:, None]) @ axes.mT)


def plane(quick: bool) -> Problem:
    """Five Gaussians in the plane, three times as long as wide."""
    law = mixture("plane", 2, 5, 1.0, 0.09, 0.01)
    return Problem("plane", law, law.means, 200 if quick else 2000, 200 if quick else 1000)


def space(quick: bool) -> Problem:
    """Six Gaussians in 64 dimensions, whose variances run from 0.3 to 0.001 in directions of their own."""
    law = mixture("space", 64, 6, 0.8, 0.3, 0.001)
    return Problem("space", law, law.means, 32 if quick else 1000, 200 if quick else 1000)


def digits(quick: bool) -> Problem:
    """The 8x8 digits as they are: every training image in [-1, 1]^64, and nothing between."""
    data = load("digits")
    law = FiniteSet(data.facts.scale.forward(data.train).flatten(1))
    return Problem("digits", law, law.points, 32 if quick else 384, 200 if quick else 500)


PROBLEMS: dict[str, Callable[[bool], Problem]] = {"plane": plane, "space": space, "digits": digits}


def distances(x: Tensor, y: Tensor) -> Tensor:
    """Mean |x_i - y_j| over j, of each i; over j != i where both are the same draws."""
    return torch.cdist(x, y).sum(1) / (len(y) - 1 if x is y else len(y))


def energy_distance(problem: Problem, x: Tensor) -> tuple[float, float]:
    """2 E|x - y| - E|x - x'| - E|y - y'| to exact draws y, unbiased, so of either sign where x are exact too.

    With it the standard error over x, to first order: the deviation of 2 (E|x_i - y| - E|x_i - x'|) over sqrt(n).

    Reference: Székely & Rizzo (2013), eq. 2.
    """
    if not x.isfinite().all():
        return float("nan"), float("nan")
    y, within = problem.exact
    across, own = distances(x, y), distances(x, x)
    value = 2 * across.mean() - own.mean() - within
    return float(value), float((2 * (across - own)).std() / len(x) ** 0.5)


def floor(problem: Problem, repeats: int = 20) -> dict[str, float]:
    """The energy distance of exact draws, as many as are compared: its mean, and what one in twenty exceeds."""
    found = [
        energy_distance(problem, problem.law.sample(problem.draws, rng=stream(9, repeat)))[0]
        for repeat in range(repeats)
    ]
    values = torch.tensor(found, dtype=torch.float64)
    return {"mean": float(values.mean()), "exceeded_by_one_in_20": float(values.quantile(0.95))}
