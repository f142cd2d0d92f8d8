"""Tests of whether two sets of features are of one law: p-values that are uniform, or larger, where they are."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ancestral.errors import OptionError, unknown
from ancestral.measure.metrics import distances, intervals
from ancestral.measure.metrics.neighbours import by_rows, nearest
from ancestral.measure.record import Interval

ITERATIONS = 100
"""Of L-BFGS, at most, to fit the logistic classifier."""


@dataclass(frozen=True)
class Test:
    """A statistic and how often one as large comes about by chance where the laws are one.

    Attributes:
        statistic: with its interval.
        p_value: in (0, 1].
    """

    statistic: Interval
    p_value: float


def classifier(x: Tensor, y: Tensor, *, rng: np.random.Generator, kind: str = "logistic") -> Test:
    """How often a classifier tells the sets apart: its accuracy on the half of both that it was not fitted on.

    1/2 where the laws are one, 1 where they do not overlap; as many examples are taken of each. Its interval is the
    exact binomial one. The p-value is exact given how many the classifier told to be of each set,

        P(A >= a) for A hypergeometric,   a the examples of x that are told to be of x.

    Reference: Lopez-Paz & Oquab (2017), section 3; Fisher (1935), section 21, for the p-value.

    Args:
        x: features, float64, shape (n, D).
        y: features, shape (m, D).
        rng: of the division in halves.
        kind: "logistic", which sees means, or "knn" with k about the root of the number, which sees more in few
            dimensions.

    Raises:
        OptionError: if there are fewer than four examples of each, or of different dimensions, or no such classifier.

    Example:
        >>> from ancestral.rng import stream
        >>> x = torch.linspace(0, 1, 40, dtype=torch.float64)[:, None]
        >>> found = classifier(x, x + 2, rng=stream(0))
        >>> found.statistic.value, found.p_value < 1e-9
        (1.0, True)
    """
    if kind not in CLASSIFIERS:
        raise unknown("classifier", kind, CLASSIFIERS)
    n = min(len(x), len(y)) // 2 * 2
    if n < 4 or x.ndim != 2 or x.shape[1:] != y.shape[1:]:
        raise OptionError(
            f"received features of shape {tuple(x.shape)} and {tuple(y.shape)}: give (n, D) and (m, D), 4 each or more"
        )
    x, y = (each[torch.from_numpy(rng.permutation(len(each))[:n])] for each in (x, y))
    half = n // 2
    fitted, label = torch.cat([x[:half], y[:half]]), torch.cat([torch.ones(half), torch.zeros(half)]).double()
    mean, deviation = fitted.mean(0), fitted.std(0).clamp(min=torch.finfo(torch.float64).tiny)
    told = CLASSIFIERS[kind]((fitted - mean) / deviation, label)
    of_x, of_y = (int(told((each[half:] - mean) / deviation).sum()) for each in (x, y))
    accuracy = intervals.share(of_x + half - of_y, 2 * half)
    return Test(accuracy, _hypergeometric(of_x, of_x + of_y, half))


def energy(x: Tensor, y: Tensor, *, rng: np.random.Generator, permutations: int = 199) -> Test:
    """Whether the energy distance is larger than what dividing the pooled examples anew makes it.

        p = (1 + sum_r [E_r >= E]) / (R + 1),   E_r of the r-th of R random divisions

    All divisions are measured in one pass over the distances.

    Reference: Székely & Rizzo (2013), section 6; Phipson & Smyth (2010) for the ones that are added.

    Args:
        x: features, float64, shape (n, D).
        y: features, shape (m, D).
        rng: of the divisions.
        permutations: R.

    Raises:
        OptionError: if there are too few examples, or of different dimensions.

    Example:
        >>> from ancestral.rng import stream
        >>> x = torch.linspace(0, 1, 40, dtype=torch.float64)[:, None]
        >>> energy(x, x + 2, rng=stream(0)).p_value
        0.005
    """
    statistic = distances.energy(x, y)
    n, m, pooled = len(x), len(y), torch.cat([x, y])
    of_x = torch.zeros(n + m, permutations + 1, dtype=torch.float64)
    of_x[:n, 0] = 1
    for r in range(permutations):
        of_x[torch.from_numpy(rng.permutation(n + m)[:n]), 1 + r] = 1
    within, touching, total = torch.zeros(permutations + 1).double(), torch.zeros(permutations + 1).double(), 0.0
    for rows, d in by_rows(pooled, pooled):
        within += (of_x[rows] * (d @ of_x)).sum(0)
        touching += d.sum(1) @ of_x[rows]
        total += float(d.sum())
    without = total - 2 * touching + within
    E = 2 * (touching - within) / (n * m) - within / (n * (n - 1)) - without / (m * (m - 1))
    return Test(statistic, float((E[0] <= E).double().mean()))


def _logistic(x: Tensor, label: Tensor) -> Callable[[Tensor], Tensor]:
    """Logistic regression with a Gaussian prior of unit variance on the weights of standardised features."""
    w = torch.zeros(x.shape[1] + 1, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([w], max_iter=ITERATIONS, line_search_fn="strong_wolfe")

    def loss() -> float:
        optimiser.zero_grad()
        score = x @ w[1:] + w[0]
        nats = torch.nn.functional.binary_cross_entropy_with_logits(score, label, reduction="sum")
        objective = (nats + w[1:].square().sum() / 2) / len(x)
        objective.backward()  # type: ignore[no-untyped-call]
        return float(objective.detach())

    optimiser.step(loss)  # type: ignore[no-untyped-call]
    weights = w.detach()
    return lambda other: other @ weights[1:] + weights[0] > 0


def _knn(x: Tensor, label: Tensor) -> Callable[[Tensor], Tensor]:
    """The majority among the k nearest, k odd and about the root of the number of examples."""
    k = math.isqrt(len(x)) // 2 * 2 + 1
    return lambda other: label[nearest(other, x, k=k)[1]].mean(1) > 1 / 2


CLASSIFIERS: dict[str, Callable[[Tensor, Tensor], Callable[[Tensor], Tensor]]] = {"logistic": _logistic, "knn": _knn}
"""By name: fitted on examples, shape (n, D), and whether each is of x, they tell it of others."""


def _hypergeometric(a: int, told: int, half: int) -> float:
    """P(A >= a) for the A among `told` examples, drawn from half of each of two sets, that are of the first."""

    def log_choose(n: Tensor | int, k: Tensor | int) -> Tensor:
        n, k = torch.as_tensor(n).double(), torch.as_tensor(k).double()
        return torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)

    A = torch.arange(a, min(told, half) + 1)
    A = A[told - A <= half]
    log_p = log_choose(half, A) + log_choose(half, told - A) - log_choose(2 * half, told)
    return min(1.0, float(log_p.exp().sum()))
