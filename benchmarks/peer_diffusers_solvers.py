"""The solvers of diffusers on a law whose denoiser is known, by its own schedulers on its own grids.

A scheduler hands the network an integer or interpolated timestep, and updates x with a sigma of its own table. The two
need not agree: times on most grids of DPM-Solver++, UniPC and DEIS are rounded or cut to integers. `told` says which of
the two the network is asked at: "sigma", the one that the update uses, which shows the solver; or "timestep", which is
what a user gets. With "sigma" a walk also begins at the first time of the grid: by itself a scheduler begins at the
second where two times were cut to one.
"""

from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import diffusers
import torch
from torch import Tensor

from ancestral.diffusion.process import CONSTRAINTS, Process

GRIDS: dict[str, dict[str, Any]] = {
    "linspace": {},  # the default of most, and all that the single-step scheduler has beside the last three
    "leading": {"timestep_spacing": "leading"},
    "trailing": {"timestep_spacing": "trailing"},
    "karras": {"use_karras_sigmas": True},
    "exponential": {"use_exponential_sigmas": True},
    "beta": {"use_beta_sigmas": True},
}
EVEN = ("linspace", "leading", "trailing")
SINGLE = ("linspace", "karras", "exponential", "beta")


@dataclass(frozen=True)
class Solver:
    """A scheduler with its options, and what is claimed about it.

    Attributes:
        scheduler: name of its class.
        options: of its constructor.
        order: declared, None where noise is drawn.
        cost: evaluations of a step, and what the whole walk takes beyond them.
        scaled: whether its x has variance 1 + sigma^2 rather than 1.
        grids: which it knows.
    """

    scheduler: str
    options: dict[str, Any] = field(default_factory=dict)
    order: int | None = None
    cost: tuple[int, int] = (1, 0)
    scaled: bool = False
    grids: tuple[str, ...] = tuple(GRIDS)

    @property
    def stochastic(self) -> bool:
        """Whether a walk draws noise."""
        return self.order is None


def _dpm(order: int, **options: Any) -> dict[str, Any]:
    return {"solver_order": order, **options}


SOLVERS = {
    "euler": Solver("EulerDiscreteScheduler", order=1, scaled=True),
    "heun": Solver("HeunDiscreteScheduler", order=2, cost=(2, -1), scaled=True),
    "dpm-2": Solver("KDPM2DiscreteScheduler", order=2, cost=(2, -1), scaled=True),
    "lms": Solver("LMSDiscreteScheduler", order=4, scaled=True),
    "dpmpp-2m": Solver("DPMSolverMultistepScheduler", _dpm(2), order=2),
    "dpmpp-2m-heun": Solver("DPMSolverMultistepScheduler", _dpm(2, solver_type="heun"), order=2),
    "dpmpp-3m": Solver("DPMSolverMultistepScheduler", _dpm(3), order=3),
    "dpmpp-2s": Solver("DPMSolverSinglestepScheduler", _dpm(2, lower_order_final=True), order=2, grids=SINGLE),
    "dpmpp-3s": Solver("DPMSolverSinglestepScheduler", _dpm(3, lower_order_final=True), order=3, grids=SINGLE),
    "unipc-1": Solver("UniPCMultistepScheduler", _dpm(1), order=2),
    "unipc-2": Solver("UniPCMultistepScheduler", _dpm(2), order=3),
    "unipc-3": Solver("UniPCMultistepScheduler", _dpm(3), order=4),
    "unipc-2-bh1": Solver("UniPCMultistepScheduler", _dpm(2, solver_type="bh1"), order=3),
    "unipc-3-bh1": Solver("UniPCMultistepScheduler", _dpm(3, solver_type="bh1"), order=4),
    "deis-1": Solver("DEISMultistepScheduler", _dpm(1), order=1),
    "deis-2": Solver("DEISMultistepScheduler", _dpm(2), order=2),
    "deis-3": Solver("DEISMultistepScheduler", _dpm(3), order=3),
    "ddim": Solver("DDIMScheduler", {"clip_sample": False}, order=1, grids=EVEN),
    "pndm": Solver(
        "PNDMScheduler", {"skip_prk_steps": True, "set_alpha_to_one": True}, order=4, cost=(1, 1), grids=EVEN
    ),
    "ancestral": Solver("DDPMScheduler", {"clip_sample": False}, grids=EVEN),
    "euler-ancestral": Solver("EulerAncestralDiscreteScheduler", scaled=True, grids=EVEN),
    "sde-dpmpp-1": Solver("DPMSolverMultistepScheduler", _dpm(1, algorithm_type="sde-dpmsolver++")),
    "sde-dpmpp-2m": Solver("DPMSolverMultistepScheduler", _dpm(2, algorithm_type="sde-dpmsolver++")),
    "sde-dpmpp-3m": Solver("DPMSolverMultistepScheduler", _dpm(3, algorithm_type="sde-dpmsolver++")),
}
"""By the names this benchmark compares under. A corrector adds one to the order of UniPC's predictor."""


def make(name: str, grid: str, process: Process, steps: int) -> Any:
    """The scheduler of that name, set to so many times of a grid, for the chain of 1000 steps of a process."""
    return deepcopy(_made(name, grid, process, steps))


@cache
def _made(name: str, grid: str, process: Process, steps: int) -> Any:
    solver = SOLVERS[name]
    given = {"timestep_spacing": "linspace"} if grid == "linspace" and solver.grids != SINGLE else GRIDS[grid]
    scheduler = getattr(diffusers, solver.scheduler)(
        trained_betas=process.chain(1000).betas.tolist(), **solver.options, **given
    )
    scheduler.set_timesteps(steps)
    return scheduler


def sigmas(name: str, grid: str, process: Process, steps: int) -> Tensor:
    """sigma / alpha where each update begins, and at the end, float64: the grid for others to walk on.

    A single-step solver takes the inner times of an update from its grid; they are left out here.
    """
    scheduler = make(name, grid, process, steps)
    if not hasattr(scheduler, "sigmas"):
        visited = torch.as_tensor(scheduler.timesteps).unique().flip(0)
        alpha_bar = scheduler.alphas_cumprod.double()[visited]
        return torch.cat([((1 - alpha_bar) / alpha_bar).sqrt(), torch.zeros(1)])
    each = scheduler.sigmas.double()
    if hasattr(scheduler, "order_list"):
        return each[[*(i for i, order in enumerate(scheduler.order_list) if order == 1), -1]]
    return each[torch.cat([torch.tensor([True]), each.diff() != 0])]


def walk(
    name: str,
    grid: str,
    process: Process,
    law: Any,
    x_T: Tensor,
    steps: int,
    *,
    told: str = "sigma",
    seed: int = 0,
    last: bool = True,
    **options: Any,
) -> tuple[Tensor, float]:
    """Where the solver takes x_T, in variance-preserving scale, and sigma / alpha there.

    Args:
        law: whose `posterior_mean` stands for the network.
        x_T: draws of N(0, I).
        steps: of the grid.
        told: "sigma" or "timestep".
        seed: of the noise, if any is drawn.
        last: whether the step to the end is taken, or the walk ends where the network is asked last.
        options: of `step`.
    """
    solver, generator = SOLVERS[name], torch.Generator().manual_seed(seed)
    scheduler = make(name, grid, process, steps)
    if told == "sigma" and hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    options = options | ({"generator": generator} if solver.stochastic else {})
    ratios = [_ratio(scheduler, i, t) for i, t in enumerate(scheduler.timesteps)]
    x = x_T * (1 + ratios[0] ** 2) ** 0.5 if solver.scaled else x_T
    for i, t in enumerate(scheduler.timesteps):
        if i == len(ratios) - 1 and not last:
            return (x / (1 + ratios[i] ** 2) ** 0.5 if solver.scaled else x), ratios[i]
        scaled = scheduler.scale_model_input(x, t)
        if told == "sigma":
            scaled = x / (1 + ratios[i] ** 2) ** 0.5 if solver.scaled else x
            log_snr = -2 * torch.tensor(ratios[i], dtype=torch.float64).log()
        else:
            log_snr = process.log_snr((float(t) + 1) / 1000)
        alpha, sigma = (float(c) for c in CONSTRAINTS["variance-preserving"](log_snr))
        eps = (scaled - alpha * law.posterior_mean(scaled, alpha, sigma)) / sigma
        x = scheduler.step(eps, t, x, **options).prev_sample
    return x, float(scheduler.sigmas[-1]) if hasattr(scheduler, "sigmas") else 0.0


def _ratio(scheduler: Any, i: int, t: Tensor) -> float:
    """sigma / alpha that the i-th update takes the network's answer for."""
    if hasattr(scheduler, "sigmas_interpol") and i % 2:
        return float(scheduler.sigmas_interpol[i])
    if hasattr(scheduler, "sigmas"):
        return float(scheduler.sigmas[i])
    alpha_bar = float(scheduler.alphas_cumprod[int(t)])
    return ((1 - alpha_bar) / alpha_bar) ** 0.5
