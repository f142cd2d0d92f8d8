"""The likelihood of held-out examples along the probability-flow ODE, and how it stands to the bound."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ancestral.data import Data, Facts
from ancestral.diffusion.likelihood import Estimate
from ancestral.diffusion.model import Diffusion
from ancestral.measure.measured import Measured, shuffled
from ancestral.measure.record import Margin, OdeLikelihood
from ancestral.rng import stream
from ancestral.training.processes import ALONE, Processes

EXAMPLES = 64
"""Held-out examples that are followed along the flow, unless a number is given: each takes hundreds of evaluations."""

EXACT, PROBES = 16, 2
"""Dimensions up to which the divergence is exact, and probes of it beyond."""

BATCH = 32
"""Examples at a time."""


@dataclass(frozen=True)
class Followed:
    """What was found along the flow, in nats per example: each part of shape (B,)."""

    facts: Facts
    chosen: Tensor
    nats: Tensor
    parts: dict[str, Tensor]
    kind: Literal["exact", "estimate", "lower bound"]
    probes: int | None
    evaluations: int
    seconds: float

    def likelihood(self, beside: Measured) -> OdeLikelihood:
        """The published record, for all held-out examples by the same regression as the bound that stands beside it."""

        def mean(nats: Tensor) -> Estimate:
            return beside.estimate(nats[:, None], self.chosen[: len(nats)])

        common = min(len(self.nats), len(beside.chosen))
        whole, above = mean(self.nats), mean(beside.nats[:common] - self.nats[:common])
        return OdeLikelihood(
            value=beside.in_unit(whole.value),
            stderr=beside.in_unit(whole.stderr),
            **{name: beside.in_unit(mean(part).value) for name, part in self.parts.items()},
            kind=self.kind,
            scheme="truncated-normal" if self.facts.levels else None,
            draws=1,
            probes=self.probes,
            n_images=len(self.nats),
            n_evaluations=self.evaluations,
            seconds=round(self.seconds, 2),
            above=Margin(value=beside.in_unit(above.value), stderr=beside.in_unit(above.stderr)),
        )


def follow(
    model: Diffusion,
    data: Data,
    *,
    n: int | None = None,
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
    group: Processes = ALONE,
) -> Followed:
    """The first n of the shuffled held-out examples, followed along the probability-flow ODE.

    Args:
        model: trained.
        data: like what it was trained on.
        n: examples, at most; by default `EXAMPLES`.
        seed: of dequantization and probes: example i has its own stream, whatever the batch.
        progress: told (what, done, of).
        group: the processes that divide the batches; each of them returns the whole.
    """
    began, order, facts = time.perf_counter(), shuffled(model.facts, data, EXAMPLES if n is None else n), model.facts
    probes = None if facts.dims <= EXACT else PROBES
    parts, starts = {}, range(0, len(order), BATCH)
    for start in starts[group.rank :: group.count]:
        rows = order[start : start + BATCH]
        each = [stream(seed, start + i, -2) for i in range(len(rows))]
        parts[start] = model.flow(data.held_out[rows], rng=each, probes=probes)
        if progress:
            progress("following the flow", start + len(rows), len(order))
    found = {start: one for part in group.gathered(parts) for start, one in part.items()}
    in_order = [found[start] for start in starts]
    names = ("prior", "divergence", "dequantization")
    return Followed(
        facts=facts,
        chosen=order,
        nats=torch.cat([one.nats for one in in_order]).cpu(),
        parts={name: torch.cat([getattr(one, name) for one in in_order]).cpu() for name in names},
        kind=in_order[0].kind,
        probes=probes,
        evaluations=sum(int(one.evaluations.sum()) for one in in_order),
        seconds=time.perf_counter() - began,
    )
