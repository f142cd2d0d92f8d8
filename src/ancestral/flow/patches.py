"""Transformers over the patches of an image, which tell how its values are mapped.

Shapes: B batch, C channels, H height, W width, N patches, D = C P^2 values of a patch, P its side, E features.
"""

from collections.abc import Iterable
from itertools import repeat

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ancestral.errors import OptionError
from ancestral.nets.blocks import attention, zeroed
from ancestral.nets.dit import Attend, DiTBlock, joined

Shape = tuple[int, int, int]
"""Of an image: C, H, W."""


class PatchNet(nn.Module):
    """Transformer blocks over the patches of an image, which put out numbers for each of its values, zero at first.

    Args:
        shape: (C, H, W).
        patch: P, which divides H and W.
        features: of the context.
        width: E, a multiple of `heads`.
        depth: blocks.
        heads: of the attention.
        per_value: numbers put out for a value.

    Raises:
        OptionError: if the patch or the heads do not divide.
    """

    def __init__(
        self, shape: Shape, patch: int, features: int, *, width: int, depth: int, heads: int, per_value: int = 2
    ) -> None:
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
        self.leave = zeroed(nn.Linear(width, per_value * D))

    def forward(
        self, x_BND: Tensor, context: Tensor, attends: Iterable[Attend] = repeat(attention), start: int = 0
    ) -> Tensor:
        """Patches start, start + 1, ..., (B, n, D), and (B, features) -> (B, n, per_value D).

        `attends` says how each block mixes what it knows of the patches.
        """
        h_BNE = self.enter(x_BND) + self.places[start : start + x_BND.shape[1]]
        for block, attend in zip(self.blocks, attends, strict=False):
            h_BNE = block(h_BNE, context, attend)
        out: Tensor = self.leave(F.layer_norm(h_BNE, h_BNE.shape[-1:])).to(x_BND.dtype)
        return out


def split(x_BCHW: Tensor, patch: int) -> Tensor:
    """An image as a sequence of its patches, (B, C, H, W) -> (B, N, D); `nets.dit.joined` is its inverse."""
    (B, C, H, W), P = x_BCHW.shape, patch
    return x_BCHW.reshape(B, C, H // P, P, W // P, P).permute(0, 2, 4, 1, 3, 5).reshape(B, -1, C * P * P)


def image(x_BND: Tensor, shape: Shape, patch: int) -> Tensor:
    """The image of which these are the patches; of D times as many numbers, one of so many times the channels."""
    return joined(x_BND, shape[1] // patch, shape[2] // patch, patch)
