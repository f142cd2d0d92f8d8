"""Closed forms of Gaussian distributions with diagonal covariance: density, divergence, bins.

Means and variances are tensors that broadcast against each other; everything is in nats.
"""

import math

import torch
from torch import Tensor
from torch.special import log_ndtr

LOG_2PI = math.log(2 * math.pi)


def log_density(x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    """log N(x; mean, var), elementwise, in nats.

    Example:
        >>> log_density(torch.tensor(0.0), torch.tensor(0.0), torch.tensor(1.0))
        tensor(-0.9189)
    """
    return -0.5 * ((x - mean).square() / var + var.log() + LOG_2PI)


def kl(mean_1: Tensor, var_1: Tensor, mean_2: Tensor, var_2: Tensor) -> Tensor:
    """KL(N(mean_1, var_1) || N(mean_2, var_2)), elementwise, in nats; zero only where the two are equal.

    KL = 1/2 [ r - 1 - log r + (mean_1 - mean_2)^2 / var_2 ],   r = var_1 / var_2

    Example:
        >>> zero, one = torch.tensor(0.0), torch.tensor(1.0)
        >>> kl(zero, one, one, one)
        tensor(0.5000)
    """
    excess = var_1 / var_2 - 1
    return 0.5 * (excess - excess.log1p() + (mean_1 - mean_2).square() / var_2)


def log_ndtr_difference(lower: Tensor, upper: Tensor) -> Tensor:
    """log(Phi(upper) - Phi(lower)) for lower < upper, without cancellation in either tail.

    An interval right of zero is reflected to the left, where Phi keeps its relative precision; the difference
    is then taken between logarithms. Ends may be infinite.

    Example:
        >>> log_ndtr_difference(torch.tensor(30.0).double(), torch.tensor(31.0).double())
        tensor(-454.3212, dtype=torch.float64)
    """
    right = lower + upper > 0
    low = torch.where(right, -upper, lower)
    high = torch.where(right, -lower, upper)
    log_high = log_ndtr(high)
    return log_high + torch.log(-torch.expm1(log_ndtr(low) - log_high))


def log_bin(x: Tensor, mean: Tensor, std: Tensor, levels: int) -> Tensor:
    """log of the mass that N(mean, std^2) puts on the bin of x, one of `levels` equally spaced values in [-1, 1].

    P(x) = Phi((x + h - mean) / std) - Phi((x - h - mean) / std),   h = 1 / (levels - 1),
    where the two end bins reach to infinity, so that the masses of all levels sum to one for any mean and std.

    Reference: Ho et al. (2020), eq. 13; exact normal integrals in float64 log space.

    Args:
        x: values on the levels, any shape; each is taken to the nearest level.
        mean: mean of the Gaussian, same shape.
        std: its standard deviation, broadcastable.
        levels: number of levels, at least 2.

    Returns:
        Nats per element, float64, the shape of x.

    Example:
        >>> values = torch.linspace(-1, 1, 17)
        >>> round(log_bin(values, torch.tensor(0.3), torch.tensor(2.0), 17).exp().sum().item(), 9)
        1.0
    """
    return log_ndtr_difference(*_bin_ends(x, mean, std, levels))


def log_bin_tanh(x: Tensor, mean: Tensor, std: Tensor, levels: int) -> Tensor:
    """`log_bin` as older papers computed it: Phi by a tanh, and no mass below 1e-12.

    Phi(z) ~ 1/2 (1 + tanh(sqrt(2 / pi) (z + 0.044715 z^3)))

    The masses still sum to one, up to the floor, but in the tails they are not a Gaussian's: 0.55 of it at 4 standard
    deviations, 0.16 at 5. For comparison with published numbers only.

    Reference: Ho et al. (2020), the published code.

    Example:
        >>> one, std = torch.tensor([1.0]), torch.tensor(0.05)
        >>> [round(float(f(one, one - 0.2, std, 256)), 2) for f in (log_bin, log_bin_tanh)]
        [-10.03, -10.56]
    """
    lower, upper = (torch.sigmoid(2 * _TANH * (z + 0.044715 * z**3)) for z in _bin_ends(x, mean, std, levels))
    return (upper - lower).clamp(min=1e-12).log()


_TANH = math.sqrt(2 / math.pi)


def _bin_ends(x: Tensor, mean: Tensor, std: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """The ends of the bin of x in standard deviations from the mean, float64."""
    x, mean, std = x.double(), mean.double(), std.double()
    level = _level(x, levels)
    centre, half = 2 * level / (levels - 1) - 1, 1 / (levels - 1)
    lower = torch.where(level <= 0, -math.inf, (centre - half - mean) / std)
    upper = torch.where(level >= levels - 1, math.inf, (centre + half - mean) / std)
    return lower, upper


def _level(x: Tensor, levels: int) -> Tensor:
    """The number of the level nearest to x."""
    return ((x + 1) * (levels - 1) / 2).round().clamp(0, levels - 1)


def log_softmax_level(x: Tensor, y: Tensor, std: Tensor, levels: int) -> Tensor:
    """log of the probability of the level x under a softmax over the levels v of -(y - v)^2 / (2 std^2).

    Reference: Kingma et al. (2021), section 3.2.

    Args:
        x: values on the levels in [-1, 1], any shape.
        y: what was seen of them, same shape.
        std: of y about the level, broadcastable.
        levels: number of levels, at least 2.

    Returns:
        Nats per element, float64, the shape of x.

    Example:
        >>> y, std = torch.tensor([0.1, 0.1, 0.1]), torch.tensor(0.5)
        >>> log_softmax_level(torch.tensor([-1.0, 0.0, 1.0]), y, std, 3).exp().sum()
        tensor(1., dtype=torch.float64)
    """
    values = torch.linspace(-1, 1, levels, dtype=torch.float64, device=x.device)
    precision, parts = (0.5 / std.double().to(x.device) ** 2).expand(x.shape), []
    rows = (_level(x.double(), levels).long(), y.double(), precision)
    for index, seen, half in zip(*(torch.split(row.flatten(), AT_ONCE) for row in rows), strict=True):
        log_p = (seen[:, None] - values).square_().mul_(-half[:, None])
        parts.append(log_p.gather(1, index[:, None])[:, 0] - log_p.logsumexp(1))
    return torch.cat(parts).view(x.shape)


AT_ONCE = 4096
"""Values whose levels are worked out at a time: what they need then stays in the processor's cache."""
