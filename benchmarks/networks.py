"""The networks that are compared: widths 32-64-64 for the peers, and a U-Net of ours with as many parameters and FLOPs.

A peer is imported when its network is asked for: each lives in an environment that need not have the others.
"""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

OURS: dict[str, Any] = {"width": 8, "multipliers": [4, 8, 8], "blocks": 4}
"""Keywords of `UNet` that bring ours within 10% of both peers in parameters and FLOPs, at one channel and at three."""

SIDE, BATCH = 32, 64


def diffusers_unet(channels: int) -> nn.Module:
    """diffusers' UNet2DModel, with attention at the lowest resolution and in the middle."""
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=SIDE,
        in_channels=channels,
        out_channels=channels,
        layers_per_block=2,
        block_out_channels=(32, 64, 64),
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    )


def ddpm_unet(channels: int, *, flash_attn: bool = False) -> nn.Module:
    """denoising-diffusion-pytorch's Unet; its own default is not to use flash attention."""
    return ddpm_pytorch().Unet(dim=32, dim_mults=(1, 2, 2), channels=channels, flash_attn=flash_attn)


def ddpm_pytorch() -> ModuleType:
    """denoising-diffusion-pytorch, with empty modules in the place of torchvision where that is missing."""
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):  # a build for another torch fails while it registers its operators
        for name in ("torchvision", "torchvision.transforms", "torchvision.utils"):
            stand_in = ModuleType(name)
            stand_in.__spec__ = ModuleSpec(name, None)
            parent, _, child = name.rpartition(".")
            sys.modules[name] = stand_in
            if parent:
                setattr(sys.modules[parent], child, stand_in)
    from denoising_diffusion_pytorch import denoising_diffusion_pytorch

    return denoising_diffusion_pytorch


@torch.no_grad()
def size(net: nn.Module, channels: int) -> dict[str, int]:
    """Parameters, and FLOPs of one image's way forward as torch counts them: convolutions and matrix products."""
    x, t = torch.zeros(2, channels, SIDE, SIDE), torch.zeros(2)
    with FlopCounterMode(display=False) as counter:
        net(x, t)
    return {"parameters": sum(p.numel() for p in net.parameters()), "flops": counter.get_total_flops() // len(x)}
