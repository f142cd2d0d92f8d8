"""How samples stand to data, in one table of numbers, with no likelihood asked for.

Each number stands beside that of held-out examples in the samples' place, which is what good looks like, and of
training examples in their place, which is what copying looks like. All sets are of one size, so that none is nearer for
being larger.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from ancestral.data import Data
from ancestral.errors import DataError
from ancestral.measure.features import Features, named
from ancestral.measure.metrics import copying, coverage, distances, twosample
from ancestral.measure.metrics.intervals import around, share
from ancestral.measure.record import Interval
from ancestral.rng import stream

SAMPLES, ENOUGH = 1000, 120
"""Examples in each set, at most by default, and at least."""

LEARNT = 2**27
"""Values of training examples among which copies are looked for, 1 GiB at most: of more, every k-th example is left."""

Better = Literal["less", "more"]
Standing = dict[str, Interval]


@dataclass(frozen=True, eq=False)
class Sets:
    """Samples and what they are held against, float64, shape (n, D).

    Attributes:
        raw: samples as they are, shape (n, *shape).
        learnt: all training examples as they are.
        x: samples, in the model's units.
        held_out: examples that were never learnt from.
        training: examples that were, all of `LEARNT` values, shape (N, D).
        features: of samples and of held-out examples.
        labels: that the features' network tells of both, if it tells classes.
        inception: whether the features are those of FID.
    """

    raw: Tensor
    learnt: Tensor
    x: Tensor
    held_out: Tensor
    training: Tensor
    features: tuple[Tensor, Tensor]
    labels: tuple[Tensor, Tensor] | None
    inception: bool = False

    @cached_property
    def near(self) -> coverage.Neighbourhoods:
        """Samples and held-out examples by whose neighbours they are."""
        return coverage.neighbourhoods(*self.features)


@dataclass(frozen=True)
class Metric:
    """A number about samples.

    Attributes:
        label: what it is called.
        group: what it is about: "Distance", "Coverage" or "Memorisation".
        better: which way it is better, or None where it is to be read beside those of real data.
        says: its definition, in a sentence.
        of: from the sets; None of sets that cannot be asked.
        share: whether it is one, from 0 to 1.
    """

    label: str
    group: str
    better: Better | None
    says: str
    of: Callable[[Sets], Interval | None]
    share: bool = False


def _balance(sets: Sets) -> Interval | None:
    if sets.labels is None:
        return None
    labels, real = sets.labels
    classes = 1 + int(torch.cat(sets.labels).max())
    return coverage.class_balance(labels, real, classes=classes, rng=stream(0))


METRICS = {
    "energy": Metric(
        "energy distance²",
        "Distance",
        "less",
        "2 E|X - Y| - E|X - X'| - E|Y - Y'| between samples and held-out examples, unbiased: 0 in expectation where "
        "the laws are one (Székely & Rizzo 2013).",
        lambda s: distances.energy(*s.features),
    ),
    "frechet": Metric(
        "FD∞",
        "Distance",
        "less",
        "The squared Fréchet distance between Gaussians of the same mean and covariance, extrapolated to infinitely "
        "many samples (Heusel et al. 2017; Chong & Forsyth 2020).",
        lambda s: distances.frechet_extrapolated(*s.features) if len(s.x) >= 2 * s.features[0].shape[1] else None,
    ),
    "fid": Metric(
        "FID",
        "Distance",
        "less",
        "The squared Fréchet distance between Gaussians of the same mean and covariance, in features of Inception-v3: "
        "too large by about c/N, so only those of equal N can be compared (Heusel et al. 2017).",
        lambda s: distances.frechet(*s.features) if s.inception else None,
    ),
    "kid": Metric(
        "kernel distance²",
        "Distance",
        "less",
        "The squared mean discrepancy with the kernel (a.b / D + 1)^3, unbiased (Bińkowski et al. 2018).",
        lambda s: distances.kid(*s.features),
    ),
    "sliced": Metric(
        "sliced Wasserstein²",
        "Distance",
        "less",
        "The squared 2-Wasserstein distance of projections, averaged over 128 directions, without its noise.",
        lambda s: distances.sliced(*s.features, rng=stream(0)),
    ),
    "told-apart": Metric(
        "told from data",
        "Distance",
        "less",
        "How often a classifier that was fitted on half of samples and held-out examples is right on the other half: "
        "1/2 where it cannot tell (Lopez-Paz & Oquab 2017).",
        lambda s: twosample.classifier(*s.features, rng=stream(0)).statistic,
        share=True,
    ),
    "precision": Metric(
        "precision",
        "Coverage",
        "more",
        "The share of samples within reach of a held-out example, which is as far as its fifth neighbour "
        "(Kynkäänniemi et al. 2019).",
        lambda s: s.near.precision,
        share=True,
    ),
    "density": Metric(
        "density",
        "Coverage",
        None,
        "Of how many held-out examples, by five, a sample is within reach: about 1 of real data, more where samples "
        "crowd (Naeem et al. 2020).",
        lambda s: s.near.density,
    ),
    "recall": Metric(
        "recall",
        "Coverage",
        "more",
        "The share of held-out examples within reach of a sample (Kynkäänniemi et al. 2019).",
        lambda s: s.near.recall,
        share=True,
    ),
    "coverage": Metric(
        "coverage",
        "Coverage",
        "more",
        "The share of held-out examples with a sample within their reach (Naeem et al. 2020).",
        lambda s: s.near.coverage,
        share=True,
    ),
    "vendi": Metric(
        "Vendi score",
        "Coverage",
        None,
        "How many samples, each unlike all others, would be as diverse as these (Friedman & Dieng 2023).",
        lambda s: coverage.vendi(s.features[0]),
    ),
    "classes": Metric(
        "classes out of balance",
        "Coverage",
        "less",
        "The total variation between the shares of classes among samples and among held-out examples, both as the "
        "features' network tells them: the share of samples that would have to be of another class.",
        _balance,
        share=True,
    ),
    "duplicates": Metric(
        "exact copies",
        "Memorisation",
        None,
        "The share of samples that equal a training example in every value.",
        lambda s: share(len(copying.duplicates(s.raw, s.learnt)), len(s.raw)),
        share=True,
    ),
    "ratio": Metric(
        "neighbour ratio",
        "Memorisation",
        None,
        "The distance from a sample to the nearest training example by that to the second, averaged: 0 of copies "
        "(Lowe 2004).",
        lambda s: copying.neighbour_ratio(s.x, s.training),
    ),
    "authentic": Metric(
        "authenticity",
        "Memorisation",
        None,
        "The share of samples that are farther from their nearest training example than that is from its own nearest "
        "(Alaa et al. 2022).",
        lambda s: copying.authenticity(s.x, s.training),
        share=True,
    ),
    "data-copying": Metric(
        "C_T",
        "Memorisation",
        None,
        "Whether samples rank nearer to training examples than held-out examples do, in standard deviations: below -3 "
        "is copying (Meehan et al. 2020).",
        lambda s: around(copying.data_copying(s.x, s.training, s.held_out, rng=stream(0)).z, 1.0),
    ),
}


OF_INCEPTION = {"frechet": "FID∞", "kid": "KID"}
"""What distances are called in the features of Inception-v3, and in no others."""


def called(name: str, features: str) -> str:
    """What a number is called, in features of such a name.

    Example:
        >>> called("kid", "digits-inception@1a2b3c4d"), called("kid", "digits-encoder@1a2b3c4d")
        ('KID', 'kernel distance²')
    """
    kind = features.rpartition("@")[0].rpartition("-")[2]
    return OF_INCEPTION.get(name, METRICS[name].label) if kind == "inception" else METRICS[name].label


class Bench:
    """Sets of held-out and training examples that samples of any model are held against, the same for all.

    Args:
        data: whose held-out split is divided in two: what is compared with, and what stands in the samples' place.
        n: examples in each set, at most; half of the held-out examples at most.
        features: in which distances are measured, a name as `features.named` knows it: by default "encoder" of images
            and the values of anything else. Copying is seen in the model's units.
        seed: of the choice of examples.

    Raises:
        DataError: if there are too few examples.
        OptionError: if there are no such features.

    Example:
        >>> from ancestral.data import load
        >>> bench = Bench(load("digits"))
        >>> bench.n, bench.training["ratio"].value
        (160, 0.0)
    """

    def __init__(self, data: Data, *, n: int = SAMPLES, features: str | None = None, seed: int = 0) -> None:
        self.data, self.n = data, min(n, len(data.held_out) // 2, len(data.train))
        if self.n < ENOUGH:
            raise DataError(
                f"{data.facts.name}: comparing samples takes {ENOUGH} of them, {2 * ENOUGH} held-out examples and "
                f"{ENOUGH} to learn from; received {n}, {len(data.held_out)} and {len(data.train)}"
            )
        order = torch.from_numpy(stream(seed, 1).permutation(len(data.held_out)))
        learnt = torch.from_numpy(stream(seed, 2).permutation(len(data.train)))
        self._against, self._other = data.held_out[order[: self.n]], data.held_out[order[self.n : 2 * self.n]]
        self._training = data.train[learnt[: self.n]]
        self._features: Features = named(features or ("encoder" if data.facts.is_image else "pixels"), data)

    @property
    def features(self) -> str:
        """What distances are measured in, with the hash of what computes it."""
        return self._features.name

    def of(self, samples: Tensor) -> Standing:
        """Every number about n samples in the user's units."""
        features, against = self._features, self._against
        sets = Sets(
            raw=samples,
            learnt=self.data.train,
            x=self._vectors(samples),
            held_out=self._vectors(against),
            training=self._learnt,
            features=(features(samples), self._seen),
            labels=(features.labels(samples), features.labels(against)) if features.classify else None,
            inception=features.kind == "inception",
        )
        return {name: found for name, metric in METRICS.items() if (found := metric.of(sets))}

    @cached_property
    def _seen(self) -> Tensor:
        return self._features(self._against)

    def aside(self, samples: Tensor) -> Interval:
        """The energy distance from examples that no other number is made with, to choose between models by."""
        return distances.energy(self._features(samples), self._features(self._other))

    def suspects(self, samples: Tensor, k: int) -> Tensor:
        """The k samples nearest to any training example, each followed by that one, shape (2 k, *shape)."""
        pairs = copying.suspects(self._vectors(samples), self._learnt, k=k)
        return torch.stack([samples[pairs.samples], self._among[pairs.training]], 1).flatten(0, 1)

    @property
    def _among(self) -> Tensor:
        """Training examples among which copies are looked for."""
        values = self.data.train[0].numel() * len(self.data.train)
        return self.data.train[:: -(-values // LEARNT)]

    @cached_property
    def _learnt(self) -> Tensor:
        return self._vectors(self._among)

    @cached_property
    def held_out(self) -> Standing:
        """The numbers of held-out examples in the samples' place."""
        return self.of(self._other)

    @cached_property
    def training(self) -> Standing:
        """The numbers of training examples in the samples' place."""
        return self.of(self._training)

    def _vectors(self, raw: Tensor) -> Tensor:
        return self.data.facts.scale.forward(raw, dtype=torch.float64).flatten(1)
