"""The diagram of four families, and what it is drawn with: the sheet, the palette and the words of every figure.

Matplotlib is loaded when something is drawn, as objects only: nothing here reads or changes its global state. Lengths
are in inches from the lower left corner, so that what is aligned in one figure is aligned in all.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

Colour = str | tuple[float, float, float]

INK, MUTED, FAINT = "#1d2733", "#66717d", "#dfe4e8"
BLUE, GREY, RED = "#1f4e79", "#7f8b97", "#c4512d"
"""Data is blue, noise is grey, what a network has learnt is red, the one warm colour: apart for every eye."""

WIDTH, DPI = 9.0, 150
LARGE, NORMAL, SMALL = 14, 13, 11.5  # points


# The sheet of every figure.


def sheet(height: float) -> "tuple[Figure, Axes]":
    """White paper of that height, and axes over all of it, one unit to the inch."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), dpi=DPI, facecolor="white")
    canvas = axes_at(figure, 0, 0, WIDTH, height)
    canvas.set(xlim=(0, WIDTH), ylim=(0, height))
    canvas.axis("off")
    return figure, canvas


def axes_at(figure: "Figure", left: float, bottom: float, width: float, height: float) -> "Axes":
    """Axes of that size at that place, without a frame above and to the right."""
    W, H = figure.get_size_inches()
    axes = figure.add_axes((left / W, bottom / H, width / W, height / H))
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(MUTED)
    axes.tick_params(color=MUTED, labelcolor=INK, labelsize=SMALL)
    return axes


def write(axes: "Axes", x: float, y: float, words: str, colour: Colour = INK, **how: Any) -> None:
    """Words or a formula at a place; `how` are options of `Axes.text`."""
    axes.text(x, y, words, **{"color": colour, "size": NORMAL, **how})


def typeset(figure: "Figure") -> "Figure":
    """Set every word and formula in STIX, which comes with matplotlib: the same on every machine."""
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        assert isinstance(text, Text)
        text.set_fontfamily("STIXGeneral")
        text.set_math_fontfamily("stix")
    return figure


# Four families.


def families() -> "Figure":
    """How x and z are related in a GAN, a VAE, a flow and a diffusion, and what each can say about log p(x).

    References: Goodfellow et al. (2014); Kingma & Welling (2014); Dinh et al. (2015); Sohl-Dickstein et al. (2015).
    """
    figure, axes = sheet(6.1)
    columns, (gan, vae, flow, diffusion) = (1.65, 2.7, 3.75, 4.8, 5.85), (4.57, 3.27, 2.12, 0.78)
    for y, name, learns, says in (
        (5.7, "", "what it learns", r"$\log p(x)$"),
        (gan, "GAN", "a game: $G$ makes, $D$ judges", "none"),
        (vae, "VAE", "to encode and to decode", "lower bound"),
        (flow, "Flow", "one invertible map", "exact"),
        (diffusion, "Diffusion", "to undo each step of noise", "lower bound, term by term"),
    ):
        write(axes, 0.3, y, name, size=LARGE, weight="bold", va="center")
        write(axes, 6.5, y + 0.13, learns, va="center")
        write(axes, 6.5, y - 0.14, says, BLUE, va="center", weight="bold")
    for x, name, colour, marker in ((1.47, "data", BLUE, "o"), (2.37, "noise", GREY, "o"), (3.36, "learned", RED, "s")):
        axes.scatter(x, 5.7, s=80, marker=marker, facecolor=colour)
        write(axes, x + 0.15, 5.69, name, va="center")
    axes.hlines((5.32, 3.82, 2.71, 1.52), 0.3, WIDTH - 0.3, color=FAINT, linewidth=1)

    def row(y: float, *things: tuple[str, str, Colour]) -> list[_Place]:
        return [_place(axes, x, y, *thing) for x, thing in zip(columns, things, strict=False)]

    data, noise, made = ("full", "x", BLUE), ("full", "z", GREY), ("hollow", r"\tilde{x}", BLUE)
    z, G, fake = row(gan + 0.32, noise, ("box", "G", RED), made)
    real, D = _place(axes, columns[2], gan - 0.32, *data), _place(axes, columns[3], gan, "box", "D", RED)
    verdict = _place(axes, columns[4], gan, "bare", r"\mathrm{real?}", INK)
    for pair in ((z, G), (G, fake), (fake, D), (real, D), (D, verdict)):
        _arrows(axes, pair)

    encoder, decoder = ("box", r"q_\phi(z\,|\,x)", RED), ("box", r"p_\theta(x\,|\,z)", RED)
    _arrows(axes, row(vae, data, encoder, noise, decoder, made))

    dots = ("bare", r"\cdots", INK)
    maps = row(flow, data, ("box", "f_1", RED), dots, ("box", "f_K", RED), noise)
    early, late = ("full", "x_1", _mix(BLUE, GREY, 0.25)), ("full", "x_{T-1}", _mix(BLUE, GREY, 0.75))
    chain = row(diffusion, ("full", "x_0", BLUE), early, dots, late, ("full", "x_T", GREY))
    for places, lift, name, colour in (
        (maps, 0.08, "$f$", RED),
        (maps[::-1], -0.08, "$f^{-1}$", RED),
        (chain, 0.08, r"$q(x_t\,|\,x_{t-1})$", MUTED),
        (chain[::-1], -0.08, r"$p_\theta(x_{t-1}\,|\,x_t)$", RED),
    ):
        _arrows(axes, places, colour, lift)
        write(axes, columns[2], places[2].y + 4.5 * lift, name, colour, ha="center", va="center")
    return typeset(figure)


@dataclass(frozen=True)
class _Place:
    """Something in the diagram that arrows start from and end at."""

    x: float
    y: float
    outline: "Patch"


def _place(axes: "Axes", x: float, y: float, shape: str, name: str, colour: Colour) -> _Place:
    """A variable is a full circle, or a hollow one if a model made it; a network is a box; the rest is bare."""
    from matplotlib.patches import Circle, FancyBboxPatch

    outline: Patch = Circle((x, y), 0.26)
    if shape == "box":
        outline = FancyBboxPatch((x - 0.37, y - 0.2), 0.74, 0.4, boxstyle="round,pad=0,rounding_size=0.08")
    outline.set(facecolor=colour if shape == "full" else _mix(colour, "white", 0.92), edgecolor=colour)
    outline.set(linewidth=1.5, zorder=3, visible=shape != "bare")
    axes.add_patch(outline)
    ink, size = "white" if shape == "full" else colour, NORMAL if shape == "box" else LARGE
    write(axes, x, y - 0.01, f"${name}$", ink, size=size, ha="center", va="center", zorder=4)
    return _Place(x, y, outline)


def _arrows(axes: "Axes", places: Sequence[_Place], colour: Colour = MUTED, lift: float = 0.0) -> None:
    """From each place to the next, outline to outline, that much above the line between their centres."""
    from matplotlib.patches import FancyArrowPatch

    for a, b in pairwise(places):
        ends = (a.x, a.y + lift), (b.x, b.y + lift)
        arrow = FancyArrowPatch(*ends, patchA=a.outline, patchB=b.outline, shrinkA=4, shrinkB=4, arrowstyle="-|>")
        arrow.set(mutation_scale=12, color=colour, linewidth=1.4)
        axes.add_patch(arrow)


def _mix(a: Colour, b: Colour, share: float) -> Colour:
    """The colour that far from a to b."""
    from matplotlib.colors import to_rgb

    red, green, blue = ((1 - share) * x + share * y for x, y in zip(to_rgb(a), to_rgb(b), strict=True))
    return red, green, blue
