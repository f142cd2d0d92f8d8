"""How much of the data samples reach and how much of what they reach is data: fidelity and diversity apart.

neighbourhoods   precision, recall, density and coverage, by balls that reach to the k-th neighbour
vendi            how many different samples a set is worth
class_balance    how far the shares of classes are from those of the data
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ancestral.errors import OptionError
from ancestral.measure.metrics.intervals import LEVEL, around, blocks, of_share, student
from ancestral.measure.metrics.neighbours import by_rows
from ancestral.measure.record import Interval
from ancestral.rng import stream

PART, FREEDOM = 500, 20
"""Examples of a part of a set, at least where there are two such parts, and degrees of freedom, at least: divisions of
both sets in parts tell the standard errors of what is made of neighbours."""

BLOCKS = 10
"""Blocks of samples that are left out in turn, from which that of the Vendi score is told."""

DRAWS = 1000
"""Of shares of classes, from which their interval is told."""


@dataclass(frozen=True)
class Neighbourhoods:
    """What balls around examples hold of samples, and balls around samples of examples.

    Attributes:
        precision: share of samples in the ball of any example.
        recall: share of examples in the ball of any sample.
        density: examples in whose balls a sample is, by k; 1 in expectation for equal laws.
        coverage: share of examples in whose ball any sample is; see `expected_coverage`.
    """

    precision: Interval
    recall: Interval
    density: Interval
    coverage: Interval


def neighbourhoods(x: Tensor, y: Tensor, *, k: int = 5) -> Neighbourhoods:
    """Precision, recall, density and coverage, with the ball of a point reaching to the k-th neighbour in its set.

        precision = mean_i [any_j d(x_i, y_j) <= r(y_j)],       density  = mean_i sum_j [d(x_i, y_j) <= r(y_j)] / k
        recall    = mean_j [any_i d(x_i, y_j) <= r(x_i)],       coverage = mean_j [min_i d(x_i, y_j) <= r(y_j)]

    They depend on n and m: compare sets of equal sizes. The intervals are over both sets. Whether points are within
    reach depends on their neighbours, so n of them are worth fewer trials. How much fewer is told by dividing both sets
    at random in G parts, two or more, again and again: of a share that is S_g in part g, and S on average,

        stderr^2 = F p (1 - p) / n,   F = max(mean Var_g S_g / (S (1 - S) / (n / G)), 1)

    and the interval is Wilson's of n / F trials (m / F of examples). Of the density, stderr^2 = mean Var_g S_g / G.

    Reference: Kynkäänniemi et al. (2019), eqs. 1-3; Naeem et al. (2020), eqs. 4 and 6; Kish (1965), section 8.2, for F,
    the effect of the design; Wolter (2007), chapter 2, for parts at random.

    Args:
        x: samples, float64, shape (n, D).
        y: examples of the data, shape (m, D).
        k: of the neighbour to which a ball reaches.

    Raises:
        OptionError: if there are fewer than 4 (k + 1) of either, or of different dimensions.

    Example:
        >>> y = torch.linspace(0, 1, 100, dtype=torch.float64)[:, None]
        >>> found = neighbourhoods(y / 2, y)
        >>> found.precision.value, 0.5 < found.coverage.value < 0.6
        (1.0, True)
    """
    if k < 1 or min(len(x), len(y)) < 4 * (k + 1):
        raise OptionError(
            f"received {len(x)} samples and {len(y)} examples for neighbour {k}: give 4 (k + 1) of each at least"
        )
    rng, G, divisions = stream(len(x), len(y)), max(2, min(len(x), len(y)) // PART), []
    for _ in range(-(-FREEDOM // (G - 1))):
        parts = (torch.from_numpy(rng.permutation(len(z))).tensor_split(G) for z in (x, y))
        divisions.append(torch.stack([_standing(x[a], y[b], k) for a, b in zip(*parts, strict=True)]))
    of_parts, value = torch.stack(divisions), _standing(x, y, k)
    variance = of_parts.var(1).mean(0)
    trials, S = torch.tensor([len(x), len(y), len(y)]), of_parts[..., :3].mean((0, 1))
    F = torch.nan_to_num(variance[:3] / (S * (1 - S) / (trials / G)), nan=1.0).clamp(min=1)
    shares = [
        of_share(p, (f * p * (1 - p) / n) ** 0.5, student(FREEDOM) ** 2 * f / n)
        for p, f, n in zip(value[:3].tolist(), F.tolist(), trials.tolist(), strict=True)
    ]
    density = around(float(value[3]), float(variance[3] / G) ** 0.5, FREEDOM)
    return Neighbourhoods(precision=shares[0], recall=shares[1], density=density, coverage=shares[2])


def expected_coverage(n: int, m: int, k: int = 5) -> float:
    """The coverage of m examples by n samples of the same law: that not all of the k nearest of both are examples.

        1 - prod_{i<k} (m - 1 - i) / (n + m - 1 - i)

    Reference: Naeem et al. (2020), appendix A.

    Example:
        >>> round(expected_coverage(1000, 1000), 3)
        0.969
    """
    i = np.arange(k)
    return float(1 - np.prod((m - 1 - i) / (n + m - 1 - i)))


def vendi(x: Tensor) -> Interval:
    """The Vendi score: how many samples, each unlike all others, would be as diverse as these.

        exp(-sum_i l_i log l_i),   l_i the eigenvalues of K / n, K_ij = x_i.x_j / |x_i| |x_j|

    1 where all are alike, at most the number of features or of samples. Of few samples it is too small. The interval is
    over the samples.

    Reference: Friedman & Dieng (2023), definition 3.1.

    Args:
        x: features, float64, shape (n, D).

    Raises:
        OptionError: if there are fewer than `BLOCKS` samples.

    Example:
        >>> round(vendi(torch.eye(3, dtype=torch.float64).repeat(20, 1)).value, 9)
        3.0
    """
    if x.ndim != 2 or len(x) < BLOCKS:
        raise OptionError(f"received features of shape {tuple(x.shape)}: give (n, D), {BLOCKS} samples at least")
    tiny = torch.finfo(torch.float64).tiny
    second = torch.zeros(BLOCKS, x.shape[1], x.shape[1], dtype=torch.float64)
    for b, rows in enumerate(blocks(len(x), BLOCKS)):
        unit = x[rows] / x[rows].norm(dim=1, keepdim=True).clamp(min=tiny)
        second[b] = unit.T @ unit
    total = second.sum(0)

    def score(moment: Tensor) -> Tensor:
        eigenvalues = torch.linalg.eigvalsh(moment / moment.trace().clamp(min=tiny)).clamp(min=0)
        return torch.special.entr(eigenvalues).sum().exp()

    return _jackknife(torch.stack([score(total), *(score(total - part) for part in second)]))


def class_balance(labels: Tensor, real: Tensor, *, classes: int, rng: np.random.Generator) -> Interval:
    """The total variation between the shares of classes among samples and among the data.

        TV = 1/2 sum_c |p_c - q_c|

    The share of samples that would have to change class; 0.2 where two of ten equal classes are left out. The estimate
    is too large where shares are equal, about (C / pi)^1/2 (1/n + 1/m)^1/2 / 2^1/2 for C equal classes: 0 is in the
    interval unless TV exceeds what 95% of redrawn shares differ by. Let one classifier tell the labels of both, so that
    its errors are in both.

    Reference: Devroye & Lugosi (2001), theorem 5.1, for total variation; Efron & Tibshirani (1993), section 6.5, for
    redrawing.

    Args:
        labels: of the samples, int64, shape (n,).
        real: of the data, shape (m,).
        classes: C.
        rng: of the redrawn shares.

    Raises:
        OptionError: if there are no labels, or labels that are no class.

    Example:
        >>> from ancestral.rng import stream
        >>> real = torch.arange(1000) % 10
        >>> round(class_balance(real[real < 8], real, classes=10, rng=stream(0)).value, 9)
        0.2
    """
    shares = []
    for each in (labels, real):
        if len(each) == 0 or int(each.min()) < 0 or int(each.max()) >= classes:
            raise OptionError(f"received {len(each)} labels: give at least one, from 0 to {classes - 1}")
        shares.append(torch.bincount(each, minlength=classes).double().numpy() / len(each))
    sizes = (len(labels), len(real))
    p, q = shares
    value = float(np.abs(p - q).sum() / 2)
    noise_p, noise_q = (
        rng.multinomial(n, share, size=DRAWS) / n - share for n, share in zip(sizes, shares, strict=True)
    )
    reach = float(np.quantile(np.abs(noise_p - noise_q).sum(1) / 2, LEVEL))
    sign = np.sign(p - q)
    variance = sum((share @ sign**2 - (share @ sign) ** 2) / n for n, share in zip(sizes, shares, strict=True))
    stderr = float(max(variance, 0.0)) ** 0.5 / 2
    return Interval(value=value, stderr=stderr, low=max(value - reach, 0.0), high=min(value + reach, 1.0))


def _standing(x: Tensor, y: Tensor, k: int) -> Tensor:
    """Precision, recall, coverage and density, shape (4,)."""
    reach_x, reach_y = _reach(x, k), _reach(y, k)
    inside = held = torch.zeros((), dtype=torch.float64)
    reached, closest = torch.zeros(len(y), dtype=torch.bool), torch.full((len(y),), torch.inf, dtype=torch.float64)
    for rows, d in by_rows(x, y):
        ball = d <= reach_y
        inside, held = inside + ball.any(1).sum(), held + ball.sum()
        reached |= (d <= reach_x[rows, None]).any(0)
        closest = torch.minimum(closest, d.min(0).values)
    covered = (closest <= reach_y).double()
    return torch.stack([inside / len(x), reached.double().mean(), covered.mean(), held / (k * len(x))])


def _reach(x: Tensor, k: int) -> Tensor:
    """The distance of each example to its k-th neighbour, shape (n,)."""
    reaches = []
    for rows, d in by_rows(x, x):
        d[torch.arange(len(rows)), rows] = torch.inf
        reaches.append(d.topk(k, largest=False).values[:, -1])
    return torch.cat(reaches)


def _jackknife(values: Tensor) -> Interval:
    """The interval of the first value, from those without each block.

    Reference: Tukey (1958).
    """
    less = values[1:].double()
    stderr = ((BLOCKS - 1) / BLOCKS * (less - less.mean()).square().sum()).sqrt()
    return around(float(values[0]), float(stderr), BLOCKS - 1)
