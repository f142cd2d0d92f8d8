"""The derivation as four figures: families, the forward chain, a swiss roll there and back, the terms of the bound.

Every number in them is computed when they are drawn, by the functions the rest of the program uses. The first figure,
and the sheet and the palette of all, are in `diagram`.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ancestral.apps.diagram import (
    BLUE,
    DPI,
    FAINT,
    GREY,
    INK,
    LARGE,
    MUTED,
    NORMAL,
    RED,
    SMALL,
    WIDTH,
    axes_at,
    families,
    sheet,
    typeset,
    write,
)
from ancestral.data import Data, Facts, draw, load
from ancestral.data.dataset import Progress
from ancestral.diffusion.denoise import reverse
from ancestral.diffusion.likelihood import Bound, mean_and_stderr
from ancestral.diffusion.model import Diffusion
from ancestral.diffusion.process import Process
from ancestral.measure import chain
from ancestral.measure.record import Likelihood
from ancestral.rng import randn, stream
from ancestral.training import checkpoint, loop, recipes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TIMES = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)
EDGE = 2.8  # of the plane that is shown, in standard deviations of the data
DOT: dict[str, Any] = {
    "markersize": 7.5,
    "markeredgecolor": "white",
    "markeredgewidth": 1.2,
    "clip_on": False,
    "zorder": 5,
}
"""A measured value: the white rim keeps it apart from the line it should lie on."""
ROLL = ("mlp.width=64", "mlp.depth=3", "training.batch=512", "training.rate=3e-3")
CHAIN = 200  # steps of the learned reverse chain
BINS = 60  # of steps in the figure of the bound, at most
INTERVAL = 1.96  # standard errors to either side, for 95%


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
        images: held-out examples in the data's units, shape (B, ...): all are measured, and shown are the first and
            the last image, or the points of the plane brought to unit variance.
        times: at which to show and to measure.
        seed: of the noise.
    """
    x_0 = facts.scale.forward(images)
    walk = forward_walk(process, x_0, times, seed=seed)
    rows, gap, left = (0, -1) if facts.is_image else (0,), 0.13, 0.3
    side = (WIDTH - 2 * left + gap) / len(times) - gap
    height = len(rows) * (side + gap) + 4.2
    (figure, canvas), top = sheet(height), height - 0.6
    for column, (t, x_t) in enumerate(zip(times, walk, strict=True)):
        x = left + column * (side + gap)
        write(canvas, x + side / 2, top + 0.14, f"$t={t:g}$", ha="center")
        for row, example in enumerate(rows):
            panel = _framed(figure, x, top - side - row * (side + gap), side)
            alpha_t, sigma_t = process(t)
            if facts.is_image:
                picture = x_t[example] / (alpha_t * x_0.abs().max() + 2 * sigma_t)
                shade = (picture / 2 + 0.5).clamp(0, 1).permute(1, 2, 0).numpy()
                panel.imshow(shade, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            else:
                _cloud(panel, x_t.flatten(1) / (alpha_t.square() + sigma_t.square()).sqrt(), BLUE)

    _coefficients(figure, process, times, [regressed(x_0, x_t) for x_t in walk])
    lines = "Lines: the closed form. Dots: regressed on $x_0$"
    walked = rf"{lines} from {len(images):,} held-out examples after a walk of $q(x_t\,|\,x_s)$."
    write(canvas, left, 0.25, walked, MUTED, size=SMALL)
    return typeset(figure)


def _coefficients(
    figure: "Figure", process: Process, times: Sequence[float], measured: Sequence[tuple[float, float, float]]
) -> None:
    """The curves of a process, and what was measured at some times as dots."""
    curves, ratio = axes_at(figure, 0.75, 1.05, 3.3, 1.95), axes_at(figure, 5.3, 1.05, 3.3, 1.95)
    t = torch.linspace(0, 1, 401, dtype=torch.float64)
    alpha, sigma = process(t)
    slopes, spreads, _ = zip(*measured, strict=True)
    wide = float(sigma[-1]) > 2
    for line, dots, colour, name in ((alpha, slopes, BLUE, r"$\alpha_t$"), (sigma, spreads, GREY, r"$\sigma_t$")):
        curves.plot(t, line, color=colour, linewidth=2, clip_on=wide)
        curves.plot(times, dots, "o", color=colour, **DOT)
        write(curves, 1.05, float(line[-1]), name, colour, size=LARGE, va="center")
    if wide:
        curves.set(yscale="log", ylim=(0.01, float(sigma[-1])))
        curves.minorticks_off()
    else:
        curves.set(ylim=(0, 1), yticks=[0, 0.5, 1], yticklabels=["0", "0.5", "1"])
    ratio.axhline(0, color=FAINT, linewidth=1, zorder=0)
    ratio.plot(t, process.log_snr(t), color=INK, linewidth=2)
    for time, (slope, spread, error) in zip(times, measured, strict=True):
        if spread > 0 and slope > 4 * error:
            ratio.plot(time, 2 * math.log(slope / spread), "o", color=INK, **DOT)
    ratio.set(ylim=(-11, 11), yticks=[-10, -5, 0, 5, 10])
    _over_time(curves, "signal and noise", "$t$")
    _over_time(ratio, r"$\log(\alpha_t^2/\sigma_t^2)$, nats", "$t$")


def _framed(figure: "Figure", left: float, bottom: float, side: float) -> "Axes":
    """A square in a faint frame, without ticks."""
    panel = axes_at(figure, left, bottom, side, side)
    panel.set(xticks=[], yticks=[])
    panel.spines[:].set(visible=True, color=FAINT)
    return panel


def _cloud(panel: "Axes", points: Tensor, colour: str) -> None:
    """Pairs as points in the plane; anything else as the histogram of all its numbers."""
    if points.shape[1] == 2:
        panel.scatter(points[:2000, 0], points[:2000, 1], s=2.5, color=colour, alpha=0.55, linewidths=0)
        panel.set(xlim=(-EDGE, EDGE), ylim=(-EDGE, EDGE))
    else:
        panel.hist(points.flatten().numpy(), bins=40, range=(-EDGE, EDGE), color=colour)


def _over_time(axes: "Axes", title: str, label: str = "") -> None:
    axes.set(xlim=(0, 1), xticks=[0, 0.25, 0.5, 0.75, 1], xticklabels=["0", "0.25", "0.5", "0.75", "1"])
    axes.set_title(title, loc="left", size=NORMAL, color=INK, pad=11)
    axes.set_xlabel(label, size=NORMAL, color=INK, labelpad=1)


# A swiss roll, there and back.


def learn_roll(*, steps: int, seed: int = 0, progress: Progress | None = None) -> tuple[Diffusion, Data]:
    """A small network that has learnt to denoise the swiss roll, and the roll."""
    data = load("swiss-roll", seed=seed)
    setup = recipes.change(recipes.choose(data.facts), ROLL)
    model = recipes.build(setup, data.facts, seed)
    state = loop.State(model, setup.training)
    for record in loop.steps(state, data, steps, seed=seed):
        if progress and record.step % 50 == 0:
            progress("learning a swiss roll", record.step, steps)
    averaged = checkpoint.averaged(state.tensors(), setup, data.facts)
    assert isinstance(averaged, Diffusion)
    return averaged, data


def swiss_roll(seed: int = 0, steps: int = 2500, progress: Progress | None = None) -> "Figure":
    """A swiss roll carried to a Gaussian by the forward chain, and out of another one by a chain that was learned.

    The arrows are the drift of the learned chain, mu_theta(x_t, t) - x_t, their lengths drawn by their square roots;
    those at t = 0 belong to the last step but one.

    Reference: Sohl-Dickstein et al. (2015), figure 1.

    Args:
        seed: of everything.
        steps: of training.
        progress: told (what, done, of).
    """
    model, data = learn_roll(steps=steps, seed=seed, progress=progress)
    times, n = (0.0, 0.25, 0.5, 0.75, 1.0), 2000
    there = forward_walk(model.process, data.facts.scale.forward(data.held_out[:n]), times, seed=seed)
    back = {point.t: point.x for point in model.sample_path(n, steps=CHAIN, rng=seed)}

    gap, left = 0.32, 0.3
    side = (WIDTH - 2 * left + gap) / len(times) - gap
    upper, lower = side + 1.05, 0.55
    figure, canvas = sheet(2 * side + 1.6)
    write(canvas, left, upper + side + 0.17, r"noise is added: $q(x_t\,|\,x_{t-1})$", BLUE)
    write(canvas, WIDTH - left, 0.22, r"and taken away: $p_\theta(x_{t-1}\,|\,x_t)$, learned", RED, ha="right")
    write(canvas, left, 0.22, r"arrows: where a step leads, $\mu_\theta(x_t, t) - x_t$", MUTED, size=SMALL)
    for column, (t, x_t) in enumerate(zip(times, there, strict=True)):
        x = left + column * (side + gap)
        above, below = _framed(figure, x, upper, side), _framed(figure, x, lower, side)
        _cloud(above, x_t, BLUE)
        _cloud(below, back[t], RED)
        _drift(below, model, max(t, 2 / CHAIN))
        write(canvas, x + side / 2, lower + side + 0.2, f"$t={t:g}$", ha="center")
        for y, arrow, colour in ((upper, r"$\rightarrow$", BLUE), (lower, r"$\leftarrow$", RED)):
            if column:
                write(canvas, x - gap / 2, y + side / 2, arrow, colour, size=LARGE, ha="center", va="center")
    return typeset(figure)


def _drift(panel: "Axes", model: Diffusion, t: float) -> None:
    ticks = torch.linspace(-0.9 * EDGE, 0.9 * EDGE, 9)
    x_t = torch.cartesian_prod(ticks, ticks)
    with torch.no_grad():
        drift = reverse(model.denoiser, x_t, t - 1 / CHAIN, t)[0] - x_t
    length = drift.norm(dim=1, keepdim=True)
    arrows = 0.55 * drift / (length * length.quantile(0.9)).sqrt()
    panel.quiver(
        *x_t.T, *arrows.T, color=INK, pivot="mid", angles="xy", scale_units="xy", scale=1, width=0.009, headwidth=3.5
    )


# The terms of the bound.


@dataclass(frozen=True)
class Binned:
    """The middle terms of a bound in bins of neighbouring steps, each as the mean of a single term.

    Attributes:
        edges: of the bins, as shares t/T of the steps, whatever their times: each step is as wide; shape (B + 1,).
        sizes: how many terms are in each bin, shape (B,).
        mean: of one term in each bin, nats, shape (B,).
        stderr: standard error of it over examples, shape (B,).
    """

    edges: Tensor
    sizes: Tensor
    mean: Tensor
    stderr: Tensor


def binned(bound: Bound, bins: int = BINS) -> Binned:
    """The middle terms in at most so many bins of neighbouring steps; sizes * mean adds up to their sum.

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
    middle = len(bound.times) - 1
    bins = min(bins, middle)
    group = torch.arange(middle) * bins // max(middle, 1)
    sizes = group.bincount(minlength=bins).double()
    each = torch.zeros(len(bound.terms), bins, dtype=torch.float64)
    each = each.scatter_add(1, group[bound.steps - 2], (bound.terms * bound.weights).double()) / sizes
    edges = (1 + torch.cat([torch.zeros(1), sizes.cumsum(0)])) / len(bound.times)
    return Binned(edges, sizes, each.mean(0), each.std(0) / len(each) ** 0.5)


def terms(bound: Bound, facts: Facts, told: Likelihood | None = None) -> "Figure":
    """The terms of the bound by timestep with 95% intervals, and what they add up to, in the data's unit.

    Args:
        bound: of at least two examples on a chain of at least two steps.
        facts: of the data.
        told: what is said of the bound, where the examples speak for others; by default their plain means.
    """

    def unit(nats: Tensor) -> Tensor:
        return facts.bits_per_dim(nats) if facts.levels else nats

    parts = binned(bound)
    edges, heights, errors = parts.edges, unit(parts.mean), INTERVAL * unit(parts.stderr)
    first, last = float(edges[0]), float(edges[-1])
    L_0, L_T, total = (unit(nats.mean()) for nats in (bound.decoder, bound.prior, bound.nats))
    running = torch.cat([L_0[None], L_0 + (parts.sizes * heights).cumsum(0)])

    figure, canvas = sheet(6.5)
    each, summed = axes_at(figure, 0.85, 3.85, 5.4, 2.1), axes_at(figure, 0.85, 1.05, 5.4, 2.0)
    low, high = float(heights.clamp(min=1e-9).min()) / 10, float(torch.maximum(heights.max(), L_0).clamp(min=1e-6))
    each.stairs(heights, edges, baseline=None, color=BLUE, linewidth=2)
    each.errorbar((edges[:-1] + edges[1:]) / 2, heights, errors, fmt="none", ecolor=BLUE, elinewidth=1.3)
    _beside(each, "$L_{t-1}$", 0.5, float(heights[len(heights) // 2]), BLUE)
    for name, t, nats, colour in (("L_0", first, bound.decoder, RED), ("L_T", last, bound.prior, GREY)):
        mean, stderr = (float(unit(number)) for number in mean_and_stderr(nats))
        if mean > low:
            each.errorbar(t, mean, INTERVAL * stderr, fmt="o", ecolor=colour, elinewidth=1.3, color=colour, **DOT)
            _beside(each, f"${name}$", t, mean, colour)
        else:
            each.plot(t, low, "v", color=colour, **DOT)
            _beside(each, f"${name} = {_power(mean)}$", t, low, colour)
    each.set(yscale="log", ylim=(low, high * (high / low) ** 0.12))
    each.minorticks_off()

    summed.axhline(0, color=FAINT, linewidth=1, zorder=0)
    summed.plot(edges, running, color=BLUE, linewidth=2, clip_on=False)
    for t, ends, colour in ((first, (0.0, float(L_0)), RED), (last, (float(running[-1]), float(total)), GREY)):
        summed.plot([t, t], ends, color=colour, linewidth=4, solid_capstyle="butt", clip_on=False, zorder=3)
    summed.plot(last, total, "o", color=INK, **DOT)
    _over_time(each, f"one term of the bound, {facts.unit}")
    _over_time(summed, f"sum from $L_0$ up to $L_{{t-1}}$, {facts.unit}", "$t/T$")

    told = told or Likelihood(
        value=float(total),
        stderr=float(unit(mean_and_stderr(bound.nats)[1])),
        prior=float(L_T),
        diffusion=float(running[-1] - L_0),
        decoder=float(L_0),
    )
    table = (
        (2.88, "prior", "$L_T$", _short(told.prior or 0.0), GREY),
        (2.55, "diffusion", r"$\sum\, L_{t-1}$", _short(told.diffusion or 0.0), BLUE),
        (2.22, "decoder", "$L_0$", _short(told.decoder or 0.0), RED),
        (1.76, "bound", "", _short(told.value), INK),
        (1.43, "", "", rf"$\pm$ {_short(INTERVAL * told.stderr)}", INK),
    )
    for y, name, symbol, value, colour in table:
        write(canvas, 6.65, y, name, colour)
        write(canvas, 7.45, y, symbol, colour)
        write(canvas, 8.75, y, value, colour, ha="right")
    canvas.hlines(2.08, 6.65, 8.75, color=MUTED, linewidth=1)
    note = f"Means over {len(bound.nats):,} held-out examples with 95% intervals"
    middle = len(bound.times) - 1
    if middle > len(heights):
        note += f"; the {middle:,} middle terms are averaged in {len(heights)} bins"
    write(canvas, 0.3, 0.25, f"{note}.", MUTED, size=SMALL)
    return typeset(figure)


def _beside(axes: "Axes", name: str, x: float, y: float, colour: str) -> None:
    axes.annotate(name, (x, y), (9, 7), textcoords="offset points", color=colour, size=NORMAL, annotation_clip=False)


def _short(value: float) -> str:
    """Three decimals, and no zero for what is merely small."""
    return "< 0.001" if 0 < value < 0.0005 else f"{value:.3f}".replace("-", "\u2212")


def _power(value: float) -> str:
    """One digit and a power of ten, or two decimals if it is not small, as mathtext."""
    digit, exponent = f"{value:.0e}".split("e")
    return rf"{digit}\times 10^{{{int(exponent)}}}" if 0 < value < 0.01 else f"{value:.2f}"


# A run's figures.


def draw_all(
    model: Diffusion, data: Data, out: Path, *, seed: int = 0, progress: Progress | None = None
) -> dict[str, Path]:
    """Draw every figure for a model and write them as PNGs that carry how they were made.

    Args:
        model: trained.
        data: that it was trained on, whose held-out split is shown and measured.
        out: a directory in which nothing has these names.
        seed: of the noise and of the swiss roll.
        progress: told (what, done, of).

    Returns:
        The file of each figure.

    Raises:
        DataError: if the data is not of the kind that the model was made for; nothing was written.
        FileExistsError: a figure is never overwritten.
    """
    n, every = 200 if len(model.facts.shape) == 3 else 2000, max(1, len(data.held_out) // 500)
    measured = chain.measure(model, data, n=n, seed=seed, progress=progress)
    figures: dict[str, Callable[[], Figure]] = {
        "families": families,
        "forward": lambda: forward_chain(model.process, model.facts, data.held_out[::every], seed=seed),
        "swiss-roll": lambda: swiss_roll(seed, progress=progress),
        "terms": lambda: terms(measured.bound, model.facts),
    }
    out.mkdir(parents=True, exist_ok=True)
    paths = {name: out / f"{name}.png" for name in figures}
    for name, path in paths.items():
        save(figures[name](), path, {"figure": name, "data": data.facts.name, "seed": seed})
    return paths


def save(figure: "Figure", path: Path, recipe: Mapping[str, Any]) -> None:
    """Write a figure as a PNG with its recipe inside, as `draw.read_recipe` finds it: equal figures, equal bytes.

    Raises:
        FileExistsError: a figure is never overwritten.
    """
    with path.open("xb") as file:
        words = {"Software": None, draw.KEY: json.dumps(recipe, sort_keys=True)}
        figure.savefig(file, format="png", dpi=DPI, metadata=words)
