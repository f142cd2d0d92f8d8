"""Decoders that are likelihoods: what a network puts out for each value, as a law of that value.

Given the latent, values are independent of each other, those of the colours of a pixel too. Parameters have shape
(B, P, *shape), P numbers for each value; values are in the model's units.
"""

import math
from abc import ABC, abstractmethod
from typing import final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ancestral import gaussian
from ancestral.data import Facts
from ancestral.errors import OptionError
from ancestral.rng import Rng, rand, randn

SHARPEST = math.log(1 / 40)
"""Log of the least scale of a logistic, in levels: a level then has all but 4e-9 of the mass about its middle."""

BROADEST = 6.0
"""Log of the largest scale of a logistic, in the model's units: all levels between the ends have next to no mass."""

FINEST = -7.0
"""Log of the least standard deviation of a Gaussian, in the model's units: a constant feature has no density."""

START = -2.0
"""Log of the standard deviation with which a Gaussian begins: about 1, the latents would explain nothing at first, and
of data whose moments are those of noise they would never begin to."""

HASTE = 10.0
"""How much faster than a weight a log deviation is learnt: it may have several nats to go."""


class Decoder(nn.Module, ABC):
    """The law of each value, given the P numbers that the network puts out for it.

    Attributes:
        per_value: P.
    """

    per_value: int

    @abstractmethod
    def log_prob(self, x: Tensor, parameters: Tensor) -> Tensor:
        """log p(x | parameters) in nats, summed over the values of each example, float64, shape (B,)."""

    @abstractmethod
    def mean(self, parameters: Tensor) -> Tensor:
        """E[x | parameters], shape (B, *shape)."""

    @abstractmethod
    def sample(self, parameters: Tensor, rng: Rng) -> Tensor:
        """One draw of x for each example, shape (B, *shape)."""


@final
class LogisticMixture(Decoder):
    """For L levels: a mixture of K logistics, integrated over the bin of each level.

        P(k) = sum_j pi_j [ S((k + 1/2 - mu_j) / s_j) - S((k - 1/2 - mu_j) / s_j) ],   S the sigmoid,

    where the two end bins reach to infinity. Within one logistic the difference is a product, which loses nothing to
    cancellation however far out the bin is:

        S(b) - S(a) = S(b) S(-a) (1 - e^(a - b))

    Of the numbers put out for a value, the first K are the log-weights; then come the means, told from K places even
    between the end levels, and the log-scales, told from 1 in the model's units.

    Reference: Salimans et al. (2017), section 2.1, without its conditioning of one colour on another.

    Args:
        levels: L, at least 2.
        components: K.

    Raises:
        OptionError: if there is no component.

    Example:
        >>> decoder, values = LogisticMixture(17, 3), torch.linspace(-1, 1, 17)[:, None]
        >>> round(float(decoder.log_prob(values, torch.randn(1, 9, 1).expand(17, 9, 1)).exp().sum()), 6)
        1.0
    """

    def __init__(self, levels: int, components: int = 5) -> None:
        super().__init__()
        if components < 1:
            raise OptionError(f"a mixture has at least 1 component, received {components}")
        self.levels, self.components, self.per_value = levels, components, 3 * components

    def log_prob(self, x: Tensor, parameters: Tensor) -> Tensor:
        log_weight, mean, log_scale = self._mixture(parameters)
        k = self._level(x.to(parameters)).round().clamp(0, self.levels - 1)[:, None]
        inverse = (-log_scale).exp()
        below = F.logsigmoid((k + 0.5 - mean) * inverse).where(k < self.levels - 1, 0.0)
        above = F.logsigmoid((mean - k + 0.5) * inverse).where(k > 0, 0.0)
        within = (-torch.expm1(-inverse)).log().where((k > 0) & (k < self.levels - 1), 0.0)
        log_p = (log_weight + below + above + within).logsumexp(1)
        return log_p.flatten(1).sum(1, dtype=torch.float64)

    def mean(self, parameters: Tensor) -> Tensor:
        """E[k] = sum over k < L - 1 of P(level > k), in the model's units."""
        log_weight, mean, log_scale = self._mixture(parameters)
        weight, inverse = log_weight.exp(), (-log_scale).exp()
        level = torch.zeros_like(weight[:, 0])
        for k in range(self.levels - 1):
            level += (weight * torch.sigmoid((mean - k - 0.5) * inverse)).sum(1)
        return level * 2 / (self.levels - 1) - 1

    def sample(self, parameters: Tensor, rng: Rng) -> Tensor:
        """A component by its weight, a logistic draw from it, and the level in whose bin that falls."""
        log_weight, mean, log_scale = self._mixture(parameters)
        shape = parameters[:, 0].shape
        u, v = (rand(shape, rng).to(parameters.device) for _ in range(2))
        below = log_weight.double().exp().cumsum(1) <= u[:, None]
        chosen = below.sum(1, keepdim=True).clamp(max=self.components - 1)
        location, scale = (part.gather(1, chosen)[:, 0].double() for part in (mean, log_scale.exp()))
        level = (location + scale * torch.logit(v)).round().clamp(0, self.levels - 1)
        return (level * 2 / (self.levels - 1) - 1).to(parameters)

    def _mixture(self, parameters: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log-weights, means and log-scales, the last two in levels, each of shape (B, K, *shape)."""
        log_weight, mean, log_scale = parameters.chunk(3, 1)
        even = (torch.arange(self.components).to(parameters) + 0.5) * 2 / self.components - 1
        even = even.view(-1, *[1] * (parameters.ndim - 2))
        log_scale = log_scale.clamp(max=BROADEST) + math.log((self.levels - 1) / 2)
        log_scale = SHARPEST + F.softplus(log_scale - SHARPEST)
        return log_weight.log_softmax(1), self._level(even + mean), log_scale

    def _level(self, x: Tensor) -> Tensor:
        return (x + 1) * (self.levels - 1) / 2


@final
class Bernoulli(Decoder):
    """For two levels, -1 and 1: P(x) = S(x l), with l the log-odds of the upper one.

    Example:
        >>> Bernoulli().log_prob(torch.tensor([[1.0], [-1.0]]), torch.full((2, 1, 1), 2.0)).exp()
        tensor([0.8808, 0.1192], dtype=torch.float64)
    """

    per_value = 1

    def log_prob(self, x: Tensor, parameters: Tensor) -> Tensor:
        return F.logsigmoid(x.sign() * parameters[:, 0]).flatten(1).sum(1, dtype=torch.float64)

    def mean(self, parameters: Tensor) -> Tensor:
        return (parameters[:, 0] / 2).tanh()

    def sample(self, parameters: Tensor, rng: Rng) -> Tensor:
        u = rand(parameters[:, 0].shape, rng).to(parameters.device)
        return (2.0 * (u < parameters[:, 0].double().sigmoid()) - 1).to(parameters)


@final
class Gaussian(Decoder):
    """For real values: N(x; mu, sigma^2) with a deviation that is learnt, so that nothing weighs it against the rest.

    Reference: Rybkin et al. (2021), section 3: a calibrated deviation in place of a weight on the divergence.

    Args:
        shape: of the deviation: () for one, or the shape of an example for one per feature.

    Example:
        >>> round(Gaussian(()).deviation().item(), 2)
        0.14
    """

    per_value = 1

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.log_deviation = nn.Parameter(torch.zeros(shape))

    def deviation(self) -> Tensor:
        """sigma, in the model's units."""
        return (FINEST + F.softplus(START + HASTE * self.log_deviation - FINEST)).exp()

    def log_prob(self, x: Tensor, parameters: Tensor) -> Tensor:
        log_p = gaussian.log_density(x.to(parameters), parameters[:, 0], self.deviation().square())
        return log_p.flatten(1).sum(1, dtype=torch.float64)

    def mean(self, parameters: Tensor) -> Tensor:
        return parameters[:, 0]

    def sample(self, parameters: Tensor, rng: Rng) -> Tensor:
        noise = randn(parameters[:, 0].shape, rng, dtype=parameters.dtype).to(parameters.device)
        return parameters[:, 0] + self.deviation() * noise


def decoder(facts: Facts, components: int) -> Decoder:
    """The likelihood that suits the data; a Gaussian has one deviation for an image, one per feature for a vector."""
    if facts.levels is None:
        return Gaussian(() if facts.is_image else facts.shape)
    return Bernoulli() if facts.levels == 2 else LogisticMixture(facts.levels, components)
