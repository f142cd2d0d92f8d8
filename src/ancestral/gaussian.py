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
    x, mean, std = x.double(), mean.double(), std.double()
    level = ((x + 1) * (levels - 1) / 2).round()
    centre, half = 2 * level / (levels - 1) - 1, 1 / (levels - 1)
    lower = torch.where(level <= 0, -math.inf, (centre - half - mean) / std)
    upper = torch.where(level >= levels - 1, math.inf, (centre + half - mean) / std)
    return log_ndtr_difference(lower, upper)
