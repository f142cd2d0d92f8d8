"""The likelihood along the probability-flow ODE, in nats per example: no bound, but the density of a bijection.

With log-SNR lambda for time and in variance-preserving scale, alpha^2 = sigmoid(lambda) and sigma^2 = sigmoid(-lambda),
so that d alpha/d lambda = alpha sigma^2 / 2 and d sigma/d lambda = -sigma alpha^2 / 2. Along the flow
dx = x_0_hat d alpha + eps_hat d sigma, see `sample`, where sigma eps_hat = x - alpha x_0_hat. Hence

    dx/d lambda       = alpha/2 (x_0_hat - alpha x)
    d log p/d lambda  = -div dx/d lambda
    log p(x)          = log p_T(x_T) + int div dx/d lambda d lambda    from the lambda of x to that of x_T

Nothing here is singular, the field vanishes at both ends, and every process with the same log-SNR is a rescaling of
this one: x there is sqrt(alpha_t^2 + sigma_t^2) times x here.

References: Song et al. (2021, 2011.13456), section 4.3 and appendix D.2; Chen et al. (2018), theorem 1, for the second
line; Zheng et al. (2023, 2305.03935) for log-SNR as time and for dequantization.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, Self

import torch
from torch import Tensor

from ancestral import ode
from ancestral.diffusion.denoise import Denoiser
from ancestral.diffusion.process import CONSTRAINTS, LOG_SNR_MIN, Process, per_example
from ancestral.errors import OptionError, unknown
from ancestral.gaussian import LOG_2PI, log_density
from ancestral.rng import Rng, Seeds, rand, randn, streams

MAX_STEP = 4.0
"""The longest step, in nats of log-SNR. Structure of one scale is decided over about as many, and a step looks at least
at every half of itself, so that none is passed over."""

_coefficients = CONSTRAINTS["variance-preserving"]


@dataclass(frozen=True)
class FlowLikelihood:
    """-log p(x_0) for a batch of B examples, and what it is made of, in nats.

    Attributes:
        nats: -log p(x_0), or -log P(x_0) for data on levels, shape (B,).
        prior: -log p_T(x_T), mean over draws, shape (B,).
        divergence: -int div dx/d lambda, mean over draws and probes, shape (B,).
        dequantization: log q(z|x_0) - log P(x_0|z) for data on levels, mean over draws; for real-valued data -D log
            alpha of where the flow begins; shape (B,). The three add up to `nats`, unless draws were combined by
            importance, which is below the sum.
        stderr: standard error of `nats` over probes and draws, shape (B,); None without noise, or with one draw of it.
        evaluations: of the network, int64, shape (B,); each comes with as many vector-Jacobian products as there are
            probes, or dimensions.
        latent: x_T of every draw, in the process's own scale, shape (B, draws, ...).
        kind: what -nats is to log p: "exact", up to the solver's tolerance and where the flow begins; an unbiased
            "estimate"; or a "lower bound" in expectation.
    """

    nats: Tensor
    prior: Tensor
    divergence: Tensor
    dequantization: Tensor
    stderr: Tensor | None
    evaluations: Tensor
    latent: Tensor
    kind: Literal["exact", "lower bound", "estimate"]

    def shifted(self, nats: float) -> Self:
        """The same with a constant added, such as the log-determinant of a scaling."""
        return replace(self, nats=self.nats + nats, dequantization=self.dequantization + nats)


def slope(denoiser: Denoiser, log_snr: Tensor, x: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """dx/d lambda = alpha/2 (x_0_hat - alpha x): the probability-flow ODE in variance-preserving scale.

    Args:
        denoiser: E[x_0 | x_t], of any process.
        log_snr: lambda, nats, float64, shape (B,).
        x: float64, shape (B, ...).
        dtype: of what the denoiser is given.

    Example:
        >>> from ancestral import toys
        >>> from ancestral.diffusion import denoise, process
        >>> oracle = denoise.OracleDenoiser(toys.gaussian([0.0], [[4.0]]), process.edm())
        >>> slope(oracle, torch.zeros(1).double(), torch.ones(1, 1).double())
        tensor([[0.1500]], dtype=torch.float64)
    """
    t = denoiser.process.time(log_snr.cpu())
    alpha, scale = (per_example(c, x) for c in (_coefficients(log_snr)[0], denoiser.process.prior_var(t).sqrt()))
    x_0_hat = denoiser((scale * x).to(dtype), t)
    return alpha / 2 * (x_0_hat - alpha * x)


def end(process: Process) -> tuple[float, float]:
    """Where the flow ends: the log-SNR of t = 1, at least `LOG_SNR_MIN`, and sqrt(alpha_T^2 + sigma_T^2) there.

    Example:
        >>> from ancestral.diffusion import process
        >>> log_snr_T, scale_T = end(process.straight())
        >>> log_snr_T, round(scale_T, 4)
        (-20.0, 1.0)
    """
    log_snr_T = max(float(process.log_snr(1.0)), LOG_SNR_MIN)
    return log_snr_T, float(process.prior_var(process.time(log_snr_T)).sqrt())


# Dequantization: from data on levels to a density. Each takes x_0 of shape (B, K, ...), the number of levels, lambda_0
# and rng to z of shape (B, K, ...) and log q(z|x_0) - log P(x_0|z), shape (B, K).

Dequantization = Callable[[Tensor, int, Tensor, Rng], tuple[Tensor, Tensor]]


def uniform(x_0: Tensor, levels: int, log_snr_0: Tensor, rng: Rng) -> tuple[Tensor, Tensor]:
    """z = alpha_0 (x_0 + half u), u ~ U(-1, 1), half = 1/(levels - 1): bins of one width, which do not meet.

    log q = -D log(2 alpha_0 half),   log P(x_0|z) = 0

    Reference: Theis et al. (2016), a note on the evaluation of generative models.
    """
    alpha_0, _ = _coefficients(log_snr_0)
    half, u = 1 / (levels - 1), 2 * rand(x_0.shape, rng).to(x_0) - 1
    log_q = -(2 * alpha_0 * half).log().to(x_0).expand(x_0.shape)
    return alpha_0 * (x_0 + half * u), log_q.flatten(2).sum(2)


def truncated_normal(x_0: Tensor, levels: int, log_snr_0: Tensor, rng: Rng) -> tuple[Tensor, Tensor]:
    """z = alpha_0 x_0 + sigma_0 e, with e ~ N(0, 1) between -tau and tau, half a bin: the bins do not meet.

    log q = sum_i [log N(e_i; 0, 1) - log(sigma_0 Z)],   log P(x_0|z) = 0,
    tau = alpha_0 / (sigma_0 (levels - 1)),   Z = erf(tau / sqrt 2)

    Reference: Zheng et al. (2023). The noise of log q is kept: it cancels that of log p(z).
    """
    alpha_0, sigma_0 = _coefficients(log_snr_0)
    tau = alpha_0 / (sigma_0 * (levels - 1))
    Z = torch.special.erf(tau / 2**0.5)
    e = torch.special.ndtri(0.5 + Z * (rand(x_0.shape, rng) - 0.5)).clamp(-tau, tau).to(x_0)
    log_q = -0.5 * (e.square() + LOG_2PI) - (sigma_0 * Z).log()
    return alpha_0 * x_0 + sigma_0 * e, log_q.flatten(2).sum(2)


def variational(x_0: Tensor, levels: int, log_snr_0: Tensor, rng: Rng) -> tuple[Tensor, Tensor]:
    """z ~ q(z|x_0) = N(alpha_0 x_0, sigma_0^2), and the decoder P(x_0|z) ∝ exp(-(z/alpha_0 - x_0)^2 e^lambda_0 / 2).

    The decoder is normalised over the levels from -1 to 1.

    Reference: Kingma et al. (2021), variational diffusion models.
    """
    alpha_0, sigma_0 = _coefficients(log_snr_0)
    e = randn(x_0.shape, rng, dtype=torch.float64).to(x_0)
    z = alpha_0 * x_0 + sigma_0 * e
    log_q = -0.5 * (e.square() + LOG_2PI) - sigma_0.log()
    log_mass = torch.full_like(z, -math.inf)
    for level in torch.linspace(-1, 1, levels, dtype=torch.float64):
        log_mass = torch.logaddexp(log_mass, -0.5 * log_snr_0.exp() * (z / alpha_0 - level).square())
    log_decoder = -0.5 * log_snr_0.exp() * (z / alpha_0 - x_0).square() - log_mass
    return z, (log_q - log_decoder).flatten(2).sum(2)


DEQUANTIZATIONS: dict[str, tuple[Dequantization, float]] = {
    "truncated-normal": (truncated_normal, 3.0),
    "uniform": (uniform, 3**0.5),
    "variational": (variational, 3.0),
}
"""Each with the half of a bin, in deviations sigma_0/alpha_0, that it has where it begins by default: three, as for
Kingma et al. (2021); and sqrt(3), where the uniform law has the variance of the normal one and is closest to it."""


def starts_at(dequantization: str, levels: int | None) -> float:
    """lambda_0 by default: -LOG_SNR_MIN for real values, else where the bins have the width of `DEQUANTIZATIONS`.

    Example:
        >>> round(starts_at("truncated-normal", 256), 2)
        13.28
    """
    return 2 * math.log(DEQUANTIZATIONS[dequantization][1] * (levels - 1)) if levels else -LOG_SNR_MIN


COMBINATIONS: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "mean": lambda log_w: (log_w.mean(1), log_w),
    "importance": lambda log_w: (log_w.logsumexp(1) - math.log(log_w.shape[1]), log_w.shape[1] * log_w.softmax(1)),
}
"""Of log-weights, shape (B, N): their mean, or the logarithm of the mean weight (Burda et al. 2016); and terms, shape
(B, N), the standard error of whose mean is that of the result, to first order."""


def flow_likelihood(
    denoiser: Denoiser,
    x_0: Tensor,
    *,
    rng: Seeds,
    levels: int | None = None,
    dequantization: str = "truncated-normal",
    draws: int = 1,
    combine: str = "mean",
    probes: int | None = None,
    log_snr_max: float | None = None,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    terminal: Callable[[Tensor], Tensor] | None = None,
) -> FlowLikelihood:
    """-log p(x_0) by the probability-flow ODE, from log-SNR `log_snr_max` to the end of the process.

    Real-valued data begin at alpha_0 x_0, without noise: log p(x_0) = log p_0(alpha_0 x_0) + D log alpha_0, with an
    error proportional to exp(-log_snr_max). For data on levels, with z ~ q(z|x_0) and the weight of a draw

        w = p(z) P(x_0|z) / q(z|x_0),   -log P(x_0) <= -E[log w],   -log P(x_0) <= -E[log mean_k w_k]  (tighter)

    The solver follows x and, for every probe v, the integral of v^T J v. A step must keep two root mean squares within
    the tolerance: of the errors of x over its coordinates, and of those of the integrals over the probes, in nats per
    dimension. The second bounds the error of their mean too, and their number, one against D, cannot hide it.

    Reference: Song et al. (2021, 2011.13456), appendix D.2, whose published code shares one step size among a batch.

    Args:
        denoiser: E[x_0 | x_t], asked in the dtype of x_0 for those examples that are on their way, in any number; one
            that is clipped has a divergence with jumps, which cost steps.
        x_0: examples in the model's units, shape (B, ...); on `levels` values in [-1, 1] when there are levels.
        rng: a seed, one per example, or generators.
        levels: number of levels of the data; None for a real-valued density.
        dequantization: a key of `DEQUANTIZATIONS`, for data on levels.
        draws: of z per example.
        combine: of draws, a key of `COMBINATIONS`.
        probes: Rademacher probes of the divergence per draw; None for the exact one, from D products.
        log_snr_max: lambda_0; by default -LOG_SNR_MIN, or for data on levels as in `DEQUANTIZATIONS`. A network that
            has never seen so little noise should start where it has.
        rtol, atol: tolerances of a step. In float32, below 1e-6 they are those of rounding.
        terminal: log-density of x_T in the process's own scale at `end(process)`, (N, ...) -> (N,), where the law there
            is known; by default that of the chain, N(0, alpha_T^2 + sigma_T^2).

    Returns:
        Nats per example and their parts, float64.

    Raises:
        OptionError: if a name is unknown, a number is out of range, an example does not arrive, or probes would be
            combined by importance, which is not a bound.

    Example:
        >>> from ancestral import toys
        >>> from ancestral.diffusion import denoise, process
        >>> from ancestral.rng import stream
        >>> toy = toys.named("ring-8")
        >>> oracle = denoise.OracleDenoiser(toy, process.straight())
        >>> x_0 = toy.sample(5, rng=stream(0))
        >>> result = flow_likelihood(oracle, x_0, rng=0)
        >>> bool((result.nats + toy.log_prob(x_0)).abs().max() < 1e-3), result.kind
        (True, 'exact')
    """
    if combine not in COMBINATIONS:
        raise unknown("combination", combine, COMBINATIONS)
    if probes is not None and (probes < 1 or combine == "importance"):
        raise OptionError(
            f"received {probes} probes and combine = {combine!r}: give at least one and 'mean', since the exponential "
            "of a noisy log-density is too large on average, or probes=None for exact divergences"
        )
    B, shape, rng = len(x_0), x_0.shape[1:], streams(rng, len(x_0))
    log_snr_0, z, cost = _enter(x_0, levels, dequantization, draws, log_snr_max, rng)
    v = None
    if probes is not None:
        v = ode.rademacher((B, draws, probes, *shape), rng).to(z).flatten(0, 1).movedim(1, 0)
    x_T, integral, evaluations = _integrate(denoiser, z.flatten(0, 1), v, log_snr_0, x_0.dtype, rtol, atol)

    _, scale_T = end(denoiser.process)
    if terminal is None:
        log_p_T = log_density(x_T, z.new_zeros(()), z.new_ones(())).flatten(1).sum(1)
    else:
        log_p_T = terminal(scale_T * x_T).to(z) + shape.numel() * math.log(scale_T)
    log_p_T, integral = log_p_T.reshape(B, draws), integral.reshape(B, draws, -1)
    log_w = (log_p_T - cost)[:, :, None] + integral
    log_p, terms = COMBINATIONS[combine](log_w[:, 0] if levels is None else log_w.mean(2))
    n = terms.shape[1]
    return FlowLikelihood(
        nats=-log_p,
        prior=-log_p_T.mean(1),
        divergence=-integral.mean((1, 2)),
        dequantization=cost.mean(1),
        stderr=terms.std(1) / n**0.5 if n > 1 else None,
        evaluations=evaluations.reshape(B, draws).sum(1),
        latent=(scale_T * x_T).reshape(B, draws, *shape),
        kind="lower bound" if levels is not None else "exact" if probes is None else "estimate",
    )


def _enter(
    x_0: Tensor, levels: int | None, dequantization: str, draws: int, log_snr_0: float | None, rng: Rng
) -> tuple[float, Tensor, Tensor]:
    """lambda_0; z, shape (B, draws, ...); and what log p(z) exceeds log w by, shape (B, draws)."""
    if dequantization not in DEQUANTIZATIONS:
        raise unknown("dequantization", dequantization, DEQUANTIZATIONS)
    if draws < 1 or (levels is None and draws > 1):
        raise OptionError(
            f"received {draws} draws: data on levels takes 1 or more, real-valued data has nothing to draw"
        )
    x_0 = x_0.double()[:, None].expand(-1, draws, *x_0.shape[1:])
    if levels is None:
        log_snr_0 = starts_at(dequantization, None) if log_snr_0 is None else log_snr_0
        alpha_0 = _alpha(log_snr_0)
        return log_snr_0, alpha_0 * x_0, x_0.new_full(x_0.shape[:2], -x_0.shape[2:].numel() * math.log(alpha_0))
    dequantize, _ = DEQUANTIZATIONS[dequantization]
    log_snr_0 = starts_at(dequantization, levels) if log_snr_0 is None else log_snr_0
    return log_snr_0, *dequantize(x_0, levels, torch.tensor(log_snr_0, dtype=torch.float64), rng)


def _integrate(
    denoiser: Denoiser, z: Tensor, v: Tensor | None, log_snr_0: float, dtype: torch.dtype, rtol: float, atol: float
) -> tuple[Tensor, Tensor, Tensor]:
    """x_T in variance-preserving scale; int div dx/d lambda d lambda for each of the probes v, (N, P); evaluations."""
    log_snr_T, _ = end(denoiser.process)
    if log_snr_0 <= log_snr_T:
        raise OptionError(f"received log_snr_max {log_snr_0:g}: this process ends at {log_snr_T:.4g}, start above")
    N, D, P = len(z), z.shape[1:].numel(), 1 if v is None else len(v)

    def f(log_snr: Tensor, state: Tensor, index: Tensor) -> Tensor:
        field, x = partial(slope, denoiser, log_snr, dtype=dtype), state[:, :D].reshape(-1, *z.shape[1:])
        if v is None:
            dx, div = ode.divergence_exact(field, x)
        else:
            dx, div = ode.divergence_hutchinson(field, x, v[:, index])
        return torch.cat([dx.flatten(1), div.reshape(P, -1).T / D], 1)

    def both(error: Tensor) -> Tensor:
        return torch.maximum(ode.rms(error[:, :D]), ode.rms(error[:, D:]))

    state = torch.cat([z.reshape(N, D), z.new_zeros(N, P)], 1)
    state, evaluations, _ = ode.dormand_prince(
        f, state, log_snr_0, log_snr_T, rtol=rtol, atol=atol, max_step=MAX_STEP, norm=both
    )
    return state[:, :D].reshape(z.shape), D * state[:, D:], evaluations


def encode(
    denoiser: Denoiser, x_0: Tensor, *, log_snr_max: float = -LOG_SNR_MIN, rtol: float = 1e-5, atol: float = 1e-5
) -> Tensor:
    """The latent x_T of each example, in the process's own scale, shape and dtype of x_0; see `flow_likelihood`.

    Example:
        >>> from ancestral import toys
        >>> from ancestral.diffusion import denoise, process
        >>> oracle = denoise.OracleDenoiser(toys.gaussian([0.0], [[4.0]]), process.cosine())
        >>> x_0 = torch.tensor([[2.0], [-1.0]])
        >>> encode(oracle, x_0), decode(oracle, encode(oracle, x_0))
        (tensor([[ 1.0000],
                [-0.5000]]), tensor([[ 2.0000],
                [-1.0000]]))
    """
    (log_snr_T, scale_T), alpha_0 = end(denoiser.process), _alpha(log_snr_max)
    return scale_T * _follow(denoiser, alpha_0 * x_0, log_snr_max, log_snr_T, rtol, atol)


def decode(
    denoiser: Denoiser, x_T: Tensor, *, log_snr_max: float = -LOG_SNR_MIN, rtol: float = 1e-5, atol: float = 1e-5
) -> Tensor:
    """The example of each latent: the inverse of `encode` up to the solver's tolerance."""
    (log_snr_T, scale_T), alpha_0 = end(denoiser.process), _alpha(log_snr_max)
    return _follow(denoiser, x_T / scale_T, log_snr_T, log_snr_max, rtol, atol) / alpha_0


def _alpha(log_snr: float) -> float:
    return float(_coefficients(torch.tensor(log_snr, dtype=torch.float64))[0])


def _follow(denoiser: Denoiser, x: Tensor, start: float, stop: float, rtol: float, atol: float) -> Tensor:
    def f(log_snr: Tensor, state: Tensor, index: Tensor) -> Tensor:
        return slope(denoiser, log_snr, state, x.dtype)

    return ode.dormand_prince(f, x.double(), start, stop, rtol=rtol, atol=atol, max_step=MAX_STEP).x.to(x)
