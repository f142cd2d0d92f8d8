"""Error against evaluations where the exact solution is known: ours beside diffusers and k-diffusion."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from types import ModuleType
from typing import Any

import peer_diffusers_solvers
import peer_k_diffusion
import solver_ours as ours
import torch
from solver_problems import PROCESS, SIGMA_MIN, Asked, Problem, energy_distance, floor
from torch import Tensor

from ancestral.diffusion.sample import SAMPLERS
from ancestral.rng import randn, stream

BUDGETS = (5, 8, 10, 15, 20, 50)
PEERS: dict[str, ModuleType] = {"diffusers": peer_diffusers_solvers, "k-diffusion": peer_k_diffusion}
TOLD = {"diffusers": ("sigma", "timestep"), "k-diffusion": ("sigma",)}
SEED, FITTED_SEED, FITTED_ON = 3, 11, 256
Row = dict[str, Any]


def steps_within(cost: tuple[int, int], budget: int) -> int:
    """The most steps that a budget of evaluations pays for."""
    each, beyond = cost
    return (budget - beyond) // each


def judged(problem: Problem, stochastic: bool, walk: Callable[..., tuple[Tensor, float]]) -> Row:
    """What a walk cost and how far off it ended; a walk that is refused says why."""
    law = Asked(problem.law)
    shape = (problem.draws, problem.centres.shape[1])
    x_T = randn(shape, stream(SEED), dtype=torch.float64) if stochastic else problem.x_T
    try:
        x, end = walk(law=law, x_T=x_T)
    except Exception as error:
        return {"refused": f"{type(error).__name__}: {error}".splitlines()[0]}
    if stochastic:
        width = float((x.var(0).sum() / problem.exact[0].var(0).sum()).sqrt())
        energy, stderr = energy_distance(problem, x)
        return {"evaluations": law.asked, "energy": energy, "stderr": stderr, "width": width}
    at = min(problem.solutions, key=lambda known: abs(known - end))
    return {"evaluations": law.asked, "end": at, **problem.error(x, at)}


def theirs(problem: Problem, library: str, name: str, grid: str, budget: int) -> Row:
    """A solver of a peer on a grid of its own, and ours of the same name on the same grid."""
    peer = PEERS[library]
    solver = peer.SOLVERS[name]
    steps = steps_within(solver.cost, budget)
    row: Row = {"library": library, "solver": name, "grid": grid, "budget": budget, "steps": steps}
    for told in TOLD[library]:
        walk = partial(peer.walk, name, grid, PROCESS, steps=steps, told=told, seed=SEED)
        row[told] = judged(problem, solver.stochastic, walk)
    if same := ours.named(name, solver.stochastic):
        sigmas = peer.sigmas(name, grid, PROCESS, steps)
        row["ours"] = judged(problem, solver.stochastic, partial(ours.on_sigmas, same, PROCESS, sigmas, seed=SEED))
    return row


def own(problem: Problem, name: str, grid: str, budget: int) -> Row:
    """A sampler of ours on a grid of ours."""
    steps = steps_within(ours.cost(name), budget)
    walk = partial(ours.on_grid, name, grid, PROCESS, steps, seed=SEED)
    found = judged(problem, SAMPLERS[name].stochastic, walk)
    return {"library": "ours", "solver": name, "grid": grid, "budget": budget, "steps": steps, "sigma": found}


def fitted(problem: Problem, budget: int) -> Row:
    """Our default: what is fitted to the law, on starts that are not judged."""
    starts = randn((FITTED_ON, problem.centres.shape[1]), stream(FITTED_SEED), dtype=torch.float64)
    found = ours.fitted(PROCESS, budget, problem.law, starts)
    row = judged(problem, False, partial(ours.on_fit, found, PROCESS))
    says = {"sampler": found.sampler, "times": found.times, "candidate": found.candidate, "asked": found.asked}
    named = {"library": "ours", "solver": "fitted", "grid": found.sampler, "budget": budget}
    return {**named, "steps": len(found.times), "sigma": row, "fit": says}


def rows(problem: Problem, budgets: tuple[int, ...]) -> Iterator[Row]:
    """Everything of ours, then everything of theirs."""
    for budget in budgets:
        yield fitted(problem, budget)
    for name, grid, budget in product(ours.counted(), ours.GRIDS, budgets):
        if steps_within(ours.cost(name), budget) >= 1:
            yield own(problem, name, grid, budget)
    for library, peer in PEERS.items():
        for name, solver in peer.SOLVERS.items():
            for grid, budget in product(solver.grids, budgets):
                yield theirs(problem, library, name, grid, budget)


def measure(problem: Problem, budgets: tuple[int, ...], say: Callable[[str], None]) -> dict[str, Any]:
    """All rows of a problem, and what exact draws look like."""
    found = []
    for row in rows(problem, budgets):
        found.append(row)
        if row["budget"] == budgets[-1]:
            say(f"{problem.name}: {row['library']} {row['solver']} {row['grid']}: {row['sigma']}")
    return {
        "starts": problem.starts,
        "draws": problem.draws,
        "ends": {"0": 0.0, "sigma_min": SIGMA_MIN},
        "floor": floor(problem),
        "rows": found,
    }
