"""How fast the peers' solvers converge: error against steps far beyond what anyone would take, on the plane.

The order is measured on Karras's grid up to the first step of the chain, with the network told the sigma of the update,
so that neither a step to no noise nor a rounded time hides it; where x is held in float32, errors below 1e-6 say
nothing and are left out. The rest are curves, each of a fault that a fine grid brings to light.
"""

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import diffusers
import torch
from solver_oracles import PEERS, judged
from solver_problems import PROCESS, Problem, floor

COUNTS = (40, 80, 160, 320, 640)
DIVISORS = (10, 20, 50, 100, 200, 500)
ROUNDING = 1e-6

CURVES: list[tuple[str, str, str, str, tuple[int, ...], dict[str, Any]]] = [
    *[
        ("steps to t - 1000 // n", "diffusers", name, grid, (10, 15, 20, 30, 50, 70, 100, 150, 300, 500), {})
        for name in ("ddim", "pndm")
        for grid in ("linspace", "leading", "trailing")
    ],
    *[
        ("times cut to integers", "diffusers", name, grid, COUNTS, {"told": told})
        for name in ("euler", "dpmpp-2m", "unipc-2", "deis-2")
        for grid in ("karras", "exponential", "beta")
        for told in ("sigma", "timestep")
    ],
    *[
        ("lower order at the end below 15 steps", "diffusers", name, grid, tuple(range(8, 21)), {})
        for name in ("dpmpp-2m", "dpmpp-3m")
        for grid in ("linspace", "karras")
    ],
    *[
        ("the first time of the grid", "diffusers", name, grid, DIVISORS, {})
        for name in ("euler", "dpmpp-2m")
        for grid in ("leading", "trailing")
    ],
    *[
        ("noise", library, name, grid, DIVISORS, {})
        for library in PEERS
        for name in ("sde-dpmpp-2m", "sde-dpmpp-3m")
        for grid in ("linspace", "karras")
    ],
    *[
        ("churn", library, "euler", "karras", DIVISORS, {"s_churn": churn})
        for churn in (40.0, math.inf)
        for library in PEERS
    ],
]
"""(what is looked at, library, solver, grid, numbers of steps, options of the walk)."""


def order(problem: Problem, library: str, name: str) -> dict[str, Any]:
    """Median error after more and more steps on Karras's grid, and how fast it falls."""
    peer, errors = PEERS[library], []
    for steps in COUNTS:
        walk = partial(peer.walk, name, "karras", PROCESS, steps=steps, last=False)
        errors.append(judged(problem, False, walk)["median"])
    usable = [error for error in errors if error > ROUNDING]
    slopes = [math.log2(coarse / fine) for coarse, fine in pairwise(usable)]
    return {
        "library": library,
        "solver": name,
        "declared": peer.SOLVERS[name].order,
        "errors": errors,
        "slopes": slopes,
        "measured": slopes[-1] if slopes else math.nan,
    }


def edm_sde_third_order() -> str:
    """What diffusers' EDM scheduler does when asked for the third-order stochastic solver."""
    scheduler = diffusers.EDMDPMSolverMultistepScheduler(solver_order=3, algorithm_type="sde-dpmsolver++")
    scheduler.set_timesteps(10)
    x = torch.randn(2, 1, 2, 2) * scheduler.init_noise_sigma
    try:
        for t in scheduler.timesteps:
            x = scheduler.step(scheduler.scale_model_input(x, t), t, x).prev_sample
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return "runs"


def measure(problem: Problem, quick: bool, say: Callable[[str], None]) -> dict[str, Any]:
    """Orders and curves."""
    orders, curves = [], []
    for library, peer in PEERS.items():
        for name, solver in peer.SOLVERS.items():
            if solver.stochastic or "karras" not in solver.grids:
                continue
            orders.append(order(problem, library, name))
            say(f"order of {library} {name}: declared {solver.order}, measured {orders[-1]['measured']:.2f}")
            if quick:
                break
    for what, library, name, grid, counts, options in CURVES[::8] if quick else CURVES:
        peer, noisy = PEERS[library], PEERS[library].SOLVERS[name].stochastic or "s_churn" in options
        walk = partial(peer.walk, name, grid, PROCESS, **options)
        found = [judged(problem, noisy, partial(walk, steps=n)) for n in counts]
        curves.append(
            {
                "what": what,
                "library": library,
                "solver": name,
                "grid": grid,
                "options": options,
                "steps": counts,
                "errors": [row.get("energy", row.get("median", math.nan)) for row in found],
                "is": "energy" if noisy else "median",
            }
        )
        said = ", ".join(f"{n}: {error:.3g}" for n, error in zip(counts, curves[-1]["errors"], strict=True))
        say(f"{what}: {library} {name} {grid} {options}: {said}")
    return {"orders": orders, "curves": curves, "edm sde-dpmpp-3m": edm_sde_third_order(), "floor": floor(problem)}
