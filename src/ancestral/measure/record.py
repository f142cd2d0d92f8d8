"""The record of an evaluation: what `ancestral evaluate --json` prints, with its schema.

Renew the published schema with: python -m ancestral.measure.record > docs/evaluation.schema.json
"""

import json
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class Record(BaseModel):
    """A frozen part of the record; a key it does not have is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


Kind = Literal["exact", "lower bound", "estimate"]
"""What kind of log-likelihood it is whose negative is told: minus a lower bound is an upper one."""


class Likelihood(Record):
    """The negative log-likelihood, or a bound on it, averaged over examples.

    `stderr` is its standard error over examples and the noise drawn for them: what other examples would change, and
    what other noise would. The bound of a chain is the sum of `prior` (L_T), `diffusion` (the middle terms) and
    `decoder` (L_0).
    """

    value: float
    stderr: float = Field(ge=0)
    stderr_examples: float | None = Field(None, ge=0)
    stderr_noise: float | None = Field(None, ge=0)
    prior: float | None = None
    diffusion: float | None = None
    decoder: float | None = None


class Margin(Record):
    """A number and its standard error: such as by how much a model is better than a baseline, on the same examples."""

    value: float
    stderr: float = Field(ge=0)


class Interval(Margin):
    """A number, its standard error, and its 95% interval, which need not be symmetric."""

    low: float
    high: float


class Baselines(Record):
    """Two simple densities, fitted on the training split, over the examples for which the likelihood speaks."""

    independent_pixels: float
    gaussian: float


class Margins(Record):
    """The model's margin over each baseline."""

    independent_pixels: Margin
    gaussian: Margin


class Averaged(Record):
    """The bound under one average of the weights.

    `length` is relative to the run; `residual` is the relative error of its profile, as it was made from snapshots.
    """

    length: float
    residual: float
    likelihood: Likelihood


class Comparison(Record):
    """Another run, and by how much the bound of this one is below its: paired, on the same examples and noise."""

    run: str
    likelihood: Likelihood
    better: Margin


class OdeLikelihood(Record):
    """The negative log-likelihood along the probability-flow ODE, averaged over examples.

    `value` is the sum of `prior`, `divergence` and `dequantization`. For data on levels it is an upper bound, the mean
    over `draws` of `scheme` for each example; else it is exact but for the solver's tolerance, or an estimate with
    `probes` of the divergence for each draw. `stderr_noise` is what other draws and probes would change. `above` is by
    how much the variational bound exceeds it on the same examples: for an exact guess it does, up to what
    dequantization costs, and for a trained one the two belong to different laws.
    """

    value: float
    stderr: float = Field(ge=0)
    stderr_examples: float | None = Field(None, ge=0)
    stderr_noise: float | None = Field(None, ge=0)
    prior: float
    divergence: float
    dequantization: float
    kind: Kind
    scheme: str | None
    draws: int
    probes: int | None
    n_images: int
    n_evaluations: int
    seconds: float
    above: Margin


class Samples(Record):
    """Samples of the model, held-out examples in their place, and training examples in their place; n of each.

    `quality.METRICS` says what the numbers are, and `features` what distances are measured in.
    """

    n: int
    features: str
    model: dict[str, Interval]
    held_out: dict[str, Interval]
    training: dict[str, Interval]
    rate: float = Field(description="samples that were drawn each second")
    evaluations: int = Field(description="of the network for each sample")


class Modes(Record):
    """The modes of a mixture that samples reach: `hit` out of `of`, and the share of samples that lies at one.

    `reverse_kl` is KL(q || p) in nats, with q the shares of the modes among the samples that lie at one, and p their
    weights: 0 when all modes are met as often as they should be, and None when no sample lies at one. `least` is the
    smallest share of a mode, relative to its weight.
    """

    hit: int
    of: int
    high_quality: float
    reverse_kl: float | None
    least: float


class Trip(Record):
    """The error of a flow's way there and back, relative where values exceed 1: the largest, and what 99.9% keep to."""

    data: float
    data_most: float
    latent: float
    latent_most: float


class RoundTrip(Record):
    """How exactly a flow inverts on held-out examples, in the precision that it runs in and in twice that."""

    float32: Trip
    float64: Trip


class Evaluation(Record):
    """The one object that `ancestral evaluate --json` prints.

    From `estimator` to `respaced` it tells of the chain of a diffusion model, and is silent of other families.
    Of `bits_per_dim` (data on levels) and `nats` (real values, per example) one is there, if the family has a
    likelihood; baselines and margins are in the same unit.
    """

    run: str
    data: str
    family: Literal["diffusion", "vae", "flow", "gan"]
    unit: Literal["bits/dim", "nats"]
    kind: Kind | None = Field(None, description="None of a family that has no likelihood")
    bits_per_dim: Likelihood | None = None
    nats: Likelihood | None = None
    baselines: Baselines | None = None
    margins: Margins | None = None
    estimator: Literal["all-steps", "importance"] | None = None
    limit: bool | None = Field(None, description="whether every term is that of infinitely many steps in its place")
    chain: int | None = Field(None, description="steps T of the chain whose bound this is")
    variance: str | None = Field(None, description="of the reverse chain")
    decoder: str | None = Field(None, description="what turns the last step into probabilities of levels")
    best: bool | None = Field(None, description="whether it is the best of all sub-chains of so many steps")
    respaced: bool | None = Field(
        None, description="whether the model was trained for other steps, so this is another one's bound"
    )
    tolerance: float | None = Field(None, description="standard error that was asked for")
    draws: int | None = Field(
        None, description="importance weights of each example, twice over, of which its bound is made"
    )
    seed: int
    n_images: int = Field(0, description="held-out examples whose likelihood was measured")
    n_held_out: int = Field(0, description="held-out examples for which they speak")
    n_evaluations: int | None = Field(None, description="of a diffusion model's network, over all examples")
    seconds: float = Field(0.0, description="that measuring the likelihood took")
    gap: Interval | None = Field(
        None, description="by how much training examples are likelier than held-out ones: above 0 is memorised"
    )
    artifacts: dict[str, str]
    ode: OdeLikelihood | None = Field(None, description="along the probability-flow ODE, if it was asked for")
    comparison: Comparison | None = Field(None, description="with another run, if one was named")
    ema: list[Averaged] | None = Field(None, description="the averages of the weights that were asked for")

    samples: Samples | None = Field(None, description="how samples stand to data")
    modes: Modes | None = Field(None, description="that samples reach, where the law is a mixture that is known")
    round_trip: RoundTrip | None = Field(None, description="of a flow of blocks that are inverted exactly")

    @property
    def likelihood(self) -> Likelihood | None:
        """Whichever of the two units is there."""
        return self.bits_per_dim or self.nats


if __name__ == "__main__":
    print(json.dumps(Evaluation.model_json_schema(), indent=2))  # noqa: T201
