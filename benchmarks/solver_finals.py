"""The best pairs of the peers beside our default, from starts that neither was picked on.

The best of a hundred pairs on a few hundred starts is partly the luckiest. So for every law and budget the nearest
pairs of theirs by RMS, picked on the starts that `solver_oracles` judges by, walk again from fresh starts, and beside
them what was fitted to the law on 1,024 starts of its own. The best of theirs is still picked where it is judged.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import solver_ours as ours
import torch
from solver_oracles import FITTED_SEED, PEERS, Row
from solver_problems import PROCESS, Problem
from torch import Tensor

from ancestral.rng import randn, stream

PICKED, FRESH = 5, 72
"""Pairs of theirs that walk again, and the stream of the fresh starts."""

FITTED_ON = 1024
"""Starts of the fit."""

STARTS = {"plane": 10_000, "space": 4_000, "digits": 2_048}
"""How many there are."""


def finalists(rows: list[Row], budget: int) -> list[tuple[Row, str]]:
    """The nearest pairs of the peers by RMS, each with what its network was told of the time."""
    known = [
        (row[told]["rms"], i, told)
        for i, row in enumerate(rows)
        if row["budget"] == budget and row["library"] != "ours"
        for told in ("sigma", "timestep")
        if math.isfinite(row.get(told, {}).get("rms", math.nan))
    ]
    best: dict[tuple[Any, ...], tuple[Row, str]] = {}
    for rms, i, told in sorted(known):
        best.setdefault((rms, rows[i]["solver"], rows[i]["grid"]), (rows[i], told))
    return list(best.values())[:PICKED]


def errors(problem: Problem, walk: Callable[..., tuple[Tensor, float]]) -> tuple[Tensor, dict[str, float]]:
    """Squared error of each start, the mean over coordinates, and what `Problem.error` says of all."""
    x, end = walk(law=problem.law, x_T=problem.x_T)
    at = min(problem.solutions, key=lambda known: abs(known - end))
    return (x - problem.solutions[at]).square().mean(1), problem.error(x, at)


def measure(problem: Problem, rows: list[Row], starts: int | None, say: Callable[[str], None]) -> dict[str, list[Row]]:
    """For each budget the best of theirs and ours, and the mean gap of the squared errors, start by start."""
    fresh, found = replace(problem, starts=starts or STARTS[problem.name], named=FRESH), []
    for budget in sorted({row["budget"] for row in rows}):
        noise = randn((FITTED_ON, problem.centres.shape[1]), stream(FITTED_SEED), dtype=torch.float64)
        fit = ours.fitted(PROCESS, budget, problem.law, noise)
        own, said = errors(fresh, partial(ours.on_fit, fit, PROCESS))
        best: tuple[Tensor, Row] | None = None
        for row, told in finalists(rows, budget):
            walk = partial(
                PEERS[row["library"]].walk, row["solver"], row["grid"], PROCESS, steps=row["steps"], told=told
            )
            other, figures = errors(fresh, partial(walk, seed=0))
            if best is None or other.mean() < best[0].mean():
                best = other, {**figures, "library": row["library"], "solver": row["solver"], "grid": row["grid"]}
        assert best is not None
        gap = best[0] - own
        line = {"budget": budget, "starts": fresh.starts, "ours": {**said, "sampler": fit.sampler}, "theirs": best[1]}
        found.append({**line, "gap": float(gap.mean()), "stderr": float(gap.std() / len(gap) ** 0.5)})
        say(f"{problem.name} {found[-1]}")
    return {problem.name: found}
