"""A convolutional U-Net for images of any channel count and any side, channels-last throughout.

Shapes: B batch, C channels, H height, W width.
"""

from contextlib import AbstractContextManager
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ancestral.errors import unknown
from ancestral.nets.blocks import Attention, NoiseEmbedding, ResidualBlock, channel_norm, zeroed

PRECISIONS = ("auto", "float32", "bfloat16")


@cache
def has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware; asked of the CPU, not guessed."""
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") or capabilities.get("bf16"))


class UNet(nn.Module):
    """Residual blocks at falling resolutions and back, each resolution joined across; attention at the lowest.

    A side is halved rounding up, and brought back to exactly what it was, so no side is special.

    Args:
        channels: of the image.
        width: channels of the first level.
        multipliers: width of each level, in units of `width`; every level after the first halves the side.
        blocks: residual blocks per level, each way.
        attention: whether the lowest level attends over its pixels.
        precision: "float32", "bfloat16" (weights stay float32), or "auto": bfloat16 where the CPU has it.

    Raises:
        OptionError: if the precision is unknown.

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
        attention: bool = True,
        precision: str = "auto",
    ) -> None:
        super().__init__()
        if precision not in PRECISIONS:
            raise unknown("precision", precision, PRECISIONS)
        self.bfloat16 = precision == "bfloat16" or (precision == "auto" and has_bfloat16())
        features, widths = 4 * width, [width * m for m in multipliers]
        self.embedding = NoiseEmbedding(features)
        self.enter = nn.Conv2d(channels, width, 3, padding=1)
        self.down, self.shrink = nn.ModuleList(), nn.ModuleList()
        self.up, self.grow = nn.ModuleList(), nn.ModuleList()
        above = width
        for level, here in enumerate(widths):
            self.shrink.append(nn.Conv2d(above, here, 3, stride=2, padding=1) if level else nn.Identity())
            self.down.append(nn.ModuleList(ResidualBlock(here, here, features) for _ in range(blocks)))
            self.up.append(
                nn.ModuleList(ResidualBlock(2 * here if i == 0 else here, here, features) for i in range(blocks))
            )
            self.grow.append(nn.Conv2d(here, above, 3, padding=1) if level else nn.Identity())
            above = here
        self.attend = Attention(above, heads=max(1, above // 64)) if attention else nn.Identity()
        self.middle = ResidualBlock(above, above, features)
        self.leave = zeroed(nn.Conv2d(width, channels, 3, padding=1))
        self.to(memory_format=torch.channels_last)

    def forward(self, x_BCHW: Tensor, log_snr: Tensor) -> Tensor:
        """(B, C, H, W), (B,) -> (B, C, H, W), float32."""
        with self._precision():
            embedding = self.embedding(log_snr)
            h = self.enter(x_BCHW.contiguous(memory_format=torch.channels_last))
            levels = []
            for shrink, blocks in zip(self.shrink, self.down, strict=True):
                h = shrink(h)
                for block in blocks:
                    h = block(h, embedding)
                levels.append(h)
            h = self.middle(self.attend(h), embedding)
            for level in reversed(range(len(levels))):
                h = torch.cat([h, levels[level]], 1)
                for block in self.up[level]:
                    h = block(h, embedding)
                if level:
                    h = F.interpolate(h, size=levels[level - 1].shape[2:], mode="nearest")
                h = self.grow[level](h)
            return self.leave(F.silu(channel_norm(h))).float()

    def _precision(self) -> AbstractContextManager[None]:
        return torch.autocast("cpu", torch.bfloat16, enabled=self.bfloat16)
