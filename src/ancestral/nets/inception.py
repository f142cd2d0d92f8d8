"""The Inception-v3 of the Fréchet inception distance: the network whose features that number is defined in.

Its weights are those of TensorFlow's graph of 2015-12-05, whose pooling does not count what is padded and whose
resizing puts pixels at their corners. Parameters have the names of the file in which PyTorch's users hand them around.

Shapes: B batch, C channels, H height, W width.

Reference: Szegedy et al. (2016), "Rethinking the Inception architecture for computer vision", figures 5 to 7; Heusel et
al. (2017), section 4, for features to measure distances in.
"""

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SIDE = 299
"""Of the images that the network sees."""

FEATURES = 2048

Step = tuple[int, Sequence[tuple[int, int]]]
"""Channels that leave, and a kernel; two kernels are two layers side by side."""

mean_3x3 = partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False)
most_3x3 = partial(F.max_pool2d, kernel_size=3, stride=1, padding=1)
halved = partial(F.max_pool2d, kernel_size=3, stride=2)

ONE, THREE, FIVE, ACROSS, DOWN = [(1, 1)], [(3, 3)], [(5, 5)], [(1, 7)], [(7, 1)]
BOTH = [(1, 3), (3, 1)]


class Layer(nn.Module):
    """A convolution, normalised by moments that were learnt, and rectified."""

    def __init__(self, into: int, out: int, kernel: tuple[int, int], stride: int = 1, *, padded: bool = True) -> None:
        super().__init__()
        padding = (kernel[0] // 2, kernel[1] // 2) if padded else 0
        self.conv = nn.Conv2d(into, out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out, eps=1e-3)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(B, into, H, W) -> (B, out, H', W')."""
        return F.relu(self.bn(self.conv(x_BCHW)))


class Mixed(nn.Module):
    """Branches side by side, joined by channels, and at last what is pooled.

    Args:
        into: channels.
        branches: the steps of each by its name. Its layers are named by it and by their number, if there are several.
        pooled: channels that a layer makes of what is pooled; None for no layer, where the last layers halve the sides.
        pool: how.
    """

    def __init__(
        self, into: int, branches: Mapping[str, Sequence[Step]], pooled: int | None, pool: partial[Tensor]
    ) -> None:
        super().__init__()
        self.pool, self.paths, halves = pool, list[list[list[str]]](), pooled is None
        for name, steps in branches.items():
            path, channels = list[list[str]](), into
            for i, (out, kernels) in enumerate(steps, 1):
                number, last = f"_{i}" if len(steps) > 1 else "", halves and i == len(steps)
                path.append([f"{name}{number}{letter}" for letter in ("ab" if len(kernels) > 1 else ("",))])
                for layer, kernel in zip(path[-1], kernels, strict=True):
                    self.add_module(layer, Layer(channels, out, kernel, 2 if last else 1, padded=not last))
                channels = out
            self.paths.append(path)
        self.branch_pool = nn.Identity() if pooled is None else Layer(into, pooled, (1, 1))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(B, into, H, W) -> (B, out, H', W')."""
        found = []
        for path in self.paths:
            h = x_BCHW
            for layers in path:
                h = torch.cat([self.get_submodule(layer)(h) for layer in layers], 1)
            found.append(h)
        return torch.cat([*found, self.branch_pool(self.pool(x_BCHW))], 1)


def _small(into: int, pooled: int) -> Mixed:
    branches: dict[str, Sequence[Step]] = {
        "branch1x1": [(64, ONE)],
        "branch5x5": [(48, ONE), (64, FIVE)],
        "branch3x3dbl": [(64, ONE), (96, THREE), (96, THREE)],
    }
    return Mixed(into, branches, pooled, mean_3x3)


def _long(c: int) -> Mixed:
    branches: dict[str, Sequence[Step]] = {
        "branch1x1": [(192, ONE)],
        "branch7x7": [(c, ONE), (c, ACROSS), (192, DOWN)],
        "branch7x7dbl": [(c, ONE), (c, DOWN), (c, ACROSS), (c, DOWN), (192, ACROSS)],
    }
    return Mixed(768, branches, 192, mean_3x3)


def _wide(into: int, pool: partial[Tensor]) -> Mixed:
    branches: dict[str, Sequence[Step]] = {
        "branch1x1": [(320, ONE)],
        "branch3x3": [(384, ONE), (384, BOTH)],
        "branch3x3dbl": [(448, ONE), (384, THREE), (384, BOTH)],
    }
    return Mixed(into, branches, 192, pool)


class Inception(nn.Module):
    """2048 features of images: the mean over places of what the last block puts out.

    Example:
        >>> sum(each.numel() for each in Inception().parameters())
        21785568
    """

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Layer(3, 32, (3, 3), 2, padded=False)
        self.Conv2d_2a_3x3 = Layer(32, 32, (3, 3), padded=False)
        self.Conv2d_2b_3x3 = Layer(32, 64, (3, 3))
        self.Conv2d_3b_1x1 = Layer(64, 80, (1, 1))
        self.Conv2d_4a_3x3 = Layer(80, 192, (3, 3), padded=False)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = _small(192, 32), _small(256, 64), _small(288, 64)
        halving: dict[str, Sequence[Step]] = {
            "branch3x3": [(384, THREE)],
            "branch3x3dbl": [(64, ONE), (96, THREE), (96, THREE)],
        }
        self.Mixed_6a = Mixed(288, halving, None, halved)
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = _long(128), _long(160), _long(160), _long(192)
        halving = {
            "branch3x3": [(192, ONE), (320, THREE)],
            "branch7x7x3": [(192, ONE), (192, ACROSS), (192, DOWN), (192, THREE)],
        }
        self.Mixed_7a = Mixed(768, halving, None, halved)
        self.Mixed_7b, self.Mixed_7c = _wide(1280, mean_3x3), _wide(2048, most_3x3)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Images of three channels with values from 0 to 255, of any size, (B, 3, H, W) -> (B, 2048)."""
        h = (resized(x_BCHW, SIDE) - 128) / 128
        h = halved(self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(h))))
        h = halved(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(h)))
        h = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(h)))
        h = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(h)))))
        h = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(h)))
        return h.mean((2, 3))


def resized(x_BCHW: Tensor, side: int) -> Tensor:
    """Images brought to a side as TensorFlow 1 does it by default: bilinear between pixels at their corners.

        out_i = (1 - f) in_j + f in_(j+1),   j + f = i n / side,   with the last pixel beyond the last

    in each direction, without a filter where images become smaller.

    Args:
        x_BCHW: shape (B, C, H, W).
        side: of what comes out.

    Example:
        >>> resized(torch.tensor([[[[0.0, 2.0]]]]), 4)[0, 0, 0].tolist()
        [0.0, 1.0, 2.0, 2.0]
    """
    for dim in (3, 2):
        n = x_BCHW.shape[dim]
        at = torch.arange(side, dtype=torch.float32) * (n / side)
        j = at.long()
        f = (at - j).to(x_BCHW.dtype).reshape((-1, 1) if dim == 2 else (1, -1))
        x_BCHW = x_BCHW.index_select(dim, j).lerp(x_BCHW.index_select(dim, (j + 1).clamp(max=n - 1)), f)
    return x_BCHW
