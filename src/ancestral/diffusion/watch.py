"""Walks as they are watched: each point of a path with the guess that was made of it, at no further evaluation."""

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from ancestral.diffusion.denoise import Denoiser, halves, moments
from ancestral.diffusion.process import Time
from ancestral.diffusion.sample import Point


class Glimpse(NamedTuple):
    """A moment of a walk: the time, the examples there, and E[x_0 | x_t] as the step from there saw it."""

    t: float
    x_t: Tensor
    x_0_hat: Tensor


class Watched(Denoiser):
    """A denoiser that keeps the first guess of every step, which is the one of the point that the step starts from."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.denoiser, self.process = denoiser, denoiser.process
        self.due, self.guess = True, Tensor()

    def forward(self, x_t: Tensor, t: Time) -> Tensor:
        """E[x_0 | x_t] of the denoiser."""
        return self._kept(self.denoiser(x_t, t))

    def moments(self, x_t: Tensor, t: Time) -> tuple[Tensor, Tensor]:
        """Mean and variance of a denoiser that knows both."""
        mean, var = moments(self.denoiser, x_t, t)
        return self._kept(mean), var

    def halves(self, x_t: Tensor, t: Time) -> tuple[Tensor, Tensor]:
        """The mean, and the place of the reverse variance of a denoiser that learned it."""
        mean, fraction = halves(self.denoiser, x_t, t)
        return self._kept(mean), fraction

    def _kept(self, x_0_hat: Tensor) -> Tensor:
        if self.due:
            self.due, self.guess = False, x_0_hat
        return x_0_hat


def glimpses(path: Iterator[Point], watched: Watched) -> Iterator[Glimpse]:
    """Every point of a path with the guess of x_0 made there; at its end the examples are their own estimate.

    A point is seen when the step from it is done. A `Watched` belongs to one path alone.

    Example:
        >>> import torch
        >>> from ancestral import toys
        >>> from ancestral.diffusion import denoise, process, sample
        >>> from ancestral.rng import randn, stream
        >>> watched = Watched(denoise.OracleDenoiser(toys.named("ring-8"), process.cosine()))
        >>> path = sample.ddim.path(watched, randn((5, 2), stream(0)).double(), 10)
        >>> first, *_, last = glimpses(path, watched)
        >>> bool(first.x_0_hat.norm(dim=1).max() < 0.1), torch.equal(last.x_t, last.x_0_hat)
        (True, True)
    """
    point = next(path)
    for following in path:
        yield Glimpse(point.t, point.x, watched.guess)
        point, watched.due = following, True
    yield Glimpse(point.t, point.x, point.x)
