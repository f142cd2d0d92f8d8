"""Whether samples copy what was learnt from: each number beside what it is for samples that are new.

copied            share nearer to training than to held-out examples     1/2 of what is new, 1 of copies
authenticity      share that is no near copy of its nearest example      high of what is new, 0 of copies
data_copying      C_T, a rank test against held-out examples             0 of what is new, below -3 of copies
neighbour_ratio   nearest distance by that to the second                 near 1 of what is new, 0 of copies
duplicates        which samples equal an example, byte by byte
suspects          the pairs of a sample and an example that are nearest
likelihood_gap    how much likelier what was learnt is                    0 of a model that does not memorise
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ancestral.errors import OptionError
from ancestral.measure.metrics import intervals
from ancestral.measure.metrics.neighbours import nearest
from ancestral.measure.record import Interval
from ancestral.rng import Rng

ENOUGH = 5
"""Samples and held-out examples that a cell needs in order to speak."""

ROUNDS = 20
"""Of Lloyd's algorithm."""


def copied(x: Tensor, training: Tensor, held_out: Tensor) -> Interval:
    """The share of samples that are nearer to a training example than to any of as many held-out ones; ties are half.

    One half of what is new, all of what was copied. The interval is over the samples, for these examples.

    Args:
        x: samples, float64, shape (n, D).
        training: examples that were learnt from, shape (m, D).
        held_out: as many that were not, shape (m, D).

    Raises:
        OptionError: if there are more of one than of the other, whose examples would be nearer for being more.

    Example:
        >>> x = torch.arange(6, dtype=torch.float64)[:, None]
        >>> copied(x, x, x + 0.5).value, copied(x, x - 0.5, x + 0.5).value
        (1.0, 0.5)
    """
    if len(training) != len(held_out):
        raise OptionError(
            f"received {len(training)} training and {len(held_out)} held-out examples: give as many of each"
        )
    to_training, to_held_out = (nearest(x, each)[0][:, 0] for each in (training, held_out))
    nearer = (to_training < to_held_out).double() + 0.5 * (to_training == to_held_out).double()
    stderr, w = float(nearer.std() / len(x) ** 0.5), intervals.student(len(x) - 1) ** 2 / len(x)
    return intervals.of_share(float(nearer.mean()), stderr, w)


def authenticity(x: Tensor, training: Tensor) -> Interval:
    """The share of samples that are farther from their nearest training example than that is from its own nearest.

        d(x, t) > min over t' != t of d(t, t'),   t the training example nearest to x

    The interval is the exact binomial one over the samples, for these training examples. Read it beside the share of
    held-out examples: of a law in few dimensions about half of what is new is authentic.

    Reference: Alaa et al. (2022), section 4.3.

    Args:
        x: samples, float64, shape (n, D).
        training: examples that were learnt from, shape (m, D), 2 at least.

    Raises:
        OptionError: if there are too few examples, or of different dimensions.

    Example:
        >>> training = torch.arange(4, dtype=torch.float64)[:, None]
        >>> authenticity(torch.tensor([[0.1], [9.0]], dtype=torch.float64), training).value
        0.5
    """
    distance, index = (each[:, 0] for each in nearest(x, training))
    near, which = torch.unique(index, return_inverse=True)
    own = nearest(training[near], training, k=2)[0][:, 1]  # the first is the example itself, or equals it
    return intervals.share(int((distance > own[which]).sum()), len(x))


def neighbour_ratio(x: Tensor, training: Tensor) -> Interval:
    """The distance to the nearest training example by that to the second nearest, averaged over samples.

    0 of a copy of one example, and 1 where two are as near. A sample at no distance from both counts as a copy.

    Reference: Lowe (2004), section 7.1, for the ratio.

    Args:
        x: samples, float64, shape (n, D).
        training: examples that were learnt from, shape (m, D), 2 at least.

    Raises:
        OptionError: if there are too few examples, or of different dimensions.

    Example:
        >>> training = torch.tensor([[0.0], [4.0]], dtype=torch.float64)
        >>> neighbour_ratio(torch.tensor([[0.0], [1.0]], dtype=torch.float64), training).value
        0.16666666666666666
    """
    first, second = nearest(x, training, k=2)[0].T
    return intervals.mean(first / second.clamp(min=torch.finfo(torch.float64).tiny))


@dataclass(frozen=True)
class Copying:
    """A test of data-copying.

    Attributes:
        C_T: the mean over cells of their z, by their share of the held-out examples: below 0 if samples are nearer to
            what was learnt than held-out examples are, above if they are farther.
        z: C_T by its standard deviation under the hypothesis that the law of distances is one; with one cell, C_T.
        cells: that had enough of both to speak.
    """

    C_T: float
    z: float
    cells: int


def data_copying(x: Tensor, training: Tensor, held_out: Tensor, *, rng: Rng, cells: int = 1) -> Copying:
    """C_T: whether distances to the nearest training example rank lower for samples than for held-out examples.

        z = (U - n m / 2) / (n m (n + m + 1 - sum_t (t^3 - t) / (n + m)(n + m - 1)) / 12)^1/2

    in each cell of a division of the training examples by k-means, with U the pairs in which the sample is farther and
    t the numbers of equal distances. Given the training examples, z is standard normal if samples are of the law of
    held-out examples; below -3 is what its authors call copying.

    Reference: Meehan et al. (2020), section 4; Mann & Whitney (1947) for U; Lehmann (1975), chapter 1, for ties.

    Args:
        x: samples, float64, shape (n, D).
        training: examples that were learnt from, shape (k, D).
        held_out: examples that were not, shape (m, D).
        rng: of the first centres of the cells, one generator.
        cells: how many; in 1, copies in one region may be made up for by what is too far in another.

    Raises:
        OptionError: if no cell has `ENOUGH` of both, or the sets are of different dimensions.

    Example:
        >>> from ancestral.rng import stream
        >>> held_out, training, x = [torch.from_numpy(stream(s).normal(size=(200, 2))) for s in range(3)]
        >>> data_copying(x, training, held_out, rng=stream(3)).z > -3
        True
        >>> data_copying(training, training, held_out, rng=stream(3)).z < -3
        True
    """
    centres = _centres(training, cells, rng)
    of_x, of_held_out = (nearest(each, centres)[1][:, 0] for each in (x, held_out))
    to_x, to_held_out = (nearest(each, training)[0][:, 0] for each in (x, held_out))
    z, weight = [], []
    for cell in range(len(centres)):
        a, b = to_x[of_x == cell], to_held_out[of_held_out == cell]
        if min(len(a), len(b)) >= ENOUGH:
            z.append(_mann_whitney(a, b))
            weight.append(len(b))
    if not z:
        raise OptionError(f"no cell has {ENOUGH} samples and {ENOUGH} held-out examples: give more, or fewer cells")
    w = torch.tensor(weight, dtype=torch.float64)
    w = w / w.sum()
    C_T = float(w @ torch.tensor(z, dtype=torch.float64))
    return Copying(C_T, C_T / float(w.norm()), len(z))


def duplicates(raw: Tensor, training: Tensor) -> Tensor:
    """Which samples equal a training example, byte by byte, and the first that each equals.

    Args:
        raw: samples in the user's units, shape (n, *shape).
        training: examples that were learnt from, of the same type, shape (m, *shape).

    Returns:
        Pairs of indices (sample, example), int64, shape (k, 2).

    Raises:
        OptionError: if the two differ in type or shape.

    Example:
        >>> duplicates(torch.tensor([[7, 8], [1, 2]]), torch.tensor([[0, 0], [1, 2], [1, 2]]))
        tensor([[1, 1]])
    """
    if raw.dtype != training.dtype or raw.shape[1:] != training.shape[1:]:
        raise OptionError(
            f"received {raw.dtype} of shape {tuple(raw.shape)} and {training.dtype} of shape {tuple(training.shape)}: "
            "bytes are compared of equal types and shapes"
        )
    first: dict[bytes, int] = {}
    for j, example in enumerate(training.numpy()):
        first.setdefault(np.ascontiguousarray(example).tobytes(), j)
    found = [(i, first.get(np.ascontiguousarray(example).tobytes())) for i, example in enumerate(raw.numpy())]
    return torch.tensor([pair for pair in found if pair[1] is not None], dtype=torch.int64).reshape(-1, 2)


@dataclass(frozen=True, eq=False)
class Pairs:
    """Pairs of a sample and the training example nearest to it, most suspicious first.

    Attributes:
        samples: indices, shape (k,).
        training: indices, shape (k,).
        distance: between the two, in the unit of the features, shape (k,).
        relative: by the distance from the training example to its own nearest: below 1 is not authentic.
    """

    samples: Tensor
    training: Tensor
    distance: Tensor
    relative: Tensor


def suspects(x: Tensor, training: Tensor, *, k: int = 10) -> Pairs:
    """The k pairs of a sample and its nearest training example that are nearest, to be looked at.

    Args:
        x: samples, float64, shape (n, D).
        training: examples that were learnt from, shape (m, D), 2 at least.
        k: how many; all if there are fewer samples.

    Example:
        >>> training = torch.arange(4, dtype=torch.float64)[:, None]
        >>> found = suspects(training[:2] + 0.25, training, k=1)
        >>> found.samples.item(), found.training.item(), found.relative.item()
        (0, 0, 0.25)
    """
    distance, index = (each[:, 0] for each in nearest(x, training))
    order = distance.argsort(stable=True)[:k]
    own = nearest(training[index[order]], training, k=2)[0][:, 1]
    relative = distance[order] / own.clamp(min=torch.finfo(torch.float64).tiny)
    return Pairs(order, index[order], distance[order], relative)


def likelihood_gap(training: Tensor, held_out: Tensor) -> Interval:
    """Mean negative log-likelihood of held-out examples less that of training ones: above 0 is what was memorised.

    The interval is Welch's, of two independent means.

    Args:
        training: of each example, in any unit, shape (n,), 2 at least.
        held_out: in the same unit, shape (m,), 2 at least.

    Raises:
        OptionError: if there are fewer than two of either.

    Example:
        >>> likelihood_gap(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])).value
        2.0
    """
    a, b = intervals.mean(training.double()), intervals.mean(held_out.double())
    return intervals.welch(b.value - a.value, (a.stderr**2, len(training) - 1), (b.stderr**2, len(held_out) - 1))


def _mann_whitney(a: Tensor, b: Tensor) -> float:
    """The rank-sum z of a against b, with ties: above 0 where a is larger; 0 where all are equal."""
    n, m = len(a), len(b)
    _, which, ties = torch.unique(torch.cat([a, b]), return_inverse=True, return_counts=True)
    rank = (ties.cumsum(0) - (ties - 1) / 2).double()[which]
    U = float(rank[:n].sum()) - n * (n + 1) / 2
    t, N = ties.double(), n + m
    variance = n * m / 12 * (N + 1 - float((t**3 - t).sum()) / (N * (N - 1)))
    return (U - n * m / 2) / variance**0.5 if variance > 0 else 0.0


def _centres(x: Tensor, k: int, rng: Rng) -> Tensor:
    """Centres of k cells, by `ROUNDS` rounds from different examples; a cell that empties keeps its centre."""
    if not isinstance(rng, np.random.Generator) or not 1 <= k <= len(x):
        raise OptionError(f"received {k} cells of {len(x)} examples: give 1 to {len(x)}, and one generator as rng")
    centres = x[torch.from_numpy(rng.permutation(len(x))[:k])].clone()
    for _ in range(ROUNDS if k > 1 else 1):
        which = nearest(x, centres)[1][:, 0]
        size = torch.bincount(which, minlength=k)
        total = torch.zeros_like(centres).index_add_(0, which, x)
        centres = torch.where(size[:, None] > 0, total / size.clamp(min=1)[:, None], centres)
    return centres
