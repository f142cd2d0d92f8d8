"""The likelihood of held-out examples along the probability-flow ODE, and how it stands to the bound."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ancestral.data import Data, Facts
from ancestral.diffusion.flow import FlowLikelihood
from ancestral.diffusion.likelihood import Estimate
from ancestral.diffusion.model import Diffusion
from ancestral.measure.measured import Measured, reach, shuffled
from ancestral.measure.record import Margin, OdeLikelihood
from ancestral.rng import stream
from ancestral.training.processes import ALONE, Processes

EXAMPLES = 64
"""Held-out examples that are followed along the flow, unless a number is given: each takes hundreds of evaluations."""

EXACT, DRAWS = 16, 2
"""Dimensions up to which the divergence is exact, and how many times over what is random is drawn, so that its error is
known: dequantizations of data on levels, each with a probe of its own, or probes of the divergence of real values."""

BATCH = 32
"""Examples at a time."""

PARTS = ("prior", "divergence", "dequantization")
"""What a likelihood along the flow is the sum of."""


@dataclass(frozen=True)
class Followed:
    """What was found along the flow, in nats per example: each part of shape (B,)."""

    facts: Facts
    chosen: Tensor
    nats: Tensor
    stderr: Tensor | None
    parts: dict[str, Tensor]
    kind: Literal["exact", "estimate", "lower bound"]
    probes: int | None
    evaluations: int
    seconds: float

    def likelihood(self, beside: Measured) -> OdeLikelihood:
        """The published record, for all held-out examples by the same regression as the bound that stands beside it."""

        def mean(*nats: Tensor) -> Estimate:
            return beside.estimate(torch.stack(nats, 1), self.chosen[: len(nats[0])])

        # two values with the mean and the standard error of all that were drawn
        noisy = [self.nats] if self.stderr is None else [self.nats - self.stderr, self.nats + self.stderr]
        common = min(len(self.nats), len(beside.chosen))
        whole, above = mean(*noisy), mean(beside.nats[:common] - self.nats[:common])
        errors = {"stderr_examples": whole.over_examples, "stderr_noise": whole.over_noise}
        return OdeLikelihood(
            value=beside.in_unit(whole.value),
            stderr=beside.in_unit(whole.stderr),
            **{name: beside.in_unit(error) for name, error in errors.items() if error is not None},
            **{name: beside.in_unit(mean(part).value) for name, part in self.parts.items()},
            kind=self.kind,
            scheme="truncated-normal" if self.facts.levels else None,
            draws=DRAWS if self.facts.levels else 1,
            probes=self.probes,
            n_images=len(self.nats),
            n_evaluations=self.evaluations,
            seconds=round(self.seconds, 2),
            above=Margin(value=beside.in_unit(above.value), stderr=beside.in_unit(above.stderr)),
        )


def follow(
    model: Diffusion,
    data: Data,
    beside: Measured,
    *,
    n: int | None = None,
    tolerance: float | None = None,
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
    group: Processes = ALONE,
) -> Followed:
    """The first n of the shuffled held-out examples, followed along the probability-flow ODE.

    Args:
        model: trained.
        data: like what it was trained on.
        beside: the bound, by whose regression those that are followed speak for all.
        n: examples, at most; by default `EXAMPLES`, or all of them if there is a tolerance.
        tolerance: standard error to reach, in bits/dim (nats where values are real), by following more examples.
        seed: of dequantization and probes: example i has its own stream, whatever the batch.
        progress: told (what, done, of).
        group: the processes that divide the batches; each of them returns the whole.
    """
    began, facts = time.perf_counter(), model.facts
    order = shuffled(facts, data, n if n or tolerance else EXAMPLES)
    draws, exact = DRAWS if facts.levels else 1, facts.dims <= EXACT
    probes = None if exact else 1 if facts.levels else DRAWS
    found: dict[int, FlowLikelihood] = {}

    def until(done: int) -> Followed:
        """The first so many of the order: those that were not followed yet are followed now."""
        parts, starts = {}, range(sum(len(one.nats) for one in found.values()), done, BATCH)
        for start in starts[group.rank :: group.count]:
            rows = order[start : min(start + BATCH, done)]
            each = [stream(seed, start + i, -2) for i in range(len(rows))]
            parts[start] = model.flow(data.held_out[rows], rng=each, probes=probes, draws=draws)
            if progress:
                progress("following the flow", start + len(rows), len(order))
        for part in group.gathered(parts):
            found.update(part)
        in_order = [found[start] for start in sorted(found)]
        errors = [one.stderr for one in in_order if one.stderr is not None]
        return Followed(
            facts=facts,
            chosen=order[:done],
            nats=torch.cat([one.nats for one in in_order]).cpu(),
            stderr=torch.cat(errors).cpu() if errors else None,
            parts={name: torch.cat([getattr(one, name) for one in in_order]).cpu() for name in PARTS},
            kind=in_order[0].kind,
            probes=probes,
            evaluations=sum(int(one.evaluations.sum()) for one in in_order),
            seconds=time.perf_counter() - began,
        )

    done = len(order) if tolerance is None else min(EXAMPLES, len(order))
    followed = until(done)
    while tolerance is not None and done < len(order):
        share = followed.likelihood(beside).stderr / tolerance
        if share <= 1:
            break
        done = group.told(reach(done, len(order), share, BATCH))
        followed = until(done)
    return followed
