"""Couplings of the values of an image, whose networks are transformers over its patches.

Shapes: B batch, C channels, H height, W width, N patches, D = C P^2 values of a patch, P its side.
"""

import math
from collections.abc import Iterator
from typing import final

import torch
from torch import Tensor
from torch.nn import functional as F

from ancestral.flow.bijector import Bijector, summed
from ancestral.flow.patches import PatchNet, Shape, image, split


@final
class Coupling(Bijector):
    """The values that a mask keeps tell a network how the others are moved and stretched.

        z = x where m = 1,   z = (x + b) s,   s = 2 sigmoid(r),   (b, r) = net(m x)   elsewhere

    One pass each way. No value grows more than twofold, and a new coupling is the identity.

    Reference: Dinh et al. (2017), eqs. 4-8; Kolesnikov et al. (2024), Jet, for the form of the scale.

    Args:
        net: (m x, context) to b and r, two numbers for each value.
        keep: m, bool, shape (C, H, W).

    Example:
        >>> shape = (1, 4, 4)
        >>> net = PatchNet(shape, 2, 3, width=8, depth=1, heads=2)
        >>> coupling, x, context = Coupling(net, next(masks(shape, 2))), torch.randn(5, *shape), torch.randn(5, 3)
        >>> torch.equal(coupling(x, context)[0], x)
        True
    """

    keep: Tensor

    def __init__(self, net: PatchNet, keep: Tensor) -> None:
        super().__init__()
        self.net = net
        self.register_buffer("keep", keep)

    def forward_and_log_det(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        b, r = self._told(x, context)
        log_s = _log_scale(r).masked_fill(self.keep, 0.0)
        return torch.where(self.keep, x, (x + b) * log_s.exp()), summed(log_s)

    def inverse(self, z: Tensor, context: Tensor) -> Tensor:
        b, r = self._told(z, context)
        return torch.where(self.keep, z, z * (-_log_scale(r)).exp() - b)

    def _told(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """b and r of each value, shape (B, C, H, W)."""
        out = self.net(split(x * self.keep, self.net.patch), context)
        b, r = image(out, (x.shape[1], x.shape[2], x.shape[3]), self.net.patch).chunk(2, 1)
        return b, r


def _log_scale(r: Tensor) -> Tensor:
    """log s, zero at r = 0."""
    return math.log(2) + F.logsigmoid(r)


def masks(shape: Shape, patch: int) -> Iterator[Tensor]:
    """What each of a sequence of couplings keeps, without end: bool, shape (C, H, W).

    Twice half of the values of every patch, at random, and then the other half; then every other patch: of a
    checkerboard, of rows, of columns, and the next time the others. A patch of one value has no halves, and a single
    patch no others.

    Reference: Kolesnikov et al. (2024), Jet.
    """
    (C, H, W), P = shape, patch
    dims, rows, columns = C * P * P, torch.arange(H // P)[:, None], torch.arange(W // P)[None]
    patterns = [
        (index % 2 == parity).expand(H // P, W // P)
        for parity in (0, 1)
        for index in (rows + columns, rows, columns)
        if bool((index % 2 == 1).any())
    ]
    step = 0
    while True:
        for _ in range(2 if dims > 1 else 0):
            half = torch.zeros(dims, dtype=torch.bool)
            half[torch.randperm(dims)[: dims // 2]] = True
            for kept in (half, ~half):
                yield image(kept.expand(1, H * W // P**2, dims), shape, P)[0].contiguous()
        if patterns:
            kept = patterns[step % len(patterns)].reshape(1, -1, 1).expand(-1, -1, dims)
            yield image(kept, shape, P)[0].contiguous()
            step += 1
        elif dims == 1:
            yield torch.zeros(shape, dtype=torch.bool)  # a single value is moved by what it is told of
