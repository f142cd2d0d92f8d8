"""Grids: the decreasing times at which the network is asked; the walk closes at the data, t = 0.

A grid is `(process, n) -> times`, n float64 numbers in (0, 1], never rounded to steps of a chain. Each is even in a
variable of its own:

    "uniform"                   t
    "quadratic"                 sqrt(t)
    "log-snr", "exponential"    log(alpha_t^2 / sigma_t^2)
    "karras"                    (sigma_t / alpha_t)^(1/rho)
    "beta"                      the distribution function of Beta(0.6, 0.6) at t
    "trailing"                  t, of a chain: 1, ..., 1/n
    "leading"                   t, of a chain: 1 - 1/n + 1/T, ..., 1/T
    "linspace"                  t, of a chain: 1, ..., 1/T

Karras and log-SNR end at log_snr_max = 12 by default, near the sigma_min of 0.002 of Karras et al. (2022).
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ancestral.diffusion.process import LOG_SNR_MIN, Process
from ancestral.errors import OptionError

Grid = Callable[[Process, int], Tensor]

LOG_SNR_MAX = 12.0
"""Where grids in log-SNR end by default, in nats: sigma / alpha = 0.0025."""


def uniform(process: Process, n: int) -> Tensor:
    """n times evenly spaced: 1, (n-1)/n, ..., 1/n; the chain of n steps."""
    return torch.arange(_counted(n), 0, -1, dtype=torch.float64) / n


def quadratic(process: Process, n: int) -> Tensor:
    """n times whose roots are evenly spaced: t_i = (i/n)^2. Reference: Song, Meng & Ermon (2021), appendix D.2."""
    return uniform(process, n).square()


def log_snr(process: Process, n: int, log_snr_max: float = LOG_SNR_MAX) -> Tensor:
    """n times evenly spaced in log-SNR, from the end of the process to log_snr_max: the limit of Karras for rho = inf.

    Reference: Lu et al. (2022), DPM-Solver. In sigma / alpha the spacing is exponential.
    """
    first, last = _ends(process, log_snr_max)
    return _times(process, first + torch.linspace(0, 1, _counted(n), dtype=torch.float64) * (last - first))


def karras(process: Process, n: int, rho: float = 7.0, log_snr_max: float = LOG_SNR_MAX) -> Tensor:
    """n times evenly spaced in (sigma / alpha)^(1/rho), from the end of the process to log_snr_max.

    Reference: Karras et al. (2022), eq. 5.
    """
    first, last = torch.exp(-_ends(process, log_snr_max) / (2 * rho))
    root = first + torch.linspace(0, 1, _counted(n), dtype=torch.float64) * (last - first)
    return _times(process, -2 * rho * root.log())


def beta(process: Process, n: int, shape: float = 0.6, T: int = 1000) -> Tensor:
    """Evenly spaced quantiles of Beta(shape, shape), laid out in t over a chain of T steps: denser at both ends.

    t_i = 1/T + (1 - 1/T) F^{-1}(u_i),   u_i even from 1 to 0

    Reference: Lee et al. (2024), Beta Sampling is All You Need.
    """
    u = torch.linspace(1, 0, _counted(n, T), dtype=torch.float64)
    low, high = torch.zeros_like(u), torch.ones_like(u)
    for _ in range(60):
        middle = (low + high) / 2
        above = _beta_cdf(middle, shape) > u
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    return 1 / T + (1 - 1 / T) * high.where(u > 0, 0.0)


def trailing(process: Process, n: int, T: int = 1000) -> Tensor:
    """n of the T steps of a chain, from its end, t = 1, to 1/n. Reference: Lin et al. (2024), table 2."""
    return uniform(process, _counted(n, T))


def leading(process: Process, n: int, T: int = 1000) -> Tensor:
    """n of the T steps of a chain, from t = 1 - 1/n + 1/T, below its end, to its first, 1/T.

    The noise it begins with is not that of its first time: measured, this makes it worse than `trailing` and `linspace`
    beyond 50 steps. Reference: Lin et al. (2024), table 2.
    """
    return uniform(process, _counted(n, T)) - (1 / n - 1 / T)


def linspace(process: Process, n: int, T: int = 1000) -> Tensor:
    """n of the T steps of a chain, from its end, t = 1, to its first, 1/T. Reference: Lin et al. (2024), table 2."""
    return torch.linspace(1, 1 / T, _counted(n, T), dtype=torch.float64)


GRIDS: dict[str, Grid] = {
    "uniform": uniform,
    "quadratic": quadratic,
    "log-snr": log_snr,
    "exponential": log_snr,
    "karras": karras,
    "beta": beta,
    "trailing": trailing,
    "leading": leading,
    "linspace": linspace,
}


def grid(process: Process, steps: int | Tensor) -> Tensor:
    """The given times, or the default grid of so many: Karras's for a variance-exploding process, else uniform.

    Raises:
        OptionError: if there are no steps, or the times are not decreasing within (0, 1].

    Example:
        >>> from ancestral.diffusion.process import cosine
        >>> grid(cosine(), 4)
        tensor([1.0000, 0.7500, 0.5000, 0.2500], dtype=torch.float64)
    """
    if isinstance(steps, int):
        return karras(process, steps) if process.constraint == "variance-exploding" else uniform(process, steps)
    times = torch.as_tensor(steps, dtype=torch.float64).flatten()
    if len(times) == 0:
        raise OptionError("sampling needs at least one step, received a grid without times")
    legal = (times > 0) & (times < torch.cat([torch.full_like(times[:1], math.nextafter(1, 2)), times[:-1]]))
    if not legal.all():
        first = int((~legal).nonzero()[0])
        raise OptionError(
            f"a grid of steps must be decreasing times in (0, 1], but time {first + 1} of {len(times)} is "
            f"{float(times[first])}: leave it out; the data, t = 0, is added by the sampler"
        )
    return times


def _ends(process: Process, log_snr_max: float) -> Tensor:
    """The log-SNR of the first and the last time, shape (2,)."""
    end = process.log_snr(1.0).clamp(min=LOG_SNR_MIN)
    return torch.stack([end, torch.full_like(end, log_snr_max)])


def _times(process: Process, log_snr: Tensor) -> Tensor:
    """The times of these log-SNR, the first of which is the end of the process."""
    return torch.cat([torch.ones(1, dtype=torch.float64), process.time(log_snr[1:])])


def _beta_cdf(t: Tensor, a: float) -> Tensor:
    """F(t) of Beta(a, a): t^a / B(a, a) sum_k (1 - a)_k / k! t^k / (a + k) below 1/2, and 1 - F(1 - t) above."""
    near = torch.minimum(t, 1 - t)
    k = torch.arange(60, dtype=torch.float64)
    rising = torch.cat([torch.ones(1, dtype=torch.float64), ((k + 1 - a) / (k + 1)).cumprod(0)[:-1]])
    total = (rising / (a + k) * near[:, None] ** k).sum(1)
    below = near**a * total * math.exp(math.lgamma(2 * a) - 2 * math.lgamma(a))
    return torch.where(t < 0.5, below, 1 - below)


def _counted(n: int, T: float = math.inf) -> int:
    """The number of times, if a chain of T steps has so many."""
    if not 1 <= n <= T:
        chain = "" if math.inf == T else f" and at most the {T} of the chain"
        raise OptionError(f"sampling needs at least one step{chain}, received {n}")
    return n
