"""Steps that remember: a polynomial through the last guesses, integrated exactly along the step.

With lambda = log(alpha / sigma) = log_snr / 2 and rho = sigma / alpha, the probability-flow ODE of every process is

    d(x / sigma) = x_0_hat d e^lambda        (data prediction)
    d(x / alpha) = eps_hat d rho             (noise prediction)

linear but for one guess f, which is replaced by the polynomial through what is known of it. With v in [0, 1] along the
step from t to s, h = lambda_s - lambda_t, and w_j the integral of the Lagrange polynomial of node j,

    x_s = a x_t + b sum_j w_j f_j + c z,   w_j = int L_j(v) e^{kappa v} dv / int e^{kappa v} dv,   sum_j w_j = 1

                            f        polynomial in    kappa          a                            b
    DPM-Solver++, UniPC     x_0_hat  lambda           h              sigma_s / sigma_t            alpha_s (1 - e^-h)
    the same with noise     x_0_hat  lambda           (1 + tau^2) h  e^{-tau^2 h} times as much   alpha_s (1 - e^-kappa)
    DEIS                    eps_hat  lambda           -h             alpha_s / alpha_t            sigma_s (1 - e^h)
    LMS                     eps_hat  rho              0              the same                     the same
    PLMS                    eps_hat  t                0              the same                     the same

and c^2 = sigma_s^2 (1 - e^{-2 tau^2 h}). A step that is infinitely long in lambda, from no signal or to no noise, takes
the first guess alone; and a guess made where there was no signal is not a node of any later step in lambda or rho.

A walk starts with one guess, at the most noise, where guesses hardly change. Methods of three guesses or more correct
their first step with the second guess, as every step of UniPC is corrected with the next, so that the start leaves a
method of order 3 as it is; no evaluation is added. With noise prediction, whose errors grow by e^h, only if that step
has h <= 1. Memory is never changed in place: a walk can be taken up anywhere.
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

from torch import Tensor

from ancestral.diffusion.denoise import Denoiser
from ancestral.diffusion.process import Instant
from ancestral.diffusion.singlestep import drawn
from ancestral.errors import unknown
from ancestral.rng import Rng

LIMIT = 3.0
"""The most that (1 - e^-|h|) sum_j |w_j| may be, by which errors of the guesses grow in a step; short, even steps stay
far below. Where one is long, or much longer than those before it, the oldest guesses are left out."""

Known = tuple[tuple[Instant, Tensor], ...]
"""Guesses and when they were made, the newest first."""

Memory = Known | None


def moments(kappa: float, n: int) -> list[float]:
    """M_k = int_0^1 v^k e^{kappa v} dv / int_0^1 e^{kappa v} dv for k < n <= 5, to float64 rounding.

    I_k = int_0^1 v^k e^{-kappa (1 - v)} dv obeys k I_{k-1} = 1 - kappa I_k, which loses nothing downwards for small
    kappa, where it forgets what it began with, nor upwards for large.

    Example:
        >>> moments(0.0, 3), round(moments(1e-9, 2)[1], 12), round(moments(40.0, 2)[1], 6)
        ([1.0, 0.5, 0.3333333333333333], 0.500000000083, 0.975)
    """
    if abs(kappa) > 1:
        integrals = [-math.expm1(-kappa) / kappa]
        for k in range(1, n):
            integrals.append((1 - k * integrals[-1]) / kappa)
    else:
        integrals = [0.0]
        for k in range(20, 0, -1):
            integrals.append((1 - kappa * integrals[-1]) / k)
        integrals.reverse()
    return [integral / integrals[0] for integral in integrals[:n]]


def weights(nodes: Sequence[float], moments: Sequence[float]) -> list[float]:
    """w_j, the mean of the Lagrange polynomial L_j under a measure on [0, 1] with the given moments.

    Args:
        nodes: where the guesses were made, in units of the step: 0 is its start, 1 its end, and they are distinct.
        moments: M_0 = 1, M_1, ..., at least as many as there are nodes.

    Example:
        >>> [round(24 * w) for w in weights([0, -1, -2, -3], [1, 1 / 2, 1 / 3, 1 / 4])]  # Adams and Bashforth's
        [55, -59, 37, -9]
    """
    found = []
    for j, node in enumerate(nodes):
        product, below = [1.0], 1.0  # coefficients of prod_i (v - v_i), and prod_i (v_j - v_i)
        for i, other in enumerate(nodes):
            if i != j:
                product = [a - other * b for a, b in zip([0.0, *product], [*product, 0.0], strict=True)]
                below *= node - other
        found.append(sum(c * M for c, M in zip(product, moments, strict=False)) / below)
    return found


def bounded(nodes: Sequence[float], moments: Sequence[float], h: float) -> list[float]:
    """The `weights` of the first nodes, of as many as keep within `LIMIT` in a step of length h in lambda.

    Example:
        >>> bounded([0, -1], [1, 1 / 2], 1.0), bounded([0, -0.01], [1, 1 / 2], 1.0)
        ([1.5, -0.5], [1.0])
    """
    found = weights(nodes, moments)
    within = -math.expm1(-abs(h)) * sum(map(abs, found)) <= LIMIT
    return found if within else bounded(nodes[:-1], moments, h)


class Predicted(NamedTuple):
    """What a corrector needs of a step: x_t = rest + b sum_j w_j f_j, from the time of the first f."""

    known: Known
    rest: Tensor
    b: float
    kappa: float


MEANS: dict[str, Callable[[float], float]] = {
    "B1": lambda kappa: kappa / (-2 * math.expm1(-kappa)) if 0 < abs(kappa) < math.inf else 0.5,
    "B2": lambda kappa: 0.5,
}
"""M_1 for two guesses in UniPC, B(h) / (2 (1 - e^-h)): B1(h) = h, where that is finite, and B2(h) = 1 - e^-h."""


def dpmpp_step(
    denoiser: Denoiser,
    x: Tensor,
    t: Instant,
    s: Instant,
    memory: Predicted | None,
    *,
    rng: Rng | None = None,
    order: int = 2,
    tau: float = 0.0,
) -> tuple[Tensor, Predicted]:
    """x_s = a x_t + b sum_j w_j x_0_hat_j + c z: DPM-Solver++(kM), and SDE-DPM-Solver++(kM) with tau = 1.

    Two guesses have the published weights, 1 + 1/(2r) and -1/(2r) with r = h_before / h: those of an even measure.
    Three have the exact ones.

    Reference: Lu et al. (2022), DPM-Solver++, 2211.01095, algorithm 2; Gonzalez et al. (2023), for tau.

    Args:
        order: how many guesses are kept.
        tau: of fresh noise: 0 is the probability-flow ODE, 1 the reverse of the forward process.
    """
    mean = MEANS["B2"] if order == 2 else None
    return _predicted(denoiser, x, t, s, memory, order, tau, rng, mean, corrected=order - 2)


def unipc_step(
    denoiser: Denoiser,
    x: Tensor,
    t: Instant,
    s: Instant,
    memory: Predicted | None,
    *,
    rng: Rng | None = None,
    order: int = 2,
    variant: str = "B2",
) -> tuple[Tensor, Predicted]:
    """A prediction from `order` guesses, corrected with the next step's, which is at its end: order + 1 guesses.

    x_t' = rest + b sum_j w_j f_j, with f_0 = x_0_hat(x_t, t), which is kept: one evaluation a step. The point of a walk
    is x_t, as predicted. The last step has nothing to correct it.

    Reference: Zhao et al. (2023), UniPC, 2302.04867, algorithms 5-8. Two guesses have the published weight, see
    `MEANS`; more have the exact ones, whatever B(h).
    """
    if variant not in MEANS:
        raise unknown("variant of UniPC", variant, MEANS)
    return _predicted(denoiser, x, t, s, memory, order, 0.0, None, MEANS[variant])


def sa_solver_step(
    denoiser: Denoiser,
    x: Tensor,
    t: Instant,
    s: Instant,
    memory: Predicted | None,
    *,
    rng: Rng | None = None,
    order: int = 2,
    tau: float = 1.0,
) -> tuple[Tensor, Predicted]:
    """The stochastic Adams solver: a prediction from `order` guesses, corrected with the next, on the same noise.

    tau = 0 is the probability-flow ODE, and 1 the reverse of the forward process.

    Reference: Xue et al. (2023), SA-Solver, 2309.05019, algorithm 1, with a constant tau.
    """
    return _predicted(denoiser, x, t, s, memory, order, tau, rng, None)


def deis_step(
    denoiser: Denoiser, x: Tensor, t: Instant, s: Instant, memory: Memory, *, rng: Rng | None = None, order: int = 3
) -> tuple[Tensor, Known]:
    """Noise prediction with a polynomial in lambda = -log rho, integrated exactly: order 1 is DDIM.

    Reference: Zhang & Chen (2023), DEIS, 2204.13902, eq. 15, with log rho for time.
    """
    return _by_noise(denoiser, x, t, s, memory, order, lambda i: i.log_snr, -1)


def lms_step(
    denoiser: Denoiser, x: Tensor, t: Instant, s: Instant, memory: Memory, *, rng: Rng | None = None, order: int = 4
) -> tuple[Tensor, Known]:
    """Noise prediction with a polynomial in rho: Adams and Bashforth's linear multistep method on d(x/alpha)/d rho.

    Reference: Karras et al. (2022) for rho as time; Hairer, Nørsett & Wanner (1993), III.5, for steps of any size.
    """
    return _by_noise(denoiser, x, t, s, memory, order, lambda i: math.exp(-i.log_snr / 2), 0)


def plms_step(
    denoiser: Denoiser, x: Tensor, t: Instant, s: Instant, memory: Memory, *, rng: Rng | None = None, order: int = 4
) -> tuple[Tensor, Known]:
    """Pseudo linear multistep: Adams and Bashforth's mean of eps_hat over t, (55, -59, 37, -9) / 24 on even steps.

    The mean is over t where the step is in rho, so that it is of second order whatever the number of guesses.

    Reference: Liu et al. (2022), PNDM, 2202.09778, eqs. 11-12, for steps of any size and without a Runge-Kutta start.
    """
    return _by_noise(denoiser, x, t, s, memory, order, float, 0)


def _linear(x: Tensor, t: Instant, s: Instant, tau: float, rng: Rng | None) -> tuple[Tensor, float, float]:
    """a x_t + c z, b and kappa, for data prediction."""
    h = (s.log_snr - t.log_snr) / 2
    fresh = tau**2 * h if tau else 0.0
    rest = x * (s.sigma / t.sigma * math.exp(-fresh))
    if fresh and s.sigma:
        rest.add_(drawn(x, rng, f"tau = {tau}"), alpha=s.sigma * math.sqrt(-math.expm1(-2 * fresh)))
    return rest, s.alpha * -math.expm1(-h - fresh), h + fresh


def _sum(rest: Tensor, b: float, known: Known, shares: Sequence[float], keep: bool) -> Tensor:
    """rest + b sum_j w_j f_j, in the place of rest unless that is kept."""
    x = rest.add(known[0][1], alpha=b * shares[0]) if keep else rest.add_(known[0][1], alpha=b * shares[0])
    for (_, f), share in zip(known[1:], shares[1:], strict=False):
        x.add_(f, alpha=b * share)
    return x


@lru_cache(4096)
def _shares(at: tuple[float, ...], t: float, s: float, kappa: float, h: float, M_1: float | None) -> list[float]:
    """w_j of guesses at these places in a step from t to s, two by M_1 if given: kept for the next walk on the grid."""
    M = [1.0, M_1] if M_1 and len(at) == 2 else moments(kappa, len(at))
    return bounded([(place - t) / (s - t) for place in at], M, h)


def _shared(known: Known, t: Instant, s: Instant, kappa: float, M_1: float | None = None) -> tuple[Known, list[float]]:
    """The guesses that are nodes of the step from t to s, and w_j in lambda."""
    h = (s.log_snr - t.log_snr) / 2
    if math.isinf(h):
        return known[:1], [1.0]
    at = tuple([i.log_snr for i, _ in known])
    return known, _shares(at[:-1] if math.isinf(at[-1]) else at, t.log_snr, s.log_snr, kappa, h, M_1)


def _predicted(
    denoiser: Denoiser,
    x: Tensor,
    t: Instant,
    s: Instant,
    memory: Predicted | None,
    order: int,
    tau: float,
    rng: Rng | None,
    mean: Callable[[float], float] | None,
    corrected: float = math.inf,
) -> tuple[Tensor, Predicted]:
    """The step before corrected with the guess at its end, if it is among the first so many, and the next predicted."""
    known = ((t, denoiser(x, t)), *(memory.known if memory else ()))
    if memory and len(memory.known) <= corrected:
        origin, kappa = known[1][0], memory.kappa
        even = math.isinf(origin.log_snr)
        nodes, shares = (known[:2], [0.5, 0.5]) if even else _shared(known, origin, t, kappa, mean and mean(kappa))
        x = _sum(memory.rest, memory.b, nodes, shares, keep=True)
    known = known[:order]
    rest, b, kappa = _linear(x, t, s, tau, rng)
    x = _sum(rest, b, *_shared(known, t, s, kappa, mean and mean(kappa)), keep=len(known) <= corrected)
    return x, Predicted(known, rest, b, kappa)


def _by_noise(
    denoiser: Denoiser,
    x: Tensor,
    t: Instant,
    s: Instant,
    memory: Memory,
    order: int,
    place: Callable[[Instant], float],
    rate: int,
) -> tuple[Tensor, Known]:
    """(alpha_s / alpha_t) x_t + b sum_j w_j eps_hat_j, the polynomial being one in `place`, and kappa = rate h.

    The first step, and one that is infinitely long, is DDIM's, with x_0_hat: it may come from where there is no signal.
    """
    before, h = memory or (), (s.log_snr - t.log_snr) / 2
    at: tuple[float, ...] = (place(t), *[place(i) for i, _ in before[: order - 1]])
    at = at[:-1] if math.isinf(at[-1]) else at
    if math.isinf(h) or len(at) <= 1:
        x_0_hat = denoiser(x, t)
        eps_hat = (x / t.sigma).add_(x_0_hat, alpha=-t.alpha / t.sigma)
        return (x_0_hat * s.alpha).add_(eps_hat, alpha=s.sigma), ((t, eps_hat), *before)[:order]
    known = ((t, denoiser.affine(x, t, 1 / t.sigma, -t.alpha / t.sigma)), *before)[:order]
    shares = _shares(at, at[0], place(s), rate * h, h, None)
    x = _sum(x * (s.alpha / t.alpha), s.sigma * -math.expm1(h), known, shares, keep=False)
    if len(before) == 1 and order > 2:
        (_, eps_hat), (origin, f) = known
        h = (t.log_snr - origin.log_snr) / 2
        if h <= 1:
            x.add_(eps_hat - f, alpha=s.alpha / t.alpha * t.sigma * -math.expm1(h) * moments(rate * h, 2)[1])
    return x, known
