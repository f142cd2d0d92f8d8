"""Which modes of a mixture a set of samples reaches, and how much of it lies at one."""

import torch
from torch import Tensor

from ancestral import toys
from ancestral.errors import OptionError
from ancestral.measure.record import Modes

REACH = 3.0
"""Mahalanobis distance from a mean below which a sample counts to its mode."""


def apart(law: toys.Mixture) -> bool:
    """Whether the law has several modes, none of whose means is within twice `REACH` of another.

    Example:
        >>> apart(toys.ring_8()), apart(toys.two_moons())
        (True, False)
    """
    offsets = law.means[:, None] - law.means
    squared = torch.einsum("jkd,kde,jke->jk", offsets, torch.linalg.inv(law.covs), offsets)
    return len(law.weights) > 1 and float(squared.fill_diagonal_(torch.inf).min()) > (2 * REACH) ** 2


def modes(law: toys.Mixture, x: Tensor) -> Modes:
    """The modes of a mixture that samples reach.

    A sample counts to the mode whose mean is nearest in Mahalanobis distance, d_k^2 = (x - m_k)^T S_k^-1 (x - m_k), if
    that distance is below `REACH`. Of exact draws from modes that lie far apart in two dimensions, all but e^(-9/2)
    count; see `expected_quality`.

    Reference: Srivastava et al. (2017), VEEGAN, section 5; Lin et al. (2018), PacGAN, section 4, for the KL.

    Args:
        law: whose modes they are.
        x: samples in the units of the law, shape (n, D).

    Raises:
        OptionError: if there are no samples, or of another dimension.

    Example:
        >>> ring = toys.ring_8()
        >>> modes(ring, ring.means[:6]).hit, round(modes(ring, ring.means).reverse_kl, 9)
        (6, 0.0)
    """
    if x.ndim != 2 or x.shape[1] != law.dim or len(x) == 0:
        raise OptionError(f"received samples of shape {tuple(x.shape)}: give at least one, as (n, {law.dim})")
    offsets = x.double()[:, None] - law.means
    squared = torch.einsum("nkd,kde,nke->nk", offsets, torch.linalg.inv(law.covs), offsets)
    nearest, k = squared.min(1)
    counts = torch.bincount(k[nearest < REACH**2], minlength=len(law.weights)).double()
    total = counts.sum()
    q = counts / total.clamp(min=1)
    return Modes(
        hit=int((counts > 0).sum()),
        of=len(counts),
        high_quality=float(total / len(x)),
        reverse_kl=float(torch.special.xlogy(q, q / law.weights).sum()) if total else None,
        least=float((q / law.weights).min()),
    )


def expected_quality(dim: int) -> float:
    """P(chi^2_D < REACH^2): the high-quality share of exact draws where no two modes overlap.

    Reference: the regularised incomplete gamma function P(D / 2, REACH^2 / 2).

    Example:
        >>> from math import exp
        >>> round(expected_quality(2), 6), round(1 - exp(-9 / 2), 6)
        (0.988891, 0.988891)
    """
    half = torch.tensor([dim / 2, REACH**2 / 2], dtype=torch.float64)
    return float(torch.special.gammainc(half[0], half[1]))
