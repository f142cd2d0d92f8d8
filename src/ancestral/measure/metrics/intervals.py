"""Intervals that hold the truth in 95 cases of 100: of means, of shares, and of squared distances between laws."""

import math
from collections.abc import Callable
from functools import cache
from statistics import NormalDist

import torch
from torch import Tensor

from ancestral.errors import OptionError
from ancestral.measure.record import Interval
from ancestral.rng import stream

LEVEL = 0.95
"""Of every interval."""


@cache
def student(freedom: float, level: float = LEVEL) -> float:
    """The quantile of Student's t that bounds a share of it on both sides.

    With t = v^1/2 tan a, that is the a with int_0^a cos^(v-1) = level / 2 of int_-pi/2^pi/2 cos^(v-1).

    Args:
        freedom: degrees of freedom v > 0.
        level: the share.

    Example:
        >>> round(student(1), 3), round(student(9), 3), round(student(math.inf), 3)
        (12.706, 2.262, 1.96)
    """
    if freedom > 10_000:
        return NormalDist().inv_cdf((1 + level) / 2)
    a = torch.linspace(0, math.pi / 2, 200_001, dtype=torch.float64)[:-1]
    below = torch.cumulative_trapezoid(a.cos() ** (freedom - 1), a)
    return float(freedom**0.5 * a[1:][torch.searchsorted(below, level * below[-1])].tan())


def around(value: float, stderr: float, freedom: float = math.inf, level: float = LEVEL) -> Interval:
    """The symmetric interval of a number whose error is normal, with a standard error of so many degrees of freedom.

    Example:
        >>> round(around(1.0, 0.5).high, 2)
        1.98
    """
    reach = student(freedom, level) * stderr
    return Interval(value=value, stderr=stderr, low=value - reach, high=value + reach)


def mean(values: Tensor) -> Interval:
    """The mean of independent values.

    Args:
        values: float64, shape (n,).

    Raises:
        OptionError: if there are fewer than two.

    Example:
        >>> mean(torch.tensor([0.0, 1.0, 2.0, 3.0], dtype=torch.float64)).value
        1.5
    """
    if len(values) < 2:
        raise OptionError(f"received {len(values)} values: an interval takes 2 at least")
    return around(float(values.mean()), float(values.std() / len(values) ** 0.5), len(values) - 1)


def welch(value: float, *parts: tuple[float, int], level: float = LEVEL) -> Interval:
    """The interval of a difference of independent means, from the variance of each and its degrees of freedom.

        v = (sum_i s_i^2)^2 / sum_i (s_i^4 / v_i)

    Reference: Welch (1947).

    Example:
        >>> found = welch(0.0, (0.5, 9), (0.5, 9))
        >>> round(found.high, 3) == round(student(18), 3)
        True
    """
    total, below = sum(variance for variance, _ in parts), sum(variance**2 / v for variance, v in parts)
    return around(value, total**0.5, total**2 / below if below else math.inf, level)


def share(hits: int, n: int) -> Interval:
    """The share of n independent trials that are hits, with the exact binomial interval.

        low:  P(K >= hits | low) = 2.5%,    high:  P(K <= hits | high) = 2.5%

    Reference: Clopper & Pearson (1934).

    Args:
        hits: of the trials, 0 to n.
        n: trials, at least 1.

    Raises:
        OptionError: if there are no trials, or more hits than trials.

    Example:
        >>> found = share(0, 10)
        >>> round(found.low, 4), round(found.high, 4)
        (0.0, 0.3085)
    """
    if not 0 <= hits <= n or n == 0:
        raise OptionError(f"received {hits} hits of {n} trials: give 1 trial at least, and no more hits than trials")
    tail = (1 - LEVEL) / 2
    high = 1.0 if hits == n else _bisected(lambda p: at_least(hits + 1, n, p) > 1 - tail)
    low = 0.0 if hits == 0 else _bisected(lambda p: at_least(hits, n, p) > tail)
    p = hits / n
    return Interval(value=p, stderr=(p * (1 - p) / n) ** 0.5, low=low, high=high)


def of_share(value: float, stderr: float, w: float) -> Interval:
    """The interval of a share p whose error grows and falls with theta (1 - theta), as that of trials does.

        (p - theta)^2 <= w theta (1 - theta),   w = z^2 / n for n trials

    It lies in [0, 1], and has a width where p is 0 or 1.

    Reference: Wilson (1927).

    Args:
        value: p.
        stderr: to be told with it.
        w: squared reach by theta (1 - theta).

    Example:
        >>> found = of_share(1.0, 0.0, student(math.inf) ** 2 / 10)
        >>> round(found.low, 4), found.high
        (0.7225, 1.0)
    """
    middle, half = value + w / 2, (w * value * (1 - value) + w**2 / 4) ** 0.5
    low = (middle - half) / (1 + w) if value > 0 else 0.0
    high = (middle + half) / (1 + w) if value < 1 else 1.0
    return Interval(value=value, stderr=stderr, low=low, high=high)


def at_least(hits: int, n: int, p: float) -> float:
    """P(K >= hits) of a binomial K of n trials with probability p.

    Example:
        >>> round(at_least(2, 2, 0.5), 9)
        0.25
    """
    if hits <= 0 or p >= 1:
        return 1.0
    if p <= 0:
        return 0.0
    k = torch.arange(hits, n + 1, dtype=torch.float64)
    log_choose = math.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)
    return min(1.0, float((log_choose + k * math.log(p) + (n - k) * math.log1p(-p)).exp().sum()))


def blocks(n: int, count: int) -> list[Tensor]:
    """The indices of n examples in blocks of about equal size: at random, for sets may be sorted, and always the same.

    Example:
        >>> [len(block) for block in blocks(5, 2)]
        [3, 2]
    """
    return list(torch.tensor_split(torch.from_numpy(stream(n, count).permutation(n)), count))


def of_pairs(H: Tensor, value: float | None = None) -> Interval:
    """The interval of a squared distance ||E f||^2 between laws, from its values H_ab = <f_a, f_b> for pairs of blocks.

        H_ab = theta + e_a + e_b + e_ab,    Var U = V_0 + V_1,    V_0 = 2 Var e_ab / B(B - 1),    V_1 = 4 Var e_a / B

    for U the mean of H_ab over a != b. Where the laws are one, theta and all e_a are 0 and U errs by V_0 alone; V_1
    grows with theta. So the interval is that of all theta which U does not contradict,

        (U - theta)^2 <= z_0^2 V_0 + z_1^2 c theta,    c = min(V_1 / max(U, V_0^1/2), (8 V_0)^1/2),

    and 0 is in it exactly where |U| <= z_0 V_0^1/2. The bound on c is that of the first eigenvalue of the covariance of
    f by the root of the sum of their squares. The jackknife, which counts V_0 twice, would hold 0 too often.

    It holds the truth as often as it should where the laws are one and where they are clearly apart. In between it may
    be 92 in 100, and 85 where f varies along one direction only, as for vectors of one feature, since U is skewed.

    Reference: Hoeffding (1948), section 5, for the variance of a U-statistic; Efron & Stein (1981) for the jackknife;
    Wilson (1927) for an interval whose variance is that of the parameter and not of the estimate.

    Args:
        H: values for pairs of blocks that have no example in common, float64, shape (B, B); the diagonal is ignored.
        value: an estimate to use in place of U that errs as U does.

    Example:
        >>> f = torch.linspace(0.9, 1.1, 20, dtype=torch.float64)[:, None]
        >>> round(of_pairs(f @ f.T).value, 3)
        1.0
    """
    B = len(H)
    same = torch.eye(B, dtype=torch.bool)
    U = float(H[~same].mean())
    offset = (H - U).masked_fill(same, 0)
    e_a = offset.sum(1) / (B - 2)
    e_ab = (offset - e_a[:, None] - e_a).masked_fill(same, 0)
    pair = float(e_ab.square().sum()) / (B * (B - 3))
    single = max(float(e_a.square().sum()) / (B - 1) - pair / (B - 2), 0.0)
    V_0, V_1 = 2 * pair / (B * (B - 1)), 4 * single / B
    U = U if value is None else value
    z_0, z_1 = student(B * (B - 3) / 2), student(B - 1)
    c = min(V_1 / max(U, V_0**0.5), (8 * V_0) ** 0.5) if V_0 > 0 else 0.0
    half = z_1**2 * c / 2
    reach = max(half**2 + 2 * half * U + z_0**2 * V_0, 0.0) ** 0.5
    return Interval(value=U, stderr=(V_0 + V_1) ** 0.5, low=U + half - reach, high=U + half + reach)


def _bisected(above: Callable[[float], bool]) -> float:
    """The number in [0, 1] from which on a monotone condition holds."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if above(middle) else (middle, high)
    return high
