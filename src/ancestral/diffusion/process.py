"""The forward process: a curve of log signal-to-noise ratios, and one constraint that turns it into (alpha, sigma).

    x_t = alpha(t) x_0 + sigma(t) eps,   eps ~ N(0, I),   log_snr(t) = log(alpha(t)^2 / sigma(t)^2)

Time runs over [0, 1]: t = 0 is the data (alpha = 1, sigma = 0), t = 1 the end of the chain. Everything is written
for a pair s < t, so that a chain of T steps, any subset of its steps, and the continuous limit are one formula:

    SNR_t / SNR_s = exp(log_snr(t) - log_snr(s)),   gain = 1 - SNR_t / SNR_s

Coefficients are float64. `gain` is computed by expm1 of a difference of logarithms, so nothing cancels when s is
close to t, and the limits sigma_s = 0 and alpha_t = 0 need no special case.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from inspect import signature
from typing import TypeVar, overload

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ancestral import gaussian
from ancestral.errors import OptionError, unknown
from ancestral.nets import MonotoneCurve
from ancestral.rng import Rng, randn_like

Curve = Callable[[Tensor], Tensor]
Time = Tensor | float
Coefficient = TypeVar("Coefficient", Tensor, float)

LOG_SNR_MIN = -20.0
"""Where a curve that ends in pure noise is cut, in nats: at alpha = 4.5e-5 every parameterization is still defined."""

CONSTRAINTS: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "variance-preserving": lambda log_snr: (log_snr.sigmoid().sqrt(), (-log_snr).sigmoid().sqrt()),
    "variance-exploding": lambda log_snr: (torch.ones_like(log_snr), (-log_snr / 2).exp()),
    "straight": lambda log_snr: ((log_snr / 2).sigmoid(), (-log_snr / 2).sigmoid()),
}
"""alpha^2 + sigma^2 = 1 (DDPM), alpha = 1 (NCSN, EDM), alpha + sigma = 1 (flow matching)."""

LEVELS: dict[str, Callable[[float], tuple[float, float]]] = {
    "variance-preserving": lambda log_snr: (_sigmoid(log_snr) ** 0.5, _sigmoid(-log_snr) ** 0.5),
    "variance-exploding": lambda log_snr: (1.0, math.exp(-log_snr / 2)),
    "straight": lambda log_snr: (_sigmoid(log_snr / 2), _sigmoid(-log_snr / 2)),
}
"""`CONSTRAINTS` of a plain number, in a tenth of the time."""


@dataclass(frozen=True)
class Chain:
    """A process seen as T steps, in the derivation's own letters: q(x_t|x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1}, beta_t).

    Attributes:
        betas: variance added by each step, shape (T,), float64.
        alpha_bar: prod_{i <= t} (1 - beta_i), shape (T,), float64.
        increasing: whether beta_1 < ... < beta_T; some published tables are not, and only alpha_bar must decrease.
    """

    betas: Tensor
    alpha_bar: Tensor
    increasing: bool


class Instant(float):
    """A time of a grid with what a process says of it, as plain numbers: a walk does no tensor arithmetic on scalars.

    Between the times of a grid the log-SNR says everything, and the time itself is nan: see `Process.instant`.

    Attributes:
        alpha: signal coefficient, float64.
        sigma: standard deviation of the noise, float64.
        log_snr: log signal-to-noise ratio in nats, float64.
    """

    __slots__ = ("alpha", "log_snr", "sigma")
    alpha: float
    sigma: float
    log_snr: float


@dataclass(frozen=True)
class Process:
    """A forward noising process, continuous and stateless.

    Args:
        log_snr_curve: float64 times in [0, 1] -> log signal-to-noise ratio in nats, strictly decreasing, +inf at 0.
        constraint: a key of `CONSTRAINTS`.

    Raises:
        OptionError: if the constraint is unknown, the curve is not decreasing, or it does not start at the data.

    Example:
        >>> process = cosine()
        >>> alpha, sigma = process(0.5)
        >>> alpha**2 + sigma**2
        tensor(1., dtype=torch.float64)
    """

    log_snr_curve: Curve
    constraint: str = "variance-preserving"

    def __post_init__(self) -> None:
        if self.constraint not in CONSTRAINTS:
            raise unknown("constraint", self.constraint, CONSTRAINTS)
        if self.log_snr(0.0) != math.inf:
            raise OptionError(f"a process must start at the data, but its log-SNR at t = 0 is {self.log_snr(0.0):.4g}")
        self.chain(1000)

    @property
    def curve(self) -> MonotoneCurve | None:
        """The curve, if it is one that is learnt."""
        return self.log_snr_curve if isinstance(self.log_snr_curve, MonotoneCurve) else None

    def log_snr(self, t: Time) -> Tensor:
        """log(alpha_t^2 / sigma_t^2) in nats, float64, the shape of t."""
        if isinstance(t, Instant):
            return torch.tensor(t.log_snr, dtype=torch.float64)
        return self.log_snr_curve(torch.as_tensor(t, dtype=torch.float64))

    @overload
    def __call__(self, t: Instant) -> tuple[float, float]: ...  # type: ignore[overload-overlap]  # an Instant is told apart

    @overload
    def __call__(self, t: Time) -> tuple[Tensor, Tensor]: ...

    def __call__(self, t: Time) -> tuple[Tensor, Tensor] | tuple[float, float]:
        """The signal coefficient alpha_t and the noise standard deviation sigma_t, float64, the shape of t."""
        if isinstance(t, Instant):
            return t.alpha, t.sigma
        return CONSTRAINTS[self.constraint](self.log_snr(t))

    def instants(self, times: Sequence[float]) -> tuple[Instant, ...]:
        """The times with their coefficients, all computed at once.

        Example:
            >>> half, data = cosine().instants([0.5, 0.0])
            >>> half, round(half.alpha, 3), (data.alpha, data.sigma)
            (0.5, 0.703, (1.0, 0.0))
        """
        return (_instants if self.curve is None else _instants.__wrapped__)(self, tuple(times))

    def instant(self, log_snr: float) -> Instant:
        """Where the log-SNR is the given one: the constraint alone says alpha and sigma, and no time is searched for.

        Example:
            >>> even = cosine().instant(0.0)
            >>> round(even.alpha, 4), round(even.sigma, 4), float(even)
            (0.7071, 0.7071, nan)
        """
        instant = Instant(math.nan)
        (instant.alpha, instant.sigma), instant.log_snr = LEVELS[self.constraint](log_snr), log_snr
        return instant

    def rate(self, t: Time) -> Tensor:
        """-d log_snr / dt, nats per unit of time, float64, the shape of t."""
        with torch.enable_grad():
            t = torch.as_tensor(t, dtype=torch.float64).detach().requires_grad_()
            (slope,) = torch.autograd.grad(self.log_snr(t).sum(), t)
        return -slope

    def time(self, log_snr: Tensor | float) -> Tensor:
        """The time at which the process has the given log-SNR (clamped to [0, 1]), by bisection to float64 rounding."""
        target = torch.as_tensor(log_snr, dtype=torch.float64)
        low, high = torch.zeros_like(target), torch.ones_like(target)
        for _ in range(60):
            middle = (low + high) / 2
            above = self.log_snr(middle) > target
            low, high = torch.where(above, middle, low), torch.where(above, high, middle)
        return high

    @overload
    def gain(self, s: Instant, t: Instant) -> float: ...  # type: ignore[overload-overlap]

    @overload
    def gain(self, s: Time, t: Time) -> Tensor: ...

    def gain(self, s: Time, t: Time) -> Tensor | float:
        """1 - SNR_t / SNR_s: the share of what x_s knows about x_0 that x_t has lost, in [0, 1]."""
        if isinstance(s, Instant) and isinstance(t, Instant):
            return -math.expm1(t.log_snr - s.log_snr)
        return -torch.expm1(self.log_snr(t) - self.log_snr(s))

    @overload
    def transition(self, s: Instant, t: Instant) -> tuple[float, float]: ...  # type: ignore[overload-overlap]

    @overload
    def transition(self, s: Time, t: Time) -> tuple[Tensor, Tensor]: ...

    def transition(self, s: Time, t: Time) -> tuple[Tensor | float, Tensor | float]:
        """Coefficients of q(x_t|x_s) = N(alpha_{t|s} x_s, var_{t|s}), s < t.

        alpha_{t|s} = alpha_t / alpha_s,   var_{t|s} = sigma_t^2 - alpha_{t|s}^2 sigma_s^2 = sigma_t^2 gain
        """
        (alpha_s, _), (alpha_t, sigma_t) = self(s), self(t)
        return alpha_t / alpha_s, sigma_t**2 * self.gain(s, t)

    @overload
    def posterior_coefficients(self, s: Instant, t: Instant) -> tuple[float, float, float]: ...  # type: ignore[overload-overlap]

    @overload
    def posterior_coefficients(self, s: Time, t: Time) -> tuple[Tensor, Tensor, Tensor]: ...

    def posterior_coefficients(self, s: Time, t: Time) -> tuple[Tensor | float, Tensor | float, Tensor | float]:
        """(c_t, c_0, var) of q(x_s|x_t, x_0) = N(c_t x_t + c_0 x_0, var), s < t.

        c_t = alpha_{t|s} sigma_s^2 / sigma_t^2,   c_0 = alpha_s gain,   var = sigma_s^2 gain

        For two neighbours of a variance-preserving chain these are sqrt(1 - beta_t) (1 - abar_{t-1}) / (1 - abar_t),
        sqrt(abar_{t-1}) beta_t / (1 - abar_t) and beta~_t.

        Reference: Ho et al. (2020), eqs. 6-7; Kingma et al. (2021), appendix A.
        """
        (alpha_s, sigma_s), (alpha_t, sigma_t) = self(s), self(t)
        gain = self.gain(s, t)
        return (alpha_t / alpha_s) * (sigma_s / sigma_t) ** 2, alpha_s * gain, sigma_s**2 * gain

    def posterior(self, x_t: Tensor, x_0: Tensor, s: Time, t: Time) -> tuple[Tensor, Tensor]:
        """Mean and variance of q(x_s|x_t, x_0), s < t; see `posterior_coefficients` for the equation.

        Args:
            x_t: noised examples, shape (B, ...).
            x_0: data, or an estimate of it, same shape.
            s, t: times, scalars or shape (B,).

        Returns:
            The mean, shape (B, ...) in the dtype of x_t, and the variance, broadcastable against it.
        """
        c_t, c_0, var = (per_example(c, x_t) for c in self.posterior_coefficients(s, t))
        return c_t * x_t + c_0 * x_0, var

    def marginal(self, x_0: Tensor, t: Time, rng: Rng) -> tuple[Tensor, Tensor]:
        """One draw of q(x_t|x_0): x_t = alpha_t x_0 + sigma_t eps. Returns (x_t, eps)."""
        alpha_t, sigma_t = (per_example(c, x_0) for c in self(t))
        eps = randn_like(x_0, rng)
        return alpha_t * x_0 + sigma_t * eps, eps

    def chain(self, T: int) -> Chain:
        """The process as T steps t_i = i / T, after rescaling to variance-preserving form (which keeps the log-SNR).

        beta_t = 1 - abar_t / abar_{t-1},   abar_t = sigmoid(log_snr(t))

        Raises:
            OptionError: if T < 1 or alpha_bar does not decrease, naming the first step where it does not.

        Example:
            >>> linear().chain(1000).betas[[0, -1]]
            tensor([0.0001, 0.0200], dtype=torch.float64)
        """
        if T < 1:
            raise OptionError(f"a chain needs at least one step, received T = {T}")
        log_alpha_bar = logsigmoid(self.log_snr(torch.arange(T + 1, dtype=torch.float64) / T))
        decreasing = log_alpha_bar[1:] < log_alpha_bar[:-1]
        if not decreasing.all():
            first = int((~decreasing).nonzero()[0]) + 1
            raise OptionError(f"alpha_bar must decrease along the chain, but does not at step {first} of {T}")
        betas = -torch.expm1(log_alpha_bar.diff())
        return Chain(betas, log_alpha_bar[1:].exp(), bool((betas.diff() > 0).all()))

    def prior_var(self, t: Time = 1.0) -> Tensor:
        """Variance of p(x_T) = N(0, alpha_T^2 + sigma_T^2), float64: where a chain ends for data of unit variance."""
        alpha_T, sigma_T = self(t)
        return alpha_T.square() + sigma_T.square()

    def terminal_kl(self, x_0: Tensor, t: Time = 1.0) -> Tensor:
        """L_T = KL(q(x_T|x_0) || p(x_T)) in nats per example, shape (B,): what a chain has not forgotten at its end."""
        alpha_T, sigma_T = self(t)
        zero = torch.zeros_like(alpha_T)
        return gaussian.kl(alpha_T * x_0.double(), sigma_T.square(), zero, self.prior_var(t)).flatten(1).sum(1)


def per_example(coefficient: Coefficient, x: Tensor) -> Coefficient:
    """A float64 scalar or (B,) coefficient, cast once to the dtype and device of x and shaped to broadcast over it.

    A plain number stays one: it is cast where it meets x.
    """
    if isinstance(coefficient, float):
        return coefficient
    return coefficient.to(x).reshape(-1, *[1] * (x.ndim - 1))


@lru_cache(16)
def _instants(process: Process, times: tuple[float, ...]) -> tuple[Instant, ...]:
    """The instants of a grid, kept for the next walk on it."""
    at = torch.tensor(times, dtype=torch.float64)
    instants = []
    for t, alpha, sigma, log_snr in zip(times, *(c.tolist() for c in (*process(at), process.log_snr(at))), strict=True):
        instant = Instant(t)
        instant.alpha, instant.sigma, instant.log_snr = alpha, sigma, log_snr
        instants.append(instant)
    return tuple(instants)


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > 0 else math.exp(x) / (1 + math.exp(x))


# Schedules. Each returns a Process.


def _from_decay(decay: Tensor) -> Tensor:
    """log_snr = log(alpha_bar / (1 - alpha_bar)) from decay = -log alpha_bar, without overflow."""
    return -decay - torch.log(-torch.expm1(-decay))


def from_betas(betas: Sequence[float] | Tensor) -> Process:
    """A chain given by its betas, read as a continuous process: `chain(len(betas))` returns the table.

    Between two steps noise is added at a constant rate (log alpha_bar is linear in t), so the log-SNR curve does not
    depend on how many steps are taken along it.

    Raises:
        OptionError: if the table is empty or a beta is outside (0, 1), naming the first such step.

    Example:
        >>> from_betas([0.1, 0.2, 0.5]).chain(3).betas
        tensor([0.1000, 0.2000, 0.5000], dtype=torch.float64)
    """
    betas = torch.as_tensor(betas, dtype=torch.float64)
    if betas.ndim != 1 or len(betas) == 0:
        raise OptionError(f"betas must be a list of numbers in (0, 1), received shape {tuple(betas.shape)}")
    if not ((betas > 0) & (betas < 1)).all():
        first = int((~((betas > 0) & (betas < 1))).nonzero()[0])
        raise OptionError(f"beta must lie in (0, 1), but step {first + 1} of {len(betas)} has {float(betas[first])}")
    increments = -torch.log1p(-betas)
    knots = torch.cat([torch.zeros(1, dtype=torch.float64), increments.cumsum(0)])

    def log_snr(t: Tensor) -> Tensor:
        position = t * len(betas)
        step = position.detach().floor().long().clamp(0, len(betas) - 1)
        return _from_decay(knots[step] + (position - step) * increments[step])

    return Process(log_snr)


def linear(beta_min: float = 1e-4, beta_max: float = 0.02) -> Process:
    """The linear schedule of DDPM: 1000 betas from beta_min to beta_max; other T sample the same log-SNR curve.

    Reference: Ho et al. (2020), section 4.
    """
    return from_betas(torch.linspace(beta_min, beta_max, 1000, dtype=torch.float64))


def scaled_linear(beta_min: float = 0.00085, beta_max: float = 0.012) -> Process:
    """Betas whose square roots are linear over 1000 steps. Reference: Rombach et al. (2022)."""
    return from_betas(torch.linspace(beta_min**0.5, beta_max**0.5, 1000, dtype=torch.float64).square())


def cosine(offset: float = 0.008, log_snr_min: float = LOG_SNR_MIN) -> Process:
    """alpha_bar(t) = f(t) / f(0),   f(t) = cos^2(pi/2 (t + offset) / (1 + offset)).

    In place of the original's clip of the last beta at 0.999, the curve is followed until log_snr_min. The offset keeps
    the first of 1000 steps at the width of one of 256 levels; without it that step is four times finer, and a decoder
    of 256 levels costs next to nothing.

    Reference: Nichol & Dhariwal (2021), eq. 17.
    """
    quarter = math.pi / 2 / (1 + offset)
    tan_0 = math.tan(quarter * offset)

    def log_snr(t: Tensor) -> Tensor:
        angle = quarter * t
        early = -2 * torch.log1p(-(2 * (angle / 2).sin().square() + angle.sin() * tan_0).clamp(max=0.99))
        late = -2 * (torch.sin(quarter * (1 - t)) / math.cos(quarter * offset)).log()
        return _from_decay(torch.where(t < 0.5, early, late))

    return Process(_until(log_snr, log_snr_min))


def sigmoid(start: float = -3.0, end: float = 3.0, log_snr_min: float = LOG_SNR_MIN) -> Process:
    """alpha_bar(t) = (S(end) - S(v)) / (S(end) - S(start)),   v = start + t (end - start),   S the logistic function.

    Reference: Jabri et al. (2022), algorithm 1. Differences of logistic functions are written as
    S(a) - S(b) = sinh((a - b)/2) / (2 cosh(a/2) cosh(b/2)), which does not cancel.
    """
    constant = math.log(math.cosh(start / 2)) - math.log(math.cosh(end / 2))

    def log_snr(t: Tensor) -> Tensor:
        half = (end - start) / 2
        return torch.sinh(half * (1 - t)).log() - torch.sinh(half * t).log() + constant

    return Process(_until(log_snr, log_snr_min))


def edm(mean: float = -1.2, std: float = 1.2, sigma_max: float = 80.0) -> Process:
    """Variance-exploding, with log sigma normal under uniform time, cut at sigma_max.

    log sigma(t) = mean + std Phi^{-1}(t Phi((log sigma_max - mean) / std))

    Reference: Karras et al. (2022), table 1 (noise distribution).
    """
    top = torch.special.ndtr(torch.tensor((math.log(sigma_max) - mean) / std, dtype=torch.float64))
    return Process(lambda t: -2 * (mean + std * torch.special.ndtri(t * top)), "variance-exploding")


def straight() -> Process:
    """The straight path of flow matching, alpha = 1 - t and sigma = t; it ends in pure noise.

    Reference: Lipman et al. (2023); Liu et al. (2023).
    """
    return Process(lambda t: 2 * (torch.log1p(-t) - t.log()), "straight")


def log_linear(log_snr_max: float = 13.3, log_snr_min: float = -8.0, knee: float = 1e-4) -> Process:
    """Variance-preserving, with the log-SNR linear in time, from where noise is finer than a level of the data.

    log_snr(t) = log_snr_max - (log_snr_max - log_snr_min) t + 2 log(1 + knee / t)

    A chain of T steps, T well below 1 / knee, starts at log_snr_max: at 13.3 noise has a sixth of the width of one of
    256 levels, so that nothing is left for finer steps to tell. Below the knee the curve goes on to the data as other
    schedules do.

    Reference: Kingma et al. (2021), appendix B, for the ends; section 5.1, for why the shape between them only matters
    to the variance of an estimate.
    """
    return Process(lambda t: log_snr_max - (log_snr_max - log_snr_min) * t + 2 * torch.log1p(knee / t))


def learned(log_snr_max: float = 13.3, log_snr_min: float = -8.0, knee: float = 1e-4, bins: int = 64) -> Process:
    """The log-linear schedule, whose ends and shape are then learnt with the network; see `Diffusion.loss`.

    Reference: Kingma et al. (2021), section 5.
    """
    return Process(MonotoneCurve(log_snr_max, log_snr_min, knee, int(bins)))


def zero_terminal(process: Process, T: int = 1000) -> Process:
    """The process shifted and scaled in alpha so that nothing is left at its end: alpha_T = 0.

    alpha'_t = alpha_1 (alpha_t - alpha_T) / (alpha_1 - alpha_T),   t = 1, ..., T

    The first of the T steps keeps its alpha; before it, where a chain has no times, the process is as it was. The noise
    is sigma'^2 = (1 - alpha') (1 + alpha'), with 1 - alpha' made of the 1 - alpha: nothing cancels near the data.

    Reference: Lin et al. (2024), algorithm 1.

    Raises:
        OptionError: if the process is not variance-preserving.

    Example:
        >>> zero_terminal(linear())(torch.tensor([0.001, 1.0]))[0], linear()(0.001)[0]
        (tensor([0.9999, 0.0000], dtype=torch.float64), tensor(0.9999, dtype=torch.float64))
    """
    if process.constraint != "variance-preserving" or process.curve is not None:
        kind = process.constraint if process.curve is None else "learned"
        raise OptionError(
            "only a variance-preserving process is rescaled to end in pure noise, and none that is learned, received a "
            f"{kind} one: choose another schedule, or leave zero_terminal out"
        )
    (alpha_1, _), (alpha_T, _) = process(1 / T), process(1.0)

    def missing(log_snr: Tensor) -> Tensor:
        """1 - alpha = sigma^2 / (1 + alpha)."""
        return (-log_snr).sigmoid() / (1 + log_snr.sigmoid().sqrt())

    first = missing(process.log_snr(1 / T))

    def log_snr(t: Tensor) -> Tensor:
        before = process.log_snr(t)
        later = process.log_snr(t.clamp(min=1 / T))
        alpha = alpha_1 * (later.sigmoid().sqrt() - alpha_T) / (alpha_1 - alpha_T)
        one_minus = (alpha_1 * missing(later) - alpha_T * first) / (alpha_1 - alpha_T)
        return torch.where(t < 1 / T, before, 2 * alpha.log() - one_minus.log() - alpha.log1p())

    return Process(log_snr)


SCHEDULES: dict[str, Callable[..., Process]] = {
    "linear": linear,
    "scaled-linear": scaled_linear,
    "cosine": cosine,
    "sigmoid": sigmoid,
    "edm": edm,
    "straight": straight,
    "log-linear": log_linear,
    "learned": learned,
}


def named(name: str, **options: float) -> Process:
    """The schedule of that name, with its published constants where `options` gives no other.

    Raises:
        OptionError: if there is no such schedule, or it has no such constant, with the close match.

    Example:
        >>> _, sigma_1 = named("cosine", offset=0.0)(1 / 1000)
        >>> sigma_1
        tensor(0.0016, dtype=torch.float64)
    """
    if name not in SCHEDULES:
        raise unknown("schedule", name, SCHEDULES)
    allowed = signature(SCHEDULES[name]).parameters
    for option in options:
        if option not in allowed:
            raise unknown(f"constant of the {name} schedule", option, allowed)
    return SCHEDULES[name](**options)


def _until(log_snr: Curve, log_snr_min: float) -> Curve:
    """The curve stretched in time so that t = 1 is where it reaches log_snr_min."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if log_snr(torch.tensor(middle, dtype=torch.float64)) > log_snr_min:
            low = middle
        else:
            high = middle
    return lambda t: log_snr(t * low)
