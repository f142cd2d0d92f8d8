"""The weight of a GAN's penalties on images, swept about its rule at more than one batch.

    python benchmarks/gamma.py
    python benchmarks/gamma.py --data DATA --factors 0.3 1 3 --batches 64 --seeds 1

Trains the default on one core for every factor, batch and seed, and measures the averaged generator on as many samples
as half of the held-out examples, against the other half. Two rows need no training: held-out data, and training
examples in the samples' place. Prints one row for each run, and writes the same as JSON.
"""

import argparse
import json
from itertools import product
from pathlib import Path
from typing import Any

import torch
from gan_modes import trained

from ancestral.data import load
from ancestral.gan.model import GAMMA_IMAGES
from ancestral.measure.quality import Bench, Standing
from ancestral.training import recipes

SHOWN = ("energy", "precision", "recall", "coverage")
"""Numbers about samples."""


def line(row: dict[str, Any]) -> str:
    """One row for people."""
    cells = [row["of"], row.get("gamma", ""), row.get("batch", ""), row.get("seed", "")]
    cells += [f"{value:.3f} ({low:.3f} to {high:.3f})" for value, low, high in (row[name] for name in SHOWN)]
    return "| " + " | ".join(map(str, [*cells, row.get("seconds", ""), "; ".join(row.get("said", []))])) + " |"


def numbers(standing: Standing) -> dict[str, Any]:
    """Each with its interval."""
    return {name: (standing[name].value, standing[name].low, standing[name].high) for name in SHOWN}


def main() -> None:
    """What the first lines of this file say."""
    parser = argparse.ArgumentParser(description="The weight of a GAN's penalties on images.")
    parser.add_argument("--data", default="digits")
    parser.add_argument("--factors", nargs="*", type=float, default=[0.03, 0.1, 0.3, 1, 3, 10, 30], help="of the rule")
    parser.add_argument("--batches", nargs="*", type=int, default=[64, 16])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=None, help="by default the recipe's")
    parser.add_argument("--to", type=Path, default=Path("runs/gamma.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    data = load(options.data)
    bench, section, rows = Bench(data, n=1000), recipes.gan(data.facts).training, list[dict[str, Any]]()
    options.to.parent.mkdir(parents=True, exist_ok=True)

    def tell(row: dict[str, Any]) -> None:
        print(line(row), flush=True)
        rows.append(row)
        options.to.write_text(json.dumps(rows, indent=2) + "\n")

    head = ["samples of", "gamma", "batch", "seed", *SHOWN, "CPU s", "said"]
    print("| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|")
    tell({"of": "held-out data"} | numbers(bench.held_out))
    tell({"of": "training data"} | numbers(bench.training))
    for batch, factor, seed in product(options.batches, options.factors, range(options.seeds)):
        own = section.model_copy(update={"batch": batch} | ({"steps": options.steps} if options.steps else {}))
        row, model = trained(data, seed, "relativistic", factor * GAMMA_IMAGES * data.facts.dims, own)
        tell(row | {"of": f"{factor:g} x the rule", "batch": batch} | numbers(bench.of(model.sample(bench.n, rng=0))))


if __name__ == "__main__":
    main()
