"""The report of a comparison: one page that needs nothing else, for a screen, a phone and paper.

Pictures and drawings are inside it; it has no script, and asks for nothing from anywhere.
"""

import base64
from collections.abc import Mapping, Sequence
from html import escape
from io import BytesIO, StringIO
from itertools import cycle
from typing import TYPE_CHECKING

from PIL.Image import Image

from ancestral.apps.diagram import BLUE, FAINT, GREY, INK, MUTED, RED
from ancestral.apps.output import number
from ancestral.measure.compare import Contest, Row
from ancestral.measure.quality import METRICS, called
from ancestral.measure.record import Interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GROUPS = {
    "Distance": "How far samples are from held-out data. Other held-out data is as near as anything can be told to be.",
    "Coverage": "Whether samples look like data (precision, density), and show all of it (recall, coverage).",
    "Memorisation": "Whether samples repeat what was learnt from. Training data in the samples' place is what copying "
    "looks like.",
}
"""What samples are asked, as `quality.Metric.group` says it."""

LETTERS = 24
"""Of a label beside a drawing, at most."""

FOUND = {"held-out data": BLUE, "training data": GREY}
MARKS = {"best": "best", "no difference": "no difference at this N", "worse": ""}

STYLE = """
:root { color-scheme: light; --ink: #1d2733; --muted: #55606b; --faint: #dfe4e8; --blue: #1f4e79; --paper: #fff; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 64rem; padding: 1.5rem 1rem 4rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.55 system-ui, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .4rem; }
h2 { font-size: 1.25rem; margin: 2.6rem 0 .4rem; border-top: 2px solid var(--faint); padding-top: 1rem; }
p, dd { max-width: 46rem; }
a { color: var(--blue); }
nav a { display: inline-block; margin: 0 1rem .3rem 0; }
code { font: .9em ui-monospace, monospace; overflow-wrap: anywhere; background: #f3f5f7; padding: .1em .3em; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .8rem 0; }
th, td { text-align: right; padding: .35rem .7rem; border-bottom: 1px solid var(--faint); vertical-align: top; }
th[scope=row], td:first-child { text-align: left; position: sticky; left: 0; background: var(--paper);
  max-width: 9rem; font-weight: 500; }
thead th { vertical-align: bottom; }
td small { display: block; color: var(--muted); }
.interval { white-space: nowrap; }
td.real { color: var(--muted); }
.best { font-weight: 650; }
.samples { display: grid; grid-template-columns: repeat(auto-fit, minmax(14rem, 1fr)); gap: 1rem; }
figure { margin: 0; }
figcaption { color: var(--muted); margin: .3rem 0 0; }
img { max-width: 100%; height: auto; }
.samples img { width: 100%; image-rendering: pixelated; border: 1px solid var(--faint); }
dt { font-weight: 650; margin-top: .7rem; }
dd { margin-left: 0; }
@media print { body { max-width: none; padding: 0; font-size: 10pt; } nav { display: none; }
  figure, tr { break-inside: avoid; } h2 { break-after: avoid; } .wide { overflow: visible; } }
"""


def page(result: Contest, pictures: Mapping[str, Image]) -> str:
    """The page, in HTML.

    Args:
        result: the comparison.
        pictures: samples of each row, and held-out data, by name.
    """
    sections = {
        "At a glance": _glance(result),
        "Samples": _samples(result, pictures),
        "Quality and speed": _drawn(speed(result), "Each run: samples for each second, and their distance from data."),
        **({"Likelihood": _likelihood(result)} if _with(result, "likelihood") else {}),
        **{
            name: f"<p>{says}</p>" + _drawn(forest(result, _of_group(result, name)), f"{name}, with 95% intervals.")
            for name, says in GROUPS.items()
            if _of_group(result, name)
        },
        "Stability over seeds": _stability(result),
        "Training": _training(result),
        "Cost": _cost(result),
        "What the numbers are": _definitions(result),
    }
    names = {title: title.lower().replace(" ", "-") for title in sections}
    contents = "".join(f'<a href="#{name}">{escape(title)}</a>' for title, name in names.items())
    body = "".join(
        f'<section aria-labelledby="{names[title]}"><h2 id="{names[title]}">{escape(title)}</h2>{html}</section>'
        for title, html in sections.items()
    )
    families = _listed([row.family for row in result.rows])
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<title>{escape(result.data)}: {escape(families)}</title><link rel="icon" href="data:,">'
        f"<style>{STYLE}</style></head><body><header><h1>{escape(families)} on {escape(result.data)}</h1>"
        f"<p>{escape(summary(result))}</p><p><code>{escape(result.command)}</code></p>"
        f'<nav aria-label="Contents">{contents}</nav></header><main>{body}</main></body></html>\n'
    )


def summary(result: Contest) -> str:
    """In a sentence, what was compared."""
    seeds = "one seed" if result.seeds == 1 else f"{result.seeds} seeds"
    trained = f"Every family, with its defaults, trained for {result.minutes or 0:g} minutes on one core from {seeds}"
    what = "Runs as they were found" if result.minutes is None else trained
    single = [row.family for row in result.rows if row.runs - row.failed == 1]
    return (
        f"{what}. {result.n:,} samples of each run against as many held-out examples, in {result.features}. "
        "Numbers are means over seeds with 95% intervals, which hold for other seeds and other held-out examples"
        + (f", and those of {_listed(single)}, of one run each, for this run" if single else "")
        + f". ancestral {result.version}."
    )


def title(name: str, result: Contest) -> str:
    """What a number is called."""
    labels = {"likelihood": f"negative log-likelihood, {result.unit}", "rate": "samples a second"}
    labels["gap"] = f"likelihood gap, {result.unit}"
    return labels.get(name) or called(name, result.features)


# Sections.


def _glance(result: Contest) -> str:
    names = [name for name in ("likelihood", *METRICS, "gap", "rate") if _with(result, name)]
    heads = [f"{escape(row.family)}{_failed(row)}" for row in result.rows]
    rows = "".join(
        f'<tr><th scope="row">{escape(title(name, result))}</th>{"".join(_cell(row, name) for row in result.rows)}'
        + "".join(_plain(standing.get(name), "real") for standing in (result.held_out, result.training))
        + "</tr>"
        for name in names
    )
    return (
        "<p>Held-out data in the samples' place is what good looks like, training data in their place what copying "
        "looks like. “No difference” means that the interval of the difference from the best holds zero: over "
        "seeds, on these held-out examples, and at a level that is divided among the families.</p>"
        + _table("Every number, by family", [*heads, "held-out data", "training data"], rows)
    )


def _table(label: str, heads: Sequence[str], rows: str) -> str:
    """A table that is scrolled by itself where it is wider than the page; its first column stays."""
    head = "".join(f'<th scope="col">{each}</th>' for each in heads)
    return (
        f'<div class="wide" tabindex="0" role="region" aria-label="{label}">'
        f"<table><thead><tr><td></td>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _cell(row: Row, name: str) -> str:
    found, verdict = row.numbers.get(name), row.verdicts.get(name)
    if found is None:
        return "<td>none</td>" if name == "likelihood" else "<td></td>"
    word = "" if verdict is None else MARKS[verdict.word]
    kind = ' class="best"' if verdict and verdict.word == "best" else ""
    return f"<td{kind}>{_split(found)}{f'<small>{escape(word)}</small>' if word else ''}</td>"


def _plain(found: Interval | None, kind: str = "") -> str:
    return f'<td class="{kind}">{"" if found is None else _split(found)}</td>'


def _split(found: Interval) -> str:
    value, rest = number(found).split(" ", 1)
    return f'{value}<small class="interval">{rest[1:-1]}</small>'


def _failed(row: Row) -> str:
    return f"<br><small>{row.failed} of {row.runs} runs failed</small>" if row.failed else ""


def _samples(result: Contest, pictures: Mapping[str, Image]) -> str:
    shown = "".join(
        _figure(_png(picture), f"Samples: {name}" if name != "held-out data" else name)
        for name, picture in pictures.items()
    )
    says = "Of the first run of each that ended, not chosen: the first that seed 0 gives."
    return f'<p>{says}</p><div class="samples">{shown}</div>'


def _likelihood(result: Contest) -> str:
    without = [row.family for row in result.rows if "likelihood" not in row.numbers and row.failed < row.runs]
    said = f" {_listed(without)} has none." if without else ""
    page = (
        f"<p>Of held-out examples, in {result.unit}: less is better, and what is a bound is an upper one.{said}</p>"
        + _drawn(forest(result, ["likelihood"]), "Negative log-likelihood, with 95% intervals.")
    )
    if any("likelihood" in row.best for row in result.rows):
        page += (
            "<p>Of the last checkpoint, and of the best, as if training had stopped in time. One half of held-out "
            "examples chooses it and the other half measures it, and then the other way round:</p>"
        ) + _last_and_best("likelihood", result)
    return page


def _stability(result: Contest) -> str:
    names = [name for name in ("likelihood", *METRICS, "gap") if any(name in row.between for row in result.rows)]
    failed = "".join(f"<td>{row.failed} of {row.runs}</td>" for row in result.rows)
    rows = f'<tr><th scope="row">runs that failed</th>{failed}</tr>' + "".join(
        f'<tr><th scope="row">{escape(title(name, result))}</th>'
        + "".join(f"<td>{row.between[name]:.2g}</td>" if name in row.between else "<td></td>" for row in result.rows)
        + "</tr>"
        for name in names
    )
    says = "Standard deviation between seeds." if names else "One seed says nothing of it: --seeds asks for more."
    return f"<p>{says}</p>" + _table("Deviation between seeds", [escape(row.family) for row in result.rows], rows)


def _training(result: Contest) -> str:
    return (
        _drawn(training(result), "Energy distance of a few samples of the checkpoints of every run, along it.")
        + f"<p>The {escape(title('energy', result))} of the last checkpoint, and of the one that is best in the "
        "drawing, which is chosen by other held-out examples than it is measured on:</p>"
        + _last_and_best("energy", result)
    )


def _last_and_best(name: str, result: Contest) -> str:
    """A number at the end of the runs, and at the best of their checkpoints."""
    rows = "".join(
        f'<tr><th scope="row">{words}</th>{"".join(_plain(found.get(name)) for found in standings)}</tr>'
        for words, standings in (
            ("last checkpoint", [row.numbers for row in result.rows]),
            ("best checkpoint", [row.best for row in result.rows]),
        )
    )
    families = [escape(row.family) for row in result.rows]
    return _table(f"{escape(title(name, result))} of the last and the best checkpoint", families, rows)


def _cost(result: Contest) -> str:
    rows = "".join(
        f'<tr><th scope="row">{escape(row.family)}</th><td>{row.seconds / 60:.1f}</td><td>{row.parameters:,}</td>'
        f"<td>{row.evaluations}</td>{_plain(row.numbers.get('rate'))}</tr>"
        for row in result.rows
    )
    heads = ("minutes of training", "parameters", "evaluations of the network a sample", "samples a second")
    commands = "".join(
        f"<li><code>ancestral evaluate {escape(each.run)}</code>"
        + (f": failed, {escape(each.failed)}" if each.failed else "")
        + "</li>"
        for each in result.entrants
    )
    return (
        "<p>Means over seeds.</p>"
        + _table("Cost", heads, rows)
        + f"<p>The runs, and what measures each again:</p><ul>{commands}</ul>"
    )


def _definitions(result: Contest) -> str:
    shown = {name: says for name, says in result.definitions.items() if _with(result, name)}
    terms = "".join(f"<dt>{escape(title(name, result))}</dt><dd>{escape(says)}</dd>" for name, says in shown.items())
    return f"<dl>{terms}</dl>"


# Drawings.


def forest(result: Contest, names: Sequence[str]) -> "Figure":
    """One panel for each number: the mean of every family with its interval, its seeds, and real data beside them."""
    real = [label for label, standing in _real(result).items() if any(name in standing for name in names)]
    labels = [row.family for row in result.rows if any(name in row.numbers for name in names)] + real
    columns = min(2, len(names))
    figure, panels = _panels(columns, -(-len(names) // columns), 0.35 * len(labels) + 1.0)
    for axes, name in zip(panels, names, strict=False):
        for y, label in enumerate(labels):
            _row(axes, result, name, label, y)
        axes.set_yticks(range(len(labels)), [_shown(label) for label in labels])
        axes.set_ylim(len(labels) - 0.5, -0.5)
        axes.set_title(title(name, result), loc="left", fontsize=11, color=INK)
        axes.grid(axis="x", color=FAINT)
    for axes in panels[len(names) :]:
        axes.set_axis_off()
    return figure


def _row(axes: "Axes", result: Contest, name: str, label: str, y: float) -> None:
    if label in FOUND:
        found = _real(result)[label].get(name)
        seeds, colour = list[float](), FOUND[label]
    else:
        row = next(each for each in result.rows if each.family == label)
        found, colour = row.numbers.get(name), RED
        seeds = [each.numbers[name].value for each in result.entrants if each.family == label and name in each.numbers]
    if found is None:
        return
    axes.plot(seeds, [y + 0.22] * len(seeds), "|", color=GREY, markersize=6)
    axes.plot([found.low, found.high], [y, y], color=colour, linewidth=2)
    axes.plot([found.value], [y], "o", color=colour, markersize=6)


def _real(result: Contest) -> dict[str, Mapping[str, Interval]]:
    return {"held-out data": result.held_out, "training data": result.training}


def speed(result: Contest) -> "Figure":
    """Every run by how fast it is sampled and how near samples are."""
    figure, (axes, *_) = _panels(1, 1, 3.6)
    shown = [each for each in result.entrants if "rate" in each.numbers]
    for mark, row in zip(cycle("osD^vPX*"), result.rows, strict=False):
        runs = [each for each in shown if each.family == row.family]
        points = [(each.numbers["rate"].value, each.numbers["energy"].value) for each in runs]
        if points:
            axes.plot(*zip(*points, strict=True), mark, label=_shown(row.family), markersize=7, alpha=0.8)
    axes.set_xscale("log")
    axes.axhspan(result.held_out["energy"].low, result.held_out["energy"].high, color=FAINT, label="held-out data")
    axes.set_xlabel("samples a second")
    axes.set_ylabel(title("energy", result))
    axes.legend(frameon=False, bbox_to_anchor=(1, 1), loc="upper left")
    return figure


def training(result: Contest) -> "Figure":
    """Every run's distance at its checkpoints."""
    figure, panels = _panels(min(2, len(result.rows)), -(-len(result.rows) // 2), 2.4)
    for axes, row in zip(panels, result.rows, strict=False):
        for each in (one for one in result.entrants if one.family == row.family and one.looks):
            steps = [look.step / each.steps for look in each.looks]
            axes.plot(steps, [look.energy.value for look in each.looks], ".-", color=RED, alpha=0.6, linewidth=1)
        axes.axhline(0, color=MUTED, linewidth=0.8)
        axes.set_xlim(0, 1.02)
        axes.set_title(_shown(row.family), loc="left", fontsize=11, color=INK)
        axes.set_xlabel("share of the run")
        axes.set_ylabel("energy distance²")
    for axes in panels[len(result.rows) :]:
        axes.set_axis_off()
    return figure


def _shown(label: str) -> str:
    """A label that leaves room for what is drawn beside it: of a path, the end."""
    return label if len(label) <= LETTERS else f"…{label[1 - LETTERS :]}"


def _panels(columns: int, rows: int, height: float) -> "tuple[Figure, list[Axes]]":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5, height * rows), layout="constrained", facecolor="white")
    panels = [axes for row in figure.subplots(rows, columns, squeeze=False) for axes in row]
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=INK)
    return figure, panels


def _drawn(figure: "Figure", alt: str) -> str:
    """A drawing inside the page, in lines and not in pixels."""
    text = StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    coded = base64.b64encode(text.getvalue().encode()).decode()
    return _figure(f"data:image/svg+xml;base64,{coded}", alt)


def _figure(source: str, words: str) -> str:
    """A picture with its words, for whoever sees it and whoever does not."""
    said = escape(words)
    return f'<figure><img src="{source}" alt="{said}"><figcaption>{said}</figcaption></figure>'


def _png(picture: Image) -> str:
    data = BytesIO()
    picture.save(data, format="png")
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()


def _with(result: Contest, name: str) -> bool:
    return any(name in row.numbers for row in result.rows)


def _of_group(result: Contest, group: str) -> list[str]:
    groups = {name: metric.group for name, metric in METRICS.items()} | {"gap": "Memorisation"}
    return [name for name, of in groups.items() if of == group and _with(result, name)]


def _listed(words: Sequence[str]) -> str:
    """Words with commas, and an "and" before the last."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
