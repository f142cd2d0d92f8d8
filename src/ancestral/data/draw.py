"""How examples look, alone and on a path: grids of images, clouds of points, or histograms; PNGs with their recipe."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from ancestral.data.dataset import printable
from ancestral.data.facts import Facts
from ancestral.errors import DataError, OptionError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH = 512  # pixels that a picture is about wide
PATH = 768  # the same for a contact sheet of images, and for a frame of an animation
PANEL = 160  # pixels that a cloud or histograms on a contact sheet are wide
REACH = 3.0  # standard deviations from the centre to the edge of a cloud on a path, the same at every moment
GAP = 2  # pixels between tiles
APART = 8  # pixels between groups of them
PAPER, INK = 255, "#1f4e79"
FEATURES = 16
KEY = "ancestral"


def grid(facts: Facts, raw: Tensor, columns: int | None = None) -> Image.Image:
    """A picture of examples, about 512 pixels wide and without words.

    Images become tiles on white paper, enlarged by a whole factor if they are small; levels run from black to white,
    and real values from the lowest shown to the highest. Vectors of two features become points in the plane; anything
    else becomes one histogram for each of up to 16 features, evenly spaced among all.

    Args:
        facts: what the examples are.
        raw: examples in the user's units, shape (N, *facts.shape).
        columns: tiles in a row; by default as many as make the grid square.

    Raises:
        OptionError: if there are no examples, or of another shape, or fewer than one column.

    Example:
        >>> from ancestral.data import load
        >>> digits = load("digits")
        >>> grid(digits.facts, digits.train[:64]).size
        (526, 526)
    """
    if len(raw) == 0 or tuple(raw.shape[1:]) != facts.shape:
        raise OptionError(
            f"received examples of shape {tuple(raw.shape)}: expected at least one of shape {facts.shape}"
        )
    if columns is not None and columns < 1:
        raise OptionError(f"received columns={columns}: at least 1 is needed")
    values = raw.detach().numpy()
    if facts.is_image:
        return _tiles(_grey_levels(facts, values), columns or math.ceil(math.sqrt(len(values))), WIDTH)
    return _plot(facts, _flat(values), WIDTH)


def sheet(facts: Facts, path: Sequence[tuple[Tensor, Tensor]]) -> Image.Image:
    """A contact sheet of a path: columns are its moments in order, and each has x_t above the estimate of x_0 there.

    Images have a pair of rows for each example, shaded alike. Of anything else all examples together are one picture.

    Args:
        facts: what the examples are.
        path: x_t and the estimate at each moment, in the user's units, shapes (N, *facts.shape).

    Example:
        >>> from ancestral.data import load
        >>> digits = load("digits")
        >>> three = digits.train[:3]
        >>> sheet(digits.facts, [(16 - three, three), (three, three)]).size
        (770, 2326)
    """
    if not facts.is_image:
        rows = zip(*path, strict=True)
        panels = ([_plot(facts, _flat(x.numpy()), PANEL, REACH) for x in row] for row in rows)
        return joined([joined(row, GAP, 1) for row in panels], APART, 0)
    moments = torch.stack([torch.stack(pair, 1) for pair in path], 2)  # example, of the pair, moment, then the image
    shades = _grey_levels(facts, moments.numpy())
    pairs = (_tiles(pair.reshape(-1, *facts.shape), len(path), PATH) for pair in shades)
    return joined(pairs, APART, 0)


def beside(facts: Facts, x_t: Tensor, x_0_hat: Tensor) -> Image.Image:
    """Examples on their way at the left, and the estimates of where each is going at the right, for an animation."""
    if not facts.is_image:
        return joined([_plot(facts, _flat(x.numpy()), PATH // 2, REACH) for x in (x_t, x_0_hat)], APART, 1)
    columns = math.ceil(math.sqrt(len(x_t)))
    return joined([_tiles(_grey_levels(facts, x.numpy()), columns, PATH // 2) for x in (x_t, x_0_hat)], APART, 1)


def joined(images: Iterable[Image.Image], gap: int, axis: int) -> Image.Image:
    """Pictures of one size on white paper, below each other (axis 0) or side by side (axis 1)."""
    parts: list[NDArray[np.uint8]] = []
    for pixels in map(np.asarray, images):
        size = [*pixels.shape]
        size[axis] = gap
        parts += [np.full(size, PAPER, dtype=np.uint8), pixels]
    return Image.fromarray(np.concatenate(parts[1:], axis))


def save_png(image: Image.Image, path: str | Path | BytesIO, recipe: Mapping[str, Any]) -> None:
    """Write a PNG that carries, as JSON in its text chunk "ancestral", how it was made.

    Args:
        image: the picture.
        path: where to write it, or a buffer in memory; an existing file is replaced.
        recipe: anything JSON can hold, under string keys.
    """
    info = PngInfo()
    info.add_text(KEY, json.dumps(recipe, sort_keys=True))
    image.save(path, "PNG", pnginfo=info)


def read_recipe(path: str | Path) -> dict[str, Any]:
    """The recipe inside a PNG that `save_png` wrote; the pixels are not decoded.

    Raises:
        DataError: if the file is no PNG or carries no recipe.
    """
    where = printable(str(path))
    try:
        with Image.open(path, formats=("PNG",)) as image:
            recipe = json.loads(image.info[KEY])
    except Exception:  # a foreign file can raise nearly anything
        recipe = None
    if not isinstance(recipe, dict):
        raise DataError(f"{where}: carries no recipe: give a PNG that ancestral wrote, unchanged by other programs")
    return recipe


def _grey_levels(facts: Facts, values: NDArray[Any]) -> NDArray[np.uint8]:
    """Images on 0 .. 255."""
    low, high = (0, facts.levels - 1) if facts.levels else (values.min(), values.max())
    shade = (values.astype(np.float64) - low) / (float(high - low) or 1.0)
    return np.rint(255 * shade).astype(np.uint8)


def _tiles(images: NDArray[np.uint8], columns: int, wide: int) -> Image.Image:
    n, channels, height, width = images.shape
    rows = math.ceil(n / columns)
    zoom = max(1, wide // (columns * width))
    tile = np.full((rows * columns, channels, zoom * height + GAP, zoom * width + GAP), PAPER, dtype=np.uint8)
    tile[:n, :, :-GAP, :-GAP] = images.repeat(zoom, axis=2).repeat(zoom, axis=3)
    sheet = tile.reshape(rows, columns, channels, *tile.shape[2:]).transpose(0, 3, 1, 4, 2)
    sheet = sheet.reshape(rows * tile.shape[2], columns * tile.shape[3], channels)[:-GAP, :-GAP]
    return Image.fromarray(np.ascontiguousarray(sheet[..., 0] if channels == 1 else sheet))


def _flat(values: NDArray[Any]) -> NDArray[np.float64]:
    return values.reshape(len(values), -1).astype(np.float64)


def _plot(facts: Facts, values: NDArray[np.float64], wide: int, reach: float | None = None) -> Image.Image:
    return _points(facts, values, wide, reach) if facts.dims == 2 else _histograms(values, facts.levels, wide)


def _points(facts: Facts, values: NDArray[np.float64], wide: int, reach: float | None) -> Image.Image:
    """Points in the plane, in a frame set by the data's scale so that pictures of one set can be laid side by side.

    Without a reach the frame is wide enough for nearly all of them.
    """
    units = torch.tensor([[0.0, 0.0], [1.0, 1.0]], dtype=torch.float64).reshape(2, *facts.shape)
    centre, edge = facts.scale.inverse(units).reshape(2, 2).numpy()
    far = float(np.quantile(np.abs(values - centre).max(axis=1), 0.99))
    unit = float((edge - centre).max())
    half = reach * unit if reach else 1.05 * max(far, (1 if facts.levels else 2.5) * unit)
    figure = _figure(wide, wide)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.scatter(values[:, 0], values[:, 1], s=6, c=INK, alpha=0.5, linewidths=0)
    axes.set(xlim=(centre[0] - half, centre[0] + half), ylim=(centre[1] - half, centre[1] + half))
    axes.axis("off")
    return _rendered(figure)


def _histograms(values: NDArray[np.float64], levels: int | None, wide: int) -> Image.Image:
    dims = values.shape[1]
    shown = np.unique(np.linspace(0, dims - 1, min(dims, FEATURES)).round().astype(int))
    columns = math.ceil(math.sqrt(len(shown)))
    rows = math.ceil(len(shown) / columns)
    figure = _figure(wide, wide * rows // columns)
    for place, feature in enumerate(shown, 1):
        axes = figure.add_subplot(rows, columns, place)
        if levels:
            axes.hist(values[:, feature], bins=min(levels, 64), range=(-0.5, levels - 0.5), color=INK)
        else:
            axes.hist(values[:, feature], bins=40, color=INK)
        axes.set(xticks=[], yticks=[])
        axes.spines[["left", "top", "right"]].set_visible(False)
    figure.subplots_adjust(0.02, 0.03, 0.98, 0.98, 0.08, 0.08)
    return _rendered(figure)


def _figure(width: int, height: int) -> "Figure":
    from matplotlib.figure import Figure  # loaded when there is something to plot

    return Figure(figsize=(width / 100, height / 100), dpi=100, facecolor="white")


def _rendered(figure: "Figure") -> Image.Image:
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi="figure")
    return Image.open(buffer).convert("RGB")
