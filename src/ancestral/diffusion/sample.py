"""Samplers: pure steps from time t to time s, and the one loop that walks a grid of times back to the data.

A step is `(denoiser, x, t, s, memory, *, rng, **options) -> (x, memory)`. It sees the denoiser and (alpha, sigma)
only, so every sampler works with every process and parameterization. A bare call of a sampler finishes;
`.path(...)` yields every point on the way. Times on the way are instants: the coefficients of a whole grid are computed
before the first step, in float64, and meet x as plain numbers.

Steps that remember nothing are in `singlestep`, those that remember in `multistep`; `SAMPLERS` names them all.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ancestral.diffusion import multistep, singlestep
from ancestral.diffusion.denoise import Denoiser
from ancestral.diffusion.grids import grid
from ancestral.errors import OptionError
from ancestral.rng import Seeds, streams

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
        order: of convergence in the number of steps for a deterministic sampler, None where noise is drawn or a
            tolerance is kept.
        stochastic: whether the step draws noise.
        evaluations: of the network in one step by default; None where that depends on the example or the step.

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
    order: int | None = None
    stochastic: bool = False
    evaluations: int | None = None

    def __call__(self, denoiser: Denoiser, x: Tensor, steps: int | Tensor, **options: Any) -> Tensor:
        """The end of the path: examples at t = 0, the shape of x."""
        with torch.no_grad():  # once, and not in every step
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
        with torch.no_grad() if torch.is_grad_enabled() else nullcontext():
            point = Point(s, *step(denoiser, point.x, t, s, point.memory, **options))
        yield point


ancestral = Sampler(singlestep.ancestral_step, stochastic=True, evaluations=1)
ddim = Sampler(singlestep.ddim_step, order=1, evaluations=1)
euler = Sampler(singlestep.euler_step, order=1, evaluations=1)
heun = Sampler(singlestep.heun_step, order=2, evaluations=2)
annealed_langevin = Sampler(singlestep.annealed_langevin_step, stochastic=True, evaluations=10)

SAMPLERS = {
    "ancestral": ancestral,
    "ddim": ddim,
    "euler": euler,
    "heun": heun,
    "midpoint": Sampler(singlestep.midpoint_step, order=2, evaluations=2),
    "dpmpp-2s": Sampler(singlestep.dpmpp_2s_step, order=2, evaluations=2),
    "dpmpp-2m": Sampler(partial(multistep.dpmpp_step, order=2), order=2, evaluations=1),
    "dpmpp-3m": Sampler(partial(multistep.dpmpp_step, order=3), order=3, evaluations=1),
    "sde-dpmpp-2m": Sampler(partial(multistep.dpmpp_step, order=2, tau=1.0), stochastic=True, evaluations=1),
    "sde-dpmpp-3m": Sampler(partial(multistep.dpmpp_step, order=3, tau=1.0), stochastic=True, evaluations=1),
    "unipc-1": Sampler(partial(multistep.unipc_step, order=1), order=2, evaluations=1),
    "unipc-2": Sampler(partial(multistep.unipc_step, order=2), order=3, evaluations=1),
    "unipc-3": Sampler(partial(multistep.unipc_step, order=3), order=3, evaluations=1),
    "deis-2": Sampler(partial(multistep.deis_step, order=2), order=2, evaluations=1),
    "deis-3": Sampler(partial(multistep.deis_step, order=3), order=3, evaluations=1),
    "lms": Sampler(multistep.lms_step, order=3, evaluations=1),
    "plms": Sampler(multistep.plms_step, order=2, evaluations=1),
    "sa-solver": Sampler(multistep.sa_solver_step, stochastic=True, evaluations=1),
    "adaptive": Sampler(singlestep.adaptive_step),
    "predictor-corrector": Sampler(singlestep.predictor_corrector_step, stochastic=True, evaluations=2),
    "annealed-langevin": annealed_langevin,
    "restart": Sampler(singlestep.restart_step, stochastic=True),
}
"""Every sampler by its name, with its published constants where options give no other."""
