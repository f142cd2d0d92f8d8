"""Bounds on log p(x) = log E[p(x | z)] from importance weights, in the memory of some of them, and annealed.

    w = p(x | z) p(z) / q(z | x),   z ~ q(z | x)

    E[log w]  <=  E[log mean_K(w)]  <=  log p(x)

The first is the evidence lower bound, the second the importance-weighted bound, which rises with K to log p(x). A walk
from the prior to the posterior gives weights of its own, which do not depend on q.

References: Kingma & Welling (2014), eq. 3; Burda et al. (2016), theorem 1; Neal (2001), annealed importance sampling.
"""

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from ancestral.errors import OptionError
from ancestral.importance import Weights
from ancestral.rng import Rng, rand, randn

AT_ONCE = 256
"""Latents that are decoded at a time."""

ACCEPTED = 0.65
"""Share of proposals that Hamiltonian steps are made to accept; Neal (2011), section 4.4."""

FIRST_STEP, TUNED = 0.5, 0.2
"""Length of the first Hamiltonian step, and by how much its logarithm follows what was accepted."""

LOGISTIC = 4.0
"""Temperatures are those of a logistic curve between these ends: close to each other near 0 and near 1."""


def weights(
    log_weight: Callable[[Tensor], Tensor],
    n: int,
    latents: int,
    draws: int,
    *,
    rng: Rng,
    dtype: torch.dtype = torch.float32,
    at_once: int = AT_ONCE,
) -> Weights:
    """K importance weights of each of n examples, so many at a time; the noise does not depend on how many that is.

    Args:
        log_weight: standard normal noise (n, k, Z) -> log w of its draws, (n, k).
        n: examples.
        latents: Z.
        draws: K.
        rng: a generator per example; of a single one, the noise depends on `at_once`.
        dtype: of the noise.
        at_once: draws of all examples together at a time, at most, but at least one each.

    Raises:
        OptionError: if there are no draws.

    Example:
        >>> from ancestral.rng import streams
        >>> unit = lambda noise: noise.square().sum(2) / -2
        >>> few, many = (weights(unit, 2, 3, 50, rng=streams(0, 2), at_once=k).elbo.nats for k in (2, 1000))
        >>> torch.allclose(few, many, rtol=0, atol=1e-12)
        True
    """
    if draws < 1:
        raise OptionError(f"a bound needs at least 1 draw, received {draws}")
    size, found = max(1, at_once // max(1, n)), None
    for first in range(0, draws, size):
        noise = randn((n, min(size, draws - first), latents), rng, dtype=dtype)
        part = Weights.of(log_weight(noise).cpu())
        found = part if found is None else found.joined(part)
    assert found is not None
    return found


def temperatures(steps: int) -> list[float]:
    """From 0 to 1 in so many steps along a logistic curve.

    Reference: Wu et al. (2017), section 4, for the schedule.

    Example:
        >>> [round(beta, 3) for beta in temperatures(4)]
        [0.0, 0.105, 0.5, 0.895, 1.0]
    """
    curve = torch.sigmoid(torch.linspace(-LOGISTIC, LOGISTIC, steps + 1, dtype=torch.float64))
    betas: list[float] = ((curve - curve[0]) / (curve[-1] - curve[0])).tolist()
    return betas


def annealed(
    log_likelihood: Callable[[Tensor], Tensor],
    n: int,
    latents: int,
    *,
    chains: int,
    steps: int,
    leapfrog: int,
    rng: Rng,
    dtype: torch.dtype = torch.float32,
) -> Weights:
    """Weights of walks from the prior to the posterior, E[w] = p(x): a lower bound on log p(x) that owes nothing to q.

        log w = sum_t (beta_t - beta_{t-1}) log p(x | z_{t-1}),   z_0 ~ N(0, I)
        z_t by one Hamiltonian step that leaves N(z; 0, I) p(x | z)^beta_t as it is

    The length of a step is tuned for each example and temperature by walks of their own, which are thrown away: in
    those that count it depends on nothing that they did, or their weights would be biased.

    References: Neal (2001), eqs. 3 and 4; Neal (2011), section 3.2, for the step.

    Args:
        log_likelihood: z (n, chains, Z) -> log p(x | z) in nats, (n, chains), with a gradient.
        n: examples.
        latents: Z.
        chains: walks for each example.
        steps: temperatures.
        leapfrog: steps of the integrator in each Hamiltonian one.
        rng: a generator per example, or one.
        dtype: of the latents.

    Raises:
        OptionError: if any of the numbers is below 1.

    Example:
        >>> from ancestral.rng import streams
        >>> seen = lambda z: -(z - 1).square().sum(2) / 2  # p(x) = N(1; 0, 2) sqrt(2 pi)
        >>> w = annealed(seen, 1, 1, chains=200, steps=20, leapfrog=2, rng=streams(0, 1))
        >>> bool((w.importance.nats - (-0.25 - math.log(2) / 2)).abs() < 4 * w.importance.stderr)
        True
    """
    if min(chains, steps, leapfrog) < 1:
        raise OptionError(f"received {chains} chains, {steps} steps and {leapfrog} leapfrog steps: at least 1 of each")
    betas, shape, tuned = temperatures(steps), (n, chains, latents), list[Tensor]()

    def at(z: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            value = log_likelihood(z)
            gradient: Tensor = torch.autograd.grad(value.sum(), z)[0]
        return value.detach().double(), gradient

    def walk(tuning: bool) -> Tensor:
        z = randn(shape, rng, dtype=dtype)
        length = torch.full((n, 1, 1), FIRST_STEP, dtype=dtype)
        value, gradient = at(z)
        log_w = torch.zeros(n, chains, dtype=torch.float64)
        for t, (beta_before, beta) in enumerate(pairwise(betas)):
            log_w += (beta - beta_before) * value
            if t == steps - 1:
                break
            if not tuning:
                length = tuned[t]
            momentum = randn(shape, rng, dtype=dtype)
            y, v, value_y, gradient_y = z, momentum, value, gradient
            for _ in range(leapfrog):
                v = v + length / 2 * (beta * gradient_y - y)
                y = y + length * v
                value_y, gradient_y = at(y)
                v = v + length / 2 * (beta * gradient_y - y)
            energy, energy_y = (
                beta * value_ - 0.5 * (z_.double().square() + v_.double().square()).sum(2)
                for value_, z_, v_ in ((value, z, momentum), (value_y, y, v))
            )
            log_ratio = (energy_y - energy).nan_to_num(nan=-math.inf).clamp(max=0)
            accept = rand((n, chains), rng).log() < log_ratio
            z, gradient = (torch.where(accept[..., None], a, b) for a, b in ((y, z), (gradient_y, gradient)))
            value = torch.where(accept, value_y, value)
            if tuning:
                tuned.append(length)
                length = length * (TUNED * (log_ratio.exp().mean(1) - ACCEPTED)).exp().to(dtype)[:, None, None]
        return log_w

    walk(tuning=True)
    return Weights.of(walk(tuning=False))
