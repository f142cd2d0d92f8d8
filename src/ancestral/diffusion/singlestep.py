"""Steps that remember nothing: from time t to time s, by what the network says at t and perhaps once more.

The probability-flow ODE is written without reference to time, as d(x / alpha) = eps_hat d(sigma / alpha) or as
d(x / sigma) = x_0_hat d(alpha / sigma) (Song et al. 2021, 2011.13456, eq. 13). Either holds for every process. As
measured, the first is nearer where steps are short, and the second has no singularity at alpha = 0.
"""

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ancestral import langevin, ode
from ancestral.diffusion import flow
from ancestral.diffusion.denoise import FIXED, Denoiser, reverse
from ancestral.diffusion.process import LOG_SNR_MIN, Instant, Process
from ancestral.errors import OptionError
from ancestral.rng import Rng, randn_like


def drawn(x: Tensor, rng: Rng | None, why: str) -> Tensor:
    """Fresh noise of the shape of x, for an option that asks for it.

    Raises:
        OptionError: if there is none to be had.
    """
    if rng is None:
        raise OptionError(f"{why} draws noise: pass rng=, one generator or one per example")
    return randn_like(x, rng)


def ancestral_step(
    denoiser: Denoiser, x: Tensor, t: Instant, s: Instant, memory: None, *, rng: Rng, variance: str = "fixed-small"
) -> tuple[Tensor, None]:
    """x_s ~ p_theta(x_s|x_t) = N(mu_theta, Sigma_theta); the last step, to the data, returns the mean.

    Reference: Ho et al. (2020), algorithm 2. `variance` is one of `denoise.VARIANCES`.
    """
    if variance in FIXED:
        c_t, c_0, var = denoiser.process.posterior_coefficients(s, t)
        var = var if variance == "fixed-small" else denoiser.process.transition(s, t)[1]
        x = denoiser.affine(x, t, c_t, c_0)
        return (x.add_(randn_like(x, rng), alpha=var**0.5) if s.sigma else x), memory
    mean, variances, _ = reverse(denoiser, x, s, t, variance)
    return (mean.add_(variances**0.5 * randn_like(x, rng)) if s.sigma else mean), memory


def ddim_step(
    denoiser: Denoiser, x: Tensor, t: Instant, s: Instant, memory: None, *, rng: Rng | None = None, eta: float = 0.0
) -> tuple[Tensor, None]:
    """x_s = alpha_s x_0_hat + sqrt(sigma_s^2 - eta^2 beta~) eps_hat + eta sqrt(beta~) z.

    eta scales the standard deviation of fresh noise: 0 is deterministic, 1 is ancestral sampling.

    Reference: Song, Meng & Ermon (2021), eqs. 12 and 16.
    """
    if not 0 <= eta <= 1:
        raise OptionError(f"DDIM's eta is the share of fresh noise and lies in [0, 1], received {eta}")
    fresh = eta**2 * denoiser.process.gain(s, t) if eta else 0.0
    x = denoiser.affine(x, t, *_ddim(t, s.alpha, s.sigma * (1 - fresh) ** 0.5))
    if eta == 0 or s.sigma == 0:
        return x, memory
    return x.add_(drawn(x, rng, f"DDIM with eta = {eta}"), alpha=s.sigma * fresh**0.5), memory


def euler_step(
    denoiser: Denoiser, x: Tensor, t: Instant, s: Instant, memory: None, *, rng: Rng | None = None, churn: float = 0.0
) -> tuple[Tensor, None]:
    """x_s = x_t + (alpha_s - alpha_t) x_0_hat + (sigma_s - sigma_t) eps_hat, which equals DDIM with eta = 0.

    With churn, from more noise than x_t has: see `heun_step`.
    """
    x, t = _churned(denoiser.process, x, t, churn, rng)
    return denoiser.affine(x, t, *_ddim(t, s.alpha, s.sigma)), memory


def heun_step(
    denoiser: Denoiser, x: Tensor, t: Instant, s: Instant, memory: None, *, rng: Rng | None = None, churn: float = 0.0
) -> tuple[Tensor, None]:
    """Euler to s, x_e, then again from t with a mean of the slopes at both ends; Euler alone where sigma_s = 0.

    x_s = (1 - w) x_e + w times Euler's step from x_t with the guess at x_e. Of the noise, as Karras et al. do, but with
    the weight that is exact while eps_hat is linear in log-SNR, w = 1/h - 1/(e^h - 1). Of the data, with w = 1/2, where
    a step would multiply an error of eps_hat by more than 2: by alpha_s (rho_t - rho_s), rho = sigma / alpha.

    With churn, x_t is first taken up to where sigma / alpha is 1 + churn times as much, and the step begins there.

    References: Karras et al. (2022), algorithms 1 and 2, whose gamma_i is churn; Cox & Matthews (2002), ETD2RK.
    """
    x, t = _churned(denoiser.process, x, t, churn, rng)
    x_e = denoiser.affine(x, t, *_ddim(t, s.alpha, s.sigma))
    if s.sigma == 0:
        return x_e, memory
    h = (s.log_snr - t.log_snr) / 2
    if s.alpha * t.sigma - s.sigma * t.alpha > 2 * t.alpha:
        w, by_x, by_e, by_x_0 = 0.5, s.sigma / t.sigma, 0.0, s.alpha * -math.expm1(-h)
    else:
        w = 1 / h - 1 / math.expm1(h) if abs(h) > 1e-4 else 0.5 - h / 12  # to h^3 / 720: parts cancel
        by_x, by_e, by_x_0 = s.alpha / t.alpha, -math.expm1(h), s.alpha * math.expm1(h)
    return denoiser.affine(x_e, s, 1 - w + w * by_e, w * by_x_0).add_(x, alpha=w * by_x), memory


def midpoint_step(
    denoiser: Denoiser, x: Tensor, t: Instant, s: Instant, memory: None, *, rng: Rng | None = None
) -> tuple[Tensor, None]:
    """Euler to the middle in log-SNR; x_s = (alpha_s / alpha_t) x_t + sigma_s (1 - e^h) eps_hat, of the noise there.

    A step with h > 1 is that of `dpmpp_2s_step`, with the guess of x_0 there: errors of the noise grow by e^h.

    Reference: Lu et al. (2022), DPM-Solver-2; Karras et al. (2022), appendix D.2.
    """
    h = (s.log_snr - t.log_snr) / 2
    if h > 1 or math.isinf(h):
        return dpmpp_2s_step(denoiser, x, t, s, memory)
    middle = denoiser.process.instant((t.log_snr + s.log_snr) / 2)
    x_m = denoiser.affine(x, t, *_ddim(t, middle.alpha, middle.sigma))
    b = s.sigma * -math.expm1(h) / middle.sigma
    return denoiser.affine(x_m, middle, b, -b * middle.alpha).add_(x, alpha=s.alpha / t.alpha), memory


def dpmpp_2s_step(
    denoiser: Denoiser, x: Tensor, t: Instant, s: Instant, memory: None, *, rng: Rng | None = None
) -> tuple[Tensor, None]:
    """x_s = (sigma_s / sigma_t) x_t + alpha_s (1 - e^-h) x_0_hat, with the guess of the middle in log-SNR.

    Euler alone where there is no middle. Reference: Lu et al. (2022), DPM-Solver++, 2211.01095, algorithm 1, r_1 = 1/2.
    """
    h = (s.log_snr - t.log_snr) / 2
    if math.isinf(h):
        return euler_step(denoiser, x, t, s, memory)
    middle = denoiser.process.instant((t.log_snr + s.log_snr) / 2)
    x_m = denoiser.affine(x, t, *_ddim(t, middle.alpha, middle.sigma))
    return denoiser.affine(x_m, middle, 0.0, s.alpha * -math.expm1(-h)).add_(x, alpha=s.sigma / t.sigma), memory


def adaptive_step(
    denoiser: Denoiser,
    x: Tensor,
    t: Instant,
    s: Instant,
    memory: None,
    *,
    rng: Rng | None = None,
    tolerance: float = 1e-4,
) -> tuple[Tensor, None]:
    """The probability-flow ODE from t to s by `ode.dormand_prince`, with steps of its own for each example.

    The last step goes on to log-SNR -LOG_SNR_MIN, and ends with the guess there. The denoiser is always given the whole
    batch, with those that have arrived left where they are, so that it may know of each example who it is.

    Reference: Song et al. (2021, 2011.13456), appendix D.2; the equation is that of `flow.slope`.

    Args:
        tolerance: of the error of one of its steps, relative to a coordinate and in units of unit variance.
    """
    start, stop = max(t.log_snr, LOG_SNR_MIN), min(s.log_snr, -LOG_SNR_MIN)
    there = s if s.sigma else denoiser.process.instant(stop)
    levels, states = torch.full((len(x),), start, dtype=torch.float64), x.double() / math.hypot(t.alpha, t.sigma)

    def field(log_snr: Tensor, state: Tensor, index: Tensor) -> Tensor:
        levels[index], states[index] = log_snr, state
        return flow.slope(denoiser, levels, states, x.dtype)[index]

    solution = ode.dormand_prince(
        field, states.clone(), start, stop, rtol=tolerance, atol=tolerance, max_step=flow.MAX_STEP
    )
    x = (math.hypot(there.alpha, there.sigma) * solution.x).to(x)
    return (x if s.sigma else denoiser(x, there)), memory


def predictor_corrector_step(
    denoiser: Denoiser,
    x: Tensor,
    t: Instant,
    s: Instant,
    memory: None,
    *,
    rng: Rng,
    variance: str = "fixed-small",
    updates: int = 1,
    snr: float = 0.16,
) -> tuple[Tensor, None]:
    """An ancestral step to s, then `updates` steps of Langevin dynamics there; none at the data.

    snr is the ratio of what the score moves x by to the noise, delta = 4 snr^2 ||z||^2 / ||score||^2, here (2 snr
    sigma_s)^2: with expected norms, of z and of eps / sigma_s. Drawn ones are not independent of the noise.

    Reference: Song et al. (2021, 2011.13456), algorithms 4 and 5.
    """
    x, _ = ancestral_step(denoiser, x, t, s, memory, rng=rng, variance=variance)
    for _ in range(updates if s.sigma else 0):
        x = langevin.langevin_step(denoiser.score(x, s), x, (2 * snr * s.sigma) ** 2, rng=rng)
    return x, memory


def restart_step(
    denoiser: Denoiser,
    x: Tensor,
    t: Instant,
    s: Instant,
    memory: None,
    *,
    rng: Rng,
    restarts: int = 3,
    inner: int = 6,
    between: tuple[float, float] = (-1.0, 4.0),
) -> tuple[Tensor, None]:
    """Heun's step; on the one that passes the end of an interval of log-SNR, that interval again and again.

    From its end x is noised up to its beginning, x ~ q(x_top | x_bottom), and comes down again in `inner` steps of
    Heun's, even in log-SNR: noise forgets the errors that the solver has gathered.

    Reference: Xu et al. (2023), Restart sampling, 2306.14878, algorithm 2.

    Args:
        restarts: how often the interval is repeated, K.
        inner: steps of each repetition.
        between: log-SNR where the interval begins and ends, nats.

    Raises:
        OptionError: if the interval is empty.
    """
    top, bottom = between
    if not top < bottom or inner < 1:
        raise OptionError(f"received an interval {between} of {inner} steps: give a lower log-SNR, a higher, and steps")
    if not t.log_snr < bottom <= s.log_snr:
        return heun_step(denoiser, x, t, s, memory)
    process = denoiser.process
    levels = [process.instant(top + (bottom - top) * i / inner) for i in range(inner + 1)]
    x, _ = heun_step(denoiser, x, t, levels[-1], memory)
    for _ in range(restarts):
        x = _noised(process, x, levels[-1], levels[0], drawn(x, rng, "restarting"))
        for high, low in pairwise(levels):
            x, _ = heun_step(denoiser, x, high, low, memory)
    return heun_step(denoiser, x, levels[-1], s, memory)


def annealed_langevin_step(
    denoiser: Denoiser,
    x: Tensor,
    t: Instant,
    s: Instant,
    memory: Any,
    *,
    rng: Rng,
    updates: int = 10,
    size: float = 0.2,
) -> tuple[Tensor, langevin.Chains]:
    """`updates` steps of Langevin dynamics on log q(x_t), of length size * sigma_t^2, then on to the next level.

    Each example is one chain. The memory is the level's `langevin.Chains`, whose `ess()` and `r_hat()` say whether
    the level was explored. The last level ends with the denoiser's guess.

    Reference: Song & Ermon (2019), algorithm 1. Two changes: between levels x is shrunk to the spread of unit-variance
    data at the next one, and the closing denoising step is from Jolicoeur-Martineau et al. (2021).
    """
    chains = langevin.ula(
        lambda flat: denoiser.score(flat.reshape(x.shape), t).flatten(1),
        x.flatten(1),
        size * t.sigma**2,
        updates,
        rng=rng,
    )
    x = chains.samples[-1].reshape(x.shape)
    if s.sigma == 0:
        return denoiser(x, t), chains
    return math.hypot(s.alpha, s.sigma) / math.hypot(t.alpha, t.sigma) * x, chains


def _ddim(t: Instant, alpha: float, sigma: float) -> tuple[float, float]:
    """(a, b) of alpha x_0_hat + sigma eps_hat = a x_t + b x_0_hat, of eps_hat = (x_t - alpha_t x_0_hat) / sigma_t."""
    return sigma / t.sigma, alpha - sigma / t.sigma * t.alpha


def _noised(process: Process, x: Tensor, s: Instant, t: Instant, z: Tensor) -> Tensor:
    """x_t ~ q(x_t|x_s), the forward process from s up to t."""
    scale, var = process.transition(s, t)
    return (scale * x).add_(z, alpha=var**0.5)


def _churned(process: Process, x: Tensor, t: Instant, churn: float, rng: Rng | None) -> tuple[Tensor, Instant]:
    """x_t noised to 1 + churn times its sigma / alpha, and where that is; as it is where there is no signal."""
    if churn == 0 or t.alpha == 0:
        return x, t
    if churn < 0:
        raise OptionError(f"churn is how much more noise a step begins with, and at least 0, received {churn}")
    up = process.instant(t.log_snr - 2 * math.log1p(churn))
    return _noised(process, x, t, up, drawn(x, rng, f"churn = {churn}")), up
