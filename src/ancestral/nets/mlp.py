"""A residual network for vectors.

Shapes: B batch, D dimensions of the data, E width.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ancestral.nets.blocks import NoiseEmbedding, waves, zeroed


class MLP(nn.Module):
    """Residual layers over a vector, each modulated by the noise level.

    Args:
        shape: of one example; flattened inside.
        width: hidden features.
        depth: residual layers.
        octaves: of `waves` of the input.
        variance: put out a reverse variance too, see `denoise.reverse`.
        classes: that labels may name; None without labels.

    Example:
        >>> MLP((2,), width=32, depth=2)(torch.zeros(5, 2), torch.zeros(5)).shape
        torch.Size([5, 2])
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        width: int = 128,
        depth: int = 4,
        octaves: int = 4,
        variance: bool = False,
        classes: int | None = None,
    ) -> None:
        super().__init__()
        dims, self.octaves, self.variance, self.classes = torch.Size(shape).numel(), octaves, variance, classes
        self.embedding = NoiseEmbedding(width, classes)
        self.enter = nn.Linear(dims * (1 + 2 * octaves), width)
        self.modulations = nn.ModuleList(zeroed(nn.Linear(width, 2 * width)) for _ in range(depth))
        self.first = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.second = nn.ModuleList(zeroed(nn.Linear(width, width)) for _ in range(depth))
        self.leave = zeroed(nn.Linear(width, dims * (1 + variance)))

    def forward(self, x: Tensor, log_snr: Tensor, labels: Tensor | None = None) -> Tensor:
        """(B, *shape), (B,), labels (B,) -> (B, *shape). Without labels, of all classes together."""
        return self._put_out(x, log_snr, labels)[:, : x[0].numel()].reshape(x.shape)

    def halves(self, x: Tensor, log_snr: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """What `forward` gives, and the reverse variance of each value as a number about 0, where one is put out."""
        first, second = self._put_out(x, log_snr, labels).chunk(2, 1)
        return first.reshape(x.shape), second.reshape(x.shape)

    def _put_out(self, x: Tensor, log_snr: Tensor, labels: Tensor | None) -> Tensor:
        embedding_BE = self.embedding(log_snr, labels)
        h_BE = self.enter(waves(x.flatten(1), self.octaves))
        for modulation, first, second in zip(self.modulations, self.first, self.second, strict=True):
            scale, shift = modulation(embedding_BE).chunk(2, 1)
            hidden = F.layer_norm(first(F.silu(h_BE)), (h_BE.shape[1],))
            h_BE = h_BE + second(F.silu(torch.addcmul(shift, hidden, 1 + scale)))
        out: Tensor = self.leave(F.silu(h_BE))
        return out
