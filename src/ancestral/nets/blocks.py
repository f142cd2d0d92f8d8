"""What networks are made of.

Shapes: B batch, C channels, H height, W width, E embedding.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class NoiseEmbedding(nn.Module):
    """A log-SNR in nats, shape (B,), as a vector of E features: sines and cosines, then two layers."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, features), nn.SiLU(), nn.Linear(features, features), nn.SiLU())

    def forward(self, log_snr: Tensor) -> Tensor:
        """(B,) -> (B, E)."""
        periods = torch.logspace(math.log10(80.0), 0, 32, dtype=log_snr.dtype)
        angle_BF = 2 * math.pi * log_snr[:, None] / periods
        out: Tensor = self.layers(torch.cat([angle_BF.sin(), angle_BF.cos()], 1))
        return out


class LevelPhases(nn.Module):
    """Where each value lies within its level, as sines and cosines that fade where noise hides it.

    For y = x_t / alpha_t, which is x_0 plus noise of standard deviation rho = sigma_t / alpha_t, and the periods
    P = D, 2D, 4D, ... of the spacing D between levels: sin(2 pi y / P) and cos(2 pi y / P), each times the factor
    exp(-(2 pi rho / P)^2 / 2) by which such noise shrinks its mean. From the first of them a network can round to a
    level, which from the value alone it would have to learn as a staircase.

    Reference: Kingma et al. (2021), appendix C, for Fourier features of the input; the fading is ours.

    Args:
        levels: number of levels in [-1, 1].
        octaves: number of periods.
    """

    def __init__(self, levels: int, octaves: int) -> None:
        super().__init__()
        spacing = 2 / (levels - 1)
        self.frequencies = [2 * math.pi / (spacing * 2**octave) for octave in range(octaves)]

    def forward(self, x_BCHW: Tensor, log_snr: Tensor) -> Tensor:
        """Unit-variance input (B, C, H, W), (B,) -> (B, C (1 + 2 octaves), H, W), the input first."""
        rho_squared = (-log_snr).exp()[:, None, None, None]
        y = x_BCHW * (1 + rho_squared).sqrt()
        features = [x_BCHW]
        for frequency in self.frequencies:
            fade = (-0.5 * frequency**2 * rho_squared).exp()
            features += [fade * (frequency * y).sin(), fade * (frequency * y).cos()]
        return torch.cat(features, 1)


def zeroed(layer: nn.Module) -> nn.Module:
    """The layer with all parameters zero, so that the branch it ends starts as nothing."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def channel_norm(x_BCHW: Tensor) -> Tensor:
    """Each pixel's channels brought to zero mean and unit variance: one fused pass over a channels-last tensor.

    Reference: Ba et al. (2016), applied per pixel. On a CPU it costs a third of a group norm.
    """
    return F.layer_norm(x_BCHW.permute(0, 2, 3, 1), (x_BCHW.shape[1],)).permute(0, 3, 1, 2)


class ResidualBlock(nn.Module):
    """x + conv(silu(modulate(norm(conv(silu(x)))))); the noise level modulates by a scale and a shift per channel."""

    def __init__(self, channels_in: int, channels: int, features: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels_in, channels, 3, padding=1, bias=False)
        self.modulation = zeroed(nn.Linear(features, 2 * channels))
        self.second = zeroed(nn.Conv2d(channels, channels, 3, padding=1))
        self.shortcut = nn.Identity() if channels_in == channels else nn.Conv2d(channels_in, channels, 1)

    def forward(self, x_BCHW: Tensor, embedding_BE: Tensor) -> Tensor:
        """(B, C_in, H, W), (B, E) -> (B, C, H, W)."""
        scale, shift = self.modulation(embedding_BE)[:, :, None, None].chunk(2, 1)
        hidden = channel_norm(self.first(F.silu(x_BCHW)))
        hidden = torch.addcmul(shift, hidden, 1 + scale)
        out: Tensor = self.shortcut(x_BCHW) + self.second(F.silu(hidden))
        return out


class ResidualStack(nn.Module):
    """Residual blocks one after the other, the first taking `channels_in`."""

    def __init__(self, channels_in: int, channels: int, features: int, blocks: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            ResidualBlock(channels if i else channels_in, channels, features) for i in range(blocks)
        )

    def forward(self, x_BCHW: Tensor, embedding_BE: Tensor) -> Tensor:
        """(B, C_in, H, W), (B, E) -> (B, C, H, W)."""
        for block in self.blocks:
            x_BCHW = block(x_BCHW, embedding_BE)
        return x_BCHW


class Attention(nn.Module):
    """x + self-attention over the pixels, on normalised input, in heads of about 64 channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.heads = next(heads for heads in range(max(1, channels // 64), 0, -1) if channels % heads == 0)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1, bias=False)
        self.out = zeroed(nn.Conv2d(channels, channels, 1))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        B, C, H, W = x_BCHW.shape
        rows = self.qkv(channel_norm(x_BCHW)).permute(0, 2, 3, 1).reshape(B, H * W, 3, self.heads, C // self.heads)
        q, k, v = rows.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, H, W, C).permute(0, 3, 1, 2)
        out: Tensor = x_BCHW + self.out(mixed)
        return out
