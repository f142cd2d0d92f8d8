"""The record of a certificate: what `ancestral certify --json` prints, with its schema.

Renew the published schema with: python -m ancestral.measure.certification.certificate > docs/certify.schema.json
"""

import json
from typing import Literal

from pydantic import Field

from ancestral.measure.record import Record


class Row(Record):
    """One thing that was graded. A number is missing where there is none to give, or where it was not finite."""

    verdict: Literal["pass", "fail"]
    reason: str | None = Field(None, description="what failed, in words")

    @property
    def passed(self) -> bool:
        """Whether the verdict is "pass"."""
        return self.verdict == "pass"


class SamplerRow(Row):
    """What a sampler does whatever the law: its order, and where it has to be exact."""

    sampler: str
    schedule: str
    predicts: str
    declared: int | None = Field(None, description="order; none where noise is drawn or a tolerance is kept")
    measured: float | None = Field(None, description="slope of -log error over log steps")
    stderr: float | None = Field(None, description="of the slope, from the fit")
    point_mass: float | None = Field(None, description="distance of one step from the only point there is")
    exponential: float | None = Field(None, description="distance of a step between two times from the same law's flow")
    distance: float | None = Field(None, description="from the flow, of a sampler that keeps a tolerance")
    alone: float | None = Field(None, description="distance of examples drawn alone from the same ones in a batch")
    evaluations: float | None = Field(None, description="of the network in each step but the last")


class Point(Record):
    """How far n samples are from the law, at so many evaluations of the network.

    `mean` and `covariance` are errors relative to the law's scale, `energy` the energy distance.
    """

    evaluations: int
    steps: int
    mean: float | None
    covariance: float | None
    energy: float | None


class LawRow(Row):
    """A sampler on a grid against a law: errors by evaluations, and whether they go away.

    `coarse` and `fine` are four times as many steps apart; `excess` is how many standard deviations the worst of the
    three errors of `fine` lies above those of exact samples.
    """

    sampler: str
    grid: str
    schedule: str
    oracle: str
    points: list[Point] = Field(default_factory=list)
    coarse: Point | None = None
    fine: Point | None = None
    excess: float | None = None


class Floor(Record):
    """The same errors of as many exact samples: their median over repeats."""

    oracle: str
    samples: int
    repeats: int
    mean: float
    covariance: float
    energy: float


class ProcessRow(Row):
    """A process with a parameterization: identities that hold to rounding, and where it begins and ends."""

    schedule: str
    predicts: str
    bayes: float | None = Field(None, description="error of q(x_s|x_t,x_0) q(x_t|x_0) = q(x_t|x_s) q(x_s|x_0), nats")
    marginal: float | None = Field(None, description="relative error of transitions composed to the marginal")
    inverse: float | None = Field(None, description="error of time(log_snr(t)) = t")
    alpha_0: float | None = None
    sigma_0: float | None = None
    alpha_1: float | None = None
    sigma_1: float | None = None
    target: float | None = Field(None, description="error of x_0 from the target as it is published, if it is known")
    round_trip: float | None = Field(None, description="error of E[x_0|x_t] through the row and back")


class LikelihoodRow(Row):
    """A likelihood against a law whose log-density is known.

    `gap` is E[nats + log p(x_0)], in nats; a likelihood that leaves nothing out has `expected` = KL(q(x_T) || p(x_T)),
    and every bound has at least that.
    """

    likelihood: str
    schedule: str
    oracle: str
    claim: str | None = None
    gap: float | None = None
    stderr: float | None = None
    expected: float | None = None


class Certificate(Record):
    """The one object that `ancestral certify --json` prints."""

    passed: bool = Field(description="whether every verdict is pass")
    failures: int
    thorough: bool
    seed: int
    plugin: str | None = None
    seconds: float
    samplers: list[SamplerRow]
    laws: list[LawRow]
    floors: list[Floor]
    processes: list[ProcessRow]
    likelihoods: list[LikelihoodRow]

    @property
    def rows(self) -> list[Row]:
        """Everything that was graded."""
        return [*self.samplers, *self.laws, *self.processes, *self.likelihoods]


if __name__ == "__main__":
    print(json.dumps(Certificate.model_json_schema(), indent=2))  # noqa: T201
