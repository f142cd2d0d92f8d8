"""How likely a trained model finds data it has not seen, with standard errors, beside two simple densities."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from ancestral.data import Data, Facts
from ancestral.diffusion.likelihood import Bound, mean_and_stderr
from ancestral.diffusion.model import Diffusion
from ancestral.errors import DataError
from ancestral.measure import baselines
from ancestral.rng import stream
from ancestral.training.processes import ALONE, Processes

DRAWS = 20
"""Middle terms of the bound drawn per example, unless all are asked for."""

BATCH, EVALUATIONS = 250, 20_000
"""Examples at a time, and evaluations of the network between two reports of progress, at most."""


class Likelihood(BaseModel):
    """The variational bound on the negative log-likelihood, averaged over examples.

    `value` is the sum of `prior` (L_T), `diffusion` (the middle terms) and `decoder` (L_0); `stderr` is its standard
    error over examples and the noise drawn for them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    value: float
    stderr: float = Field(ge=0)
    prior: float
    diffusion: float
    decoder: float


class Margin(BaseModel):
    """By how much the model is better than a baseline, paired over the same examples: baseline minus model."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    value: float
    stderr: float = Field(ge=0)


class Baselines(BaseModel):
    """The same examples under two simple densities fitted on the training split."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    independent_pixels: float
    gaussian: float


class Margins(BaseModel):
    """The model's margin over each baseline."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    independent_pixels: Margin
    gaussian: Margin


class Averaged(BaseModel):
    """The bound under one average of the weights.

    `length` is relative to the run; `residual` is the relative error of its profile, as it was made from snapshots.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    length: float
    residual: float
    likelihood: Likelihood


class Evaluation(BaseModel):
    """The one object that `ancestral evaluate --json` prints.

    Exactly one of `bits_per_dim` (data on levels) and `nats` (real values, per example) is there; baselines and
    margins are in the same unit.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    run: str
    data: str
    unit: Literal["bits/dim", "nats"]
    bits_per_dim: Likelihood | None = None
    nats: Likelihood | None = None
    baselines: Baselines
    margins: Margins
    estimator: Literal["all-steps", "stratified"]
    chain: int = Field(description="steps T of the chain whose bound this is")
    variance: str = Field(description="of the reverse chain")
    seed: int
    n_images: int
    n_evaluations: int = Field(description="of the network, over all examples")
    seconds: float
    artifacts: dict[str, str]
    ema: list[Averaged] | None = Field(None, description="the averages of the weights that were asked for")

    @property
    def likelihood(self) -> Likelihood:
        """Whichever of the two units is there."""
        found = self.bits_per_dim or self.nats
        assert found is not None
        return found


@dataclass(frozen=True)
class Measured:
    """A bound on held-out examples with the baselines on the same ones, in nats per example."""

    facts: Facts
    bound: Bound
    independent_pixels: Tensor
    gaussian: Tensor
    seconds: float

    def likelihood(self) -> Likelihood:
        """The bound in the data's unit."""
        value, stderr = mean_and_stderr(self.in_unit(self.bound.nats))
        parts = {
            name: float(self.in_unit(getattr(self.bound, name)).mean()) for name in ("prior", "diffusion", "decoder")
        }
        return Likelihood(value=float(value), stderr=float(stderr), **parts)

    def baselines(self) -> Baselines:
        """The mean of each baseline in the data's unit."""
        return Baselines(
            independent_pixels=float(self.in_unit(self.independent_pixels).mean()),
            gaussian=float(self.in_unit(self.gaussian).mean()),
        )

    def margins(self) -> Margins:
        """The paired margin over each baseline in the data's unit."""

        def margin(baseline: Tensor) -> Margin:
            value, stderr = mean_and_stderr(self.in_unit(baseline - self.bound.nats))
            return Margin(value=float(value), stderr=float(stderr))

        return Margins(independent_pixels=margin(self.independent_pixels), gaussian=margin(self.gaussian))

    def in_unit(self, nats: Tensor) -> Tensor:
        """Nats per example in the unit in which this data's likelihood is told."""
        return self.facts.bits_per_dim(nats) if self.facts.levels else nats

    def evaluation(self, **more: Any) -> Evaluation:
        """The published record; `more` names the run, and what is known outside."""
        unit: dict[str, Any] = {"bits_per_dim" if self.facts.levels else "nats": self.likelihood()}
        T, drawn = len(self.bound.times), self.bound.terms.shape[1]
        return Evaluation(
            unit=self.facts.unit,
            baselines=self.baselines(),
            margins=self.margins(),
            estimator="all-steps" if drawn == T - 1 else "stratified",
            chain=T,
            n_images=len(self.bound.nats),
            n_evaluations=self.bound.evaluations,
            seconds=round(self.seconds, 2),
            **unit,
            **more,
        )


def evaluate(
    model: Diffusion,
    data: Data,
    *,
    n: int | None = None,
    draws: int | None = DRAWS,
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
    group: Processes = ALONE,
) -> Measured:
    """The bound on held-out examples and the baselines on the same ones.

    Several processes divide batches among them that are the same whatever their number.

    Args:
        model: trained.
        data: whose training split the baselines are fitted on, and whose held-out split is measured.
        n: held-out examples, the first n of a fixed shuffle; None for all.
        draws: middle terms per example, at most; None for all steps of the chain.
        seed: of the noise: example i has its own stream, whatever the batch.
        progress: told (what, done, of).
        group: the processes that measure together; each of them returns the whole.

    Raises:
        DataError: if the data is not of the shape and levels that the model was made for, or has too few examples.
    """
    facts = model.facts
    if (data.facts.shape, data.facts.levels) != (facts.shape, facts.levels):
        raise DataError(
            f"{data.facts.name}: examples of shape {data.facts.shape} with {data.facts.levels} levels, but the model "
            f"was trained on shape {facts.shape} with {facts.levels}; name data like {facts.name}"
        )
    order = torch.from_numpy(stream(0).permutation(len(data.held_out)))
    held_out = data.held_out[order[:n].sort().values]
    if len(held_out) < 2:
        raise DataError(
            f"{data.facts.name}: a standard error needs at least 2 held-out examples, there are {len(held_out)}"
        )
    draws = model.chain - 1 if draws is None else min(draws, model.chain - 1)
    batch = max(1, min(BATCH, EVALUATIONS // draws))
    began, parts, starts = time.perf_counter(), {}, range(0, len(held_out), batch)
    for start in starts[group.rank :: group.count]:
        rows = held_out[start : start + batch]
        parts[start] = model.bound(rows, rng=seed, start=start, draws=draws)
        if progress:
            progress("measuring the bound", start + len(rows), len(held_out))
    measured = {start: bound for part in group.gathered(parts) for start, bound in part.items()}
    return Measured(
        facts,
        Bound.join([measured[start] for start in starts]),
        baselines.independent_pixels(data, held_out),
        baselines.full_gaussian(data, held_out),
        time.perf_counter() - began,
    )


if __name__ == "__main__":
    print(json.dumps(Evaluation.model_json_schema(), indent=2))  # noqa: T201
