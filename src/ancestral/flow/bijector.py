"""Maps with an inverse and a log-determinant, and chains of them: nothing else can be part of a flow.

    log p(x) = log p_z(f(x)) + log |det df/dx|

    Bijector     what the change of variables asks of a block
    ├── Chain    one after the other; takes bijectors only
    ├── Tails    the identity near zero, a logarithm far from it
    ├── Ends     a logit between the ends of an interval, and straight lines beyond
    ├── Coupling half of the values moved and stretched as the other half says   (coupling.py)
    ├── Splines  monotone rational-quadratic splines of a vector                 (spline.py)
    └── Causal   the same of the patches of an image, one after the other        (causal.py)

Shapes: B batch, F features of the context.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import final

import torch
from torch import Tensor, nn

from ancestral.errors import OptionError


class Bijector(nn.Module, ABC):
    """An invertible map f of every example to one of as many numbers, given a context.

    A class that leaves one of the two methods out cannot be constructed: a block without an inverse is no block.
    """

    @abstractmethod
    def forward_and_log_det(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """f(x), and log |det df/dx| of each example in nats, float64.

        Args:
            x: shape (B, ...).
            context: what else is known of each example, shape (B, F).
        """

    @abstractmethod
    def inverse(self, z: Tensor, context: Tensor) -> Tensor:
        """The x with f(x) = z."""

    def forward(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """`forward_and_log_det`, as a call."""
        return self.forward_and_log_det(x, context)


@final
class Chain(Bijector):
    """Bijectors one after the other: the log-determinants add up.

    Raises:
        OptionError: if a block is not a bijector.

    Example:
        >>> Chain([nn.Linear(2, 2)])
        Traceback (most recent call last):
        ancestral.errors.OptionError: a flow is made of bijectors, received Linear: it has no inverse and no log-det
    """

    def __init__(self, blocks: Iterable[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        for block in self.blocks:
            if not isinstance(block, Bijector):
                raise OptionError(
                    f"a flow is made of bijectors, received {type(block).__name__}: it has no inverse and no log-det"
                )

    def forward_and_log_det(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        total = torch.zeros(len(x), dtype=torch.float64, device=x.device)
        for block in self.blocks:
            x, log_det = block(x, context)
            total = total + log_det
        return x, total

    def inverse(self, z: Tensor, context: Tensor) -> Tensor:
        for block in reversed(self.blocks):
            assert isinstance(block, Bijector)
            z = block.inverse(z, context)
        return z


@final
class Tails(Bijector):
    """The identity within `knee` of zero, and beyond it a logarithm that goes on with slope one.

        f(x) = sign(x) (c + log(1 + |x| - c)),   f'(x) = 1 / (1 + |x| - c)   for |x| > c

    Nothing is fitted. A value of a million becomes one of 17, which the blocks behind can take, and a normal law behind
    it has tails that fall as those of a log-normal law do, not as exp(-x^2/2).

    Args:
        knee: c, in the model's units, where data has deviation 1.

    Example:
        >>> tails, x = Tails(3.0), torch.tensor([[2.0], [1e6]])
        >>> z, log_det = tails(x, torch.zeros(2, 0))
        >>> z.round(decimals=2).flatten(), round(float(log_det[1]), 2)
        (tensor([ 2.0000, 16.8200]), -13.82)
    """

    def __init__(self, knee: float = 3.0) -> None:
        super().__init__()
        self.knee = knee

    def forward_and_log_det(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        log_slope = -(x.abs() - self.knee).clamp(min=0).log1p()
        z = torch.where(x.abs() > self.knee, x.sign() * (self.knee - log_slope), x)
        return z, summed(log_slope)

    def inverse(self, z: Tensor, context: Tensor) -> Tensor:
        beyond = (z.abs() - self.knee).clamp(min=0)
        return torch.where(beyond > 0, z.sign() * (self.knee + beyond.expm1()), z)


@final
class Ends(Bijector):
    """A logit between the ends of an interval (-b, b), and straight lines from near the ends on.

        f(x) = log(w / (1 - w)),   w = (x + b) / (2b)   where w and 1 - w are at least k, a line of equal slope beyond

    Dequantized levels fill an interval, and many of them are often at an end of it: black, or white. Here the bins at
    the ends become wide, so that no block has to stretch them. The slope is nowhere more than 1 / (2b k (1 - k)), so
    that rounding of x stays small, and values outside the interval are mapped like any other.

    Args:
        bound: b.
        knee: k.

    Example:
        >>> ends, x = Ends(1.0), torch.tensor([[0.0], [0.9], [1.0], [1e6]])
        >>> ends.inverse(ends(x, torch.zeros(4, 0))[0], torch.zeros(4, 0)).flatten()
        tensor([0.0000e+00, 9.0000e-01, 1.0000e+00, 1.0000e+06])
    """

    def __init__(self, bound: float, knee: float = 1 / 256) -> None:
        super().__init__()
        self.bound, self.edge = bound, bound * (1 - 2 * knee)
        self.top, self.slope = math.log((1 - knee) / knee), 1 / (2 * bound * knee * (1 - knee))

    def forward_and_log_det(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        within, beyond = x.clamp(-self.edge, self.edge), (x.abs() - self.edge).clamp(min=0)
        z = 2 * (within / self.bound).atanh() + x.sign() * self.slope * beyond
        log_slope = math.log(2 / self.bound) - torch.log1p(-(within / self.bound).square())
        return z, summed(log_slope)

    def inverse(self, z: Tensor, context: Tensor) -> Tensor:
        within, beyond = z.clamp(-self.top, self.top), (z.abs() - self.top).clamp(min=0)
        return self.bound * (within / 2).tanh() + z.sign() * beyond / self.slope


def summed(log_slopes: Tensor) -> Tensor:
    """The sum over each example, shape (B,), in float64."""
    return log_slopes.flatten(1).sum(1, dtype=torch.float64)
