"""Neural spline flows on vectors, through zuko."""

from typing import final

from torch import Tensor, nn

from ancestral.flow.bijector import Bijector, summed

SEQUENTIAL = 16
"""Numbers of an example up to which splines are autoregressive, and the inverse takes as many passes; above it, two."""


END = 5.0
"""Of the interval on which a spline is not the identity, which is zuko's choice."""


@final
class Splines(Bijector):
    """Monotone rational-quadratic splines from [-5, 5] to itself, of which a masked network chooses the knots.

    Each number is mapped as those before it say, in an order that changes from one transform to the next: one pass
    forward, one for each number back. Of many numbers half are mapped as the other half says, and back takes two. The
    identity outside [-5, 5], with slope 1 at the ends; and what lies outside, the networks see at the end.

    Reference: Durkan et al. (2019), sections 3 and 4.

    Args:
        dims: numbers of an example; shapes (B, ...) are flattened.
        features: of the context.
        transforms: how many.
        bins: of each spline.
        width: hidden features of the masked network.
        depth: its hidden layers.

    Example:
        >>> import torch
        >>> splines = Splines(2, 4, transforms=2, bins=8, width=16, depth=2)
        >>> x, context = torch.randn(5, 2), torch.zeros(5, 4)
        >>> z, _ = splines(x, context)
        >>> bool((splines.inverse(z, context) - x).abs().max() < 1e-5)
        True
    """

    def __init__(self, dims: int, features: int, *, transforms: int, bins: int, width: int, depth: int) -> None:
        super().__init__()
        from zuko.flows import NSF  # here: it changes torch.distributions when it is imported, and takes a while

        many = dims > SEQUENTIAL
        self.transform = NSF(
            dims,
            features,
            bins=bins,
            transforms=transforms,
            hidden_features=(width,) * depth,
            passes=2 if many else None,
            randperm=many,
        ).transform
        if dims > 1:
            for each in self.transform.transforms:
                each.hyper.insert(0, nn.Hardtanh(-END, END))

    def forward_and_log_det(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        z, log_det = self.transform(context).call_and_ladj(x.flatten(1))
        return z.reshape(x.shape), summed(log_det[:, None])

    def inverse(self, z: Tensor, context: Tensor) -> Tensor:
        x: Tensor = self.transform(context).inv(z.flatten(1))
        return x.reshape(z.shape)
