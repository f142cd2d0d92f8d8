"""A decreasing curve that can be learnt: a log-SNR over time, by its two ends and the density between them.

Shapes: K bins.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

FLOOR = 0.1
"""Share of time that is spread evenly over the log-SNRs, whatever is learnt: no bin is passed in no time."""


class MonotoneCurve(nn.Module):
    """A log-SNR that falls from `high` to `low` in the time from 0 to 1, of which each bin has the share it has learnt.

        log_snr(t) = high - (high - low) F^-1(t) + 2 log(1 + knee / t)

    F is the distribution function of a histogram of K equal bins over [0, 1], so F^-1 is piecewise linear and strictly
    increasing whatever the parameters are. It begins as the identity, between the given ends. Below the knee the curve
    goes on to the data, as other schedules do. Times and log-SNRs are float64 on the CPU. Their gradient reaches the
    ends within `learning` only, and the shape never: what should move it asks for `log_mass`.

    Args:
        high, low: where the curve begins and ends, before it has learnt, in nats.
        knee: time below which the curve turns to the data.
        bins: of the histogram.

    Example:
        >>> curve = MonotoneCurve(13.0, -7.0, knee=0.0)
        >>> [round(log_snr, 9) for log_snr in curve(torch.tensor([0.0, 0.5, 1.0]).double()).tolist()]
        [13.0, 3.0, -7.0]
    """

    def __init__(self, high: float, low: float, knee: float = 1e-4, bins: int = 64) -> None:
        super().__init__()
        self.middle, self.reach, self.knee = (high + low) / 2, (high - low) / 2, knee
        self.moved = nn.Parameter(torch.zeros(2))
        self.shape = nn.Parameter(torch.zeros(bins))
        self.learns = False

    @contextmanager
    def learning(self) -> Iterator[None]:
        """Within it, the gradient of a log-SNR reaches the ends."""
        self.learns = True
        try:
            yield
        finally:
            self.learns = False

    def forward(self, t: Tensor) -> Tensor:
        """(...) -> (...), float64."""
        (high, low), mass = self.ends() if self.learns else self.ends().detach(), self.log_mass().detach().exp()
        edges = torch.cat([mass.new_zeros(1), mass.cumsum(0)]) / mass.sum()
        within = (torch.searchsorted(edges, t.detach().contiguous(), right=True) - 1).clamp(0, len(mass) - 1)
        r = (within + (t - edges[within]) / (edges[within + 1] - edges[within])) / len(mass)
        below = 2 * torch.log1p(self.knee / t) if self.knee else 0.0
        return high - (high - low) * r + below

    def ends(self) -> Tensor:
        """high and low, shape (2,), float64, moved outwards: each stays on its side of the middle it began with."""
        moved = self.moved.double().cpu() / self.reach
        return self.middle + self.reach * moved.exp() * moved.new_tensor([1.0, -1.0])

    def log_mass(self) -> Tensor:
        """The logarithm of the share of time that is spent in each bin, from high to low, shape (K,), float64."""
        even = math.log(FLOOR / len(self.shape))
        learnt = self.shape.double().cpu().log_softmax(0) + math.log1p(-FLOOR)
        return torch.logaddexp(learnt, torch.full_like(learnt, even))

    def bin(self, log_snr: Tensor) -> Tensor:
        """Which bin a log-SNR lies in, int64; beyond an end, the one there."""
        high, low = self.ends().detach()
        place = (high - log_snr) / (high - low) * len(self.shape)
        return place.floor().long().clamp(0, len(self.shape) - 1)
