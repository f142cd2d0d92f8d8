"""A diffusion transformer: the image as a sequence of patches, each block modulated by the noise level and the class.

Shapes: B batch, C channels, H height, W width, N patches, E features, P side of a patch.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ancestral.errors import OptionError
from ancestral.nets.blocks import NoiseEmbedding, attention, zeroed
from ancestral.nets.levels import LevelPhases
from ancestral.nets.precision import lowered

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""How an attention is computed of queries, keys and values."""


class DiTBlock(nn.Module):
    """x + g_1 attention(m_1(x)), then + g_2 mlp(m_2(x)), with m(x) = (1 + scale) norm(x) + shift, from zero gates.

    Reference: Peebles & Xie (2023), section 3.2, adaLN-zero.
    """

    def __init__(self, width: int, heads: int, features: int) -> None:
        super().__init__()
        self.heads = heads
        self.modulation = zeroed(nn.Linear(features, 6 * width))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, width))

    def forward(self, x_BNE: Tensor, embedding: Tensor, attend: Attend = attention) -> Tensor:
        """(B, N, E), (B, features), how queries, keys and values of (B, heads, N, E / heads) mix -> (B, N, E)."""
        B, N, E = x_BNE.shape
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self.modulation(embedding)[:, None].chunk(6, 2)
        rows = self.qkv(modulated(x_BNE, shift_1, scale_1)).reshape(B, N, 3, self.heads, E // self.heads)
        q, k, v = rows.permute(2, 0, 3, 1, 4)
        mixed = attend(q, k, v).transpose(1, 2).reshape(B, N, E)
        x_BNE = torch.addcmul(x_BNE, gate_1, self.out(mixed))
        out: Tensor = torch.addcmul(x_BNE, gate_2, self.mlp(modulated(x_BNE, shift_2, scale_2)))
        return out


def modulated(x_BNE: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """(1 + scale) norm(x) + shift, each patch's features brought to zero mean and unit variance."""
    return torch.addcmul(shift, F.layer_norm(x_BNE, x_BNE.shape[-1:]), 1 + scale)


def positions(rows: int, columns: int, width: int) -> Tensor:
    """Where each patch is: sines and cosines of its row and of its column, (rows columns, E).

    Reference: Vaswani et al. (2017), section 3.5, a half of the features for each direction.
    """
    frequencies = torch.exp(-math.log(10_000.0) * torch.arange(width // 4) / (width // 4))
    angles = [torch.arange(n)[:, None] * frequencies for n in (rows, columns)]
    row, column = (torch.cat([angle.sin(), angle.cos()], 1) for angle in angles)
    both = [row[:, None].expand(-1, columns, -1), column[None].expand(rows, -1, -1)]
    return torch.cat(both, 2).reshape(rows * columns, -1)


class DiT(nn.Module):
    """Transformer blocks over the patches of an image of any side.

    A side that is not a multiple of the patch is padded with zeros, and what is put out is cropped to what came in.

    Reference: Peebles & Xie (2023).

    Args:
        channels: of the image.
        width: features of a patch, a multiple of 4 and of `heads`.
        depth: blocks.
        heads: of the attention.
        patch: side of a patch.
        classes: that labels may name; None without labels.
        levels: of the data, whose phases are added to the input; None for real-valued data.
        octaves: how many, see `LevelPhases`.
        variance: put out a reverse variance too, see `denoise.reverse`.
        precision: "float32", "bfloat16" (weights stay float32), or "auto": bfloat16 where the hardware has it.

    Raises:
        OptionError: if the precision is unknown, or the width does not divide.

    Example:
        >>> DiT(3, width=16, depth=1, heads=2)(torch.zeros(2, 3, 7, 5), torch.zeros(2)).shape
        torch.Size([2, 3, 7, 5])
    """

    def __init__(
        self,
        channels: int,
        width: int = 256,
        depth: int = 6,
        heads: int = 4,
        patch: int = 4,
        classes: int | None = None,
        levels: int | None = None,
        octaves: int = 3,
        variance: bool = False,
        precision: str = "auto",
    ) -> None:
        super().__init__()
        if width % 4 or width % heads:
            raise OptionError(f"a transformer's width is a multiple of 4 and of its {heads} heads, received {width}")
        self.lowered, self.patch, self.width, self.classes = lowered(precision), patch, width, classes
        self.variance = variance
        self.embedding = NoiseEmbedding(width, classes)
        self.phases = LevelPhases(levels, octaves) if levels else None
        self.enter = nn.Conv2d(channels * (1 + 2 * octaves if levels else 1), width, patch, stride=patch)
        self.blocks = nn.ModuleList(DiTBlock(width, heads, width) for _ in range(depth))
        self.modulation = zeroed(nn.Linear(width, 2 * width))
        self.leave = zeroed(nn.Linear(width, channels * (1 + variance) * patch**2))

    def forward(self, x_BCHW: Tensor, log_snr: Tensor, labels: Tensor | None = None) -> Tensor:
        """(B, C, H, W), (B,), labels (B,) -> (B, C, H, W), float32. Without labels, of all classes together."""
        return self._put_out(x_BCHW, log_snr, labels)[:, : x_BCHW.shape[1]]

    def halves(self, x_BCHW: Tensor, log_snr: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """What `forward` gives, and the reverse variance of each value as a number about 0, where one is put out."""
        first, second = self._put_out(x_BCHW, log_snr, labels).chunk(2, 1)
        return first, second

    def _put_out(self, x_BCHW: Tensor, log_snr: Tensor, labels: Tensor | None) -> Tensor:
        (_, _, H, W), P = x_BCHW.shape, self.patch
        rows, columns = -(-H // P), -(-W // P)
        with torch.autocast(x_BCHW.device.type, torch.bfloat16, enabled=self.lowered):
            embedding = self.embedding(log_snr, labels)
            if self.phases:
                x_BCHW = self.phases(x_BCHW, log_snr)
            x_BCHW = F.pad(x_BCHW, (0, columns * P - W, 0, rows * P - H))
            x_BNE = self.enter(x_BCHW).flatten(2).transpose(1, 2)
            x_BNE = x_BNE + positions(rows, columns, self.width).to(x_BNE)
            for block in self.blocks:
                x_BNE = block(x_BNE, embedding)
            shift, scale = self.modulation(embedding)[:, None].chunk(2, 2)
            out = self.leave(modulated(x_BNE, shift, scale))
        return joined(out.float(), rows, columns, P)[:, :, :H, :W]


def joined(x_BND: Tensor, rows: int, columns: int, patch: int) -> Tensor:
    """The image of which these are the patches, row by row, (B, rows columns, C P P) -> (B, C, rows P, columns P)."""
    P = patch
    x_BCHW = x_BND.reshape(len(x_BND), rows, columns, -1, P, P).permute(0, 3, 1, 4, 2, 5)
    return x_BCHW.reshape(len(x_BND), -1, rows * P, columns * P)
