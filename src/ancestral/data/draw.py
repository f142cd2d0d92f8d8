"""How examples look: a grid of images, a cloud of points, or histograms, and PNGs that carry their recipe."""

import json
import math
from collections.abc import Mapping
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
GAP = 2  # pixels between tiles
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
        return _tiles(_grey_levels(facts, values), columns or math.ceil(math.sqrt(len(values))))
    values = values.reshape(len(values), -1).astype(np.float64)
    return _points(facts, values) if facts.dims == 2 else _histograms(facts, values)


def save_png(image: Image.Image, path: str | Path, recipe: Mapping[str, Any]) -> None:
    """Write a PNG that carries, as JSON in its text chunk "ancestral", how it was made.

    Args:
        image: the picture.
        path: where to write it; an existing file is replaced.
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


def _tiles(images: NDArray[np.uint8], columns: int) -> Image.Image:
    n, channels, height, width = images.shape
    rows = math.ceil(n / columns)
    zoom = max(1, WIDTH // (columns * width))
    tile = np.full((rows * columns, channels, zoom * height + GAP, zoom * width + GAP), PAPER, dtype=np.uint8)
    tile[:n, :, :-GAP, :-GAP] = images.repeat(zoom, axis=2).repeat(zoom, axis=3)
    sheet = tile.reshape(rows, columns, channels, *tile.shape[2:]).transpose(0, 3, 1, 4, 2)
    sheet = sheet.reshape(rows * tile.shape[2], columns * tile.shape[3], channels)[:-GAP, :-GAP]
    return Image.fromarray(np.ascontiguousarray(sheet[..., 0] if channels == 1 else sheet))


def _points(facts: Facts, values: NDArray[np.float64]) -> Image.Image:
    """Points in the plane, in a frame set by the data's scale so that pictures of one set can be laid side by side."""
    units = torch.tensor([[0.0, 0.0], [1.0, 1.0]], dtype=torch.float64).reshape(2, *facts.shape)
    centre, edge = facts.scale.inverse(units).reshape(2, 2).numpy()
    far = float(np.quantile(np.abs(values - centre).max(axis=1), 0.99))
    half = 1.05 * max(far, (1 if facts.levels else 2.5) * float((edge - centre).max()))
    figure = _figure(WIDTH)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.scatter(values[:, 0], values[:, 1], s=6, c=INK, alpha=0.5, linewidths=0)
    axes.set(xlim=(centre[0] - half, centre[0] + half), ylim=(centre[1] - half, centre[1] + half))
    axes.axis("off")
    return _rendered(figure)


def _histograms(facts: Facts, values: NDArray[np.float64]) -> Image.Image:
    dims = values.shape[1]
    shown = np.unique(np.linspace(0, dims - 1, min(dims, FEATURES)).round().astype(int))
    columns = math.ceil(math.sqrt(len(shown)))
    rows = math.ceil(len(shown) / columns)
    figure = _figure(WIDTH * rows // columns)
    for place, feature in enumerate(shown, 1):
        axes = figure.add_subplot(rows, columns, place)
        if facts.levels:
            axes.hist(values[:, feature], bins=min(facts.levels, 64), range=(-0.5, facts.levels - 0.5), color=INK)
        else:
            axes.hist(values[:, feature], bins=40, color=INK)
        axes.set(xticks=[], yticks=[])
        axes.spines[["left", "top", "right"]].set_visible(False)
    figure.subplots_adjust(0.02, 0.03, 0.98, 0.98, 0.08, 0.08)
    return _rendered(figure)


def _figure(height: int) -> "Figure":
    from matplotlib.figure import Figure  # loaded when there is something to plot

    return Figure(figsize=(WIDTH / 100, height / 100), dpi=100, facecolor="white")


def _rendered(figure: "Figure") -> Image.Image:
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi="figure")
    return Image.open(buffer).convert("RGB")
