"""Networks that turn an example into a few features, in which examples of one kind lie near each other.

Shapes: B batch, C channels, H height, W width, D dimensions of the data, E features.
"""

from itertools import pairwise

import torch
from torch import Tensor, nn

from ancestral.nets.critic import Layers, Residual, active, resampled, scaled, sizes

LARGEST = 32
"""Longer sides of an image are brought to this, which bounds what its features cost."""


class ImageEncoder(nn.Module):
    """Features of images of any side: residual blocks at falling sizes, then one layer over all that is left.

    Args:
        shape: of an image, (C, H, W).
        features: E.
        width: channels of the first level; twice as many at all others.

    Example:
        >>> ImageEncoder((3, 7, 40), features=5)(torch.zeros(2, 3, 7, 40)).shape
        torch.Size([2, 5])
    """

    def __init__(self, shape: tuple[int, ...], features: int = 64, width: int = 16) -> None:
        super().__init__()
        self.sizes = sizes(min(shape[1], LARGEST), min(shape[2], LARGEST))
        channels = [width, *(2 * width for _ in self.sizes[1:])]
        self.enter = scaled(nn.Conv2d(shape[0], width, 3, padding=1))
        self.blocks = nn.ModuleList(Residual(c) for c in channels)
        self.narrow = nn.ModuleList(scaled(nn.Conv2d(a, b, 1)) for a, b in pairwise(channels))
        height, across = self.sizes[-1]
        self.leave = scaled(nn.Linear(channels[-1] * height * across, features))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, E)."""
        h = self.blocks[0](self.enter(resampled(x_BCHW, self.sizes[0])))
        for size, narrow, block in zip(self.sizes[1:], self.narrow, self.blocks[1:], strict=True):
            h = block(narrow(resampled(active(h), size)))
        out: Tensor = self.leave(active(h).flatten(1))
        return out


class VectorEncoder(nn.Module):
    """Features of vectors, or of arrays taken as vectors.

    Args:
        shape: of one example; flattened inside.
        features: E.
        width: hidden features.
        depth: residual layers.

    Example:
        >>> VectorEncoder((2, 3), features=5)(torch.zeros(4, 2, 3)).shape
        torch.Size([4, 5])
    """

    def __init__(self, shape: tuple[int, ...], features: int = 64, width: int = 128, depth: int = 2) -> None:
        super().__init__()
        self.layers = Layers(torch.Size(shape).numel(), width, depth, octaves=1)
        self.leave = scaled(nn.Linear(width, features))

    def forward(self, x: Tensor) -> Tensor:
        """(B, *shape) -> (B, E)."""
        out: Tensor = self.leave(self.layers(x.flatten(1)))
        return out
