"""Squared distances between the laws of two sets of features, each 0 in expectation where the laws are one.

    frechet                between Gaussians of the same mean and covariance; biased upwards by about c / N
    frechet_extrapolated   the same for infinitely many samples
    kid, mmd, energy       of a kernel: cubic, Gaussian, minus the distance
    sliced                 2-Wasserstein, over random directions

Every interval is over both sets, and `intervals.of_pairs` says how it is made.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ancestral.errors import OptionError
from ancestral.measure.metrics.intervals import around, blocks, of_pairs
from ancestral.measure.metrics.neighbours import AT_ONCE, distance
from ancestral.measure.record import Interval
from ancestral.rng import Rng, randn

BLOCKS = 20
"""Blocks of examples, from whose pairs the intervals are told."""

FEW_BLOCKS = 10
"""The same where every pair of blocks costs a decomposition."""

NEAR = 1000
"""Examples of each set whose distances set the width of the Gaussian kernel, at most."""

Kernel = Callable[[Tensor, Tensor], Tensor]


def frechet_of_moments(mean_1: Tensor, cov_1: Tensor, mean_2: Tensor, cov_2: Tensor) -> float:
    """The squared Fréchet (2-Wasserstein) distance between two Gaussians.

        |m_1 - m_2|^2 + tr(S_1 + S_2 - 2 (S_1^1/2 S_2 S_1^1/2)^1/2)

    The last trace is the sum of the singular values of S_1^1/2 S_2^1/2, which is exact to rounding for singular S too.

    Reference: Dowson & Landau (1982), eq. 4.

    Args:
        mean_1: shape (D,).
        cov_1: symmetric, shape (D, D).
        mean_2: shape (D,).
        cov_2: symmetric, shape (D, D).

    Example:
        >>> zero, one = torch.zeros(2, dtype=torch.float64), torch.eye(2, dtype=torch.float64)
        >>> round(frechet_of_moments(zero, one, zero + 1, 4 * one), 9)
        4.0
    """
    cross = torch.linalg.svdvals(_root(cov_1) @ _root(cov_2)).sum()
    return float((mean_1 - mean_2).square().sum() + cov_1.trace() + cov_2.trace() - 2 * cross)


def frechet(x: Tensor, y: Tensor) -> Interval:
    """The squared Fréchet distance between the Gaussians that two sets of features have the moments of.

    From N samples it is too large by about c / N, with a c that depends on both laws: compare equal N only, or use
    `frechet_extrapolated`. The interval, from a jackknife over `FEW_BLOCKS` blocks, is that of this biased number.

    Reference: Heusel et al. (2017), section 4; Tukey (1958) for the jackknife.

    Args:
        x: features, float64, shape (n, D).
        y: features, shape (m, D).

    Raises:
        OptionError: if there are too few examples, or of different dimensions.

    Example:
        >>> x = torch.linspace(0, 1, 100, dtype=torch.float64)[:, None]
        >>> round(frechet(x, x + 2).value, 6)
        4.0
    """
    value, less = _frechet_of_blocks(x, y)[:2]
    B = FEW_BLOCKS
    stderr = ((B - 1) / B * (less - less.mean()).square().sum()).sqrt()
    return around(value, float(stderr), B - 1)


def frechet_extrapolated(x: Tensor, y: Tensor) -> Interval:
    """The squared Fréchet distance for infinitely many samples: FD_N = FD_inf + c / N + d / N^2, solved for FD_inf.

    FD_N is averaged over all subsets that leave out none, one or two of `FEW_BLOCKS` blocks of both sets, which makes
    of a quadratic functional its U-statistic.

        FD_inf = mean over a != b of 1/2 (B^2 FD - (B - 1)^2 (FD_(a) + FD_(b)) + (B - 2)^2 FD_(ab))

    Reference: Chong & Forsyth (2020), section 4, for the extrapolation; Schucany, Gray & Owen (1971) for one that
    removes two orders of the bias.

    Args:
        x: features, float64, shape (n, D).
        y: features, shape (m, D).

    Raises:
        OptionError: if there are fewer than 2 D examples, where the bias is no series in 1/N, or too few for blocks.

    Example:
        >>> x = torch.linspace(0, 1, 100, dtype=torch.float64)[:, None]
        >>> round(frechet_extrapolated(x, x + 2).value, 6)
        4.0
    """
    if min(len(x), len(y)) < 2 * x.shape[1]:
        raise OptionError(
            f"received {len(x)} and {len(y)} examples of {x.shape[1]} features: extrapolating takes twice as many "
            "examples as features; give more, or features of fewer dimensions"
        )
    B = FEW_BLOCKS
    value, less, lesser = _frechet_of_blocks(x, y, pairs=True)
    return of_pairs((B**2 * value - (B - 1) ** 2 * (less[:, None] + less) + (B - 2) ** 2 * lesser) / 2)


def kid(x: Tensor, y: Tensor) -> Interval:
    """The kernel distance of Inception's fame, here of any features: squared MMD with k(a, b) = (a.b / D + 1)^3.

    Reference: Bińkowski et al. (2018), section 3 and eq. 4.

    Args:
        x: features, float64, shape (n, D).
        y: features, shape (m, D).

    Raises:
        OptionError: if there are too few examples, or of different dimensions.

    Example:
        >>> x = torch.linspace(0, 1, 100, dtype=torch.float64)[:, None]
        >>> round(kid(x, x + 2).value, 1)
        375.9
    """
    return discrepancy(lambda a, b: (a @ b.T / a.shape[1] + 1) ** 3, x, y)


def mmd(x: Tensor, y: Tensor, *, width: float | None = None) -> Interval:
    """The squared maximum mean discrepancy with the Gaussian kernel k(a, b) = exp(-|a - b|^2 / 2 s^2).

    Reference: Gretton et al. (2012), eq. 3 and section 8 for the median as s.

    Args:
        x: features, float64, shape (n, D).
        y: features, shape (m, D).
        width: s, in the unit of the features; by default the median distance among up to `NEAR` examples of each set.

    Raises:
        OptionError: if there are too few examples, or of different dimensions, or the width is not positive.

    Example:
        >>> x = torch.linspace(0, 1, 100, dtype=torch.float64)[:, None]
        >>> round(mmd(x, x + 2).value, 2)
        1.44
    """
    _check(x, y)
    s = median_distance(x, y) if width is None else width
    if not s > 0:
        raise OptionError(
            f"received a kernel of width {s}: it has to be positive, and is the median distance if not given"
        )
    return discrepancy(lambda a, b: (distance(a, b).square() / (-2 * s**2)).exp(), x, y)


def median_distance(x: Tensor, y: Tensor) -> float:
    """The median distance between two examples among both sets, evenly thinned to `NEAR` of each.

    Example:
        >>> median_distance(torch.tensor([[0.0], [1.0]]), torch.tensor([[3.0]]))
        2.0
    """
    pooled = torch.cat([each[:: -(-len(each) // NEAR)] for each in (x, y)])
    return float(torch.pdist(pooled).median())


def energy(x: Tensor, y: Tensor) -> Interval:
    """The squared energy distance.

        2 E|X - Y| - E|X - X'| - E|Y - Y'|,   X, X' and Y, Y' independent

    Reference: Székely & Rizzo (2013), eq. 2.5, as a U-statistic.

    Args:
        x: features, float64, shape (n, D).
        y: features, shape (m, D).

    Raises:
        OptionError: if there are too few examples, or of different dimensions.

    Example:
        >>> x = torch.linspace(0, 1, 100, dtype=torch.float64)[:, None]
        >>> round(energy(x, x + 2).value, 3)
        3.32
    """
    return discrepancy(lambda a, b: -distance(a, b), x, y)


def discrepancy(kernel: Kernel, x: Tensor, y: Tensor) -> Interval:
    """The squared distance between the mean embeddings of two laws by a kernel, as the unbiased U-statistic.

        E k(X, X') + E k(Y, Y') - 2 E k(X, Y),   X, X' and Y, Y' independent

    Reference: Gretton et al. (2012), eq. 3.

    Args:
        kernel: (a, D), (b, D) -> (a, b).
        x: features, float64, shape (n, D).
        y: features, shape (m, D).

    Raises:
        OptionError: if there are too few examples, or of different dimensions.

    Example:
        >>> x = torch.linspace(0, 1, 100, dtype=torch.float64)[:, None]
        >>> round(discrepancy(lambda a, b: a @ b.T, x, x + 2).value, 2)
        4.0
    """
    _check(x, y)
    n, m = len(x), len(y)
    within, without, crossed = _sums(kernel, x), _sums(kernel, y), _sums(kernel, x, y)
    value = within.sum() / (n * (n - 1)) + without.sum() / (m * (m - 1)) - 2 * crossed.sum() / (n * m)
    size_x, size_y = (torch.tensor([len(block) for block in blocks(k, BLOCKS)]).double() for k in (n, m))
    across = crossed / size_x[:, None] / size_y
    H = within / size_x[:, None] / size_x + without / size_y[:, None] / size_y - across - across.T
    return of_pairs(H, float(value))


def sliced(x: Tensor, y: Tensor, *, rng: Rng, directions: int = 128) -> Interval:
    """The squared 2-Wasserstein distance between projections, averaged over random directions, without its noise.

        E_w int_0^1 (F_w^-1(u) - G_w^-1(u))^2 du

    for F_w^-1 and G_w^-1 the quantile functions of x.w and y.w. The square is taken between different ones of `BLOCKS`
    blocks, with the integral exact on the common refinement of their steps. So it is 0 in expectation for equal laws;
    for others it is as biased as the quantiles of a block are, which is of relative order BLOCKS / n. The interval is
    over the samples, for these directions.

    Reference: Bonneel et al. (2015), section 3.

    Args:
        x: features, float64, shape (n, D).
        y: features, shape (m, D).
        rng: of the directions.
        directions: how many.

    Raises:
        OptionError: if there are too few examples, or of different dimensions.

    Example:
        >>> from ancestral.rng import stream
        >>> x = torch.linspace(0, 1, 100, dtype=torch.float64)[:, None]
        >>> round(sliced(x, x + 2, rng=stream(0)).value, 6)
        4.0
    """
    _check(x, y)
    w = randn((directions, x.shape[1]), rng, dtype=torch.float64)
    w = w / w.norm(dim=1, keepdim=True)
    parts = [[each[block] @ w.T for block in blocks(len(each), BLOCKS)] for each in (x, y)]
    ends = torch.cat([torch.arange(k + 1, dtype=torch.float64) / k for k in {len(b) for part in parts for b in part}])
    ends = torch.unique(ends)
    u, du = (ends[1:] + ends[:-1]) / 2, ends.diff()
    H = torch.zeros(BLOCKS, BLOCKS, dtype=torch.float64)
    for some in torch.split(torch.arange(directions), max(1, AT_ONCE // (BLOCKS * len(u)))):
        F, G = (torch.stack([_quantiles(b[:, some], u) for b in part]) for part in parts)
        gap = ((F - G) * du.sqrt()[:, None]).flatten(1)
        H += gap @ gap.T / directions
    return of_pairs(H)


def _quantiles(x: Tensor, u: Tensor) -> Tensor:
    """The quantile function of each column at u: (n, L), (G,) -> (G, L)."""
    return x.sort(0).values[(u * len(x)).long()]


def _sums(kernel: Kernel, x: Tensor, y: Tensor | None = None) -> Tensor:
    """The kernel summed over every pair of blocks, shape (BLOCKS, BLOCKS); of x alone, without each with itself."""
    others = x if y is None else y
    of_x, of_others = _blocks(len(x)), _blocks(len(others))
    sums = torch.zeros(BLOCKS, BLOCKS, dtype=torch.float64)
    side = math.isqrt(AT_ONCE)
    for top in range(0, len(x), side):
        for left in range(top if y is None else 0, len(others), side):
            rows, columns = slice(top, top + side), slice(left, left + side)
            k = kernel(x[rows], others[columns])
            if y is None and top == left:
                k.fill_diagonal_(0)
            part = of_x[rows].T @ k @ of_others[columns]
            sums += part + part.T if y is None and top < left else part
    return sums


def _blocks(n: int) -> Tensor:
    """One where an example is in a block, else zero, shape (n, BLOCKS)."""
    within = torch.zeros(n, BLOCKS, dtype=torch.float64)
    for b, rows in enumerate(blocks(n, BLOCKS)):
        within[rows, b] = 1
    return within


def _root(cov: Tensor) -> Tensor:
    """The symmetric square root of a covariance, rounding errors below zero taken for zero."""
    values, vectors = torch.linalg.eigh(cov)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def _frechet_of_blocks(x: Tensor, y: Tensor, *, pairs: bool = False) -> tuple[float, Tensor, Tensor]:
    """The distance of all examples, without each block (B,), and, if asked for, without each pair of blocks (B, B)."""
    _check(x, y)
    B, few = FEW_BLOCKS, min(len(x), len(y)) < x.shape[1]
    centre = y.mean(0)
    moments = [] if few else [_moments(each, centre) for each in (x, y)]

    def without(*left: int) -> float:
        if few:
            parts = ([rows for b, rows in enumerate(blocks(len(z), B)) if b not in left] for z in (x, y))
            return _frechet_of_few(*(z[torch.cat(kept)] for z, kept in zip((x, y), parts, strict=True)))
        keep = torch.tensor([float(b not in left) for b in range(B)], dtype=torch.float64)
        (m_1, S_1), (m_2, S_2) = (_pooled(keep, *part) for part in moments)
        return frechet_of_moments(m_1, S_1, m_2, S_2)

    lesser = torch.zeros(B, B, dtype=torch.float64)
    for a in range(B if pairs else 0):
        for b in range(a):
            lesser[a, b] = lesser[b, a] = without(a, b)
    return without(), torch.tensor([without(a) for a in range(B)], dtype=torch.float64), lesser


def _frechet_of_few(x: Tensor, y: Tensor) -> float:
    """The distance of fewer examples than features, without their covariances.

    With S_1 = X^T X of examples X that are centred and divided by (n - 1)^1/2, and S_2 = Y^T Y, the singular values of
    S_1^1/2 S_2^1/2 are those of X Y^T, which has a row for each example.
    """
    X, Y = ((z - z.mean(0)) / (len(z) - 1) ** 0.5 for z in (x, y))
    apart = (x.mean(0) - y.mean(0)).square().sum()
    return float(apart + X.square().sum() + Y.square().sum() - 2 * torch.linalg.svdvals(X @ Y.T).sum())


def _moments(x: Tensor, centre: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The size of every block, and the sums over it of x and x x^T about a centre: (B,), (B, D), (B, D, D)."""
    size, first, second = [], [], []
    for block in blocks(len(x), FEW_BLOCKS):
        part = x[block] - centre
        size.append(float(len(part)))
        first.append(part.sum(0))
        second.append(part.T @ part)
    return torch.tensor(size, dtype=torch.float64), torch.stack(first), torch.stack(second)


def _pooled(keep: Tensor, size: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and covariance over the blocks that are kept."""
    n = float(keep @ size)
    mean = torch.einsum("b,bd->d", keep, first) / n
    return mean, (torch.einsum("b,bde->de", keep, second) - n * torch.outer(mean, mean)) / (n - 1)


def _check(x: Tensor, y: Tensor) -> None:
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise OptionError(f"received features of shape {tuple(x.shape)} and {tuple(y.shape)}: give (n, D) and (m, D)")
    if min(len(x), len(y)) < BLOCKS:
        raise OptionError(f"received {len(x)} and {len(y)} examples: an interval takes {BLOCKS} of each at least")
