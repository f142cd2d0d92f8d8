"""Couplings of the values of an image, whose networks are transformers over its patches.

Shapes: B batch, C channels, H height, W width, N patches, D = C P^2 values of a patch, P its side, E features.
"""

import math
from collections.abc import Iterator
from typing import final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ancestral.errors import OptionError
from ancestral.flow.bijector import Bijector, summed
from ancestral.nets.blocks import zeroed
from ancestral.nets.dit import DiTBlock, joined

Shape = tuple[int, int, int]
"""Of an image: C, H, W."""


class PatchNet(nn.Module):
    """Transformer blocks over the patches of an image, put out as two images; both are zero at first.

    Args:
        shape: (C, H, W).
        patch: P, which divides H and W.
        features: of the context.
        width: E, a multiple of `heads`.
        depth: blocks.
        heads: of the attention.

    Raises:
        OptionError: if the patch or the heads do not divide.
    """

    def __init__(self, shape: Shape, patch: int, features: int, *, width: int, depth: int, heads: int) -> None:
        super().__init__()
        (C, H, W), self.patch = shape, patch
        if patch < 1 or H % patch or W % patch:
            raise OptionError(f"received patch {patch}: the sides of images of {H}x{W} are not multiples of it")
        if width % heads:
            raise OptionError(f"a transformer's width is a multiple of its {heads} heads, received {width}")
        N, D = H * W // patch**2, C * patch**2
        self.enter = nn.Linear(D, width)
        self.places = nn.Parameter(0.02 * torch.randn(N, width))
        self.blocks = nn.ModuleList(DiTBlock(width, heads, features) for _ in range(depth))
        self.leave = zeroed(nn.Linear(width, 2 * D))

    def forward(self, x_BCHW: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, H, W), (B, features) -> (B, C, H, W) twice."""
        _, _, H, W = x_BCHW.shape
        h_BNE = self.enter(split(x_BCHW, self.patch)) + self.places
        for block in self.blocks:
            h_BNE = block(h_BNE, context)
        out = self.leave(F.layer_norm(h_BNE, h_BNE.shape[-1:]))
        first, second = joined(out, H // self.patch, W // self.patch, self.patch).chunk(2, 1)
        return first, second


def split(x_BCHW: Tensor, patch: int) -> Tensor:
    """An image as a sequence of its patches, (B, C, H, W) -> (B, N, D)."""
    (B, C, H, W), P = x_BCHW.shape, patch
    return x_BCHW.reshape(B, C, H // P, P, W // P, P).permute(0, 2, 4, 1, 3, 5).reshape(B, -1, C * P * P)


@final
class Coupling(Bijector):
    """The values that a mask keeps tell a network how the others are moved and stretched.

        z = x where m = 1,   z = (x + b) s,   s = 2 sigmoid(r),   (b, r) = net(m x)   elsewhere

    One pass each way. No value grows more than twofold, and a new coupling is the identity.

    Reference: Dinh et al. (2017), eqs. 4-8; Kolesnikov et al. (2024), Jet, for the form of the scale.

    Args:
        net: (m x, context) to b and r.
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
        b, r = self.net(x * self.keep, context)
        log_s = _log_scale(r).masked_fill(self.keep, 0.0)
        return torch.where(self.keep, x, (x + b) * log_s.exp()), summed(log_s)

    def inverse(self, z: Tensor, context: Tensor) -> Tensor:
        b, r = self.net(z * self.keep, context)
        return torch.where(self.keep, z, z * (-_log_scale(r)).exp() - b)


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
                yield joined(kept.expand(1, H * W // P**2, dims), H // P, W // P, P)[0].contiguous()
        if patterns:
            kept = patterns[step % len(patterns)].reshape(1, -1, 1).expand(-1, -1, dims)
            yield joined(kept, H // P, W // P, P)[0].contiguous()
            step += 1
        elif dims == 1:
            yield torch.zeros(shape, dtype=torch.bool)  # a single value is moved by what it is told of
