"""Random changes to images that a gradient passes through, so that a critic cannot learn a few images by heart.

The critic sees reals and fakes through them alike, each with a draw of its own: the generator is taught by what is seen
of its images, and the changes themselves are not what tells reals from fakes.

    brightness    x + u,                    u uniform in [-1/4, 1/4)
    contrast      m + c (x - m),            c uniform in [3/4, 5/4), m the mean of the image
    translation   by whole pixels,          up to an eighth of a side each way, the edge repeated
    cutout        a box of half of each side, at a uniform place, set to zero

Reference: Zhao et al. (2020), Differentiable augmentation for data-efficient GAN training, section 3.
"""

import torch
from torch import Tensor

from ancestral.rng import Rng, rand

STRENGTH = 0.25
"""Half the width of the intervals of brightness and contrast."""

REACH = 8
"""A translation is by up to a side over this."""


def augmented(x_BCHW: Tensor, rng: Rng) -> Tensor:
    """The images, each changed by all four of its own draws, in the order of the table above.

    Args:
        x_BCHW: images in the model's units, shape (B, C, H, W).
        rng: from which six numbers are drawn for each image.

    Example:
        >>> from ancestral.rng import streams
        >>> augmented(torch.zeros(2, 1, 8, 8), streams(0, 2)).flatten(1).amax(1).shape
        torch.Size([2])
    """
    u = rand((len(x_BCHW), 6), rng).to(x_BCHW)
    x = brightened(x_BCHW, STRENGTH * (2 * u[:, 0] - 1))
    x = contrasted(x, 1 + STRENGTH * (2 * u[:, 1] - 1))
    reach = torch.tensor([side // REACH for side in x.shape[2:]]).to(u)
    x = translated(x, (u[:, 2:4] * (2 * reach + 1)).floor().sub(reach).long())
    return cut(x, u[:, 4:6])


def brightened(x_BCHW: Tensor, by: Tensor) -> Tensor:
    """x + by, a number for each image, shape (B,)."""
    return x_BCHW + by[:, None, None, None]


def contrasted(x_BCHW: Tensor, factor: Tensor) -> Tensor:
    """m + factor (x - m), with m the mean of each image and a factor for each, shape (B,)."""
    mean = x_BCHW.mean((1, 2, 3), keepdim=True)
    return mean + factor[:, None, None, None] * (x_BCHW - mean)


def translated(x_BCHW: Tensor, by_B2: Tensor) -> Tensor:
    """Each image moved down and right by so many pixels, int64, shape (B, 2); what comes in repeats the edge."""
    B, _, H, W = x_BCHW.shape
    rows = (torch.arange(H, device=x_BCHW.device) - by_B2[:, :1]).clamp(0, H - 1)
    columns = (torch.arange(W, device=x_BCHW.device) - by_B2[:, 1:]).clamp(0, W - 1)
    example = torch.arange(B, device=x_BCHW.device)[:, None, None]
    return x_BCHW.permute(0, 2, 3, 1)[example, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def cut(x_BCHW: Tensor, at_B2: Tensor) -> Tensor:
    """Each image with a box of half of each side set to zero, whose centre is at this place, (B, 2) in [0, 1).

    What of the box is outside the image cuts nothing.
    """
    inside = []
    for axis, side in enumerate(x_BCHW.shape[2:]):
        centre = (at_B2[:, axis : axis + 1] * side).floor()
        away = torch.arange(side, device=x_BCHW.device) - (centre - side // 4)
        inside.append((away >= 0) & (away < side // 2))
    box_BHW = inside[0][:, :, None] & inside[1][:, None, :]
    return x_BCHW * ~box_BHW[:, None]
