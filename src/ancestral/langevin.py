"""Langevin dynamics on any score, unadjusted and Metropolis-adjusted, with the diagnostics of its chains.

Started anywhere, the recursion x_t = x_{t-1} + (delta/2) grad log p(x_{t-1}) + sqrt(delta) eps draws from p in the
limit of small delta and many steps; a Metropolis correction makes it exact at every delta, when p itself is known.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from ancestral.errors import OptionError
from ancestral.rng import Rng, rand, randn

Field = Callable[[Tensor], Tensor]


@final
@dataclass(frozen=True, eq=False)
class Chains:
    """Every state of several Markov chains, and how well they have mixed.

    Attributes:
        samples: states after each step, shape (steps, chains, D).
        acceptance: fraction of proposals accepted, None where nothing is rejected.

    Example:
        >>> from ancestral.rng import stream
        >>> chains = Chains(randn((1000, 4, 1), stream(0)))
        >>> bool(chains.r_hat() < 1.01), bool(chains.after(500).ess() > 1500)
        (True, True)
    """

    samples: Tensor
    acceptance: float | None = None

    def after(self, burn_in: int) -> "Chains":
        """The same chains without their first `burn_in` steps."""
        return replace(self, samples=self.samples[burn_in:])

    def r_hat(self) -> Tensor:
        """Split R-hat of each coordinate: near 1 when all halves of all chains tell the same story.

        R-hat = sqrt(var+ / W),   var+ = (n-1)/n W + B/n, with W and B the variances within and between half-chains.

        Reference: Gelman et al. (2013), Bayesian Data Analysis, 11.4; Vehtari et al. (2021), without ranks.

        Returns:
            Shape (D,); above 1.01 the chains should not be trusted yet.

        Raises:
            OptionError: for fewer than 4 steps.
        """
        within, pooled = _variances(self._halves())
        return (pooled / within).sqrt()

    def ess(self) -> Tensor:
        """Effective sample size of each coordinate: independent draws that would estimate its mean as well.

        ESS = m n / tau,   tau = 1 + 2 sum_t rho_t, the autocorrelations pooled over the m half-chains of n steps and
        summed in pairs for as long as these are positive, each no larger than the one before.

        Reference: Geyer (1992), Practical Markov chain Monte Carlo, 3.3; Vehtari et al. (2021), without ranks.

        Returns:
            Shape (D,), in draws; at most m n log10(m n), which antithetic chains can reach.

        Raises:
            OptionError: for fewer than 4 steps.
        """
        x = self._halves()
        n, m, _ = x.shape
        within, pooled = _variances(x)
        spectrum = torch.fft.rfft(x - x.mean(0), n=2 * n, dim=0)
        autocovariance = torch.fft.irfft(spectrum.abs().square(), n=2 * n, dim=0)[:n].mean(1) / (n - 1)
        rho = 1 - (within - autocovariance) / pooled
        pairs = rho[: n - n % 2].unflatten(0, (-1, 2)).sum(1)
        positive = (pairs > 0).cumprod(0)
        tau = 2 * (pairs.cummin(0).values * positive).sum(0) - 1
        ess: Tensor = m * n / tau.clamp(min=1 / math.log10(m * n))
        return ess

    def _halves(self) -> Tensor:
        """The two halves of every chain as chains of their own, shape (steps // 2, 2 chains, D), in float64."""
        half = len(self.samples) // 2
        if half < 2:
            raise OptionError(f"received chains of {len(self.samples)} steps: diagnostics need at least 4")
        return torch.cat([self.samples[:half], self.samples[-half:]], dim=1).double()


def langevin_step(score_x: Tensor, x: Tensor, delta: float | Tensor, *, rng: Rng, temperature: float = 1.0) -> Tensor:
    """One step of Langevin dynamics from x, given the score there.

    x_t = x_{t-1} + (delta/2) grad log p(x_{t-1}) + sqrt(temperature delta) eps,   eps ~ N(0, I)

    Reference: Welling & Teh (2011), Bayesian learning via stochastic gradient Langevin dynamics, eq. 3.

    Args:
        score_x: grad log p(x), shape of x.
        x: states, batch first.
        delta: step size, one number or a tensor that broadcasts against x.
        rng: one generator, or one per state.
        temperature: variance of the noise relative to exact dynamics; 0 is gradient ascent.

    Example:
        >>> from ancestral.rng import stream
        >>> langevin_step(torch.tensor([-2.0]), torch.tensor([2.0]), 0.5, rng=stream(0), temperature=0.0)
        tensor([1.5000])
    """
    eps = randn(x.shape, rng, dtype=x.dtype).to(x.device)
    return x + delta / 2 * score_x + (temperature * delta) ** 0.5 * eps


def ula(score: Field, x: Tensor, delta: float, steps: int, *, rng: Rng, temperature: float = 1.0) -> Chains:
    """Run the unadjusted Langevin algorithm; its stationary law is p up to a bias of order delta.

    Reference: Roberts & Tweedie (1996), Exponential convergence of Langevin distributions.

    Args:
        score: x -> grad log p(x), on shape (chains, D).
        x: where the chains start, shape (chains, D).
        delta: step size, in squared units of x.
        steps: how many steps to take, all of them kept.
        rng: one generator, or one per chain.
        temperature: variance of the noise relative to exact dynamics; 0 is gradient ascent, into a local maximum.

    Raises:
        OptionError: if x is not (chains, D), or delta or steps are not positive.

    Example:
        >>> from ancestral.rng import stream
        >>> chains = ula(lambda x: -x, torch.zeros(1000, 1), 0.1, 200, rng=stream(0))
        >>> round(chains.after(50).samples.var().item(), 1)
        1.0
    """
    _check(x, delta, steps)
    history = []
    for _ in range(steps):
        x = langevin_step(score(x).detach(), x, delta, rng=rng, temperature=temperature)
        history.append(x)
    return Chains(torch.stack(history))


def mala(log_prob: Field, score: Field, x: Tensor, delta: float, steps: int, *, rng: Rng) -> Chains:
    """Run the Metropolis-adjusted Langevin algorithm; its stationary law is p at every step size.

    y = x + (delta/2) grad log p(x) + sqrt(delta) eps replaces x with probability
    min(1, p(y) q(x|y) / (p(x) q(y|x))),   q(y|x) = N(y; x + (delta/2) grad log p(x), delta I)

    Reference: Roberts & Tweedie (1996), Exponential convergence of Langevin distributions.

    Args:
        log_prob: x -> log p(x) up to a constant, in nats, (chains, D) -> (chains,).
        score: x -> grad log p(x), on shape (chains, D).
        x: where the chains start, shape (chains, D), with p(x) > 0.
        delta: step size, in squared units of x; about 0.57 accepted is optimal in many dimensions.
        steps: how many steps to take, all of them kept.
        rng: one generator, or one per chain.

    Raises:
        OptionError: if x is not (chains, D), p is 0 at a start, or delta or steps are not positive.

    Example:
        >>> from ancestral.rng import stream
        >>> rng = stream(0)
        >>> chains = mala(lambda x: -x.square().sum(1) / 2, lambda x: -x, torch.zeros(100, 1), 1.0, 200, rng=rng)
        >>> round(chains.after(50).samples.var().item(), 1)
        1.0
    """
    _check(x, delta, steps)
    log_p_x, score_x = log_prob(x).detach(), score(x).detach()
    if not bool(log_p_x.isfinite().all()):
        raise OptionError("received a start where log_prob is not finite: start every chain where p is positive")
    history, accepted = [], 0.0
    for _ in range(steps):
        y = langevin_step(score_x, x, delta, rng=rng)
        log_p_y, score_y = log_prob(y).detach(), score(y).detach()
        log_q_y = -(y - x - delta / 2 * score_x).square().sum(1) / (2 * delta)
        log_q_x = -(x - y - delta / 2 * score_y).square().sum(1) / (2 * delta)
        log_ratio = log_p_y + log_q_x - log_p_x - log_q_y
        # A proposal outside the support has a ratio of -inf or nan, and is rejected by both.
        accept = rand((len(x),), rng).to(x.device).log() < log_ratio
        x, score_x = torch.where(accept[:, None], y, x), torch.where(accept[:, None], score_y, score_x)
        log_p_x = torch.where(accept, log_p_y, log_p_x)
        accepted += accept.double().mean().item()
        history.append(x)
    return Chains(torch.stack(history), accepted / steps)


def _variances(x: Tensor) -> tuple[Tensor, Tensor]:
    """W and var+ of chains (n, m, D): variance within chains, and of all draws were the chains independent."""
    n = len(x)
    within = x.var(0).mean(0)
    return within, (n - 1) / n * within + x.mean(0).var(0)


def _check(x: Tensor, delta: float, steps: int) -> None:
    if x.ndim != 2:
        raise OptionError(f"received states of shape {tuple(x.shape)}: chains start from (chains, D)")
    if not delta > 0 or steps < 1:
        raise OptionError(f"received delta {delta} and {steps} steps: both must be positive")
