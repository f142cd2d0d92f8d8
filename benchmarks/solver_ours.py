"""Our samplers, on the grids of others and on our own."""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from ancestral.diffusion import grids, sample
from ancestral.diffusion.denoise import OracleDenoiser
from ancestral.diffusion.fit import Fit, fit
from ancestral.diffusion.process import Process, linear
from ancestral.diffusion.sample import SAMPLERS
from ancestral.rng import stream
from ancestral.toys import gaussian

GRIDS = {name: grid for name, grid in grids.GRIDS.items() if name != "exponential"}
"""Ours, each once: "exponential" is another name of "log-snr"."""


SAME = {
    "dpm-2": "midpoint",
    "pndm": "plms",
    "deis-1": "euler",
    "euler-ancestral": "ancestral",
    "sde-dpmpp-1": "ancestral",
}
"""What the peers call by another name: the same formula, if they are right."""


def named(name: str, stochastic: bool) -> str | None:
    """Our sampler of a peer's name, if there is one that draws noise, or draws none, as theirs does."""
    own = SAME.get(name, name)
    return own if own in SAMPLERS and SAMPLERS[own].stochastic == stochastic else None


def on_sigmas(
    name: str, process: Process, sigmas: Tensor, *, law: Any, x_T: Tensor, seed: int = 0
) -> tuple[Tensor, float]:
    """Where the sampler takes x_T over the given sigma / alpha, the last of which is where it ends."""
    times = process.time(-2 * sigmas.log()).tolist()
    times[-1] = times[-1] if sigmas[-1] > 0 else 0.0  # the bisection ends just above
    start, step = sample.Point(times[0], x_T), SAMPLERS[name].step
    *_, end = sample.walk(step, OracleDenoiser(law, process), start, times, rng=stream(seed))
    return end.x, float(sigmas[-1])


def on_grid(
    name: str, grid: str, process: Process, steps: int, *, law: Any, x_T: Tensor, seed: int = 0
) -> tuple[Tensor, float]:
    """Where the sampler takes x_T over a grid of ours, to the data: no noise."""
    times = GRIDS[grid](process, steps)
    return SAMPLERS[name](OracleDenoiser(law, process), x_T, times, rng=stream(seed)), 0.0


FITTED = ("unipc-2", "unipc-3", "dpmpp-2m", "dpmpp-3m", "deis-3", "plms")
"""What a fit chooses from here: the multistep ones, for the sake of time."""


def fitted(process: Process, evaluations: int, law: Any, x_T: Tensor) -> Fit:
    """The sampler and grid fitted to a law on starts of its own."""
    return fit(OracleDenoiser(law, process), x_T, evaluations, samplers=FITTED)


def on_fit(found: Fit, process: Process, *, law: Any, x_T: Tensor) -> tuple[Tensor, float]:
    """Where the fitted sampler takes x_T over the fitted grid, to the data."""
    return SAMPLERS[found.sampler](OracleDenoiser(law, process), x_T, found.steps), 0.0


def counted() -> list[str]:
    """Our samplers whose evaluations are the same for every example, and so fit a budget."""
    return [name for name, sampler in SAMPLERS.items() if getattr(sampler, "evaluations", 1) is not None]


@cache
def cost(name: str) -> tuple[int, int]:
    """Evaluations of a step, and what the whole walk takes beyond them: counted on one start."""

    class Counting:
        asked = 0

        def posterior_mean(self, x_t: Tensor, alpha: Any, sigma: Any) -> Tensor:
            self.asked += 1
            return law.posterior_mean(x_t, alpha, sigma)

    law, found = gaussian([0.0], [[1.0]]), []
    for steps in (6, 7):
        counting = Counting()
        on_grid(name, "uniform", linear(), steps, law=counting, x_T=torch.ones(1, 1).double())
        found.append(counting.asked)
    each = found[1] - found[0]
    return each, found[0] - 6 * each
