"""The four families on laws that are known, and on images: what each reaches with its defaults, in one table.

    python benchmarks/families.py toys                    # modes, and nats above the entropy, on four laws of the plane
    python benchmarks/families.py DATA --minutes 20       # bits/dim and samples of every family on the same images

Every model is trained by its default recipe, on so many threads, from one seed. The rows "held-out data" and "training
data" stand in the samples' place. Prints Markdown, and writes the same as JSON.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import ancestral as ac
from ancestral import toys
from ancestral.data import draw, load
from ancestral.diffusion.likelihood import mean_and_stderr
from ancestral.diffusion.model import Diffusion
from ancestral.errors import Diverged
from ancestral.gan.model import GAN
from ancestral.measure.modes import apart, expected_quality, modes
from ancestral.measure.quality import Bench, Standing
from ancestral.rng import stream

LAWS = ("two-moons", "ring-8", "grid-25", "checkerboard")
RECIPES = {"diffusion": None, "vae": "vae", "flow": "flow", "gan": "gan", "classic-gan": "classic-gan"}
FRESH, FOLLOWED, DRAWN = 20_000, 2_000, 10_000
"""Fresh points of a known law, of which the first are followed along an ODE; and samples whose modes are counted."""


def trained(source: str, recipe: str | None, where: Path, arguments: argparse.Namespace) -> tuple[Any, float] | str:
    """The model of a run and the seconds of processor time it took, or why there is none."""
    began = time.process_time()
    try:
        run = ac.train(source, to=where, recipe=recipe, seed=arguments.seed, **budget(arguments))
    except Diverged as error:
        return str(error)
    return ac.load(run.path), time.process_time() - began


def budget(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the command line says of how long."""
    wishes = {"minutes": arguments.minutes, "steps": arguments.steps}
    return {name: value for name, value in wishes.items() if value is not None}


def known(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Every family on every law."""
    for name in arguments.laws:
        law, data = toys.named(name), load(name)
        fresh = law.sample(FRESH, rng=stream(arguments.seed, 99))
        separate = isinstance(law, toys.Mixture) and apart(law)
        if separate:
            for row, x in {"held-out data": fresh[:DRAWN], "training data": data.train[:DRAWN].double()}.items():
                yield {"law": name, "family": row, **reached(law, x)}
        for family in arguments.families:
            found = trained(name, RECIPES[family], arguments.to / f"{name}-{family}", arguments)
            row = {"law": name, "family": family}
            if isinstance(found, str):
                yield row | {"failed": found}
                continue
            model, seconds = found
            row["CPU s"] = round(seconds, 1)
            if separate:
                row |= reached(law, model.sample(DRAWN, rng=arguments.seed).double())
            yield row | excess(model, fresh, law)


def reached(law: toys.Mixture, x: torch.Tensor) -> dict[str, Any]:
    """Modes that samples reach."""
    found = modes(law, x)
    return {"hit": found.hit, "of": found.of, "high quality": found.high_quality, "reverse KL": found.reverse_kl}


def excess(model: Any, fresh: torch.Tensor, law: toys.Toy) -> dict[str, Any]:
    """Nats above what the law itself gives the same points, paired, with the standard error."""
    if isinstance(model, GAN):
        return {}
    x, found = fresh.float(), {}
    if isinstance(model, Diffusion):
        few = x[:FOLLOWED]
        found["ODE"] = model.flow(few).nats
        found["bound"] = model.bound(few, draws=20).nats
    else:
        options = {"draws": 1000} if hasattr(model, "bound") else {}
        points = x[:FOLLOWED] if options else x
        found["IW-1000" if options else "exact"] = -torch.cat(
            [model.log_prob(part, **options).nats for part in torch.split(points, 500)]
        )
    told = {}
    for name, nats in found.items():
        own = -law.log_prob(fresh[: len(nats)])
        value, stderr = mean_and_stderr(nats.cpu().double() - own)
        told[name] = [float(value), float(stderr)]
    return {"excess": told}


def pictured(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Every family on the same images."""
    data = load(arguments.source)
    bench = Bench(data, n=500)
    for family in arguments.families:
        where = arguments.to / f"{data.facts.name}-{family}"
        found = trained(arguments.source, RECIPES[family], where, arguments)
        if isinstance(found, str):
            yield {"family": family, "failed": found}
            continue
        model, seconds = found
        row: dict[str, Any] = {"family": family, "CPU s": round(seconds, 1)}
        if not isinstance(model, GAN):
            measured = ac.evaluate(model, data, n=arguments.n)
            row |= {"kind": measured.kind, "likelihood": [measured.likelihood().value, measured.likelihood().stderr]}
        drawn = model.sample(256, rng=0)
        draw.save_png(draw.grid(data.facts, drawn[:64]), where / "table.png", {"family": family, "seed": 0})
        yield row | {"samples": told(bench.of(model.sample(bench.n, rng=0)))}
    for name, standing in {"held-out data": bench.held_out, "training data": bench.training}.items():
        yield {"family": name, "samples": told(standing)}


def told(standing: Standing) -> dict[str, list[float]]:
    """Numbers about samples, with their standard errors."""
    return {name: [found.value, found.stderr] for name, found in standing.items()}


def cell(value: Any) -> str:
    """A cell of a table."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {cell(each)}" for name, each in value.items())
    if isinstance(value, list):
        return f"{value[0]:.4f} ± {value[1]:.4f}"
    if isinstance(value, float):
        return "-" if math.isinf(value) else f"{value:.4g}"
    return "" if value is None else str(value)


def main() -> None:
    """Train, measure, print a line for each as it ends, and write all as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="'toys', or images")
    parser.add_argument("--laws", nargs="+", default=LAWS)
    parser.add_argument("--families", nargs="+", default=list(RECIPES))
    parser.add_argument("--minutes", type=float, default=None, help="of training; by default the recipe's")
    parser.add_argument("--steps", type=int, default=None, help="in place of minutes")
    parser.add_argument("--n", type=int, default=2000, help="held-out images whose likelihood is measured")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--to", type=Path, default=Path("runs/families"))
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    rows = []
    for row in known(arguments) if arguments.source == "toys" else pictured(arguments):
        rows.append(row)
        print("| " + " | ".join(cell(value) for value in row.values()) + " |", flush=True)
    print(f"high-quality share of exact draws in the plane: {expected_quality(2):.4f}")
    arguments.to.mkdir(parents=True, exist_ok=True)
    (arguments.to / f"{Path(arguments.source).name}.json").write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
