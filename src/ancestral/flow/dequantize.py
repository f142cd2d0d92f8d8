"""From data on levels to a density: noise u in the unit cube beside each value, drawn from a law that is known.

    P(x) = int p(y) dy over the bin of x = (2h)^D E_{u ~ q(u|x)}[ p(y) / q(u|x) ],   y = x + h (2u - 1)

with h half of the distance of two levels. Of one draw the logarithm is a lower bound in expectation; of the mean of K
it is a tighter one, and no K is too many, since it is added up as it comes.

References: Theis et al. (2016); Ho et al. (2019), Flow++, section 3.1, for a learnt q; Burda et al. (2016), for K.

Shapes: B batch, C channels, H height, W width.
"""

import math
from abc import ABC, abstractmethod
from itertools import islice
from typing import final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ancestral.flow.bijector import Chain, summed
from ancestral.flow.coupling import Coupling, masks
from ancestral.flow.patches import PatchNet, Shape
from ancestral.rng import Rng, rand


class Dequantizer(nn.Module, ABC):
    """A law q(u|x) on the unit cube."""

    @abstractmethod
    def forward(self, x: Tensor, context: Tensor, rng: Rng) -> tuple[Tensor, Tensor]:
        """u ~ q(u|x), the shape of x, and log q(u|x) of each example in nats, float64."""


@final
class Uniform(Dequantizer):
    """Every u alike, log q = 0."""

    def forward(self, x: Tensor, context: Tensor, rng: Rng) -> tuple[Tensor, Tensor]:
        u = rand(x.shape, rng).to(x)
        return u, torch.zeros(len(x), dtype=torch.float64, device=x.device)


@final
class Variational(Dequantizer):
    """u = sigmoid(v), where v is logistic noise e through couplings that are told x; uniform before it has learnt.

        log q(u|x) = -log |det du/dw|,   e = logit(w), w uniform

    Of normal noise, q would fall to nothing at the edges of the cube, and a mean of weights
    p / q would have no variance.

    The couplings act on e and x, as channels of one image, and keep x. The first keeps no e: it moves and stretches
    each as the network tells from x.

    Args:
        shape: of an example as an image, (C, H, W).
        patch: side of a patch.
        features: of the context.
        width, depth, heads: of the networks.
        steps: couplings after the first, at least 0.
    """

    def __init__(
        self, shape: Shape, patch: int, features: int, *, width: int, heads: int, depth: int = 1, steps: int = 2
    ) -> None:
        super().__init__()
        (C, H, W), self.shape = shape, shape
        nothing, everything = (torch.full(shape, kept) for kept in (False, True))
        self.couplings = Chain(
            Coupling(
                PatchNet((2 * C, H, W), patch, features, width=width, depth=depth, heads=heads),
                torch.cat([kept, everything]),
            )
            for kept in (nothing, *islice(masks(shape, patch), steps))
        )

    def forward(self, x: Tensor, context: Tensor, rng: Rng) -> tuple[Tensor, Tensor]:
        u, log_det = self.from_uniform(rand(x.shape, rng).to(x), x, context)
        return u, -log_det

    def from_uniform(self, w: Tensor, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """The u that uniform numbers w become beside x, and log |det du/dw| of each example."""
        e = w.logit(eps=1e-6)
        both = torch.cat([part.reshape(-1, *self.shape) for part in (e, x)], 1)
        moved, log_det = self.couplings(both, context)
        v = moved.chunk(2, 1)[0].reshape(x.shape)
        return v.sigmoid(), log_det + summed(_log_slope(v) - _log_slope(e))


def _log_slope(v: Tensor) -> Tensor:
    """log of the derivative of the sigmoid, elementwise."""
    return F.logsigmoid(v) + F.logsigmoid(-v)


def width(levels: int, dims: int) -> float:
    """D log(2h): the log-volume of a bin in the model's units, where the end levels are -1 and 1."""
    return dims * math.log(2 / (levels - 1))
