"""Splines of the values of each patch of an image, as the patches before it tell.

Shapes: B batch, N patches, D values of a patch, K bins of a spline.
"""

from functools import partial
from typing import TYPE_CHECKING, final

import torch
from torch import Tensor
from torch.nn import functional as F

from ancestral.flow.bijector import Bijector, summed
from ancestral.flow.patches import PatchNet, Shape, image, split
from ancestral.nets.blocks import attention

if TYPE_CHECKING:
    from zuko.transforms import MonotonicRQSTransform

END = 8.0
"""Of the interval on which a spline is not the identity: `Ends` puts all dequantized levels within 6.6."""

SLOPE = 1e-2
"""Least slope of a spline, and the inverse of the largest: what rounding may grow by on the way back."""


@final
class Causal(Bijector):
    """Monotone rational-quadratic splines of the values of a patch, told by the patches before it, row by row.

        z_n = spline(x_n; net(x_1, ..., x_n-1))

    Values of one patch are mapped each on its own, which is for couplings to mend. One pass forward, and back one patch
    after the other, each through the network once. The identity outside [-8, 8], beyond which the network sees the end;
    and everywhere before it has learnt.

    An affine map takes a normal law to a normal law, and a value of an image has often two: ink, or none. A spline
    takes one to the other.

    Reference: Zhai et al. (2024), TarFlow, section 3, for the transformer; Durkan et al. (2019), section 3, for the
    splines.

    Args:
        shape: (C, H, W).
        patch: side of a patch.
        features: of the context.
        width, depth, heads: of the network.
        bins: K.

    Example:
        >>> causal = Causal((1, 4, 4), 2, 3, width=8, depth=1, heads=2)
        >>> x, context = torch.randn(5, 1, 4, 4), torch.randn(5, 3)
        >>> bool((causal(x, context)[0] - x).abs().max() < 1e-5)
        True
    """

    def __init__(
        self, shape: Shape, patch: int, features: int, *, width: int, depth: int, heads: int, bins: int = 8
    ) -> None:
        super().__init__()
        self.shape, self.bins = shape, bins
        self.net = PatchNet(shape, patch, features, width=width, depth=depth, heads=heads, per_value=3 * bins - 1)

    def forward_and_log_det(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        x_BND = split(x, self.net.patch)
        before = F.pad(x_BND, (0, 0, 1, -1)).clamp(-END, END)
        attends = [partial(attention, causal=True)] * len(self.net.blocks)
        z_BND, log_slope = self._splines(self.net(before, context, attends)).call_and_ladj(x_BND)
        return image(z_BND, self.shape, self.net.patch), summed(log_slope)

    def inverse(self, z: Tensor, context: Tensor) -> Tensor:
        z_BND = split(z, self.net.patch)
        x, attends = [torch.zeros_like(z_BND[:, :1])], [_Past() for _ in self.net.blocks]
        for n in range(z_BND.shape[1]):
            told = self.net(x[-1].clamp(-END, END), context, attends, start=n)
            x.append(self._splines(told).inv(z_BND[:, n : n + 1]))
        return image(torch.cat(x[1:], 1), self.shape, self.net.patch)

    def _splines(self, told: Tensor) -> "MonotonicRQSTransform":
        from zuko.transforms import MonotonicRQSTransform  # here, as in `spline.py`

        K, each = self.bins, told.reshape(*told.shape[:2], -1, 3 * self.bins - 1)
        widths, heights, derivatives = torch.split(each, [K, K, K - 1], 3)
        return MonotonicRQSTransform(widths, heights, derivatives, bound=END, slope=SLOPE)


class _Past:
    """Attention of a patch to itself and to those that were asked about before it."""

    def __init__(self) -> None:
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.keys.append(k)
        self.values.append(v)
        return attention(q, torch.cat(self.keys, 2), torch.cat(self.values, 2))
