"""A convolutional U-Net for images of any channel count and any side, channels-last throughout.

Shapes: B batch, C channels, H height, W width.
"""

from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ancestral.errors import unknown
from ancestral.nets.blocks import (
    Attention,
    LevelPhases,
    NoiseEmbedding,
    ResidualBlock,
    ResidualStack,
    channel_norm,
    zeroed,
)

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
        levels: of the data, whose phases are added to the input; None for real-valued data.
        octaves: how many, see `LevelPhases`.
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
        levels: int | None = None,
        octaves: int = 3,
        attention: bool = True,
        precision: str = "auto",
    ) -> None:
        super().__init__()
        if precision not in PRECISIONS:
            raise unknown("precision", precision, PRECISIONS)
        self.lowered = precision == "bfloat16" or (precision == "auto" and has_bfloat16())
        features, widths = 4 * width, [width * m for m in multipliers]
        self.embedding = NoiseEmbedding(features)
        self.phases = LevelPhases(levels, octaves) if levels else None
        self.enter = nn.Conv2d(channels * (1 + 2 * octaves if levels else 1), width, 3, padding=1)
        self.shrink, self.down, self.up, self.grow = (nn.ModuleList() for _ in range(4))
        for level, (above, here) in enumerate(zip([width, *widths[:-1]], widths, strict=True)):
            first = level == 0 and above == here  # nothing to change on the way in
            self.shrink.append(nn.Identity() if first else nn.Conv2d(above, here, 3, stride=1 + (level > 0), padding=1))
            self.down.append(ResidualStack(here, here, features, blocks))
            self.up.append(ResidualStack(2 * here, here, features, blocks))
            self.grow.append(nn.Identity() if first else nn.Conv2d(here, above, 3, padding=1))
        self.attend = Attention(widths[-1]) if attention else nn.Identity()
        self.middle = ResidualBlock(widths[-1], widths[-1], features)
        self.leave = zeroed(nn.Conv2d(width, channels, 3, padding=1))
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, x_BCHW: Tensor, log_snr: Tensor) -> Tensor:
        """(B, C, H, W), (B,) -> (B, C, H, W), float32."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.lowered):
            embedding = self.embedding(log_snr)
            if self.phases:
                x_BCHW = self.phases(x_BCHW, log_snr)
            h = self.enter(x_BCHW.contiguous(memory_format=torch.channels_last))
            across = []
            for shrink, down in zip(self.shrink, self.down, strict=True):
                h = down(shrink(h), embedding)
                across.append(h)
            h = self.middle(self.attend(h), embedding)
            for level in reversed(range(len(across))):
                h = self.up[level](torch.cat([h, across[level]], 1), embedding)
                if level:
                    h = F.interpolate(h, size=across[level - 1].shape[2:], mode="nearest")
                h = self.grow[level](h)
            out = self.leave(F.silu(channel_norm(h)))
        return out.float()
