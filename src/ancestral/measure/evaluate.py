"""How likely a trained model finds data it has not seen, with standard errors, beside two simple densities.

Where not all held-out examples are measured, those that are speak for all of them by regression on the two simple
densities, which cost no evaluation of the network and are known for every example:

    value = mean(y) + beta . (mean over all (c) - mean(c)) = sum_i w_i y_i

The weights w_i depend on the controls c alone, so the parts of a bound are estimated with them too, and still add up.

Reference: Cochran (1977), Sampling Techniques, chapter 7, for regression estimates.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ancestral.data import Data, Facts
from ancestral.diffusion import likelihood, respace
from ancestral.diffusion.denoise import VARIANCES
from ancestral.diffusion.grids import grid
from ancestral.diffusion.likelihood import Bound, Estimate, estimate
from ancestral.diffusion.model import Diffusion
from ancestral.errors import DataError, OptionError, unknown
from ancestral.measure import baselines
from ancestral.measure.record import Baselines, Evaluation, Likelihood, Margin, Margins
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

BATCH, EVALUATIONS = 250, 20_000
"""Examples at a time, and evaluations of the network between two reports of progress, at most."""


@dataclass(frozen=True)
class Measured:
    """A bound on held-out examples, in nats per example, and the baselines on all of them.

    Attributes:
        facts: of the data.
        model: whose bound it is.
        bound: of the examples that were measured.
        chosen: which of the held-out examples these are, shape (B,).
        independent_pixels: of all N held-out examples, shape (N,).
        gaussian: of all N held-out examples, shape (N,).
        limit: whether every term is that of infinitely many steps.
        variance: of the reverse chain.
        best: whether it is the best of all chains of so many steps.
        probability: of drawing each middle term; None if all were.
        seconds: it took.
    """

    facts: Facts
    model: Diffusion
    bound: Bound
    chosen: Tensor
    independent_pixels: Tensor
    gaussian: Tensor
    limit: bool
    variance: str
    best: bool
    probability: Tensor | None
    seconds: float

    def estimate(self, part: Tensor | None = None, chosen: Tensor | None = None) -> Estimate:
        """Of the mean over all held-out examples, in nats: of what was measured, by default the bound.

        Args:
            part: something else that was measured, shape (n, R).
            chosen: on which examples, if not those of the bound, shape (n,).
        """
        controls = torch.stack([self.independent_pixels, self.gaussian], 1)
        return regressed(
            self.bound.replicates if part is None else part, controls, self.chosen if chosen is None else chosen
        )

    def likelihood(self) -> Likelihood:
        """The bound in the data's unit."""
        whole = self.estimate()
        parts = {name: self.estimate(getattr(self.bound, name)[:, None]).value for name in PARTS}
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
        """The mean of each baseline in the data's unit, over the examples for which the bound speaks."""
        rows = slice(None) if self.speak_for_all else self.chosen
        return Baselines(
            independent_pixels=self.in_unit(float(self.independent_pixels[rows].mean())),
            gaussian=self.in_unit(float(self.gaussian[rows].mean())),
        )

    def margins(self) -> Margins:
        """The paired margin over each baseline in the data's unit."""

        def margin(baseline: Tensor) -> Margin:
            found = self.estimate((baseline[self.chosen] - self.bound.nats)[:, None])
            return Margin(value=self.in_unit(found.value), stderr=self.in_unit(found.stderr))

        return Margins(independent_pixels=margin(self.independent_pixels), gaussian=margin(self.gaussian))

    def over(self, other: "Measured") -> Margin:
        """By how much this model is better than another, measured on the same examples with the same noise."""
        both = set(self.chosen.tolist()) & set(other.chosen.tolist())
        mine, theirs = (torch.tensor([i in both for i in each.chosen.tolist()]) for each in (self, other))
        found = self.estimate((other.bound.nats[theirs] - self.bound.nats[mine])[:, None], self.chosen[mine])
        return Margin(value=self.in_unit(found.value), stderr=self.in_unit(found.stderr))

    def in_unit(self, nats: float) -> float:
        """Nats per example in the unit in which this data's likelihood is told."""
        return self.facts.bits_per_dim(nats) if self.facts.levels else nats

    def evaluation(self, **more: Any) -> Evaluation:
        """The published record; `more` names the run, and what is known outside."""
        unit: dict[str, Any] = {"bits_per_dim" if self.facts.levels else "nats": self.likelihood()}
        T, (_, drawn), (_, R) = len(self.bound.times), self.bound.terms.shape, self.bound.replicates.shape
        return Evaluation(
            unit=self.facts.unit,
            baselines=self.baselines(),
            margins=self.margins(),
            estimator="all-steps" if drawn == R * (T - 1) else "importance",
            limit=self.limit,
            chain=T,
            respaced=self.model.chain != T,
            variance=self.variance,
            decoder=self.model.decoder,
            n_images=len(self.chosen),
            n_held_out=len(self.gaussian) if self.speak_for_all else len(self.chosen),
            best=self.best,
            n_evaluations=self.bound.evaluations,
            seconds=round(self.seconds, 2),
            **unit,
            **more,
        )


PARTS = ("prior", "diffusion", "decoder")

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
    if noise is None:
        return Estimate(value, variance**0.5, None, None)
    return Estimate(value, variance**0.5, max(0.0, variance - noise) ** 0.5, noise**0.5)


def evaluate(
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
    if tolerance is not None and not tolerance > 0:
        raise OptionError(f"a tolerance is a positive standard error, received {tolerance:g}")
    facts, order = model.facts, shuffled(model, data, n)
    began = time.perf_counter()
    if like is None:
        pixels = baselines.independent_pixels(data, data.held_out)
        gaussian = baselines.full_gaussian(data, data.held_out)
    else:
        pixels, gaussian = like.independent_pixels, like.gaussian
    options, pilot = _chain(model, data, steps, variance, best, seed)
    grid = options["steps"]
    draws = None if draws is None or draws >= len(grid) - 1 else draws
    options |= {"draws": draws, "limit": limit}
    if draws is not None or tolerance is not None:
        options |= {"replicates": REPLICATES}
    probability = None
    if draws is not None and like is not None and torch.equal(like.bound.times, grid.flip(0)):
        probability = like.probability
    if draws is not None and probability is None:
        probability, asked = group.told(_learnt(model, data.held_out[order[:PILOT]], options, seed))
        pilot += asked
    options["probability"] = probability
    batch = max(1, min(BATCH, EVALUATIONS // (draws or len(grid))))

    def measure(first: int, last: int, again: int) -> Bound:
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
        chosen, seconds = order[: len(bound.nats)], time.perf_counter() - began
        how = (limit, options["variance"], best, probability)
        return Measured(facts, model, bound, chosen, pixels, gaussian, *how, seconds)

    done = len(order) if tolerance is None else min(FIRST, len(order))
    bound = measure(0, done, 0)
    while tolerance is not None and done < len(order):
        share = so_far(bound).likelihood().stderr / tolerance
        if share <= 1:
            break
        more = group.told(min(len(order), done + max(batch, math.ceil(done * (1.05 * share**2 - 1)))))
        bound, done = Bound.join([bound, measure(done, more, 0)]), more
    passes = 1
    while tolerance is not None and done == len(order) and passes < PASSES:
        found = so_far(bound).likelihood()
        noise, examples = found.stderr_noise or 0.0, found.stderr_examples or 0.0
        goal = (tolerance**2 - examples**2) ** 0.5 if examples < tolerance else tolerance
        if found.stderr <= tolerance or noise <= goal:
            break
        wanted = group.told(min(PASSES, max(passes + 1, math.ceil(passes * (noise / goal) ** 2))))
        bound = Bound.repeat([bound, *(measure(0, done, again) for again in range(passes, wanted))])
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
        chosen = torch.from_numpy(stream(1).permutation(len(data.train)))[:LEARNT]
        found = respace.residuals(
            model.denoiser,
            model.facts.scale.forward(data.train[chosen]).to(model.device),
            model.chain,
            rng=[stream(seed, i, -3) for i in range(len(chosen))],
            variance=variance,
            levels=model.facts.levels,
            decoder=model.decoder,
        )
        asked = len(chosen) * respace.DRAWS * (2 if model.facts.levels else 1)
        if analytic:
            options["denoiser"] = respace.Calibrated(model.denoiser, found)
        if best:
            options["steps"] = respace.best_chain(model.process, found, steps or 1).steps
    return options, asked


def shuffled(model: Diffusion, data: Data, n: int | None) -> Tensor:
    """Which held-out examples are measured: the first n of a fixed shuffle; None for all.

    Raises:
        DataError: if the data is not of the shape and levels that the model was made for, or has too few examples.
    """
    facts = model.facts
    if (data.facts.shape, data.facts.levels) != (facts.shape, facts.levels):
        raise DataError(
            f"{data.facts.name}: examples of shape {data.facts.shape} with {data.facts.levels} levels, but the model "
            f"was trained on shape {facts.shape} with {facts.levels}; name data like {facts.name}"
        )
    order = torch.from_numpy(stream(0).permutation(len(data.held_out)))[:n]
    if len(order) < 2:
        raise DataError(
            f"{data.facts.name}: a standard error needs at least 2 held-out examples, there are {len(order)}"
        )
    return order


def _learnt(model: Diffusion, x: Tensor, options: dict[str, Any], seed: int) -> tuple[Tensor, int]:
    """How often each middle term is to be drawn, from some terms of some examples; and the evaluations it took."""
    times = options["steps"].flip(0)
    first = likelihood.spans(model.process, times)
    more = {"draws": min(PILOT_DRAWS, len(times) - 1), "replicates": 1, "probability": first}
    pilot = model.bound(x, rng=[stream(seed, i, -1) for i in range(len(x))], **options | more)
    return pilot.importance(), pilot.evaluations
