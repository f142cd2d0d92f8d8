"""The denoiser: whatever a network predicts, everything downstream sees E[x_0 | x_t].

    x_0_hat = c_skip x_t + c_out net(c_in x_t, c_noise)

One row of `ROWS` per parameterization gives (c_skip, c_out); c_in brings the input to unit variance for data of
variance sigma_data^2, and c_noise is the log-SNR. With the squared error of x_0_hat weighted by 1 / c_out^2, every
row recovers its historical loss.
"""

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Protocol, overload, runtime_checkable

import torch
from torch import Tensor, nn

from ancestral.diffusion.process import CONSTRAINTS, LOG_SNR_MIN, Instant, Process, Time, per_example
from ancestral.errors import OptionError, unknown
from ancestral.labels import checked

Row = Callable[[Any, Any, float], tuple[Any, Any]]  # of tensors, or of numbers

_COUNTING = threading.Lock()  # not one for each network: a lock cannot be copied as networks are

ROWS: dict[str, Row] = {
    "x0": lambda a, s, d: (0 * a, 1 + 0 * a),
    "eps": lambda a, s, d: (1 / a, -s / a),
    "score": lambda a, s, d: (1 / a, s**2 / a),
    "v": lambda a, s, d: (a / (a**2 + s**2), -s / (a**2 + s**2)),
    "velocity": lambda a, s, d: (1 / (a + s), -s / (a + s)),
    "edm": lambda a, s, d: (a * d**2 / (a**2 * d**2 + s**2), s * d / (a**2 * d**2 + s**2) ** 0.5),
}
"""(alpha, sigma, sigma_data) -> (c_skip, c_out). References: Ho et al. (2020), eq. 15; Song & Ermon (2019), eq. 5;
Salimans & Ho (2022), appendix D; Lipman et al. (2023), eq. 23; Karras et al. (2022), table 1."""


class Denoiser(nn.Module, ABC):
    """E[x_0 | x_t] for one process, and the same knowledge as noise, score or velocity."""

    process: Process

    @abstractmethod
    def forward(self, x_t: Tensor, t: Time) -> Tensor:
        """E[x_0 | x_t], the shape and dtype of x_t; t is a scalar or one time per example, shape (B,)."""

    def affine(self, x_t: Tensor, t: Instant, a: float, b: float) -> Tensor:
        """a x_t + b E[x_0 | x_t], which is all that a step of most samplers needs of a guess."""
        return (x_t * a).add_(self(x_t, t), alpha=b)

    def eps(self, x_t: Tensor, t: Time) -> Tensor:
        """E[eps | x_t] = (x_t - alpha_t E[x_0|x_t]) / sigma_t."""
        alpha_t, sigma_t = (per_example(c, x_t) for c in self.process(t))
        return (x_t - alpha_t * self(x_t, t)) / sigma_t

    def score(self, x_t: Tensor, t: Time) -> Tensor:
        """grad log q(x_t) = (alpha_t E[x_0|x_t] - x_t) / sigma_t^2."""
        alpha_t, sigma_t = (per_example(c, x_t) for c in self.process(t))
        return (alpha_t * self(x_t, t) - x_t) / sigma_t**2

    def velocity(self, x_t: Tensor, t: Time) -> Tensor:
        """E[eps - x_0 | x_t]: dx/dt along the straight path."""
        return self.eps(x_t, t) - self(x_t, t)


@runtime_checkable
class HasVariance(Protocol):
    """A denoiser that also knows how uncertain it is."""

    def moments(self, x_t: Tensor, t: Time) -> tuple[Tensor, Tensor]:
        """E[x_0 | x_t] and Var[x_0 | x_t] per element, each the shape of x_t."""
        ...


def moments(denoiser: Denoiser, x_t: Tensor, t: Time) -> tuple[Tensor, Tensor]:
    """E[x_0 | x_t] and Var[x_0 | x_t] from a denoiser that knows both, in one evaluation.

    Raises:
        OptionError: if this one does not.
    """
    if not isinstance(denoiser, HasVariance):
        raise OptionError(
            f"reverse variance 'optimal' needs a denoiser that knows Var[x_0|x_t], and {type(denoiser).__name__} "
            "does not: use 'beta' or 'fixed-small'"
        )
    return denoiser.moments(x_t, t)


@runtime_checkable
class HasFraction(Protocol):
    """A denoiser that was trained to know its reverse variance too."""

    def halves(self, x_t: Tensor, t: Time) -> tuple[Tensor, Tensor]:
        """E[x_0 | x_t], and where the reverse variance lies between beta~ (0) and var_{t|s} (1), per element."""
        ...


def halves(denoiser: Denoiser, x_t: Tensor, t: Time) -> tuple[Tensor, Tensor]:
    """E[x_0 | x_t] and the learned place of the reverse variance, from a denoiser that knows both.

    Raises:
        OptionError: if this one does not.
    """
    if not isinstance(denoiser, HasFraction):
        raise OptionError(
            f"reverse variance 'learned' needs a network that puts one out, and {type(denoiser).__name__} has none: "
            "use 'beta' or 'fixed-small'"
        )
    return denoiser.halves(x_t, t)


class NetworkDenoiser(Denoiser):
    """A network read as a denoiser through one row of `ROWS`.

    Args:
        net: (c_in x_t, c_noise) -> output of the shape of x_t, with c_noise the log-SNR in nats, shape (B,), clamped
            to +-20; one that knows classes has their number in `classes`, and takes labels as a third argument.
        process: the forward process that noised the data.
        predicts: which row.
        sigma_data: standard deviation of the data in the model's units.

    Raises:
        OptionError: if the row is unknown, or divides by an alpha that is zero at the end of the process.
    """

    def __init__(self, net: nn.Module, process: Process, predicts: str = "v", sigma_data: float = 1.0) -> None:
        super().__init__()
        if predicts not in ROWS:
            raise unknown("parameterization", predicts, ROWS)
        if getattr(net, "posterior", False) and predicts != "x0":
            raise OptionError(f"a network with a posterior over levels predicts 'x0', received {predicts!r}")
        self.net, self.process, self.predicts, self.sigma_data = net, process, predicts, sigma_data
        self.curve = process.curve  # which is learnt with the network, if there is one
        self._asked = [0]  # in a list, since attributes of modules are slow to set
        if not torch.stack(self.coefficients(1.0)).isfinite().all():
            raise OptionError(
                f"predicting {predicts!r} is undefined at t = 1 of this process, where no signal is left (alpha = 0): "
                "predict 'v', 'velocity', 'x0' or 'edm', or choose a schedule that keeps some signal"
            )

    @overload
    def coefficients(self, t: Instant) -> tuple[float, float, float]: ...  # type: ignore[overload-overlap]

    @overload
    def coefficients(self, t: Time) -> tuple[Tensor, Tensor, Tensor]: ...

    def coefficients(self, t: Time) -> tuple[Tensor | float, Tensor | float, Tensor | float]:
        """(c_skip, c_out, c_in) at t, float64, the shape of t."""
        if isinstance(t, Instant):
            return _scales(ROWS[self.predicts], t.alpha, t.sigma, self.sigma_data)
        return _scales.__wrapped__(ROWS[self.predicts], *self.process(t), self.sigma_data)

    @property
    def asked(self) -> int:
        """How many examples the network has been given, by all threads together."""
        return self._asked[0]

    @asked.setter
    def asked(self, n: int) -> None:
        self._asked[0] = n

    @property
    def posterior(self) -> bool:
        """Whether the network puts out a posterior over levels, and so knows Var[x_0 | x_t] too."""
        return getattr(self.net, "posterior", False)

    @property
    def classes(self) -> int | None:
        """How many classes the network knows, or None. The label of that number stands for any of them."""
        return getattr(self.net, "classes", None)

    def forward(self, x_t: Tensor, t: Time, labels: Tensor | None = None) -> Tensor:
        """E[x_0 | x_t] = c_skip x_t + c_out net(c_in x_t, c_noise), or that of each example's class."""
        if isinstance(t, Instant):
            return self.affine(x_t, t, 0.0, 1.0, labels)
        c_skip, c_out, c_in = (per_example(c, x_t) for c in self.coefficients(t))
        out = self._ask(self.net, c_in * x_t, t, labels)
        return c_skip * x_t + c_out * out.to(x_t.dtype)

    def affine(self, x_t: Tensor, t: Instant, a: float, b: float, labels: Tensor | None = None) -> Tensor:
        """a x_t + b E[x_0 | x_t] = (a + b c_skip) x_t + b c_out net(c_in x_t, c_noise): two operations, or one."""
        c_skip, c_out, c_in = self.coefficients(t)
        net = self._modules["net"]  # which takes a module less time than self.net
        out = self._ask(net, x_t if abs(c_in - 1) < 1e-15 else x_t * c_in, t, labels)
        own = a + b * c_skip
        if abs(own) <= 1e-15 * abs(a):  # what the network puts out is what is asked for
            return (out * (b * c_out)).to(x_t.dtype)
        return (x_t * own).add_(out, alpha=b * c_out)

    def moments(self, x_t: Tensor, t: Time, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """E[x_0 | x_t] and Var[x_0 | x_t], from a network that puts out a posterior over levels."""
        if not self.posterior:
            raise OptionError(
                "reverse variance 'optimal' needs a network that knows Var[x_0|x_t], and this one does not: train with "
                "--set unet.posterior=true, or use 'beta' or 'fixed-small'"
            )
        c_in = per_example(self.coefficients(t)[2], x_t)
        mean, var = self._ask(self.net.moments, c_in * x_t, t, labels)
        return mean.to(x_t.dtype), var.to(x_t.dtype)

    def halves(self, x_t: Tensor, t: Time, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """E[x_0 | x_t] and the place of the reverse variance, (1 + v) / 2 of what the network puts out."""
        if not getattr(self.net, "variance", False):
            raise OptionError(
                "reverse variance 'learned' needs a network that puts one out, and this one does not: train with "
                "--set unet.variance=true (or dit.variance, mlp.variance), or use 'beta' or 'fixed-small'"
            )
        c_skip, c_out, c_in = (per_example(c, x_t) for c in self.coefficients(t))
        first, second = self._ask(self.net.halves, c_in * x_t, t, labels)
        return c_skip * x_t + c_out * first.to(x_t.dtype), (1 + second.to(x_t.dtype)) / 2

    def _ask(self, net: Any, x: Tensor, t: Time, labels: Tensor | None) -> Any:
        if isinstance(t, Instant):
            c_noise = _level(t.log_snr, x.shape[0], x.dtype, x.device)
        else:
            c_noise = self.process.log_snr(t).clamp(LOG_SNR_MIN, -LOG_SNR_MIN).to(x).expand(len(x))
        given = () if labels is None else (labels,)
        with _COUNTING:
            self._asked[0] += x.shape[0]
        if torch.is_grad_enabled() or torch.is_inference_mode_enabled():
            return net(x, c_noise, *given)
        with torch.inference_mode():  # no_grad, and less is kept in mind of each tensor
            return net(x, c_noise, *given)


@lru_cache(4096)
def _scales(row: Row, alpha: Any, sigma: Any, sigma_data: float) -> tuple[Any, Any, Any]:
    """(c_skip, c_out, c_in): of numbers, kept for the next walk on the grid."""
    return *row(alpha, sigma, sigma_data), (alpha**2 * sigma_data**2 + sigma**2) ** -0.5


@lru_cache(256)
def _level(log_snr: float, n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The log-SNR as networks are told it, for n examples: one for all walks that pass by."""
    with torch.inference_mode(False):
        return torch.full((n,), min(max(log_snr, LOG_SNR_MIN), -LOG_SNR_MIN), dtype=dtype, device=device)


class Given(Denoiser):
    """E[x_0 | x_t, label]: a network that knows classes, told the class of each example.

    Args:
        denoiser: whose network knows classes.
        labels: index of the class of each example, int64, shape (B,).

    Raises:
        OptionError: if the network knows no classes, or not these.
    """

    def __init__(self, denoiser: NetworkDenoiser, labels: Tensor) -> None:
        super().__init__()
        self.denoiser, self.process = denoiser, denoiser.process
        self.labels = checked(labels, len(labels), denoiser.classes)

    def forward(self, x_t: Tensor, t: Time) -> Tensor:
        """E[x_0 | x_t, label]."""
        return self.denoiser(x_t, t, self.labels)

    def affine(self, x_t: Tensor, t: Instant, a: float, b: float) -> Tensor:
        """a x_t + b E[x_0 | x_t, label]."""
        return self.denoiser.affine(x_t, t, a, b, self.labels)

    def moments(self, x_t: Tensor, t: Time) -> tuple[Tensor, Tensor]:
        """E[x_0 | x_t, label] and Var[x_0 | x_t, label], from a network that knows both."""
        return self.denoiser.moments(x_t, t, self.labels)

    def halves(self, x_t: Tensor, t: Time) -> tuple[Tensor, Tensor]:
        """E[x_0 | x_t, label] and the place of the reverse variance."""
        return self.denoiser.halves(x_t, t, self.labels)


class Posterior(Protocol):
    """A law whose posterior under Gaussian noise is known, such as a `toys.Toy`."""

    def posterior_mean(self, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor: ...

    def posterior_cov(self, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor: ...


class OracleDenoiser(Denoiser):
    """The exact denoiser of a law that is known in closed form: every sampler and bound can be tested against it."""

    def __init__(self, law: Posterior, process: Process) -> None:
        super().__init__()
        self.law, self.process = law, process

    def forward(self, x_t: Tensor, t: Time) -> Tensor:
        """E[x_0 | x_t], computed in float64."""
        return self.law.posterior_mean(x_t.double(), *self.process(t)).to(x_t.dtype)

    def moments(self, x_t: Tensor, t: Time) -> tuple[Tensor, Tensor]:
        """E[x_0 | x_t], and the diagonal of Cov[x_0 | x_t]."""
        covariance = self.law.posterior_cov(x_t.double(), *self.process(t))
        return self(x_t, t), covariance.diagonal(dim1=-2, dim2=-1).to(x_t.dtype)


class ExactNetwork(nn.Module):
    """The network that a parameterization would have to learn: it inverts the row around the exact denoiser.

    net(c_in x_t, log_snr) = (E[x_0|x_t] - c_skip x_t) / c_out
    """

    def __init__(self, law: Posterior, process: Process, predicts: str) -> None:
        super().__init__()
        self.law, self.level, self.row = law, CONSTRAINTS[process.constraint], ROWS[predicts]

    def forward(self, x: Tensor, log_snr: Tensor) -> Tensor:
        """What the row turns into E[x_0 | x_t], for vectors, shape (B, D)."""
        alpha, sigma = self.level(log_snr)
        c_skip, c_out = (c[:, None] for c in self.row(alpha, sigma, 1.0))
        x_t = x * (alpha**2 + sigma**2).sqrt()[:, None]
        return (self.law.posterior_mean(x_t, alpha, sigma) - c_skip * x_t) / c_out


def exact(law: Posterior, process: Process, predicts: str) -> NetworkDenoiser:
    """The exact denoiser of a law, reached through the given parameterization, as a trained network would be.

    Example:
        >>> from ancestral import toys
        >>> from ancestral.diffusion.process import cosine
        >>> denoiser, x_t = exact(toys.named("mixture"), cosine(), "v"), torch.zeros(1, 2).double()
        >>> torch.allclose(denoiser(x_t, 0.5), OracleDenoiser(toys.named("mixture"), cosine())(x_t, 0.5))
        True
    """
    return NetworkDenoiser(ExactNetwork(law, process, predicts), process, predicts)


class Clipped(Denoiser):
    """A denoiser whose guess is moved into the range of the data, which can only bring it closer to any x_0 there."""

    def __init__(self, denoiser: Denoiser, low: float = -1.0, high: float = 1.0) -> None:
        super().__init__()
        self.denoiser, self.process, self.low, self.high = denoiser, denoiser.process, low, high

    def forward(self, x_t: Tensor, t: Time) -> Tensor:
        """E[x_0 | x_t] clipped to [low, high]."""
        return self.denoiser(x_t, t).clamp(self.low, self.high)

    def moments(self, x_t: Tensor, t: Time) -> tuple[Tensor, Tensor]:
        """The mean, clipped, and the variance of a denoiser that knows it."""
        mean, var = moments(self.denoiser, x_t, t)
        return mean.clamp(self.low, self.high), var

    def halves(self, x_t: Tensor, t: Time) -> tuple[Tensor, Tensor]:
        """The mean, clipped, and the place of the reverse variance of a denoiser that learned it."""
        mean, fraction = halves(self.denoiser, x_t, t)
        return mean.clamp(self.low, self.high), fraction


FIXED = ("beta", "fixed-large", "fixed-small")
VARIANCES = (*FIXED, "learned", "optimal")
"""What the reverse chain may take as Sigma_theta; `likelihood.decoder_nats` says how they differ in the last step."""


def reverse(
    denoiser: Denoiser, x_t: Tensor, s: Time, t: Time, variance: str = "fixed-small"
) -> tuple[Tensor, Tensor, Tensor]:
    """One transition of the learned reverse chain, p_theta(x_s|x_t) = N(mu_theta, Sigma_theta), s < t.

    mu_theta = c_t x_t + c_0 x_0_hat, the posterior q(x_s|x_t, x_0) with the denoiser's guess in place of x_0, and

        "beta", "fixed-large"   Sigma_theta = var_{t|s}
        "fixed-small"           Sigma_theta = beta~ = sigma_s^2 gain
        "optimal"               Sigma_theta = beta~ + c_0^2 Var[x_0|x_t]     (needs a denoiser that `HasVariance`)
        "learned"               log Sigma_theta = f log var_{t|s} + (1 - f) log beta~      (one that `HasFraction`)

    References: Ho et al. (2020), section 3.2; Bao et al. (2022), theorem 1; Nichol & Dhariwal (2021), eq. 15.

    Args:
        denoiser: E[x_0 | x_t].
        x_t: shape (B, ...).
        s, t: times, scalars or shape (B,).
        variance: one of `VARIANCES`.

    Returns:
        mu_theta, Sigma_theta (broadcastable) and x_0_hat, in the dtype of x_t.

    Raises:
        OptionError: if the variance is unknown, or optimal without a denoiser that knows it.
    """
    if variance not in VARIANCES:
        raise unknown("reverse variance", variance, VARIANCES)
    process = denoiser.process
    c_t, c_0, beta_tilde = (per_example(c, x_t) for c in process.posterior_coefficients(s, t))
    if variance == "learned":
        x_0_hat, fraction = halves(denoiser, x_t, t)
        return c_t * x_t + c_0 * x_0_hat, between(process, s, t, fraction), x_0_hat
    if variance == "optimal":
        x_0_hat, var_0 = moments(denoiser, x_t, t)
        return c_t * x_t + c_0 * x_0_hat, beta_tilde + c_0**2 * var_0, x_0_hat
    x_0_hat = denoiser(x_t, t)
    var = beta_tilde if variance == "fixed-small" else per_example(process.transition(s, t)[1], x_t)
    return c_t * x_t + c_0 * x_0_hat, var, x_0_hat


def between(process: Process, s: Time, t: Time, fraction: Tensor) -> Tensor:
    """The learned reverse variance: log Sigma = f log var_{t|s} + (1 - f) log beta~, the shape of f, s < t."""
    wide = per_example(process.transition(s, t)[1], fraction)
    beta_tilde = per_example(process.posterior_coefficients(s, t)[2], fraction)
    return wide * (beta_tilde / wide) ** (1 - fraction)
