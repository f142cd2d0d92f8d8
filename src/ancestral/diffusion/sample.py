"""Samplers: pure steps from time t to time s, and the one loop that walks a grid of times back to the data.

A step is `(denoiser, x, t, s, memory, *, rng, **options) -> (x, memory)`. It sees the denoiser and (alpha, sigma)
only, so every sampler works with every process and parameterization. A bare call of a sampler finishes;
`.path(...)` yields every point on the way. Times on the way are instants: the coefficients of a whole grid are computed
before the first step, in float64, and meet x as plain numbers.

The probability-flow ODE is written without reference to time: along it dx = x_0_hat d alpha + eps_hat d sigma
(Song et al. 2021, 2011.13456, eq. 13, with the process's own alpha and sigma as coordinates), which holds for
every process and has no singularity at either end.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ancestral import langevin
from ancestral.diffusion.denoise import Denoiser, reverse
from ancestral.diffusion.grids import grid
from ancestral.diffusion.process import Instant
from ancestral.errors import OptionError
from ancestral.rng import Rng, Seeds, randn_like, streams

Step = Callable[..., tuple[Tensor, Any]]


class Point(NamedTuple):
    """Where a walk is: the time, the examples there, and what a step remembers of the way."""

    t: float
    x: Tensor
    memory: Any = None


@dataclass(frozen=True)
class Sampler:
    """A step, the loop around it, and what is claimed about it.

    Attributes:
        step: the pure step.
        order: of convergence in the number of steps for a deterministic sampler, None where noise is drawn.
        stochastic: whether the step draws noise.

    Example:
        >>> from ancestral import toys
        >>> from ancestral.diffusion import denoise, process
        >>> from ancestral.rng import randn, stream
        >>> oracle = denoise.OracleDenoiser(toys.named("ring-8"), process.cosine())
        >>> x = ddim(oracle, randn((5, 2), stream(0)).double(), 50)
        >>> (x.norm(dim=1) - 2).abs().max() < 0.5
        tensor(True)
    """

    step: Step
    order: int | None
    stochastic: bool

    def __call__(self, denoiser: Denoiser, x: Tensor, steps: int | Tensor, **options: Any) -> Tensor:
        """The end of the path: examples at t = 0, the shape of x."""
        for point in self.path(denoiser, x, steps, **options):
            x = point.x
        return x

    def path(
        self, denoiser: Denoiser, x: Tensor, steps: int | Tensor, *, rng: Seeds | None = None, **options: Any
    ) -> Iterator[Point]:
        """Every point from x at the first time of the grid to the data.

        Args:
            denoiser: E[x_0 | x_t].
            x: draws of p(x_T), shape (B, ...).
            steps: a grid of times, or the number of times of the default grid.
            rng: a seed, one per example, or generators; only a stochastic sampler needs it.
            options: of the step.

        Raises:
            OptionError: if the grid is not legal, or a stochastic sampler has no rng.
        """
        if self.stochastic and rng is None:
            raise OptionError("this sampler draws noise: pass rng=, one generator or one per example")
        times = [*grid(denoiser.process, steps).tolist(), 0.0]
        generators = None if rng is None else streams(rng, len(x))
        return walk(self.step, denoiser, Point(times[0], x), times, rng=generators, **options)


def walk(step: Step, denoiser: Denoiser, start: Point, times: list[float], **options: Any) -> Iterator[Point]:
    """The loop of every sampler: `step` over neighbouring times, in either direction, without gradients."""
    point = start
    yield point
    for t, s in pairwise(denoiser.process.instants(times)):
        with torch.no_grad():
            point = Point(s, *step(denoiser, point.x, t, s, point.memory, **options))
        yield point


def ancestral_step(
    denoiser: Denoiser, x: Tensor, t: Instant, s: Instant, memory: None, *, rng: Rng, variance: str = "fixed-small"
) -> tuple[Tensor, None]:
    """x_s ~ p_theta(x_s|x_t) = N(mu_theta, Sigma_theta); the last step, to the data, returns the mean.

    Reference: Ho et al. (2020), algorithm 2. `variance` is one of `denoise.VARIANCES`.
    """
    mean, var, _ = reverse(denoiser, x, s, t, variance)
    if s.sigma == 0:
        return mean, memory
    return mean + var**0.5 * randn_like(x, rng), memory


def ddim_step(
    denoiser: Denoiser, x: Tensor, t: Instant, s: Instant, memory: None, *, rng: Rng | None = None, eta: float = 0.0
) -> tuple[Tensor, None]:
    """x_s = alpha_s x_0_hat + sqrt(sigma_s^2 - eta^2 beta~) eps_hat + eta sqrt(beta~) z.

    eta scales the standard deviation of fresh noise: 0 is deterministic, 1 is ancestral sampling.

    Reference: Song, Meng & Ermon (2021), eqs. 12 and 16.
    """
    if not 0 <= eta <= 1:
        raise OptionError(f"DDIM's eta is the share of fresh noise and lies in [0, 1], received {eta}")
    fresh = eta**2 * denoiser.process.gain(s, t)
    x_0_hat = denoiser(x, t)
    eps_hat = x.sub(x_0_hat, alpha=t.alpha) / t.sigma
    x = (s.alpha * x_0_hat).add(eps_hat, alpha=s.sigma * (1 - fresh) ** 0.5)
    if eta == 0 or s.sigma == 0:
        return x, memory
    if rng is None:
        raise OptionError(f"DDIM with eta = {eta} draws noise: pass rng=, one generator or one per example")
    return x.add(randn_like(x, rng), alpha=s.sigma * fresh**0.5), memory


def euler_step(
    denoiser: Denoiser, x: Tensor, t: Instant, s: Instant, memory: None, *, rng: Rng | None = None
) -> tuple[Tensor, None]:
    """x_s = x_t + (alpha_s - alpha_t) x_0_hat + (sigma_s - sigma_t) eps_hat, which equals DDIM with eta = 0."""
    return _along(x, t, s, *_slopes(denoiser, x, t)), memory


def heun_step(
    denoiser: Denoiser, x: Tensor, t: Instant, s: Instant, memory: None, *, rng: Rng | None = None
) -> tuple[Tensor, None]:
    """Euler to s, then again from t with the mean of the slopes at both ends; Euler alone where sigma_s = 0.

    Reference: Karras et al. (2022), algorithm 1, in the coordinates of this module.
    """
    x_0_t, eps_t = _slopes(denoiser, x, t)
    x_euler = _along(x, t, s, x_0_t, eps_t)
    if s.sigma == 0:
        return x_euler, memory
    x_0_s, eps_s = _slopes(denoiser, x_euler, s)
    return _along(x, t, s, (x_0_t + x_0_s) / 2, (eps_t + eps_s) / 2), memory


def annealed_langevin_step(
    denoiser: Denoiser,
    x: Tensor,
    t: Instant,
    s: Instant,
    memory: Any,
    *,
    rng: Rng,
    updates: int = 10,
    size: float = 0.2,
) -> tuple[Tensor, langevin.Chains]:
    """`updates` steps of Langevin dynamics on log q(x_t), of length size * sigma_t^2, then on to the next level.

    Each example is one chain. The memory is the level's `langevin.Chains`, whose `ess()` and `r_hat()` say whether
    the level was explored. The last level ends with the denoiser's guess.

    Reference: Song & Ermon (2019), algorithm 1. Two changes: between levels x is shrunk to the spread of unit-variance
    data at the next one, and the closing denoising step is from Jolicoeur-Martineau et al. (2021).
    """
    chains = langevin.ula(
        lambda flat: denoiser.score(flat.reshape(x.shape), t).flatten(1),
        x.flatten(1),
        size * t.sigma**2,
        updates,
        rng=rng,
    )
    x = chains.samples[-1].reshape(x.shape)
    if s.sigma == 0:
        return denoiser(x, t), chains
    return math.hypot(s.alpha, s.sigma) / math.hypot(t.alpha, t.sigma) * x, chains


def _slopes(denoiser: Denoiser, x: Tensor, t: Instant) -> tuple[Tensor, Tensor]:
    """(x_0_hat, eps_hat): what x gains per unit of alpha and of sigma along the probability-flow ODE."""
    x_0_hat = denoiser(x, t)
    return x_0_hat, x.sub(x_0_hat, alpha=t.alpha) / t.sigma


def _along(x: Tensor, t: Instant, s: Instant, x_0_hat: Tensor, eps_hat: Tensor) -> Tensor:
    """x + (alpha_s - alpha_t) x_0_hat + (sigma_s - sigma_t) eps_hat."""
    return x.add(x_0_hat, alpha=s.alpha - t.alpha).add(eps_hat, alpha=s.sigma - t.sigma)


ancestral = Sampler(ancestral_step, order=None, stochastic=True)
ddim = Sampler(ddim_step, order=1, stochastic=False)
euler = Sampler(euler_step, order=1, stochastic=False)
heun = Sampler(heun_step, order=2, stochastic=False)
annealed_langevin = Sampler(annealed_langevin_step, order=None, stochastic=True)

SAMPLERS = {
    "ancestral": ancestral,
    "ddim": ddim,
    "euler": euler,
    "heun": heun,
    "annealed-langevin": annealed_langevin,
}
