"""How likely a trained model of any family finds data it has not seen, with standard errors."""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ancestral.data import Data
from ancestral.diffusion.model import Diffusion
from ancestral.errors import OptionError
from ancestral.flow.model import Flow
from ancestral.gan.model import GAN
from ancestral.measure import chain
from ancestral.measure.measured import Measured, beside, shuffled
from ancestral.measure.metrics import copying
from ancestral.measure.record import Interval
from ancestral.rng import stream
from ancestral.training.processes import ALONE, Processes
from ancestral.training.recipes import Model
from ancestral.vae.model import VAE

BATCH = 250
"""Examples at a time."""

LEARNT = 256
"""Training examples whose likelihood is measured, at most, to hold it against that of held-out ones."""

REPLICATES = 2
"""How many times over what is not exact is measured, from which the error of the noise is told."""


def evaluate(
    model: Model,
    data: Data,
    *,
    n: int | None = None,
    like: Measured | None = None,
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
    group: Processes = ALONE,
    **options: Any,
) -> Measured:
    """The negative log-likelihood of held-out examples, or a bound on it, and the baselines on the same ones.

    Args:
        model: trained, of a family that has a likelihood.
        data: whose training split the baselines are fitted on, and whose held-out split is measured.
        n: held-out examples that may be measured, the first n of a fixed shuffle; None for all.
        like: a measurement of another model on the same data, whose baselines are used again.
        seed: of the noise: example i has its own stream, whatever the batch.
        progress: told (what, done, of).
        group: the processes that measure together; each of them returns the whole.
        options: of a diffusion model's bound, see `chain.measure`; of any other model's `log_prob`.

    Raises:
        OptionError: if the model has no likelihood.
        DataError: if the data is not of the shape and levels that the model was made for, or has too few examples.
    """
    common: dict[str, Any] = {"n": n, "like": like, "seed": seed, "progress": progress, "group": group}
    if isinstance(model, Diffusion):
        return chain.measure(model, data, **common, **options)
    if isinstance(model, GAN):
        raise OptionError("a GAN has no likelihood: it can be sampled, and the samples compared, and no more")
    return _densities(model, data, **common, **options)


def gap(
    model: Model,
    data: Data,
    held_out: Measured,
    *,
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
    group: Processes = ALONE,
    **options: Any,
) -> Interval | None:
    """How much likelier training examples are than held-out ones, on average, in the data's unit.

        mean over held-out (-log p) - mean over training (-log p)

    0 in expectation where nothing was memorised. Of training examples, as many as of held-out ones are measured, and
    `LEARNT` at most, by the same estimator with noise of their own.

    Args:
        model: trained.
        data: what it was trained on.
        held_out: what was measured of held-out examples.
        seed: the one of that measurement.
        progress: told (what, done, of).
        group: the processes that measure together; each of them returns the whole.
        options: the others of that measurement.

    Returns:
        The difference with its interval; None if a single example was learnt from, which has no standard error.
    """
    if len(data.train) < 2:
        return None
    n = min(LEARNT, len(held_out.chosen))
    learnt = replace(data, held_out=data.train)
    training = evaluate(model, learnt, n=n, like=held_out, seed=seed + 1, progress=progress, group=group, **options)
    found = copying.likelihood_gap(training.nats, held_out.nats)
    return Interval(**{name: held_out.in_unit(value) for name, value in found})


def _densities(
    model: VAE | Flow,
    data: Data,
    *,
    n: int | None,
    like: Measured | None,
    seed: int,
    progress: Callable[[str, int, int], None] | None,
    group: Processes,
    **options: Any,
) -> Measured:
    """The log-densities that a model gives, those that are not exact measured twice over."""
    began, order = time.perf_counter(), shuffled(model.facts, data, n)
    found, starts = {}, range(0, len(order), BATCH)
    for start in starts[group.rank :: group.count]:
        rows = order[start : start + BATCH]
        x = data.held_out[rows]
        once = model.log_prob(x, rng=seed, start=start, **options)
        values = [once.nats]
        for again in range(1, 1 if once.kind == "exact" else REPLICATES):
            each = [stream(seed, start + i, again) for i in range(len(rows))]
            values.append(model.log_prob(x, rng=each, **options).nats)
        found[start] = once.kind, -torch.stack(values, 1).double()
        if progress:
            progress("measuring the likelihood", start + len(rows), len(order))
    parts: dict[int, tuple[Any, Tensor]] = {start: one for part in group.gathered(found) for start, one in part.items()}
    pixels, gaussian = beside(data, like)
    return Measured(
        facts=model.facts,
        kind=parts[0][0],
        replicates=torch.cat([parts[start][1] for start in starts]),
        chosen=order,
        independent_pixels=pixels,
        gaussian=gaussian,
        evaluations=None,
        seconds=time.perf_counter() - began,
    )
