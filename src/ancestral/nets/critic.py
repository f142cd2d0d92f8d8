"""The two networks of a game: a critic, which scores examples, and a generator, which makes them of noise.

Neither has a normalisation layer, which would let the score of an example depend on its neighbours or on nothing but
its direction: variance is kept by the initialisation, and every residual branch starts as nothing. Neither repeats
pixels or drops them: sides change by bilinear interpolation, with what the smaller image cannot hold filtered out.

Shapes: B batch, C channels, H height, W width, D dimensions of the data, Z of the latent, E features.

Reference: Huang et al. (2024), The GAN is dead; long live the GAN!, section 4; Miyato & Koyama (2018) for the classes.
"""

from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ancestral.nets.blocks import waves, zeroed

SLOPE = 0.2
"""Of the leaky rectifier below zero."""

COARSE = 5
"""A side is halved until it is no longer than this."""

Layer = TypeVar("Layer", nn.Linear, nn.Conv2d)


def halved(side: int) -> int:
    """Half of a side, rounded up; a side that is at most `COARSE` stays as it is.

    Example:
        >>> halved(28), halved(7), halved(4)
        (14, 4, 4)
    """
    return -(-side // 2) if side > COARSE else side


def sizes(height: int, width: int) -> list[tuple[int, int]]:
    """Height and width of an image at every level, each half of the one before, until both are at most `COARSE`.

    Example:
        >>> sizes(28, 8)
        [(28, 8), (14, 4), (7, 4), (4, 4)]
    """
    found = [(height, width)]
    while max(found[-1]) > COARSE:
        found.append((halved(found[-1][0]), halved(found[-1][1])))
    return found


def resampled(x_BCHW: Tensor, size: tuple[int, int]) -> Tensor:
    """The image at another size, by bilinear interpolation over a window as wide as the coarser of the two pixels.

    It is computed in float32 at least: torch has no such interpolation of bfloat16 on a CPU.

    Args:
        x_BCHW: shape (B, C, H, W).
        size: height and width of the result.

    Example:
        >>> resampled(torch.tensor([[[[0.0, 8.0, 0.0, 8.0]]]]), (1, 2))
        tensor([[[[3.4286, 4.5714]]]])
    """
    wide = x_BCHW.to(torch.promote_types(x_BCHW.dtype, torch.float32))
    return F.interpolate(wide, size, mode="bilinear", antialias=True).to(x_BCHW.dtype)


def active(h: Tensor) -> Tensor:
    """The leaky rectifier."""
    return F.leaky_relu(h, SLOPE)


def scaled(layer: Layer) -> Layer:
    """The layer with weights that keep the variance through the rectifier before it, and no bias.

    Reference: He et al. (2015), eq. 15.
    """
    nn.init.kaiming_normal_(layer.weight, a=SLOPE)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


class Score(nn.Module):
    """w . h + b, and of an example of class y, (w + e_y) . h + b, on features h; without labels, the mean over classes.

    Reference: Miyato & Koyama (2018), eq. 3.
    """

    def __init__(self, features: int, classes: int | None = None) -> None:
        super().__init__()
        self.every = scaled(nn.Linear(features, 1))
        self.label = nn.Embedding(classes, features) if classes else None
        if self.label is not None:
            zeroed(self.label)

    def forward(self, h_BE: Tensor, labels: Tensor | None = None) -> Tensor:
        """(B, E), labels (B,) -> (B,)."""
        w_BE = self.every.weight
        if self.label is not None:
            w_BE = w_BE + (self.label.weight.mean(0) if labels is None else self.label(labels))
        return (w_BE * h_BE).sum(1) + self.every.bias  # in float32 whatever the features are: pairs of scores are close


class Layers(nn.Module):
    """Residual layers over a vector and its `waves`: h + second(active(first(active(h))))."""

    def __init__(self, dims: int, width: int, depth: int, octaves: int) -> None:
        super().__init__()
        self.octaves = octaves
        self.enter = scaled(nn.Linear(dims * (1 + 2 * octaves), width))
        self.first = nn.ModuleList(scaled(nn.Linear(width, width)) for _ in range(depth))
        self.second = nn.ModuleList(zeroed(nn.Linear(width, width)) for _ in range(depth))

    def forward(self, x_BD: Tensor, moved: Tensor | None = None) -> Tensor:
        """(B, D), what is added to the first features (B, E) -> (B, E)."""
        h_BE: Tensor = self.enter(waves(x_BD, self.octaves))
        if moved is not None:
            h_BE = h_BE + moved
        for first, second in zip(self.first, self.second, strict=True):
            h_BE = h_BE + second(active(first(active(h_BE))))
        return active(h_BE)


class VectorCritic(nn.Module):
    """Scores of vectors, or of arrays taken as vectors.

    Args:
        shape: of one example; flattened inside.
        width: hidden features.
        depth: residual layers.
        octaves: of `waves`.
        classes: that labels may name; None without labels.

    Example:
        >>> VectorCritic((2,), width=32, depth=2)(torch.zeros(5, 2)).shape
        torch.Size([5])
    """

    def __init__(
        self, shape: tuple[int, ...], width: int = 128, depth: int = 4, octaves: int = 4, classes: int | None = None
    ) -> None:
        super().__init__()
        self.layers = Layers(torch.Size(shape).numel(), width, depth, octaves)
        self.score = Score(width, classes)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """(B, *shape), labels (B,) -> (B,)."""
        score: Tensor = self.score(self.layers(x.flatten(1)), labels)
        return score


class VectorGenerator(nn.Module):
    """Vectors, or arrays taken as vectors, of a latent.

    Args:
        shape: of one example.
        latent: dimensions of the latent.
        width: hidden features.
        depth: residual layers.
        octaves: of `waves`.
        classes: that labels may name; None without labels.

    Example:
        >>> VectorGenerator((2,), latent=4, width=32, depth=2)(torch.zeros(5, 4)).shape
        torch.Size([5, 2])
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        latent: int = 2,
        width: int = 128,
        depth: int = 4,
        octaves: int = 3,
        classes: int | None = None,
    ) -> None:
        super().__init__()
        self.shape, self.layers = shape, Layers(latent, width, depth, octaves)
        self.label = nn.Embedding(classes, width) if classes else None
        self.leave = scaled(nn.Linear(width, torch.Size(shape).numel()))

    def forward(self, z_BZ: Tensor, labels: Tensor | None = None) -> Tensor:
        """(B, Z), labels (B,) -> (B, *shape)."""
        x: Tensor = self.leave(self.layers(z_BZ, self.label(labels) if self.label else None))
        return x.reshape(-1, *self.shape)


class Residual(nn.Module):
    """x + second(active(first(active(x)))), two 3x3 convolutions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = scaled(nn.Conv2d(channels, channels, 3, padding=1))
        self.second = zeroed(nn.Conv2d(channels, channels, 3, padding=1))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        out: Tensor = x_BCHW + self.second(active(self.first(active(x_BCHW))))
        return out


class ImageCritic(nn.Module):
    """Scores of images of any side: residual blocks at falling sizes, then one layer over all that is left.

    Args:
        shape: of an image, (C, H, W).
        width: channels of the first level; doubled at every level, up to four times as many.
        blocks: residual blocks per level.
        classes: that labels may name; None without labels.

    Example:
        >>> ImageCritic((3, 7, 12), width=8)(torch.zeros(2, 3, 7, 12)).shape
        torch.Size([2])
    """

    def __init__(self, shape: tuple[int, ...], width: int = 32, blocks: int = 1, classes: int | None = None) -> None:
        super().__init__()
        self.sizes = sizes(shape[1], shape[2])
        channels = _channels(width, len(self.sizes))
        self.enter = scaled(nn.Conv2d(shape[0], width, 3, padding=1))
        self.blocks = nn.ModuleList(nn.Sequential(*(Residual(c) for _ in range(blocks))) for c in channels)
        self.narrow = nn.ModuleList(scaled(nn.Conv2d(a, b, 1)) for a, b in pairwise(channels))
        height, across = self.sizes[-1]
        self.leave = scaled(nn.Linear(channels[-1] * height * across, 4 * width))
        self.score = Score(4 * width, classes)

    def forward(self, x_BCHW: Tensor, labels: Tensor | None = None) -> Tensor:
        """(B, C, H, W), labels (B,) -> (B,)."""
        h = self.blocks[0](self.enter(x_BCHW))
        for size, narrow, block in zip(self.sizes[1:], self.narrow, self.blocks[1:], strict=True):
            h = block(narrow(resampled(active(h), size)))
        score: Tensor = self.score(active(self.leave(active(h).flatten(1))), labels)
        return score


class ImageGenerator(nn.Module):
    """Images of any side of a latent: one layer to the coarsest size, then residual blocks at growing sizes.

    Args:
        shape: of an image, (C, H, W).
        latent: dimensions of the latent.
        width: channels of the last level; doubled at every level before it, up to four times as many.
        blocks: residual blocks per level.
        classes: that labels may name; None without labels.

    Example:
        >>> ImageGenerator((3, 7, 12), latent=4, width=8)(torch.zeros(2, 4)).shape
        torch.Size([2, 3, 7, 12])
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        latent: int = 64,
        width: int = 32,
        blocks: int = 1,
        classes: int | None = None,
    ) -> None:
        super().__init__()
        self.sizes = sizes(shape[1], shape[2])[::-1]
        channels = _channels(width, len(self.sizes))[::-1]
        self.coarsest = (channels[0], *self.sizes[0])
        features = torch.Size(self.coarsest).numel()
        self.enter = scaled(nn.Linear(latent, features))
        self.label = nn.Embedding(classes, features) if classes else None
        self.blocks = nn.ModuleList(nn.Sequential(*(Residual(c) for _ in range(blocks))) for c in channels)
        self.widen = nn.ModuleList(scaled(nn.Conv2d(a, b, 1)) for a, b in pairwise(channels))
        self.leave = scaled(nn.Conv2d(width, shape[0], 3, padding=1))

    def forward(self, z_BZ: Tensor, labels: Tensor | None = None) -> Tensor:
        """(B, Z), labels (B,) -> (B, C, H, W)."""
        h = self.enter(z_BZ)
        if self.label is not None:
            h = h + self.label(labels)
        h = self.blocks[0](h.reshape(-1, *self.coarsest))
        for size, widen, block in zip(self.sizes[1:], self.widen, self.blocks[1:], strict=True):
            h = block(resampled(widen(active(h)), size))
        x: Tensor = self.leave(active(h))
        return x


def _channels(width: int, levels: int) -> list[int]:
    return [width * min(2**level, 4) for level in range(levels)]
