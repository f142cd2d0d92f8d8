"""Families side by side on the same data: what every trained run reaches, over seeds, and which families differ.

Renew the published schema with: python -m ancestral.measure.compare > docs/comparison.schema.json
"""

import json
import math
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from ancestral.data import Data
from ancestral.diffusion.model import STEPS, Diffusion
from ancestral.gan.model import GAN
from ancestral.measure.evaluate import evaluate, gap
from ancestral.measure.measured import Measured
from ancestral.measure.metrics.intervals import LEVEL, around, student, welch
from ancestral.measure.quality import METRICS, Bench
from ancestral.measure.record import Interval, Kind, Record
from ancestral.training import checkpoint
from ancestral.training.recipes import Model

LIKELIHOOD, TIMED = 1000, 64
"""Held-out examples whose likelihood is measured, at most; and samples that are drawn at a time to see how fast."""

FEW, CHOOSING = 256, 128
"""Samples, and held-out examples, by which the checkpoints of a run are told apart, at most."""

EDITION = 2
"""To be raised when what is measured of a run changes, so that nothing older is taken for it."""

BETTER = {"likelihood": "less", "rate": "more"} | {name: metric.better for name, metric in METRICS.items()}
BETTER |= {"gap": None}
"""Which way each number is better."""

FACTORS = frozenset({"rate"})
"""What differs by factors: its means over seeds are geometric, and a difference of two is their ratio."""

SHARES = frozenset(name for name, metric in METRICS.items() if metric.share)


class Look(Record):
    """A checkpoint on the way: the energy distance of a few samples from examples that no other number is made with."""

    step: int
    energy: Interval


class Entrant(Record):
    """One run: what it cost and what it reached, at its end and at the best of its checkpoints.

    `numbers` are the negative log-likelihood or its bound, where the family has one, by how much training examples are
    likelier (`gap`), samples for each second, and what `quality.METRICS` says of samples. `best` is the same of samples
    from the checkpoint that is nearest by `looks`, and the likelihood of the one that has the best (`of_best`).
    """

    family: str
    seed: int
    run: str
    failed: str | None = Field(None, description="why there is no model at the end")
    seconds: float = Field(0.0, description="of training")
    steps: int = 0
    parameters: int = 0
    kind: Kind | None = Field(None, description="of the likelihood")
    evaluations: int = Field(1, description="of the network for each sample")
    numbers: dict[str, Interval] = Field(default_factory=dict)
    best: dict[str, Interval] = Field(default_factory=dict)
    looks: list[Look] = Field(default_factory=list)


class Verdict(Record):
    """A family against the one that is best by a number: the difference, and whether it can be told from none."""

    best: str
    difference: Interval | None = Field(
        None,
        description="this family's number minus that of the best; of a rate, divided by it; at a level that is divided "
        "among the families",
    )
    word: Literal["best", "no difference", "worse"]


class Row(Record):
    """A family over its seeds. Intervals hold for other seeds and held-out examples; of one run, for other examples."""

    family: str
    runs: int
    failed: int
    numbers: dict[str, Interval]
    between: dict[str, float] = Field(description="standard deviation between seeds, where there are two at least")
    best: dict[str, Interval]
    verdicts: dict[str, Verdict]
    seconds: float
    parameters: int
    evaluations: int


class Contest(Record):
    """The one object that `ancestral compare --json` prints."""

    data: str
    unit: Literal["bits/dim", "nats"]
    n: int = Field(description="samples of each model, and held-out examples that they stand against")
    minutes: float | None = Field(description="of training for each run; None for runs that were finished before")
    seeds: int
    features: str = Field(description="what distances are measured in")
    rows: list[Row]
    held_out: dict[str, Interval] = Field(description="held-out examples in the samples' place")
    training: dict[str, Interval] = Field(description="training examples in the samples' place")
    entrants: list[Entrant]
    definitions: dict[str, str] = Field(description="of the numbers")
    version: str
    command: str
    artifacts: dict[str, str]


def assess(
    run: Path,
    data: Data,
    bench: Bench,
    *,
    family: str,
    seed: int,
    progress: Callable[[str, int, int], None] | None = None,
) -> Entrant:
    """What a finished run reached.

    Args:
        run: its directory.
        data: that all are measured on.
        bench: what samples stand against.
        family: what the row is called.
        seed: of the run; that of samples and of the likelihood's noise is 0 for all.
        progress: told (what, done, of).
    """
    saved = checkpoint.open_run(run)
    model, record = saved.model, json.loads((checkpoint.run_of(run) / "run.json").read_bytes())
    numbers, best = {"rate": _rate(model)}, {}
    last = None if isinstance(model, GAN) else evaluate(model, data, n=LIKELIHOOD, progress=progress)
    tries = _tries(saved, data, bench, last, progress)
    if last:
        found = last.likelihood()
        numbers["likelihood"] = around(found.value, found.stderr)
        between = gap(model, data, last, progress=progress)
        numbers |= {"gap": between} if between else {}

        def again(k: int) -> Measured:
            return evaluate(checkpoint.load(tries[k].path), data, n=LIKELIHOOD, like=last, progress=progress)

        if len(tries) >= min(saved.setup.training.checkpoints, saved.step):  # none was left out for its held-out loss
            tried = [each.nats[:CHOOSING] for each in tries if each.nats is not None]
            best["likelihood"] = of_best(tried, again, last)
    numbers |= bench.of(model.sample(bench.n, rng=0))
    nearest = min(tries, key=lambda each: each.look.energy.value)
    if nearest.path != saved.path:
        best |= bench.of(checkpoint.load(nearest.path).sample(bench.n, rng=0))
    else:
        best |= {name: value for name, value in numbers.items() if name in METRICS}
    return Entrant(
        family=family,
        seed=seed,
        run=str(run),
        seconds=record.get("seconds", 0.0),
        steps=saved.step,
        parameters=sum(p.numel() for p in model.parameters()),
        kind=last.kind if last else None,
        evaluations=STEPS if isinstance(model, Diffusion) else 1,
        numbers=numbers,
        best=best,
        looks=[each.look for each in tries],
    )


def _rate(model: Model) -> Interval:
    """Samples for each second, from three draws."""
    took = []
    for _ in range(3):
        began = time.perf_counter()
        model.sample(TIMED, rng=0)
        took.append(TIMED / (time.perf_counter() - began))
    return Interval(value=median(took), stderr=stdev(took) / 3**0.5, low=min(took), high=max(took))


@dataclass(frozen=True)
class Try:
    """A checkpoint on the way, told by a little from the others of its run.

    Attributes:
        path: of it.
        look: at its samples.
        nats: of held-out examples, the first `CHOOSING` at least; None of a family without likelihood.
    """

    path: Path
    look: Look
    nats: Tensor | None


def _tries(
    saved: checkpoint.Saved,
    data: Data,
    bench: Bench,
    last: Measured | None,
    progress: Callable[[str, int, int], None] | None,
) -> list[Try]:
    """The checkpoints that a run kept on the way to the one that was saved, and that one, of which `last` is."""
    run, found = checkpoint.run_of(saved.path), []
    kept = [path for path in checkpoint.checkpoints(run) if 0 < checkpoint.step_of(path) < saved.step]
    for i, path in enumerate([*kept, saved.path]):
        each = saved if path == saved.path else checkpoint.open_run(path)
        look = Look(step=each.step, energy=bench.aside(each.model.sample(min(FEW, bench.n), rng=1)))
        nats = None
        if last:
            nats = last.nats if each is saved else evaluate(each.model, data, n=CHOOSING, like=last).nats
        found.append(Try(path, look, nats))
        if progress:
            progress(f"looking at checkpoints of {run.name}", i + 1, len(kept) + 1)
    return found


def of_best(tried: Sequence[Tensor], again: Callable[[int], Measured], last: Measured) -> Interval:
    """The likelihood that a run would have reached, had it stopped in time.

    One half of the examples chooses the checkpoint, by a few of them, and the other half measures it; then they change
    places. So all are measured, and none by a checkpoint that it has chosen.

    Args:
        tried: the first few examples' -log p by every checkpoint, in their order, each of shape (few,).
        again: measures the checkpoint of such an index on all that `last` was measured on.
        last: what was measured of the last of them.
    """
    half = torch.arange(len(last.chosen)) % 2
    measured, replicates = {len(tried) - 1: last}, last.replicates.clone()
    for own in (0, 1):
        best = min(range(len(tried)), key=lambda k: float(tried[k][half[: len(tried[k])] != own].mean()))
        if best not in measured:
            measured[best] = again(best)
        replicates[half == own] = measured[best].replicates[half == own]
    found = last.estimate(replicates)
    return around(last.in_unit(found.value), last.in_unit(found.stderr))


def rows(entrants: Sequence[Entrant]) -> list[Row]:
    """One row for each family, in the order in which they come."""
    families: dict[str, list[Entrant]] = defaultdict(list)
    for entrant in entrants:
        families[entrant.family].append(entrant)
    ended = {family: [each for each in runs if each.failed is None] for family, runs in families.items()}
    return [
        Row(
            family=family,
            runs=len(runs),
            failed=len(runs) - len(ended[family]),
            numbers=_means([each.numbers for each in ended[family]]),
            between=_between([each.numbers for each in ended[family]]),
            best=_means([each.best for each in ended[family]]),
            verdicts={name: verdict for name in BETTER if (verdict := _verdict(name, family, ended))},
            seconds=fmean([each.seconds for each in runs]),
            parameters=max(each.parameters for each in runs),
            evaluations=max(each.evaluations for each in runs),
        )
        for family, runs in families.items()
    ]


def over_seeds(each: Sequence[Interval], *, share: bool = False) -> Interval:
    """The mean of a number over seeds, with an interval for other seeds and other examples.

        (mean - low)^2 = (t_{K-1} s)^2 / K + mean_k (value_k - low_k)^2,   and high likewise

    for s the deviation between K seeds. The second part is of the examples, which all seeds are measured on and no
    number of seeds makes smaller; samples of the model are in both, so the interval is somewhat wide. That of a share
    ends at 0 and 1. A single seed says nothing of others: its interval is as it is.

    Reference: Zou & Donner (2008) for the sum of squared reaches.

    Example:
        >>> one = Interval(value=1.0, stderr=0.1, low=0.8, high=1.3)
        >>> found = over_seeds([one, one])
        >>> round(found.low, 9), round(found.high, 9)
        (0.8, 1.3)
    """
    K = len(each)
    if K == 1:
        return each[0]
    values = [one.value for one in each]
    mean, between, within = fmean(values), stdev(values) ** 2 / K, fmean(one.stderr**2 for one in each)
    of_seeds = student(K - 1) ** 2 * between
    low = mean - (of_seeds + fmean((one.value - one.low) ** 2 for one in each)) ** 0.5
    high = mean + (of_seeds + fmean((one.high - one.value) ** 2 for one in each)) ** 0.5
    if share:
        low, high = max(low, 0.0), min(high, 1.0)
    return Interval(value=mean, stderr=(between + within) ** 0.5, low=low, high=high)


def difference(a: Sequence[Interval], b: Sequence[Interval], level: float = LEVEL) -> Interval:
    """The mean over seeds of one family minus that of another, on these examples.

    With seeds enough it is Welch's, from the deviations between seeds alone: what the examples add to both alike goes
    out of the difference, and what they add to one is not in the interval. With a single seed on either side, or none
    that differ, both errors are taken to be independent: that is wide for the examples, and nothing of other seeds.

    Args:
        a: of one family, for each seed.
        b: of the other.
        level: of the interval.
    """
    of = fmean(one.value for one in a) - fmean(one.value for one in b)
    parts = [(stdev([one.value for one in each]) ** 2 / len(each), len(each) - 1) for each in (a, b) if len(each) > 1]
    if len(parts) < 2 or not any(variance for variance, _ in parts):
        return around(of, (over_seeds(a).stderr ** 2 + over_seeds(b).stderr ** 2) ** 0.5, level=level)
    return welch(of, *parts, level=level)


def _means(each: Sequence[dict[str, Interval]]) -> dict[str, Interval]:
    return {name: _mean(name, [numbers[name] for numbers in each]) for name in _common(each)}


def _common(each: Sequence[dict[str, Interval]]) -> list[str]:
    """The numbers that all runs have."""
    return [name for name in each[0] if all(name in numbers for numbers in each)] if each else []


def _mean(name: str, each: Sequence[Interval]) -> Interval:
    """Of a number over seeds."""
    if name in FACTORS:
        return exponential(over_seeds([logarithm(one) for one in each]))
    return over_seeds(each, share=name in SHARES)


def logarithm(one: Interval) -> Interval:
    """Of what is positive, by the delta method."""
    return around(math.log(one.value), one.stderr / one.value)


def exponential(one: Interval) -> Interval:
    """What `logarithm` takes back: its interval reaches further up than down, and not to zero.

    Example:
        >>> one = exponential(around(0.0, 0.5))
        >>> round(one.value, 2), round(one.low, 2), round(one.high, 2)
        (1.0, 0.38, 2.66)
    """
    value = math.exp(one.value)
    return Interval(value=value, stderr=value * one.stderr, low=math.exp(one.low), high=math.exp(one.high))


def _between(each: Sequence[dict[str, Interval]]) -> dict[str, float]:
    names = _common(each) if len(each) > 1 else ()
    return {name: stdev([numbers[name].value for numbers in each]) for name in names}


def _verdict(name: str, family: str, ended: dict[str, list[Entrant]]) -> Verdict | None:
    """How a family stands to the best by a number; None if it has none, or more of it is neither better nor worse.

    The best is picked from all, so that one of many that are alike would often be called worse: what is left of the
    level is divided among the others.

    Reference: Dunn (1961) for the division.
    """
    sign = {"less": 1.0, "more": -1.0}.get(BETTER[name] or "")
    found = {each: numbers for each, runs in ended.items() if (numbers := _to_compare(name, runs))}
    if sign is None or family not in found:
        return None
    best = min(found, key=lambda each: sign * fmean(one.value for one in found[each]))
    if best == family:
        return Verdict(best=best, word="best")
    apart = difference(found[family], found[best], 1 - (1 - LEVEL) / (len(found) - 1))
    word: Literal["no difference", "worse"] = "no difference" if apart.low <= 0 <= apart.high else "worse"
    return Verdict(best=best, difference=exponential(apart) if name in FACTORS else apart, word=word)


def _to_compare(name: str, runs: Sequence[Entrant]) -> list[Interval]:
    """A number of each run that has it; of what differs by factors, its logarithm."""
    found = [run.numbers[name] for run in runs if name in run.numbers]
    return [logarithm(one) for one in found] if name in FACTORS else found


if __name__ == "__main__":
    print(json.dumps(Contest.model_json_schema(), indent=2))  # noqa: T201
