"""Importance weights of examples as they come: the mean of their logarithms, the logarithm of their mean, and errors.

    E[log w]  <=  E[log mean_K(w)]  <=  log E[w]

Whoever draws them, and however many at a time, no weight is kept: no number of draws takes more memory than one.

Reference: Burda et al. (2016), theorem 1.
"""

import math
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from ancestral.protocol import Density


@dataclass(frozen=True)
class Weights:
    """What the bounds need of K importance weights of each of B examples; the weights themselves are not kept.

    Attributes:
        draws: K.
        mean: of log w, float64, shape (B,), nats.
        squares: sum of (log w - mean)^2, float64, shape (B,).
        log_sum: log of the sum of w, float64, shape (B,), nats.
        log_sum_squares: log of the sum of w^2, float64, shape (B,), nats.

    Example:
        >>> log_w = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
        >>> whole = Weights.of(log_w)
        >>> whole.elbo.nats.item(), round(whole.importance.nats.item(), 3)
        (1.5, 2.054)
        >>> halves = Weights.of(log_w[:, :2]).joined(Weights.of(log_w[:, 2:]))
        >>> round(halves.importance.nats.item(), 3)
        2.054
    """

    draws: int
    mean: Tensor
    squares: Tensor
    log_sum: Tensor
    log_sum_squares: Tensor

    @classmethod
    def of(cls, log_w: Tensor) -> Self:
        """From log-weights, shape (B, K)."""
        log_w = log_w.double()
        mean = log_w.mean(1)
        squares = (log_w - mean[:, None]).square().sum(1)
        return cls(log_w.shape[1], mean, squares, log_w.logsumexp(1), (2 * log_w).logsumexp(1))

    def joined(self, other: Self) -> Self:
        """Of these draws and those of another, for the same examples.

        Reference: Chan et al. (1983), eq. 2.1, for the mean and the squares.
        """
        draws, apart = self.draws + other.draws, other.mean - self.mean
        return type(self)(
            draws,
            self.mean + apart * other.draws / draws,
            self.squares + other.squares + apart.square() * self.draws * other.draws / draws,
            torch.logaddexp(self.log_sum, other.log_sum),
            torch.logaddexp(self.log_sum_squares, other.log_sum_squares),
        )

    def beside(self, other: Self) -> Self:
        """Of these examples, followed by those of another."""
        rows = ("mean", "squares", "log_sum", "log_sum_squares")
        return type(self)(self.draws, *(torch.cat([getattr(self, row), getattr(other, row)]) for row in rows))

    def shifted(self, nats: float) -> Self:
        """With `nats` added to every log w, as a change of units of x does."""
        log_sums = self.log_sum + nats, self.log_sum_squares + 2 * nats
        return type(self)(self.draws, self.mean + nats, self.squares, *log_sums)

    @property
    def elbo(self) -> Density:
        """The mean of log w, with the standard error std(log w) / sqrt(K)."""
        stderr = (self.squares / (self.draws - 1) / self.draws).sqrt() if self.draws > 1 else None
        return Density(self.mean, "lower bound", stderr)

    @property
    def importance(self) -> Density:
        """The log of the mean of w, with the standard error of the delta method, std(w) / (mean(w) sqrt(K))."""
        nats = self.log_sum - math.log(self.draws)
        if self.draws == 1:
            return Density(nats, "lower bound")
        stderr = ((self.draws / self.ess - 1).clamp(min=0) / (self.draws - 1)).sqrt()
        return Density(nats, "lower bound", stderr)

    @property
    def ess(self) -> Tensor:
        """Draws from the posterior itself that would say as much, (sum w)^2 / sum w^2, shape (B,).

        Reference: Kong et al. (1994), section 4.
        """
        return (2 * self.log_sum - self.log_sum_squares).exp()
