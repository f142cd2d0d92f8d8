"""What networks are made of.

Shapes: B batch, C channels, H height, W width, E embedding, G groups of channels.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


class NoiseEmbedding(nn.Module):
    """A log-SNR in nats, shape (B,), as a vector of E features: sines and cosines, then two layers.

    Told a class, the vector is moved by one of its own; label number `classes` stands for all classes together.
    """

    def __init__(self, features: int, classes: int | None = None) -> None:
        super().__init__()
        self.classes = classes
        self.label = zeroed(nn.Embedding(classes + 1, features)) if classes else None
        self.layers = nn.Sequential(nn.Linear(64, features), nn.SiLU(), nn.Linear(features, features), nn.SiLU())

    def forward(self, log_snr: Tensor, labels: Tensor | None = None) -> Tensor:
        """(B,), labels (B,) -> (B, E); without labels, of all classes together."""
        periods = torch.logspace(math.log10(80.0), 0, 32, dtype=log_snr.dtype, device=log_snr.device)
        angle_BF = 2 * math.pi * log_snr[:, None] / periods
        out: Tensor = self.layers(torch.cat([angle_BF.sin(), angle_BF.cos()], 1))
        if self.label is None:
            return out
        untold = torch.full(log_snr.shape, self.classes or 0, device=log_snr.device)
        return out + self.label(untold if labels is None else labels)


def waves(x_BD: Tensor, octaves: int) -> Tensor:
    """The values, and sin 2^k x and cos 2^k x for `octaves` k from 0: (B, D) -> (B, D (1 + 2 octaves)).

    Without them a network is slow to learn what changes over short distances.

    Reference: Tancik et al. (2020), section 5.
    """
    found = (wave(2**octave * x_BD) for octave in range(octaves) for wave in (torch.sin, torch.cos))
    return torch.cat([x_BD, *found], 1)


def zeroed(layer: nn.Module) -> nn.Module:
    """The layer with all parameters zero, so that the branch it ends starts as nothing."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def channel_norm(x_BCHW: Tensor) -> Tensor:
    """Each pixel's channels brought to zero mean and unit variance.

    Reference: Ba et al. (2016), applied per pixel.
    """
    return F.layer_norm(x_BCHW.permute(0, 2, 3, 1), (x_BCHW.shape[1],)).permute(0, 3, 1, 2)


def modulated_norm_(x_BCHW: Tensor, modulation: Tensor) -> Tensor:
    """(1 + scale) norm(x) + shift, with norm a group norm over groups of about 8 channels; x may be written over.

    It is written over where no gradient is recorded: on a CPU fresh memory is what element-wise work costs.

    The mean and variance of a group turn norm and modulation into one line per image and channel, A x + S, and their
    gradient into another, A g + K x + M, with everything but two sums over the pixels worked out on small tensors. On
    a channels-last tensor this costs a third of `torch.nn.functional.group_norm` followed by the modulation.

    Reference: Wu & He (2018), eqs. 1-5; Dhariwal & Nichol (2021), section 3, for the modulation.

    Args:
        x_BCHW: shape (B, C, H, W).
        modulation: scale and then shift of each image and channel, shape (B, 2 C).

    Returns:
        Shape (B, C, H, W), the dtype and memory layout of x. It can be differentiated once.

    Example:
        >>> y = modulated_norm_(3 + 2 * torch.randn(1, 8, 16, 16), torch.zeros(1, 16))
        >>> abs(float(y.mean())) < 1e-5, abs(float(y.var()) - 1) < 1e-2
        (True, True)
    """
    scale, shift = modulation.to(x_BCHW.dtype).chunk(2, 1)
    if not torch.is_grad_enabled():
        A, S, *_ = _line(x_BCHW, scale, shift)
        return torch.addcmul(S, x_BCHW, A, out=x_BCHW)
    out: Tensor = _ModulatedNorm.apply(x_BCHW, scale, shift)  # type: ignore[no-untyped-call]
    return out


def _groups(channels: int) -> int:
    return next(groups for groups in range(max(1, channels // 8), 0, -1) if channels % groups == 0)


def _sums(x_BCHW: Tensor) -> Tensor:
    """Over the pixels, shape (B, G, C / G), in float32 at least."""
    B, C, _, _ = x_BCHW.shape
    sums = x_BCHW.sum((2, 3))  # asked for float32, torch would convert all of x first
    return sums.to(torch.promote_types(sums.dtype, torch.float32)).view(B, _groups(C), -1)


def _means(x_BCHW: Tensor) -> Tensor:
    """Over each group, shape (B, G, 1), in float32 at least: bfloat16 holds the sum of a row, not of an image."""
    B, C, H, W = x_BCHW.shape
    rows = x_BCHW.permute(0, 2, 3, 1).reshape(B * H, W, C).sum(1)
    return (
        rows.to(torch.promote_types(rows.dtype, torch.float32)).view(B, H, _groups(C), -1).mean((1, 3))[..., None] / W
    )


def _line(x: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, ...]:
    """A and S, (B, C, 1, 1), of out = A x + S, and what they are made of: with norm(x) = r (x - m) and a = 1 + scale,
    A = a r and S = shift - m A.
    """
    B, C, _, _ = x.shape
    m = _means(x)
    r = (_means(x * x) - m * m).clamp(min=0).add(1e-5).rsqrt()
    a = 1 + scale.to(m.dtype).view(B, _groups(C), -1)
    A = a * r
    S = shift.view_as(A) - m * A
    A, S = (line.view(B, C, 1, 1).to(x.dtype) for line in (A, S))
    return A, S, a, m, r


class _ModulatedNorm(torch.autograd.Function):
    """out = A x + S, see `_line`, and its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        A, S, a, m, r = _line(x, scale, shift)
        ctx.save_for_backward(x, a, m, r, A)
        return torch.addcmul(S, x, A)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The gradient of a group norm: a g less its mean and its projection on norm(x) within each group, times r."""
        x, a, m, r, A = ctx.saved_tensors
        B, C, H, W = x.shape
        n = C // _groups(C) * H * W
        grad_shift = _sums(g)
        grad_scale = r * (_sums(g * x) - m * grad_shift)
        K = -r * r * (a * grad_scale).sum(2, keepdim=True) / n
        M = -r * (a * grad_shift).sum(2, keepdim=True) / n - m * K
        K, M = (line.expand_as(a).reshape(B, C, 1, 1).to(x.dtype) for line in (K, M))
        grad_x = torch.addcmul(M, x, K).addcmul_(g, A)
        return grad_x, grad_scale.view(B, C).to(x.dtype), grad_shift.view(B, C).to(x.dtype)


class ResidualBlock(nn.Module):
    """x + conv(relu(modulated_norm_(conv(x)))): one norm, one activation and no bias between two convolutions.

    What is written over in place is what no gradient needs, so that a block allocates as little as it can: on a CPU
    fresh memory is what element-wise work costs.
    """

    def __init__(self, channels_in: int, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.first = nn.Conv2d(channels_in, channels, 3, padding=1, bias=False)
        self.second = zeroed(nn.Conv2d(channels, channels, 3, padding=1, bias=False))
        self.shortcut = nn.Identity() if channels_in == channels else nn.Conv2d(channels_in, channels, 1, bias=False)

    def forward(self, x_BCHW: Tensor, modulation: Tensor) -> Tensor:
        """(B, C_in, H, W), (B, 2 C) -> (B, C, H, W)."""
        out: Tensor = self.second(F.relu_(modulated_norm_(self.first(x_BCHW), modulation)))
        out += self.shortcut(x_BCHW)
        return out


class ResidualStack(nn.ModuleList):
    """Residual blocks one after the other, the first taking `channels_in`."""

    def __init__(self, channels_in: int, channels: int, blocks: int) -> None:
        super().__init__(ResidualBlock(channels if i else channels_in, channels) for i in range(blocks))

    def forward(self, x_BCHW: Tensor, modulations: Iterator[Tensor]) -> Tensor:
        """(B, C_in, H, W) -> (B, C, H, W); each block takes the next modulation."""
        for block in self:
            x_BCHW = block(x_BCHW, next(modulations))
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
        mixed = attention(q, k, v).transpose(1, 2).reshape(B, H, W, C).permute(0, 3, 1, 2)
        out: Tensor = x_BCHW + self.out(mixed)
        return out


def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
    """softmax(q k^T / sqrt(D)) v, of each query over all keys or over those up to its own.

    Between few places two products take a quarter of the fused kernel's time in bfloat16, and as much in float32.
    """
    N = q.shape[2]
    if N > 256:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    scores = (q * q.shape[3] ** -0.5) @ k.transpose(2, 3)
    if causal:
        scores = scores.masked_fill(torch.ones(N, N, dtype=torch.bool, device=q.device).triu(1), -math.inf)
    return scores.softmax(3).to(v.dtype) @ v
