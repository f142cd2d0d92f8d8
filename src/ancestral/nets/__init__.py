"""Networks: they know tensors and log-SNRs, and nothing of processes, families or data."""

from ancestral.nets.curve import MonotoneCurve
from ancestral.nets.dit import DiT
from ancestral.nets.mlp import MLP
from ancestral.nets.unet import UNet

__all__ = ["MLP", "DiT", "MonotoneCurve", "UNet"]
