"""A convolutional U-Net for images of any channel count and any side, channels-last throughout.

Shapes: B batch, C channels, H height, W width.
"""

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ancestral.errors import OptionError
from ancestral.nets.blocks import (
    Attention,
    NoiseEmbedding,
    ResidualBlock,
    ResidualStack,
    modulated_norm_,
    zeroed,
)
from ancestral.nets.levels import LevelPhases, level_posterior
from ancestral.nets.precision import lowered


class UNet(nn.Module):
    """Residual blocks at falling resolutions and back, what was met on the way down added on the way up.

    A side is halved by averaging, rounding up, and brought back to exactly what it was by repetition, so no side is
    special; channels change in the first block of a level, and by a 1x1 convolution on the way up, before the side
    grows. One linear layer gives the modulation of every block. docs/results/blocks.md has what else was tried.

    Args:
        channels: of the image.
        width: channels of the first level, if its multiplier is 1.
        multipliers: channels of each level, in units of `width`; every level after the first halves the side.
        blocks: residual blocks per level, each way.
        classes: that labels may name; None without labels.
        levels: of the data, whose phases are added to the input; None for real-valued data.
        octaves: how many, see `LevelPhases`.
        posterior: put out E[x_0 | x_t] by Bayes' rule from a prior over the levels, see `level_posterior`.
        variance: put out a reverse variance too, see `denoise.reverse`; not with a posterior, which has its own.
        attention: whether the lowest level attends over its pixels.
        precision: "float32", "bfloat16" (weights stay float32), or "auto": bfloat16 where the hardware has it.

    Raises:
        OptionError: if the precision is unknown, or there is to be a posterior and there are no levels.

    Example:
        >>> UNet(3, width=16, multipliers=(1, 2))(torch.zeros(2, 3, 7, 5), torch.zeros(2)).shape
        torch.Size([2, 3, 7, 5])
    """

    def __init__(
        self,
        channels: int,
        width: int = 64,
        multipliers: tuple[int, ...] = (1, 2, 2),
        blocks: int = 2,
        classes: int | None = None,
        levels: int | None = None,
        octaves: int = 3,
        posterior: bool = False,
        variance: bool = False,
        attention: bool = True,
        precision: str = "auto",
    ) -> None:
        super().__init__()
        if posterior and (levels is None or variance):
            raise OptionError("a posterior over levels needs data that has levels, and no variance=true beside it")
        self.lowered, self.classes = lowered(precision), classes
        self.posterior, self.variance = posterior, variance
        features, widths = 4 * width, [width * m for m in multipliers]
        self.embedding = NoiseEmbedding(features, classes)
        self.phases = LevelPhases(levels, octaves) if levels else None
        self.enter = nn.Conv2d(channels * (1 + 2 * octaves if levels else 1), widths[0], 3, padding=1)
        self.down = nn.ModuleList(
            ResidualStack(above, here, blocks) for above, here in zip([widths[0], *widths[:-1]], widths, strict=True)
        )
        self.attend = Attention(widths[-1]) if attention else nn.Identity()
        self.middle = ResidualBlock(widths[-1], widths[-1])
        self.up = nn.ModuleList(ResidualStack(here, here, blocks) for here in reversed(widths))
        self.grow = nn.ModuleList(nn.Conv2d(b, a, 1, bias=False) for b, a in pairwise(reversed(widths)))
        put_out = (channels * (levels or 1), 1) if posterior else (channels * (1 + variance), 3)
        self.leave = zeroed(nn.Conv2d(widths[0], *put_out, padding="same"))
        in_turn = [block.channels for block in self.modules() if isinstance(block, ResidualBlock)]
        self.shares = [2 * channels for channels in [*in_turn, widths[0]]]
        self.modulation = zeroed(nn.Linear(features, sum(self.shares)))
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, x_BCHW: Tensor, log_snr: Tensor, labels: Tensor | None = None) -> Tensor:
        """(B, C, H, W), (B,), labels (B,) -> (B, C, H, W), float32. Without labels, of all classes together."""
        if self.posterior:
            return self.moments(x_BCHW, log_snr, labels)[0]
        return self._put_out(x_BCHW, log_snr, labels)[:, : x_BCHW.shape[1]]

    def moments(self, x_BCHW: Tensor, log_snr: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """E[x_0 | x_t] and Var[x_0 | x_t] of each value, where a posterior is put out; see `level_posterior`."""
        return level_posterior(self._put_out(x_BCHW, log_snr, labels), x_BCHW, log_snr)

    def halves(self, x_BCHW: Tensor, log_snr: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """What `forward` gives, and the reverse variance of each value as a number about 0, where one is put out."""
        first, second = self._put_out(x_BCHW, log_snr, labels).chunk(2, 1)
        return first, second

    def _put_out(self, x_BCHW: Tensor, log_snr: Tensor, labels: Tensor | None) -> Tensor:
        with torch.autocast(x_BCHW.device.type, torch.bfloat16, enabled=self.lowered):
            modulations = iter(self.modulation(self.embedding(log_snr, labels)).split(self.shares, 1))
            if self.phases:
                x_BCHW = self.phases(x_BCHW, log_snr)
            h = self.enter(x_BCHW.contiguous(memory_format=torch.channels_last))
            across: list[Tensor] = []
            for down in self.down:
                h = down(F.avg_pool2d(h, 2, ceil_mode=True) if across else h, modulations)
                across.append(h)
            h = self.middle(self.attend(h), next(modulations))
            for level, up in enumerate(self.up):
                there = across.pop()
                if level:
                    h = F.interpolate(self.grow[level - 1](h), size=there.shape[2:], mode="nearest")
                h = up(h.add_(there), modulations)
            out = self.leave(F.relu_(modulated_norm_(h, next(modulations))))
        return out.float()
