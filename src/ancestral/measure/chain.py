"""The variational bound of a diffusion model on data it has not seen, term by term, with standard errors."""

import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ancestral.data import Data
from ancestral.diffusion import likelihood, respace
from ancestral.diffusion.denoise import VARIANCES
from ancestral.diffusion.grids import grid
from ancestral.diffusion.likelihood import Bound
from ancestral.diffusion.model import Diffusion
from ancestral.errors import OptionError, unknown
from ancestral.measure.measured import Measured, OfChain, beside, reach, shuffled
from ancestral.rng import stream
from ancestral.training.processes import ALONE, Processes

DRAWS, REPLICATES = 8, 2
"""Middle terms of the bound drawn per example at a time, and how many times over, unless all are asked for."""

PILOT, PILOT_DRAWS = 64, 24
"""Examples, and terms of each, from which it is learnt how often a term is to be drawn."""

LEARNT = 2048
"""Training examples from which a reverse variance or the best chain is learnt."""

FIRST = 512
"""Examples that are measured before it is known how many a tolerance takes."""

PASSES = 200
"""How many times over all examples are measured at most, to come below a tolerance."""

PARTS = ("prior", "diffusion", "decoder")
"""What a bound is the sum of."""

BATCH, EVALUATIONS = 250, 20_000
"""Examples at a time, and evaluations of the network between two reports of progress, at most."""


def measure(
    model: Diffusion,
    data: Data,
    *,
    n: int | None = None,
    draws: int | None = DRAWS,
    tolerance: float | None = None,
    limit: bool = False,
    steps: int | None = None,
    variance: str | None = None,
    best: bool = False,
    like: Measured | None = None,
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
    group: Processes = ALONE,
) -> Measured:
    """The bound on held-out examples and the baselines on the same ones.

    Several processes divide batches among them that are the same whatever their number.

    Args:
        model: trained.
        data: whose training split the baselines are fitted on, and whose held-out split is measured.
        n: held-out examples that may be measured, the first n of a fixed shuffle; None for all.
        draws: middle terms per example and replicate, drawn by importance, at most; None for all steps of the chain.
        tolerance: standard error to reach, in bits/dim (nats where values are real): examples are measured until it is
            reached, and, when there are no more, over again with other noise, until what is left is due to the choice
            of examples.
        limit: put in place of every term what infinitely many steps would give.
        steps: of the chain, if not those that the model was trained for: the bound of another model.
        variance: of the reverse chain, if not the model's own; "optimal" is found by a pass over training examples
            where the network does not know it.
        best: of all sub-chains of so many steps, take the one with the least bound on training examples.
        like: a measurement of another model on the same data: its baselines are used again, and its terms drawn at the
            same steps where the chains are of the same times, so that the difference is paired as closely as it can be.
        seed: of the noise: example i has its own stream, whatever the batch.
        progress: told (what, done, of).
        group: the processes that measure together; each of them returns the whole.

    Raises:
        DataError: if the data is not of the shape and levels that the model was made for, or has too few examples.
        OptionError: if the tolerance is not positive.
    """
    if tolerance is not None and not 0 < tolerance < math.inf:
        raise OptionError(f"a tolerance is a positive standard error, such as 0.005, received {tolerance:g}")
    facts, order = model.facts, shuffled(model.facts, data, n)
    began = time.perf_counter()
    pixels, gaussian = beside(data, like)
    options, pilot = _chain(model, data, steps, variance, best, seed)
    grid = options["steps"]
    draws = None if draws is None or draws >= len(grid) - 1 else draws
    options |= {"draws": draws, "limit": limit}
    if draws is not None or tolerance is not None:
        options |= {"replicates": REPLICATES}
    probability = None
    other = None if like is None else like.chain
    if draws is not None and other is not None and torch.equal(other.bound.times, grid.flip(0)):
        probability = other.probability
    if draws is not None and probability is None:
        probability, asked = group.told(_learnt(model, data.held_out[order[:PILOT]], options, seed))
        pilot += asked
    options["probability"] = probability
    batch = max(1, min(BATCH, EVALUATIONS // (draws or len(grid))))

    def bound_of(first: int, last: int, again: int) -> Bound:
        """The examples first .. last - 1 of the order, for the again-th time."""
        parts, starts = {}, range(first, last, batch)
        for start in starts[group.rank :: group.count]:
            rows = order[start : min(start + batch, last)]
            each = [stream(seed, start + i, *([again] if again else [])) for i in range(len(rows))]
            parts[start] = model.bound(data.held_out[rows], rng=each, **options)
            if progress:
                progress("measuring the bound" + " again" * bool(again), start + len(rows), len(order))
        measured = {start: bound for part in group.gathered(parts) for start, bound in part.items()}
        return Bound.join([measured[start] for start in starts])

    def so_far(bound: Bound) -> Measured:
        how = OfChain(bound, model.chain, model.decoder, limit, options["variance"], best, probability)
        return Measured(
            facts=facts,
            kind="lower bound",
            replicates=bound.replicates,
            chosen=order[: len(bound.nats)],
            independent_pixels=pixels,
            gaussian=gaussian,
            evaluations=bound.evaluations,
            seconds=time.perf_counter() - began,
            parts={name: getattr(bound, name) for name in PARTS},
            chain=how,
        )

    done = len(order) if tolerance is None else min(FIRST, len(order))
    bound = bound_of(0, done, 0)
    while tolerance is not None and done < len(order):
        share = so_far(bound).likelihood().stderr / tolerance
        if share <= 1:
            break
        more = group.told(reach(done, len(order), share, batch))
        bound, done = Bound.join([bound, bound_of(done, more, 0)]), more
    passes = 1
    while tolerance is not None and done == len(order) and passes < PASSES:
        found = so_far(bound).likelihood()
        noise, examples = found.stderr_noise or 0.0, found.stderr_examples or 0.0
        goal = (tolerance**2 - examples**2) ** 0.5 if examples < tolerance else tolerance
        if found.stderr <= tolerance or noise <= goal:
            break
        wanted = group.told(min(PASSES, max(passes + 1, math.ceil(passes * (noise / goal) ** 2))))
        bound = Bound.repeat([bound, *(bound_of(0, done, again) for again in range(passes, wanted))])
        passes = wanted
    return so_far(replace(bound, evaluations=bound.evaluations + pilot))


def _chain(
    model: Diffusion, data: Data, steps: int | None, variance: str | None, best: bool, seed: int
) -> tuple[dict[str, Any], int]:
    """Which chain is measured, as options of `Diffusion.bound`, and the evaluations that learning it took."""
    variance = variance or model.variance
    if variance not in VARIANCES:
        raise unknown("reverse variance", variance, VARIANCES)
    if best and (steps is None or steps > model.chain or variance not in ("beta", "optimal")):
        raise OptionError(
            f"the best chain is one of 1 to {model.chain:,} steps with reverse variance 'beta' or 'optimal', received "
            f"steps = {steps} and {variance!r}: give --steps 50 --variance optimal"
        )
    options: dict[str, Any] = {"steps": grid(model.process, model.chain if steps is None else steps)}
    options["variance"] = variance
    analytic, asked = variance == "optimal" and not model.network.posterior, 0
    if analytic or best:
        found = _residuals(model, data, variance, seed)
        asked = min(LEARNT, len(data.train)) * respace.DRAWS * (2 if model.facts.levels else 1)
        if analytic:
            options["denoiser"] = respace.Calibrated(model.denoiser, found)
        if best:
            options["steps"] = respace.best_chain(model.process, found, steps or 1).steps
    return options, asked


def _residuals(model: Diffusion, data: Data, variance: str, seed: int) -> respace.Residuals:
    """How wrong the guess is along the chain that was trained, on some training examples."""
    chosen = torch.from_numpy(stream(1).permutation(len(data.train)))[:LEARNT]
    return respace.residuals(
        model.denoiser,
        model.facts.scale.forward(data.train[chosen]).to(model.device),
        model.chain,
        rng=[stream(seed, i, -3) for i in range(len(chosen))],
        variance=variance,
        levels=model.facts.levels,
        decoder=model.decoder,
    )


def best_times(model: Diffusion, data: Data, steps: int) -> Tensor:
    """The times of the chain's `steps` steps with the least bound on the data; see `respace.best_chain`.

    Of a reverse chain with the variance of the model if that is "beta", else with the best that depends on the time
    alone.

    Args:
        model: whose chain it is.
        data: which it was trained on.
        steps: 1 to the length of the chain.
    """
    variance = "beta" if model.variance in ("beta", "fixed-large") else "optimal"
    return respace.best_chain(model.process, _residuals(model, data, variance, 0), steps).steps


def _learnt(model: Diffusion, x: Tensor, options: dict[str, Any], seed: int) -> tuple[Tensor, int]:
    """How often each middle term is to be drawn, from some terms of some examples; and the evaluations it took."""
    times = options["steps"].flip(0)
    first = likelihood.spans(model.process, times)
    more = {"draws": min(PILOT_DRAWS, len(times) - 1), "replicates": 1, "probability": first}
    pilot = model.bound(x, rng=[stream(seed, i, -1) for i in range(len(x))], **options | more)
    return pilot.importance(), pilot.evaluations
