"""The derivation as four figures: families, the forward chain, a swiss roll there and back, the terms of the bound.

Every number in them is computed when they are drawn, by the functions the rest of the program uses. Matplotlib is
loaded by the first figure, as objects only: nothing here reads or changes its global state. Lengths are in inches
from the lower left corner, so that what is aligned in one figure is aligned in all.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ancestral import data as sources
from ancestral.data import Data, Facts, draw
from ancestral.data.dataset import Progress
from ancestral.diffusion.denoise import reverse
from ancestral.diffusion.likelihood import Bound, mean_and_stderr
from ancestral.diffusion.model import Diffusion
from ancestral.diffusion.process import Process
from ancestral.errors import RunError
from ancestral.measure.evaluate import DRAWS, evaluate
from ancestral.rng import randn, stream
from ancestral.training import checkpoint, recipes, train

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, FAINT = "#1d2733", "#66717d", "#dfe4e8"
SIGNAL, NOISE, LEARNED = "#1f4e79", "#8c98a4", "#c4512d"
"""Data is blue, noise grey, and what a network has learnt vermilion; they differ in lightness as well as in hue."""

WIDTH, DPI = 9.0, 150
LARGE, NORMAL, SMALL = 14, 13, 11.5  # points
TIMES = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)
ROLL = ("mlp.width=96", "mlp.depth=3", "training.batch=256", "training.rate=3e-3")
BINS = 60


# Four families.


def families() -> "Figure":
    """How x and z are related in a GAN, a VAE, a flow and a diffusion, and what each can say about log p(x).

    Reference: Goodfellow et al. (2014); Kingma & Welling (2014); Dinh et al. (2015); Sohl-Dickstein et al. (2015).
    """
    figure = _sheet(6.3)
    axes = _canvas(figure)
    columns, rows = (1.75, 2.8, 3.85, 4.9, 5.95), (5.1, 3.7, 2.4, 0.95)
    c1, c2, c3, c4, c5 = columns
    gan, vae, flow, diffusion = rows

    for x, word, colour in ((c1 - 0.24, "data", SIGNAL), (2.05, "noise", NOISE), (2.62, "learned", LEARNED)):
        axes.text(x, 5.98, word, color=colour, size=SMALL, va="center")
    axes.text(6.62, 5.98, "learns, and what it says of $\\log p(x)$", color=MUTED, size=SMALL, va="center")
    says = {
        gan: ("GAN", "a game: $G$ makes, $D$ judges", "none"),
        vae: ("VAE", "to encode and to decode", "lower bound"),
        flow: ("Flow", "one invertible map", "exact"),
        diffusion: ("Diffusion", "to undo each step of noise", "lower bound, term by term"),
    }
    for y, (name, learns, likelihood) in says.items():
        axes.text(0.3, y, name, size=LARGE, weight="bold", color=INK, va="center")
        axes.text(6.62, y + 0.13, learns, size=NORMAL, color=INK, va="center")
        axes.text(6.62, y - 0.15, likelihood, size=NORMAL, color=SIGNAL, va="center", weight="bold")
    for above, below in pairwise((5.75, *((a + b) / 2 for a, b in pairwise(rows)))):
        axes.plot([0.3, WIDTH - 0.2], [below, below], color=FAINT, linewidth=1)
        assert above > below

    up, down = gan + 0.3, gan - 0.3
    _node(axes, c1, up, "z", NOISE)
    _box(axes, c2, up, "G")
    _node(axes, c3, up, "x'", SIGNAL, made=True)
    _node(axes, c3, down, "x", SIGNAL)
    _box(axes, c4, gan, "D")
    axes.text(c5, gan, "real?", size=NORMAL, color=INK, ha="center", va="center")
    for start, end in (((c1, up), (c2, up)), ((c2, up), (c3, up)), ((c3, up), (c4, gan)), ((c3, down), (c4, gan))):
        _arrow(axes, start, end)
    _arrow(axes, (c4, gan), (c5, gan))

    _node(axes, c1, vae, "x", SIGNAL)
    _box(axes, c2, vae, r"q_\phi(z\,|\,x)")
    _node(axes, c3, vae, "z", NOISE)
    _box(axes, c4, vae, r"p_\theta(x\,|\,z)")
    _node(axes, c5, vae, "x'", SIGNAL, made=True)
    for left, right in pairwise(columns):
        _arrow(axes, (left, vae), (right, vae))

    _node(axes, c1, flow, "x", SIGNAL)
    _box(axes, c2, flow, "f_1")
    _box(axes, c4, flow, "f_K")
    _node(axes, c5, flow, "z", NOISE)
    for k, x in enumerate(columns):
        shade = _mix(SIGNAL, NOISE, k / 4)
        if x != c3:
            _node(axes, x, diffusion, ("x_0", "x_1", "", "x_{T-1}", "x_T")[k], shade)
    for y, forward, backward in (
        (flow, "f", "f^{\\,-1}"),
        (diffusion, r"q(x_t\,|\,x_{t-1})", r"p_\theta(x_{t-1}\,|\,x_t)"),
    ):
        axes.text(c3, y, r"$\cdots$", size=LARGE, color=MUTED, ha="center", va="center")
        axes.text(c3, y + 0.36, f"${forward}$", size=NORMAL, color=MUTED, ha="center", va="center")
        axes.text(c3, y - 0.36, f"${backward}$", size=NORMAL, color=LEARNED, ha="center", va="center")
        for left, right in pairwise(columns):
            _arrow(axes, (left, y + 0.08), (right, y + 0.08))
            _arrow(axes, (right, y - 0.08), (left, y - 0.08), LEARNED)
    return _typeset(figure)


def _node(axes: "Axes", x: float, y: float, name: str, colour: str, *, made: bool = False) -> None:
    from matplotlib.patches import Circle

    face = _mix(colour, "#ffffff", 0.88) if made else colour
    axes.add_patch(Circle((x, y), 0.27, facecolor=face, edgecolor=colour, linewidth=1.4, zorder=3))
    ink = colour if made else "white"
    axes.text(x, y - 0.01, f"${name}$", size=LARGE, color=ink, ha="center", va="center", zorder=4)


def _box(axes: "Axes", x: float, y: float, name: str) -> None:
    from matplotlib.patches import FancyBboxPatch

    frame = FancyBboxPatch(
        (x - 0.37, y - 0.19), 0.74, 0.38, boxstyle="round,pad=0,rounding_size=0.08", zorder=3, linewidth=1.4
    )
    frame.set(facecolor=_mix(LEARNED, "#ffffff", 0.93), edgecolor=LEARNED)
    axes.add_patch(frame)
    axes.text(x, y - 0.01, f"${name}$", size=NORMAL, color=LEARNED, ha="center", va="center", zorder=4)


def _arrow(axes: "Axes", start: tuple[float, float], end: tuple[float, float], colour: str = MUTED) -> None:
    """An arrow between two places of the diagram, short of what is drawn there."""
    from matplotlib.patches import FancyArrowPatch

    line = FancyArrowPatch(
        start, end, arrowstyle="-|>", mutation_scale=11, shrinkA=31, shrinkB=31, color=colour, linewidth=1.3
    )
    axes.add_patch(line)


# The forward chain.


def forward_walk(
    process: Process, x_0: Tensor, times: Sequence[float], *, seed: int = 0, between: int = 20
) -> list[Tensor]:
    """x_t at each of some increasing times, reached from x_0 through q(x_t|x_s) alone.

    x_t = alpha_{t|s} x_s + sqrt(var_{t|s}) eps, in `between` steps from each time to the next

    Args:
        process: the forward process.
        x_0: data in the model's units, shape (B, ...).
        times: increasing, in [0, 1].
        seed: of the noise.
        between: steps from each time to the next.
    """
    rng, x_t, seen = stream(seed), x_0, []
    for start, stop in pairwise([0.0, *times]):
        for s, t in pairwise(torch.linspace(start, stop, between + 1, dtype=torch.float64) if stop > start else []):
            alpha_ts, var_ts = (c.to(x_0.dtype) for c in process.transition(s, t))
            x_t = alpha_ts * x_t + var_ts.sqrt() * randn(x_0.shape, rng, dtype=x_0.dtype)
        seen.append(x_t)
    return seen


def regressed(x_0: Tensor, x_t: Tensor) -> tuple[float, float, float]:
    """alpha_t and sigma_t as least squares finds them in x_t = alpha_t x_0 + sigma_t eps, over all numbers in a batch.

    Returns:
        The slope, the standard deviation of the residuals, and the standard error of the slope. That of the standard
        deviation is sigma / sqrt(2 N).
    """
    x_0, x_t = x_0.double().flatten(), x_t.double().flatten()
    alpha = (x_0 @ x_t) / (x_0 @ x_0)
    sigma = ((x_t - alpha * x_0).square().sum() / (len(x_0) - 1)).sqrt()
    return float(alpha), float(sigma), float(sigma / x_0.norm())


def forward_chain(
    process: Process, facts: Facts, images: Tensor, times: Sequence[float] = TIMES, seed: int = 0
) -> "Figure":
    """Examples under more and more noise, and alpha_t, sigma_t and log-SNR: in closed form, and measured on the walk.

    Args:
        process: the forward process.
        facts: of the data.
        images: held-out examples in the data's units, shape (B, ...): the first three are shown, all are measured.
        times: at which to show and to measure.
        seed: of the noise.
    """
    x_0 = facts.scale.forward(images)
    walk = forward_walk(process, x_0, times, seed=seed)
    rows = min(3, len(images)) if facts.is_image else 1
    gap, left, right = 0.12, 0.3, 8.7
    side = (right - left - (len(times) - 1) * gap) / len(times)
    figure = _sheet(rows * (side + gap) + 3.75)
    top = figure.get_size_inches()[1] - 0.55
    for column, (t, x_t) in enumerate(zip(times, walk, strict=True)):
        x = left + column * (side + gap)
        _write(figure, x + side / 2, top + 0.14, f"$t={t:g}$", ha="center", size=NORMAL)
        for row in range(rows):
            panel = _axes(figure, x, top - side - row * (side + gap), side, side)
            if facts.is_image:
                reach = float(process(t)[0]) * float(x_0[:rows].abs().max()) + 2 * float(process(t)[1])
                picture = ((x_t[row] / reach + 1) / 2).clamp(0, 1).permute(1, 2, 0).numpy()
                panel.imshow(picture, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
                panel.axis("off")
            else:
                _cloud(panel, x_t.flatten(1).numpy())

    high, wide = 2.0, 3.35
    curves, ratio = _axes(figure, 0.75, 0.65, wide, high), _axes(figure, 5.25, 0.65, wide, high)
    t = torch.linspace(0, 1, 401, dtype=torch.float64)
    dots = [regressed(x_0, x_t) for x_t in walk]
    for coefficient, index, colour, name in zip(
        process(t), (0, 1), (SIGNAL, NOISE), (r"$\alpha_t$", r"$\sigma_t$"), strict=True
    ):
        curves.plot(t, coefficient, color=colour, linewidth=2, clip_on=False)
        curves.plot(times, [dot[index] for dot in dots], **_dot(colour))
        curves.text(1.05, float(coefficient[-1]), name, color=colour, size=LARGE, va="center")
    ratio.axhline(0, color=FAINT, linewidth=1, zorder=0)
    ratio.plot(t, process.log_snr(t), color=INK, linewidth=2)
    sure = [(at, 2 * np.log(a / s)) for at, (a, s, error) in zip(times, dots, strict=True) if s and a > 4 * error]
    ratio.plot(*zip(*sure, strict=True), **_dot(INK))
    ratio.set(ylim=(max(-20.0, float(process.log_snr(1.0))) - 1, 12))
    if process(1.0)[1] > 2:
        curves.set_yscale("log")
    else:
        curves.set(ylim=(0, 1), yticks=[0, 0.5, 1])
    for panel, title in ((curves, "signal and noise"), (ratio, r"$\log(\alpha_t^2/\sigma_t^2)$, nats")):
        panel.set(xlim=(0, 1), xticks=[0, 0.25, 0.5, 0.75, 1], xticklabels=["0", "", "0.5", "", "1"])
        panel.set_xlabel("$t$", size=NORMAL, color=INK, labelpad=0)
        panel.set_title(title, loc="left", size=NORMAL, color=INK, pad=10)
    return _typeset(figure)


def _cloud(panel: "Axes", points: NDArray[np.float32]) -> None:
    """Points in the plane, or the histogram of every number in examples that are not pairs."""
    if points.shape[1] == 2:
        panel.scatter(*points[:2000].T, s=2.2, color=SIGNAL, alpha=0.6, linewidths=0)
        panel.set(xlim=(-3.2, 3.2), ylim=(-3.2, 3.2), xticks=[], yticks=[], aspect="equal")
        panel.spines[:].set(visible=True, color=FAINT)
    else:
        panel.hist(points.flatten(), bins=40, range=(-3.2, 3.2), color=SIGNAL)
        panel.set(xticks=[], yticks=[])
        panel.spines["left"].set_visible(False)


# A swiss roll, there and back.


def learn_roll(*, steps: int, seed: int = 0, progress: Progress | None = None) -> tuple[Diffusion, Data]:
    """A small network that has learnt to denoise the swiss roll, and the roll."""
    data = sources.load("swiss-roll", seed=seed)
    setup = recipes.change(recipes.choose(data.facts), ROLL)
    model = recipes.build(setup, data.facts, seed)
    average = train.Average(model.network, setup.training.ema)
    for record in train.steps(model, data, setup.training, steps, seed=seed, averages={"denoiser": average}):
        if progress and record.step % 50 == 0:
            progress("learning a swiss roll", record.step, steps)
    model.network.load_state_dict(average.module.state_dict())
    return model.eval(), data


def swiss_roll(seed: int = 0, steps: int = 2000, progress: Progress | None = None) -> "Figure":
    """A swiss roll carried to a Gaussian by the forward chain, and out of another one by a chain that was learnt.

    The arrows are the drift of the learnt chain, the mean of p_theta(x_s|x_t) less x_t.

    Reference: Sohl-Dickstein et al. (2015), figure 1.

    Args:
        seed: of everything.
        steps: of training.
        progress: told (what, done, of).
    """
    model, data = learn_roll(steps=steps, seed=seed, progress=progress)
    times, chain, n = (0.0, 0.25, 0.5, 0.75, 1.0), 200, 2000
    there = forward_walk(model.process, data.facts.scale.forward(data.held_out[:n]), times, seed=seed)
    path = {round(point.t, 6): point.x for point in model.sample_path(n, steps=chain, rng=seed)}

    gap, left, side = 0.2, 0.75, 1.46
    figure = _sheet(2 * side + 1.45)
    upper, lower = side + 0.75, 0.3
    ticks = torch.linspace(-2.6, 2.6, 12)
    places = torch.cartesian_prod(ticks, ticks)
    for column, (t, x_t) in enumerate(zip(times, there, strict=True)):
        x = left + column * (side + gap)
        _write(figure, x + side / 2, upper + side + 0.14, f"$t={t:g}$", ha="center", size=NORMAL)
        forward, back = _axes(figure, x, upper, side, side), _axes(figure, x, lower, side, side)
        _cloud(forward, x_t.numpy())
        _cloud(back, path[t].numpy())
        back.collections[0].set_color(LEARNED)
        at = max(t, 1 / chain)
        with torch.no_grad():
            drift = reverse(model.denoiser, places, at - 1 / chain, at)[0] - places
        length = drift.norm(dim=1, keepdim=True)
        arrows = drift / length.quantile(0.9).clamp(min=1e-12) * 0.4
        back.quiver(
            *places.T, *arrows.T, color=INK, angles="xy", scale_units="xy", scale=1, width=0.006, alpha=0.7
        )
    return _typeset(figure)


# The terms of the bound.


@dataclass(frozen=True)
class Binned:
    """The middle terms of a bound in bins of neighbouring steps, each as the mean of a single term.

    Attributes:
        edges: times that bound the bins, shape (B + 1,).
        sizes: how many terms are in each bin, shape (B,).
        mean: of one term in each bin, nats, shape (B,).
        stderr: standard error of it over examples, shape (B,).
    """

    edges: Tensor
    sizes: Tensor
    mean: Tensor
    stderr: Tensor


def binned(bound: Bound, bins: int = BINS) -> Binned:
    """The middle terms in at most so many bins, cut where the strata are cut, so that sizes * mean adds up to their sum.

    Args:
        bound: of at least two examples.
        bins: at most this many.

    Example:
        >>> from ancestral import toys
        >>> from ancestral.diffusion import denoise, likelihood, process
        >>> toy = toys.named("mixture")
        >>> oracle = denoise.OracleDenoiser(toy, process.cosine())
        >>> bound = likelihood.bound(oracle, toy.sample(20, rng=stream(0)), 100, rng=stream(1), draws=9)
        >>> parts = binned(bound, bins=3)
        >>> parts.edges, bool((parts.sizes @ parts.mean).isclose(bound.diffusion.mean()))
        (tensor([0.0100, 0.3400, 0.6700, 1.0000], dtype=torch.float64), True)
    """
    groups = torch.arange(len(bound.weights)).tensor_split(min(bins, len(bound.weights)))
    sizes = torch.stack([bound.weights[group].sum() for group in groups])
    each = torch.stack([(bound.terms[:, group] * bound.weights[group]).sum(1) for group in groups], 1) / sizes
    last = torch.cat([torch.zeros(1), sizes.cumsum(0)]).round().long()
    return Binned(bound.times[last], sizes, each.mean(0), each.std(0) / len(each) ** 0.5)


def terms(bound: Bound, facts: Facts) -> "Figure":
    """The terms of the bound by timestep with 95% intervals, and what they add up to, in the data's unit.

    Args:
        bound: of at least two examples on a chain of at least two steps.
        facts: of the data.
    """

    def unit(nats: Tensor) -> Tensor:
        return facts.bits_per_dim(nats) if facts.levels else nats

    parts = binned(bound)
    edges, mean, error = parts.edges, unit(parts.mean), 1.96 * unit(parts.stderr)
    middle = (edges[:-1] + edges[1:]) / 2
    ends = {
        "decoder": ("$L_0$", float(bound.times[0]), LEARNED, unit(bound.decoder)),
        "prior": ("$L_T$", 1.0, NOISE, unit(bound.prior)),
    }

    figure = _sheet(6.2)
    left, wide = 0.85, 6.3
    each, total = _axes(figure, left, 3.2, wide, 2.45), _axes(figure, left, 0.6, wide, 1.9)

    each.hlines(mean, edges[:-1], edges[1:], color=SIGNAL, linewidth=2)
    each.errorbar(middle, mean, error, fmt="none", ecolor=SIGNAL, elinewidth=1.2)
    for name, (symbol, t, colour, values) in ends.items():
        value, stderr = (float(number) for number in mean_and_stderr(values))
        if value > 0:
            each.errorbar([t], [value], [1.96 * stderr], color=colour, elinewidth=1.2, clip_on=False, **_marker(colour))
    each.set(yscale="log")

    running = torch.cat([torch.zeros(1), (mean * parts.sizes).cumsum(0)]) + ends["decoder"][3].mean()
    total.fill_between(edges, 0, running, color=SIGNAL, alpha=0.08, linewidth=0)
    total.plot(edges, running, color=SIGNAL, linewidth=2)
    return _typeset(figure)


# A run's figures.


def draw_all(run: Path, out: Path, *, seed: int = 0, progress: Progress | None = None) -> dict[str, Path]:
    """Draw every figure for a run and write them as PNGs that carry how they were made.

    Args:
        run: a run directory.
        out: a directory in which nothing has these names.
        seed: of the noise and of the swiss roll.
        progress: told (what, done, of).

    Returns:
        The file of each figure.

    Raises:
        UserError: in one sentence, if the run or its data cannot be read.
    """
    model, data = checkpoint.load(run), _data(run, progress)
    measured = evaluate(model, data, n=200, draws=DRAWS, seed=seed, progress=progress)
    figures: dict[str, Callable[[], Figure]] = {
        "families": families,
        "forward": lambda: forward_chain(model.process, model.facts, data.held_out[:500], seed=seed),
        "terms": lambda: terms(measured.bound, model.facts),
        "swiss-roll": lambda: swiss_roll(seed, progress=progress),
    }
    out.mkdir(parents=True, exist_ok=True)
    written = {}
    for name, figure in figures.items():
        written[name] = out / f"{name}.png"
        save(figure(), written[name], {"figure": name, "run": run.name, "seed": seed})
    return written


def save(figure: "Figure", path: Path, recipe: dict[str, Any]) -> None:
    """Write a figure as a PNG with its recipe inside: the same figure gives the same bytes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    draw.save_png(Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy()), path, recipe)


def _data(run: Path, progress: Progress | None) -> Data:
    """The data that a run was trained on, read again."""
    try:
        record = json.loads((run / "run.json").read_bytes())["data"]
        source, size, on_bad = record["source"], record["size"], record["on_bad"]
    except (OSError, ValueError, KeyError, TypeError):
        raise RunError(f"{run / 'run.json'}: missing or damaged, so its data is not known; name a run directory") from None
    return sources.load(source, size=size, on_bad=on_bad, progress=progress)


# Drawing.


def _sheet(height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(WIDTH, height), dpi=DPI, facecolor="white")


def _axes(figure: "Figure", left: float, bottom: float, width: float, height: float) -> "Axes":
    W, H = figure.get_size_inches()
    axes = figure.add_axes((left / W, bottom / H, width / W, height / H))
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(MUTED)
    axes.tick_params(which="both", color=MUTED, labelcolor=INK, labelsize=SMALL)
    return axes


def _canvas(figure: "Figure") -> "Axes":
    """Axes over a whole figure, one unit to the inch."""
    W, H = figure.get_size_inches()
    axes = _axes(figure, 0, 0, W, H)
    axes.set(xlim=(0, W), ylim=(0, H))
    axes.axis("off")
    return axes


def _write(figure: "Figure", x: float, y: float, words: str, **how: Any) -> None:
    W, H = figure.get_size_inches()
    figure.text(x / W, y / H, words, **{"color": INK, **how})


def _typeset(figure: "Figure") -> "Figure":
    """Set every word and formula in STIX, which comes with matplotlib: the same on every machine."""
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        assert isinstance(text, Text)
        text.set_fontfamily("STIXGeneral")
        text.set_math_fontfamily("stix")
    return figure


def _dot(colour: str) -> dict[str, Any]:
    """A measured value: a dot with a white rim, which a line does not swallow."""
    return {
        "linestyle": "none", "marker": "o", "markersize": 7.5, "color": colour, "markeredgecolor": "white",
        "markeredgewidth": 1.2, "clip_on": False, "zorder": 5,
    }


def _marker(colour: str) -> dict[str, Any]:
    return {"linestyle": "none", "marker": "o", "markersize": 7, "markerfacecolor": colour}


def _mix(a: str, b: str, share: float) -> tuple[float, ...]:
    """The colour that far from a to b."""
    from matplotlib.colors import to_rgb

    return tuple((1 - share) * x + share * y for x, y in zip(to_rgb(a), to_rgb(b), strict=True))
