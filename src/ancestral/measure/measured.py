"""What was measured on held-out examples, as an estimate for all of them, beside two simple densities.

Where not all held-out examples are measured, those that are speak for all of them by regression on the two simple
densities, which cost no evaluation of the network and are known for every example:

    value = mean(y) + beta . (mean over all (c) - mean(c)) = sum_i w_i y_i

The weights w_i depend on the controls c alone, so the parts of a bound are estimated with them too, and still add up.

Reference: Cochran (1977), Sampling Techniques, chapter 7, for regression estimates.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ancestral.data import Data, Facts
from ancestral.diffusion.likelihood import Bound, Estimate, apart, estimate
from ancestral.errors import DataError
from ancestral.measure import baselines
from ancestral.measure.record import Baselines, Kind, Likelihood, Margin, Margins
from ancestral.rng import stream


@dataclass(frozen=True)
class OfChain:
    """The bound of a diffusion model's chain, and how it was taken.

    Attributes:
        bound: of the examples that were measured.
        trained: steps of the chain that the model was trained for.
        decoder: of the model.
        limit: whether every term is that of infinitely many steps.
        variance: of the reverse chain.
        best: whether it is the best of all chains of so many steps.
        probability: of drawing each middle term; None if all were.
    """

    bound: Bound
    trained: int
    decoder: str
    limit: bool
    variance: str
    best: bool
    probability: Tensor | None

    def record(self) -> dict[str, Any]:
        """What the published record says of it."""
        T, (_, drawn), (_, R) = len(self.bound.times), self.bound.terms.shape, self.bound.replicates.shape
        return {
            "estimator": "all-steps" if drawn == R * (T - 1) else "importance",
            "limit": self.limit,
            "chain": T,
            "respaced": self.trained != T,
            "variance": self.variance,
            "decoder": self.decoder,
            "best": self.best,
        }


@dataclass(frozen=True)
class Measured:
    """Negative log-likelihoods of held-out examples, or bounds on them, and the baselines on all, in nats per example.

    Attributes:
        facts: of the data.
        kind: what kind of log-density it is whose negative this is.
        replicates: R independent estimates for each of the n examples that were measured, shape (n, R).
        chosen: which of the held-out examples these are, shape (n,).
        independent_pixels: of all N held-out examples, shape (N,).
        gaussian: of all N held-out examples, shape (N,).
        evaluations: of a diffusion model's network, over all examples.
        seconds: it took.
        parts: what the values are made of, each of shape (n,).
        chain: of a diffusion model.
    """

    facts: Facts
    kind: Kind
    replicates: Tensor
    chosen: Tensor
    independent_pixels: Tensor
    gaussian: Tensor
    evaluations: int | None
    seconds: float
    parts: Mapping[str, Tensor] = field(default_factory=dict)
    chain: OfChain | None = None

    @property
    def nats(self) -> Tensor:
        """Of the examples that were measured, shape (n,)."""
        return self.replicates.mean(1)

    @property
    def bound(self) -> Bound:
        """Of a diffusion model's chain, term by term."""
        assert self.chain
        return self.chain.bound

    def estimate(self, part: Tensor | None = None, chosen: Tensor | None = None) -> Estimate:
        """Of the mean over all held-out examples, in nats: of what was measured, by default the values themselves.

        Args:
            part: something else that was measured, shape (n, R).
            chosen: on which examples, if not `self.chosen`, shape (n,).
        """
        controls = torch.stack([self.independent_pixels, self.gaussian], 1)
        return regressed(self.replicates if part is None else part, controls, self.chosen if chosen is None else chosen)

    def likelihood(self) -> Likelihood:
        """The estimate in the data's unit."""
        whole = self.estimate()
        parts = {name: self.estimate(part[:, None]).value for name, part in self.parts.items()}
        errors = {"stderr_examples": whole.over_examples, "stderr_noise": whole.over_noise}
        return Likelihood(
            value=self.in_unit(whole.value),
            stderr=self.in_unit(whole.stderr),
            **{name: self.in_unit(error) for name, error in errors.items() if error is not None},
            **{name: self.in_unit(value) for name, value in parts.items()},
        )

    @property
    def speak_for_all(self) -> bool:
        """Whether the examples that were measured are enough for a regression, or are all there are."""
        return len(self.chosen) >= ENOUGH or len(self.chosen) == len(self.gaussian)

    def baselines(self) -> Baselines:
        """The mean of each baseline in the data's unit, over the examples for which the values speak."""
        rows = slice(None) if self.speak_for_all else self.chosen
        return Baselines(
            independent_pixels=self.in_unit(float(self.independent_pixels[rows].mean())),
            gaussian=self.in_unit(float(self.gaussian[rows].mean())),
        )

    def margins(self) -> Margins:
        """The paired margin over each baseline in the data's unit."""

        def margin(baseline: Tensor) -> Margin:
            found = self.estimate(baseline[self.chosen][:, None] - self.replicates)
            return Margin(value=self.in_unit(found.value), stderr=self.in_unit(found.stderr))

        return Margins(independent_pixels=margin(self.independent_pixels), gaussian=margin(self.gaussian))

    def over(self, other: "Measured") -> Margin:
        """By how much this model is better than another, measured on the same examples with the same noise."""
        both = set(self.chosen.tolist()) & set(other.chosen.tolist())
        mine, theirs = (torch.tensor([i in both for i in each.chosen.tolist()]) for each in (self, other))
        found = self.estimate((other.nats[theirs] - self.nats[mine])[:, None], self.chosen[mine])
        return Margin(value=self.in_unit(found.value), stderr=self.in_unit(found.stderr))

    def in_unit(self, nats: float) -> float:
        """Nats per example in the unit in which this data's likelihood is told."""
        return self.facts.bits_per_dim(nats) if self.facts.levels else nats

    def record(self) -> dict[str, Any]:
        """What the published record says of it."""
        return {
            "bits_per_dim" if self.facts.levels else "nats": self.likelihood(),
            "kind": self.kind,
            "baselines": self.baselines(),
            "margins": self.margins(),
            "n_images": len(self.chosen),
            "n_held_out": len(self.gaussian) if self.speak_for_all else len(self.chosen),
            "n_evaluations": self.evaluations,
            "seconds": round(self.seconds, 2),
            **(self.chain.record() if self.chain else {}),
        }


ENOUGH = 30
"""Examples from which a regression on two controls is told."""


def regressed(replicates: Tensor, controls: Tensor, chosen: Tensor) -> Estimate:
    """The mean over N examples of what was measured on n of them, by regression on what is known of all.

    With S the covariance of the controls over the n examples, and r the residuals of the regression,

        w_i = 1/n + (mean over all (c) - mean(c))^T (n S)^-1 (c_i - mean(c))
        stderr^2 = var(r) sum_i w_i^2 + beta^T cov(c over all) beta / N

    If all were measured, or fewer than `ENOUGH`, this is their plain mean, with the standard error of one.

    Args:
        replicates: R independent estimates of each, shape (n, R).
        controls: shape (N, C).
        chosen: which of the N they are, shape (n,).

    Example:
        >>> controls = torch.arange(1000.0)[:, None]
        >>> few = regressed(3 * controls[:100] + 1, controls, torch.arange(100))
        >>> round(few.value, 6), round(few.stderr / (3 * float(controls.std()) / 1000**0.5), 2)
        (1499.5, 1.0)
    """
    y, (n, R) = replicates.mean(1).double(), replicates.shape
    all_c = controls.double()
    if n < ENOUGH or n == len(controls):
        return estimate(replicates)
    c = all_c[chosen] - all_c[chosen].mean(0)
    inverse = torch.linalg.pinv(c.T @ c, rtol=1e-9, hermitian=True)
    w = 1 / n + c @ inverse @ (all_c.mean(0) - all_c[chosen].mean(0))
    beta = inverse @ c.T @ y
    residual = y - y.mean() - c @ beta
    left = float(residual.square().sum() / (n - 1 - controls.shape[1]) * w.square().sum())
    variance = left + float(((all_c - all_c.mean(0)) @ beta).var() / len(all_c))
    value, noise = float(w @ y), float(w.square() @ replicates.double().var(1) / R) if R > 1 else None
    return apart(value, variance, noise)


def reach(done: int, of: int, share: float, batch: int) -> int:
    """How many examples bring down a standard error that `done` of them have and that is `share` times too large."""
    return min(of, done + max(batch, math.ceil(done * (1.05 * share**2 - 1))))


def shuffled(facts: Facts, data: Data, n: int | None) -> Tensor:
    """Which held-out examples are measured: the first n of a fixed shuffle; None for all.

    Raises:
        DataError: if the data is not of the shape and levels that a model was made for, or has too few examples.
    """
    refuse_other(facts, data)
    order = torch.from_numpy(stream(0).permutation(len(data.held_out)))[:n]
    if len(order) < 2:
        raise DataError(
            f"{data.facts.name}: a standard error needs at least 2 held-out examples, there are {len(order)}"
        )
    return order


def refuse_other(facts: Facts, data: Data) -> None:
    """Refuses data of another shape or other levels than a model was made for.

    Raises:
        DataError: saying both.
    """
    if (data.facts.shape, data.facts.levels) != (facts.shape, facts.levels):
        raise DataError(
            f"{data.facts.name}: examples of shape {data.facts.shape} with {data.facts.levels} levels, but the model "
            f"was trained on shape {facts.shape} with {facts.levels}; name data like {facts.name}"
        )


def beside(data: Data, like: Measured | None = None) -> tuple[Tensor, Tensor]:
    """The two baselines of all held-out examples, in nats: fitted on the training split, or of another measurement."""
    if like is not None:
        return like.independent_pixels, like.gaussian
    return baselines.independent_pixels(data, data.held_out), baselines.full_gaussian(data, data.held_out)
