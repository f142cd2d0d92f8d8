"""Networks: tensors in, tensors out. They know nothing of processes, data or families."""

from ancestral.nets.mlp import MLP
from ancestral.nets.unet import UNet

__all__ = ["MLP", "UNet"]
