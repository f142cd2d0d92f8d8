"""The solvers of k-diffusion on a law whose denoiser is known: they ask D(x, sigma) directly, so nothing is rounded.

Only its file of samplers is imported. The package around it asks for eleven others to train and to draw; empty modules
stand for those of them that the file names and no sampler here uses.
"""

import sys
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ancestral.diffusion.process import Process

UNUSED = {"torchdiffeq": "odeint", "torchsde": "BrownianTree", "torchvision.transforms": "functional"}


@cache
def _samplers() -> ModuleType:
    """k_diffusion.sampling, without running the package that it is in."""
    spec = find_spec("k_diffusion")
    if spec is None:
        raise ModuleNotFoundError("k_diffusion is not installed here: run this with .venv-peers/bin/python")
    package = ModuleType("k_diffusion")
    package.__path__ = list(spec.submodule_search_locations or [])
    sys.modules["k_diffusion"] = package
    for name, member in UNUSED.items():
        stand_in = sys.modules.setdefault(name, ModuleType(name))
        stand_in.__dict__.setdefault(member, None)
    return import_module("k_diffusion.sampling")


@dataclass(frozen=True)
class Solver:
    """A sampler with its options, and what is claimed about it; the fields are those of diffusers' solvers."""

    sampler: str
    options: dict[str, Any] = field(default_factory=dict)
    order: int | None = None
    cost: tuple[int, int] = (1, 0)
    grids: tuple[str, ...] = ("linspace", "karras", "exponential")

    @property
    def stochastic(self) -> bool:
        """Whether a walk draws noise."""
        return self.order is None


SOLVERS = {
    "euler": Solver("sample_euler", order=1),
    "heun": Solver("sample_heun", order=2, cost=(2, -1)),
    "dpm-2": Solver("sample_dpm_2", order=2, cost=(2, -1)),
    "lms": Solver("sample_lms", order=4),
    "dpmpp-2m": Solver("sample_dpmpp_2m", order=2),
    "dpmpp-2s": Solver("sample_dpmpp_2s_ancestral", {"eta": 0.0}, order=2, cost=(2, -1)),
    "dpmpp-3m": Solver("sample_dpmpp_3m_sde", {"eta": 0.0}, order=3),
    "euler-ancestral": Solver("sample_euler_ancestral"),
    "dpm-2-ancestral": Solver("sample_dpm_2_ancestral", cost=(2, -1)),
    "sde-dpmpp-2s": Solver("sample_dpmpp_sde", cost=(2, -1)),
    "sde-dpmpp-2m": Solver("sample_dpmpp_2m_sde"),
    "sde-dpmpp-3m": Solver("sample_dpmpp_3m_sde"),
}


def sigmas(name: str, grid: str, process: Process, steps: int) -> Tensor:
    """sigma / alpha at each time of the walk, its end included, float64: from the last step of the chain to the first.

    "linspace" is even in the 1000 steps of the chain, as the library's wrappers of discrete models have it.
    """
    sampling = _samplers()
    if grid == "linspace":
        times = torch.linspace(1000, 1, steps, dtype=torch.float64) / 1000
        return sampling.append_zero((-0.5 * process.log_snr(times)).exp())
    ends = (-0.5 * process.log_snr(torch.tensor([1 / 1000, 1.0]))).exp().tolist()
    return getattr(sampling, f"get_sigmas_{grid}")(steps, *ends).double()


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
    """Where the sampler takes x_T, in variance-preserving scale, and sigma / alpha there; arguments as of diffusers."""
    solver, each = SOLVERS[name], sigmas(name, grid, process, steps)
    each = each if last else each[:-1]

    def denoised(x: Tensor, ratio: Tensor) -> Tensor:
        scale = (1 + float(ratio[0]) ** 2) ** -0.5
        return law.posterior_mean(scale * x, scale, float(ratio[0]) * scale)

    if solver.stochastic or "eta" in solver.options:
        generator = torch.Generator().manual_seed(seed)
        options = {"noise_sampler": lambda *_: torch.randn(x_T.shape, generator=generator, dtype=x_T.dtype), **options}
    x = x_T * (1 + each[0] ** 2).sqrt()
    sampler = getattr(_samplers(), solver.sampler)
    x = sampler(denoised, x, each, disable=True, **solver.options, **options)
    return x / (1 + each[-1] ** 2).sqrt(), float(each[-1])
