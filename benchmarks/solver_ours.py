"""Our samplers, on the grids of others and on our own, under the names of this benchmark."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ancestral.diffusion import sample
from ancestral.diffusion.denoise import OracleDenoiser
from ancestral.diffusion.process import Process, linear
from ancestral.diffusion.sample import SAMPLERS
from ancestral.rng import stream
from ancestral.toys import gaussian

GRIDS: dict[str, Callable[[Process, int], Tensor]] = {
    "uniform": lambda process, n: sample.uniform(n),
    "karras": sample.karras,
}


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
