"""How a game stands: what the critic makes of reals and fakes, how steep it is, whether the generator has collapsed.

The losses do not say it: they are near log 2 in a game that goes well, and in one where neither player has learnt.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ancestral.gan.losses import squared_gradient

ALIKE = 0.1
"""Spread of samples relative to the data's below which the generator has collapsed to a point."""

CROWDED = 0.05
"""Distance between nearest samples relative to the data's below which it has collapsed to a few points or a curve."""

GOOD, COVERED, NEIGHBOURS = 0.5, 0.3, 5
"""It has collapsed to a few kinds when more than this share of its samples is near the data, and less than this share
of the data is near a sample; near is within the distance of an example to so many others."""


@dataclass(frozen=True)
class Standing:
    """How a game stands, in units of the critic's score, which has no zero: only differences of scores mean something.

    Attributes:
        real: mean score of examples learnt from.
        fake: mean score of samples; far below `real`, the critic has won and the generator learns little.
        steep_real: root mean square of ||grad D(x)|| on examples learnt from.
        steep_fake: the same on samples; that it grows without bound is how an unregularised game ends.
        gap: mean score of examples learnt from less that of held-out ones; well above 0, the critic has them by heart.
        classes: how many classes samples show, each that of the example nearest to it; None without labels.
        uneven: KL(q || p) in nats, with q the shares of these classes and p those of the examples; None without labels.
    """

    real: float
    fake: float
    steep_real: float
    steep_fake: float
    gap: float
    classes: int | None = None
    uneven: float | None = None


def standing(
    critic: Callable[[Tensor], Tensor], real: Tensor, fake: Tensor, held_out: Tensor, labels: Tensor | None = None
) -> Standing:
    """How a game stands on these examples, in the model's units, shape (B, ...) each; labels of the real ones, (B,).

    Example:
        >>> found = standing(lambda x: 2 * x[:, 0], torch.ones(4, 3), torch.zeros(4, 3), torch.ones(4, 3))
        >>> found.real - found.fake, found.steep_real, found.gap
        (2.0, 2.0, 0.0)
    """
    score_real, square_real = squared_gradient(critic, real)
    score_fake, square_fake = squared_gradient(critic, fake)
    with torch.no_grad():
        score_held_out = critic(held_out)
    classes, uneven = (None, None) if labels is None else shown(fake, real, labels)
    return Standing(
        real=float(score_real.detach().mean()),
        fake=float(score_fake.detach().mean()),
        steep_real=float(square_real.detach().mean().sqrt()),
        steep_fake=float(square_fake.detach().mean().sqrt()),
        gap=float(score_real.detach().mean() - score_held_out.mean()),
        classes=classes,
        uneven=uneven,
    )


def shown(samples: Tensor, data: Tensor, labels: Tensor) -> tuple[int, float]:
    """How many classes samples show, each that of the example nearest to it, and how unevenly, KL(q || p) in nats.

    Reference: Srivastava et al. (2017), VEEGAN, section 5, for classes as the modes of data whose modes are not known.

    Args:
        samples: shape (B, ...).
        data: examples, in the same units.
        labels: of the examples, int64, shape (B,).

    Example:
        >>> data, labels = torch.tensor([[0.0], [1.0], [5.0], [6.0]]), torch.tensor([0, 0, 1, 1])
        >>> shown(torch.tensor([[0.2], [0.4], [0.6], [1.2]]), data, labels)
        (1, 0.6931471805599453)
    """
    found = labels[_distances(samples, data).argmin(1)]
    q, p = (torch.bincount(of, minlength=int(labels.max()) + 1).double() / len(of) for of in (found, labels))
    met = q > 0
    return int(met.sum()), float((q[met] * (q[met] / p[met]).log()).sum())


def collapsed(samples: Tensor, data: Tensor) -> str | None:
    """Why the samples are those of a collapsed generator, as the end of a sentence, or None if they are not.

    Of as many samples as examples, two numbers are relative to those of the data: the root mean square distance from
    the mean, and the mean distance to the nearest other one, which for samples that are copies of each other is 0. Two
    are shares: of the samples that lie near the data, precision, and of the data that has a sample near it, coverage.
    A generator that has learnt nothing yet has little of both, and one that leaves out most of the data has precision
    alone. Whether samples are copies of the data is not told by any.

    Reference: Kynkäänniemi et al. (2019), eq. 2, for precision; Naeem et al. (2020), eq. 5, for coverage.

    Args:
        samples: shape (B, ...).
        data: as many examples, in the same units; more than `NEIGHBOURS`.

    Example:
        >>> data = torch.randn(100, 2, generator=torch.Generator().manual_seed(0))
        >>> collapsed(data.flip(1), data) is None
        True
        >>> collapsed(data / 100, data)
        'its samples are all alike: they spread 0.010 times as far as the data'
    """
    spread = float(_spread(samples) / _spread(data))
    if not spread >= ALIKE:
        return f"its samples are all alike: they spread {spread:.3f} times as far as the data"
    among = _distances(data, data)
    nearest = among.kthvalue(2, dim=1).values.mean()  # the first is that to itself
    apart = float(_distances(samples, samples).kthvalue(2, dim=1).values.mean() / nearest.clamp(min=1e-300))
    if not apart >= CROWDED:
        return f"its samples are few: one is {apart:.3f} times as far from the next as in the data"
    near = _distances(data, samples) <= among.kthvalue(NEIGHBOURS + 1, dim=1).values[:, None]
    precision, coverage = float(near.any(0).double().mean()), float(near.any(1).double().mean())
    if precision > GOOD and coverage < COVERED:
        return (
            f"its samples are of few kinds: {precision:.0%} are near the data, and {coverage:.0%} of the data near them"
        )
    return None


def _spread(x: Tensor) -> Tensor:
    x = x.double().flatten(1)
    return (x - x.mean(0)).square().sum(1).mean().sqrt()


def _distances(x: Tensor, y: Tensor) -> Tensor:
    """Between every x and every y, (B, B), exactly 0 between equal ones."""
    return torch.cdist(x.double().flatten(1), y.double().flatten(1), compute_mode="donot_use_mm_for_euclid_dist")
