"""Tables in Markdown of what `solvers.py` measured."""

import math
from typing import Any

Row = dict[str, Any]

ROUNDING = 1e-5
"""Differences below this are those of float32, in which some schedulers hold x."""

REASONS = {
    "dpmpp-3m": "theirs gives the quadratic term half its weight",
    "ddim": "theirs steps to t - 1000 // n whatever the next time is",
    "pndm": "theirs steps to t - 1000 // n whatever the next time is",
    "deis-3": "theirs takes coefficients from differences of float32 antiderivatives",
    "heun": "ours weighs the second guess exactly, and takes long steps with x_0_hat",
    "dpm-2": "ours takes steps of h > 1 with x_0_hat",
    "lms": "ours leaves out guesses that would multiply errors, and ends with the last one",
    "dpmpp-2m": "ours leaves out guesses that would multiply errors; theirs lowers the order below 15 steps",
    "unipc-2": "ours leaves out guesses that would multiply errors; theirs lowers the order below 15 steps",
    "unipc-3": "ours leaves out guesses that would multiply errors; theirs lowers the order below 15 steps",
    "deis-2": "ours leaves out guesses that would multiply errors; theirs lowers the order below 15 steps",
    "dpmpp-2s": "theirs takes the inner time from its grid, ours halfway in log-SNR",
    "ancestral": "theirs steps to t - 1000 // n whatever the next time is",
    "sde-dpmpp-3m": "theirs lets the weight of the quadratic term tend to -1 instead of 0",
    "unipc-2-bh1": "theirs divides by an infinite B(h) in the step to no noise",
    "unipc-3-bh1": "theirs divides by an infinite B(h) in the step to no noise",
}
"""Why solvers of one name differ on one grid: faults of the peers, and choices of ours."""


def number(value: float) -> str:
    """Three digits."""
    return "nan" if math.isnan(value) else f"{value:.3g}"


def table(head: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def ratio(row: Row, measure: str) -> float:
    """Their error over ours on the same grid; what is below rounding counts as that."""
    if "refused" in row["sigma"] or "refused" in row["ours"]:
        return math.nan
    peer, own = row["sigma"][measure], row["ours"][measure]
    return math.nan if math.isnan(peer) else max(peer, ROUNDING) / max(own, ROUNDING)


def verdict(name: str, ratios: list[float], failed: bool) -> str:
    """What the ratios of all budgets say."""
    if failed or max(ratios) > 1.01:
        better = f"ours better: {REASONS.get(name, 'WHY?')}"
        return better if failed or min(ratios) > 0.99 else f"{better}; OURS WORSE at some budgets"
    return "equal within 1%" if min(ratios) > 0.99 else "OURS WORSE"


def same_name(rows: list[Row], measure: str) -> str:
    """Their error over ours, one line for each solver and grid."""
    paired = [row for row in rows if "ours" in row and "rms" in row["ours"]]
    budgets = sorted({row["budget"] for row in paired})
    lines = []
    for key in dict.fromkeys((row["library"], row["solver"], row["grid"]) for row in paired):
        group = [row for row in paired if (row["library"], row["solver"], row["grid"]) == key]
        ratios = [ratio(row, measure) for row in group]
        finite = [value for value in ratios if math.isfinite(value)]
        lines.append([*key, *map(number, ratios), verdict(key[1], finite or [1.0], len(finite) < len(ratios))])
    return table(["library", "solver", "grid", *map(str, budgets), "verdict"], lines)


def _said(row: Row, told: str = "sigma") -> str:
    found = row[told]
    return f"{number(found['rms'])} / {number(found['median'])} / {100 * found['elsewhere']:.1f}%"


def _side(row: Row) -> str:
    """Whose row it is: theirs, ours on a fixed grid, or ours fitted to the model."""
    return "theirs" if row["library"] != "ours" else "fitted" if row["solver"] == "fitted" else "fixed"


def _named(row: Row) -> str:
    return f"{row['solver']}, {row['grid']}" + ("" if row["library"] == "ours" else f" ({row['library']})")


def best(rows: list[Row], measure: str) -> str:
    """For each budget, the best of theirs by either way of telling the network the time, beside ours."""
    lines = []
    for budget in sorted({row["budget"] for row in rows}):
        line = [str(budget)]
        for side, told in (("theirs", "timestep"), ("theirs", "sigma"), ("fixed", "sigma"), ("fitted", "sigma")):
            known = [
                row
                for row in rows
                if row["budget"] == budget
                and _side(row) == side
                and math.isfinite(row.get(told, {}).get(measure, math.nan))
            ]
            row = min(known, key=lambda row: row[told][measure], default=None)
            line += [_named(row), _said(row, told)] if row else ["", ""]
        lines.append(line)
    theirs = ["their best, told the timestep", "", "their best, told the sigma", ""]
    return table(["evaluations", *theirs, "our best on a fixed grid", "", "our default, fitted", ""], lines)


def level(row: Row) -> str:
    """Which of the two is nearer to the law, where that is more than 3 standard errors."""
    peer, own = row["sigma"], row["ours"]
    if math.isnan(peer.get("energy", math.nan)):
        return "better"
    gap = (peer["energy"] - own["energy"]) / math.hypot(peer["stderr"], own["stderr"])
    return "level" if abs(gap) < 3 else "better" if gap > 0 else "WORSE"


def noisy(rows: list[Row], floor: dict[str, float]) -> str:
    """Energy distance to exact draws of every solver that draws noise, theirs / ours on the same grid."""
    drawn = [row for row in rows if "energy" in row["sigma"] or row["solver"].startswith("sde")]
    budgets = sorted({row["budget"] for row in drawn})
    lines = []
    for key in dict.fromkeys((row["library"], row["solver"], row["grid"]) for row in drawn):
        group = {row["budget"]: row for row in drawn if (row["library"], row["solver"], row["grid"]) == key}
        cells, verdicts = [], dict.fromkeys(level(row) for row in group.values() if "ours" in row)
        for budget in budgets:
            sides = [group[budget][side] for side in ("sigma", "ours") if side in group.get(budget, {})]
            cells.append(" / ".join(number(side.get("energy", math.nan)) for side in sides))
        lines.append([*key, *cells, ", ".join(f"ours {said}" if said != "level" else said for said in verdicts)])
    exact = f"Exact draws: {floor['mean']:.2g}, one in twenty above {floor['exceeded_by_one_in_20']:.2g}.\n\n"
    return exact + table(["library", "solver", "grid", *map(str, budgets), "beyond 3 s.e."], lines)


def finals(found: list[Row]) -> str:
    """The best of theirs and our default on fresh starts: RMS / median / astray, and the gap of the mean squares."""
    lines = []
    for row in found:
        sides = [
            f"{number(s['rms'])} / {number(s['median'])} / {100 * s['elsewhere']:.2f}%"
            for s in (row["theirs"], row["ours"])
        ]
        gap = row["gap"] / row["stderr"] if row["stderr"] else 0.0
        who = f"{row['theirs']['solver']}, {row['theirs']['grid']} ({row['theirs']['library']})"
        lines.append([str(row["budget"]), who, sides[0], row["ours"]["sampler"], sides[1], f"{gap:+.1f}"])
    return table(["evaluations", "best of theirs", "", "our default", "", "theirs - ours, standard errors"], lines)


def orders(found: list[Row]) -> str:
    """Declared and measured order of the peers' solvers; the slope of each doubling before the last."""
    lines = []
    for row in found:
        slopes = ", ".join(f"{slope:.2f}" for slope in row["slopes"])
        lines.append([row["library"], row["solver"], str(row["declared"]), f"{row['measured']:.2f}", slopes])
    return table(["library", "solver", "declared", "measured", "slope at each doubling of 40 steps"], lines)


def curves(found: list[Row]) -> str:
    """Errors against steps, each a line."""
    lines = []
    for row in found:
        errors = ", ".join(f"{n}: {number(error)}" for n, error in zip(row["steps"], row["errors"], strict=True))
        given = ", ".join(f"{key} {value}" for key, value in row["options"].items())
        lines.append([row["what"], row["library"], row["solver"], row["grid"], given, f"{row['is']} at {errors}"])
    return table(["looked at", "library", "solver", "grid", "with", "error by steps"], lines)


def overhead(found: dict[str, Any]) -> str:
    """Microseconds beside the network for each evaluation of it."""
    lines = []
    for row in found["rows"]:
        verdict = "yes" if row["ratio"] >= found["wanted"] else "NO"
        spread = f"{row['ratio']:.2f} ({row['least']:.2f} to {row['greatest']:.2f})"
        times = [f"{row[f'{side}_microseconds']:.0f}" for side in ("ours", "diffusers")]
        times.append(f"{row['bare_microseconds']:.1f}" if "bare_microseconds" in row else "")
        lines.append(["x".join(map(str, row["shape"])), row["solver"], *times, spread, verdict])
    head = [
        "shape",
        "solver",
        "ours, us",
        "diffusers, us",
        "bare operations, us",
        "ratio",
        f"at least {found['wanted']:g}",
    ]
    return table(head, lines)


def looks(found: dict[str, Any]) -> str:
    """What was reached on a trained network: the best pairs by RMS to its exact walk, then the Fréchet distances."""
    lines = []
    for budget in sorted({row["budget"] for row in found["distances"]}):
        line = [str(budget)]
        for of_ours in (True, False):
            known = [r for r in found["distances"] if r["budget"] == budget and (r["library"] == "ours") == of_ours]
            row = min((r for r in known if math.isfinite(r["rms"])), key=lambda r: r["rms"])
            line += [_named(row), f"{number(row['rms'])} / {number(row['median'])}"]
        lines.append(line)
    near = table(["evaluations", "our best", "RMS / median", "their best", "RMS / median"], lines)
    rows = [
        [str(r["budget"]), _named(r), f"{r['frechet']:.2f} ± {r['plus_minus']:.2f}"]
        for r in sorted(found["looks"], key=lambda r: r["budget"])
    ]
    real = found["held_out"]
    rows.append(["", "held-out images", f"{real['frechet']:.2f} ± {real['plus_minus']:.2f}"])
    return near + "\n" + table(["evaluations", "solver, grid", "Fréchet distance"], rows)


def render(report: dict[str, Any]) -> str:
    """Everything that the report has."""
    parts = []
    for name, found in report.get("oracles", {}).items():
        parts += [
            f"## {name}: {found['starts']} starts\n",
            "RMS / median start / share of starts in another basin; best by RMS, then by the median.\n",
            best(found["rows"], "rms"),
            best(found["rows"], "median"),
            "Their RMS over ours on the same grid, by evaluations; then their median over ours.\n",
            same_name(found["rows"], "rms"),
            same_name(found["rows"], "median"),
            f"Energy distance of {found['draws']} draws, theirs / ours.",
            noisy(found["rows"], found["floor"]),
        ]
    for name, found in report.get("finals", {}).items():
        parts += [f"## {name}: {found[0]['starts']} fresh starts\n", finals(found)]
    if "faults" in report:
        refused = report["faults"]["edm sde-dpmpp-3m"]
        parts += ["## Orders\n", orders(report["faults"]["orders"])]
        parts += ["## Curves\n", curves(report["faults"]["curves"])]
        parts += [f"EDMDPMSolverMultistepScheduler, sde-dpmsolver++, order 3: {refused}\n"]
    if "overhead" in report:
        parts += ["## Time beside the network\n", overhead(report["overhead"])]
    if "images" in report:
        found = report["images"]
        parts += [f"## Images: {found['run']}, {found['images']} from each\n", looks(found)]
    return "\n".join(parts)
