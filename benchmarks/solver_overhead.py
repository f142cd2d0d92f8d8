"""Time beside the network: our samplers and the schedulers of diffusers around a network that does nothing.

A turn is one walk of ours and one of the peer's loop (scale the input, ask the same network, step). A row has the
medians over turns, and of their ratios, of the time for each evaluation, since a step of some is two. Both have their
grids before the clock starts.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import peer_diffusers_solvers as peer
import torch
from solver_ours import cost, named
from solver_problems import PROCESS
from torch import Tensor, nn

from ancestral.diffusion.denoise import NetworkDenoiser
from ancestral.diffusion.grids import uniform
from ancestral.diffusion.sample import SAMPLERS
from ancestral.rng import randn, stream

SHAPES = ((64, 1, 32, 32), (16, 2))
STEPS = 50
WANTED = 5.0
"""How many times the time of ours theirs should take."""

BARE = {"euler": (1, 1, 1), "heun": (2, 3, 2), "pndm": (2, 5, 1), "dpmpp-2m": (2, 3, 1)}
"""Of a step: products with a number, sums in place, and evaluations. Less than these operations no step can take."""


class Nothing(nn.Module):
    """A network that returns what it is given."""

    def forward(self, x: Tensor, log_snr: Tensor) -> Tensor:
        """The input."""
        return x


def ours(name: str, x: Tensor) -> Callable[[], float]:
    """Seconds of a walk."""
    denoiser, times, sampler = NetworkDenoiser(Nothing(), PROCESS, "eps"), uniform(PROCESS, STEPS), SAMPLERS[name]

    @torch.inference_mode()  # as `ancestral sample` walks
    def walk() -> float:
        rng = stream(0) if sampler.stochastic else None
        began = time.perf_counter()
        sampler(denoiser, x, times, rng=rng)
        return time.perf_counter() - began

    return walk


def theirs(name: str, x: Tensor) -> Callable[[], float]:
    """Seconds of a walk of as many steps."""
    noise, net = peer.SOLVERS[name].stochastic, Nothing()

    @torch.no_grad()
    def walk() -> float:
        scheduler = peer.make(name, "linspace", PROCESS, STEPS)
        options = {"generator": torch.Generator().manual_seed(0)} if noise else {}
        sample = x * scheduler.init_noise_sigma
        began = time.perf_counter()
        for t in scheduler.timesteps:
            eps = net(scheduler.scale_model_input(sample, t), t)
            sample = scheduler.step(eps, t, sample, **options).prev_sample
        return time.perf_counter() - began

    return walk


def bare(name: str, x: Tensor) -> Callable[[], float]:
    """Seconds of the operations of as many steps, with nothing around them."""
    products, sums, _ = BARE[name]

    @torch.inference_mode()
    def walk() -> float:
        began = time.perf_counter()
        for _ in range(STEPS):
            for _ in range(products):
                y = x * 0.9
            for _ in range(sums):
                y.add_(x, alpha=0.1)
        return time.perf_counter() - began

    return walk


def asked(cost: tuple[int, int]) -> int:
    """Evaluations of a walk."""
    return cost[0] * STEPS + cost[1]


def measure(turns: int, say: Callable[[str], None]) -> dict[str, Any]:
    """A row for each shape and each solver that both have."""
    rows = []
    for shape in SHAPES:
        x = randn(shape, stream(1))
        for name, solver in peer.SOLVERS.items():
            same = named(name, solver.stochastic)
            if same is None:
                continue
            walks, costs = (ours(same, x), theirs(name, x)), (cost(same), solver.cost)
            seconds = [(walks[0](), walks[1]()) for _ in range(turns + 1)][1:]  # the first warms up
            mine, other = ([1e6 * turn[side] / asked(costs[side]) for turn in seconds] for side in (0, 1))
            ratios = [b / a for a, b in zip(mine, other, strict=True)]
            row = {
                "shape": list(shape),
                "solver": name,
                "ours_microseconds": statistics.median(mine),
                "diffusers_microseconds": statistics.median(other),
                "ratio": statistics.median(ratios),
                "least": min(ratios),
                "greatest": max(ratios),
            }
            if name in BARE:
                alone = bare(name, x)
                median = statistics.median([alone() for _ in range(turns + 1)][1:])
                row["bare_microseconds"] = 1e6 * median / (STEPS * BARE[name][2])
            rows.append(row)
            say(f"{shape} {name}: {row['ours_microseconds']:.0f} us an evaluation, diffusers {row['ratio']:.2f} times")
    return {"steps": STEPS, "turns": turns, "wanted": WANTED, "threads": torch.get_num_threads(), "rows": rows}
