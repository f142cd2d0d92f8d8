"""Modes of ring-8 and grid-25 that a GAN reaches, seed by seed: the default, the classic game beside it, and real data.

    python benchmarks/gan_modes.py
    python benchmarks/gan_modes.py --data grid-25 --games relativistic --seeds 1 --gammas 0.0001 0.001 0.01 0.1 1

Trains every game on each data set from every seed, on one core, and measures the averaged generator on as many samples
as there are held-out examples. Two rows need no training: held-out data, and training examples in the samples' place.
Prints one row for each run and then the worst of all seeds, and writes the same as JSON.
"""

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch

from ancestral import toys
from ancestral.data import Data, load
from ancestral.errors import Diverged
from ancestral.gan.losses import GAMES
from ancestral.gan.model import GAN
from ancestral.measure.modes import modes
from ancestral.protocol import Batch
from ancestral.rng import Rows
from ancestral.training import recipes
from ancestral.training.loop import State, TrainingSection, steps

LOOKS = 4
"""How often a run is asked whether it has collapsed, evenly, the last time at its end."""


def trained(
    data: Data, seed: int, game: str, gamma: float | None, section: TrainingSection
) -> tuple[dict[str, Any], GAN]:
    """What one run cost and said, and its averaged generator."""
    torch.manual_seed(seed)
    model, began, total = GAN(data.facts, loss=game, gamma=gamma), time.process_time(), section.steps or 0
    row: dict[str, Any] = {"data": data.facts.name, "game": game, "gamma": model.gamma, "seed": seed, "said": []}
    state = State(model, section)
    batch = Batch(data.batch(range(256)), Rows((seed, 1), 256))
    try:
        for record in steps(state, data, total, seed=seed):
            if record.step % (total // LOOKS) == 0 and (why := model.check(batch)):
                row["said"].append(f"step {record.step}: {why}")
    except Diverged as error:
        row["said"].append(str(error))
    row["seconds"] = round(time.process_time() - began, 1)
    held_out = data.facts.scale.forward(data.held_out[:256])
    row["standing"] = dict(model.standing(Batch(batch.x, Rows((seed, 2), 256)), held_out))
    model.generator = state.averages["generator"][section.ema].module
    return row, model


def measured(data: Data, x: torch.Tensor) -> dict[str, Any]:
    """Modes that examples in the user's units reach."""
    law = toys.named(data.facts.name)
    assert isinstance(law, toys.Mixture)
    return modes(law, x).model_dump()


def line(row: dict[str, Any]) -> str:
    """One row for people."""
    name = row["game"] + (f", gamma {row['gamma']:g}" if row["gamma"] else "")
    kl = math.inf if row["reverse_kl"] is None else row["reverse_kl"]
    return (
        f"| {row['data']} | {name} | {row['seed']} | {row['hit']}/{row['of']} | {row['high_quality']:.3f} | "
        f"{kl:.3f} | {row['least']:.2f} | {row['seconds']:.0f} | {'; '.join(row['said'])} |"
    )


def worst(rows: list[dict[str, Any]]) -> str:
    """The least over the seeds of one game on one data set, and how many of them reached all modes but one in 25."""
    first, quality = rows[0], [row["high_quality"] for row in rows]
    kl = [math.inf if row["reverse_kl"] is None else row["reverse_kl"] for row in rows]
    enough = sum(row["hit"] >= row["of"] - (row["of"] >= 25) for row in rows)
    return (
        f"{first['data']}, {first['game']}, gamma {first['gamma']:g}: {enough} of {len(rows)} seeds reach the modes, "
        f"the worst {min(row['hit'] for row in rows)}/{first['of']}; high quality {min(quality):.3f} to "
        f"{max(quality):.3f}, reverse KL up to {max(kl):.3f}"
    )


def main() -> None:
    """What the first lines of this file say."""
    parser = argparse.ArgumentParser(description="Modes that a GAN reaches, seed by seed.")
    parser.add_argument("--data", nargs="*", default=["ring-8", "grid-25"])
    parser.add_argument("--games", nargs="*", default=list(GAMES))
    parser.add_argument("--gammas", nargs="*", type=float, default=[None], help="by default the rule")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=None, help="by default the recipe's")
    parser.add_argument("--to", type=Path, default=Path("runs/gan-modes.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows, last = [], []
    print("| data | game | seed | modes | high quality | reverse KL | least mode | CPU s | said |\n" + "|---" * 9 + "|")
    options.to.parent.mkdir(parents=True, exist_ok=True)
    for name in options.data:
        data = load(name)
        section = recipes.gan(data.facts).training
        section = section.model_copy(update={"steps": options.steps}) if options.steps else section
        for real, x in (("held-out data", data.held_out), ("training examples", data.train[: len(data.held_out)])):
            still = {"data": name, "game": real, "gamma": 0, "seed": "-", "said": [], "seconds": 0}
            print(line(still | measured(data, x)), flush=True)
        for game in options.games:
            for gamma in options.gammas:
                runs = []
                for seed in range(options.seeds):
                    row, model = trained(data, seed, game, gamma, section)
                    runs.append(row | measured(data, model.sample(len(data.held_out), rng=seed)))
                    print(line(runs[-1]), flush=True)
                    options.to.write_text(json.dumps(rows + runs, indent=2) + "\n")
                rows += runs
                last.append(worst(runs))
    print("", *last, sep="\n")


if __name__ == "__main__":
    main()
