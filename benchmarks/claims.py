"""What is said of the four families, measured on trained models by the functions of `ancestral.measure.claims`.

    python benchmarks/claims.py spread      # energy distance over seeds, and its restlessness along training, on digits
    python benchmarks/claims.py stacked     # of 1,000 triples of digits, how many samples show
    python benchmarks/claims.py chain       # ELBO <= IW-k <= AIS of a VAE on digits
    python benchmarks/claims.py lines       # walks along straight lines between latents, on digits
    python benchmarks/claims.py integral    # of the density of a flow over the plane
    python benchmarks/claims.py tightness   # bound, ODE and entropy of diffusion on grid-25

Every model is trained by its default recipe on one thread, for fewer steps where `--steps` says so; a run that is there
is read. Prints one line of JSON for each row.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import ancestral as ac
from ancestral import toys
from ancestral.data import Data, load
from ancestral.errors import Diverged
from ancestral.measure import claims
from ancestral.measure.metrics.distances import energy
from ancestral.rng import stream
from ancestral.training import loop, recipes

RECIPES = {"diffusion": None, "vae": "vae", "flow": "flow", "gan": "gan", "classic-gan": "classic-gan"}
LOOKS = 16
"""How often the distance is measured along a run."""

TRIPLES = 20_000
"""Stacked images to learn from; a tenth as many are held out."""

SHOWN = 10_000
"""Samples of stacked images that are told apart."""

Rows = Iterator[dict[str, Any]]


def distance(x: Tensor, y: Tensor, data: Data) -> float:
    """The squared energy distance of two sets in the units of the data."""
    x, y = (data.facts.scale.forward(each, dtype=torch.float64).flatten(1) for each in (x, y))
    return energy(x, y).value


def drawn(model: Any, data: Data) -> Tensor:
    """As many samples as there are held-out examples, from one seed."""
    samples: Tensor = model.sample(len(data.held_out), rng=0)
    return samples


def watched(data: Data, recipe: str | None, seed: int, steps: int | None) -> tuple[list[float], float] | None:
    """Distances of the weights as they are along a run, and of their average at its end; None if it diverged."""
    setup = recipes.choose(data.facts, recipe)
    model = recipes.build(setup, data.facts, seed)
    state, total = loop.State(model, setup.training), steps or setup.training.steps or 1000
    looks: list[float] = []
    try:
        looks.extend(
            distance(drawn(model, data), data.held_out, data)
            for record in loop.steps(state, data, total, seed=seed)
            if record.step % (total // LOOKS) == 0
        )
    except Diverged:
        return None
    for name, player in state.players.items():
        player.module.load_state_dict(state.averages[name][setup.training.ema].module.state_dict())
    return looks, distance(drawn(model, data), data.held_out, data)


def spread(arguments: argparse.Namespace) -> Rows:
    """Every family from every seed, beside halves of the held-out data, and training data, in the samples' place."""
    data = load("digits")
    half = len(data.held_out) // 2
    real = distance(data.held_out[:half], data.held_out[half:], data)
    copied = distance(data.train[: len(data.held_out)], data.held_out, data)
    yield from (
        {"family": name, "ends": [end]} for name, end in {"held-out data": real, "training data": copied}.items()
    )
    for family in arguments.families:
        began, ends, restless = time.process_time(), [], []
        for seed in range(arguments.seeds):
            found = watched(data, RECIPES[family], seed, arguments.steps)
            ends.append(found and found[1])
            if found:
                restless.append(claims.oscillation(found[0]))
        row = {"family": family, "ends": ends, **asdict(claims.spread(ends)), "oscillation": restless}
        yield row | {"CPU s": time.process_time() - began}


def stacked(arguments: argparse.Namespace) -> Rows:
    """Every family on digits stacked by three, beside real triples in the samples' place."""
    single, where = load("digits"), arguments.to / "stacked.npz"
    parts = [triples(single.train, TRIPLES, 1), triples(single.held_out, TRIPLES // 10, 2)]
    if not where.exists():
        np.savez(where, train=parts[0].to(torch.int32).numpy(), test=parts[1].to(torch.int32).numpy())
    yield {"family": "held-out data", **asdict(claims.stacked(triples(single.held_out, SHOWN, 3), single))}
    yield {"family": "training data", **asdict(claims.stacked(parts[0][:SHOWN], single))}
    for family in arguments.families:
        began = time.process_time()
        model = trained(str(where), family, arguments)
        row = {"family": family, "CPU s": time.process_time() - began}
        shown = torch.cat([model.sample(1000, rng=0, start=start) for start in range(0, SHOWN, 1000)])
        yield row | asdict(claims.stacked(shown, single))


def triples(x: Tensor, n: int, key: int) -> Tensor:
    """Images of three channels, each one image drawn anew."""
    rows = torch.from_numpy(stream(0, key).integers(0, len(x), (n, 3)))
    return x[rows, 0]


def chain(arguments: argparse.Namespace) -> Rows:
    """The surrogate of the VAE on 16 held-out digits, in bits per dimension."""
    data, model = load("digits"), trained("digits", "vae", arguments)
    found = claims.gap_chain(model, data.held_out[:16], draws=(10, 100, 1000, 5000))
    bits = data.facts.bits_per_dim
    yield {name: [-bits(mean), bits(stderr)] for name, (mean, stderr) in found.items()}


def lines(arguments: argparse.Namespace) -> Rows:
    """Walks between 64 pairs of held-out digits."""
    data = load("digits")
    for family in ("diffusion", "vae", "flow"):
        walk = claims.line(trained("digits", family, arguments), data.held_out[:64], data.held_out[64:128])
        yield {"family": family, **asdict(walk)}


def integral(arguments: argparse.Namespace) -> Rows:
    """The density of the flow over a square that holds all of the law."""
    for name in ("two-moons", "ring-8", "grid-25", "checkerboard"):
        model, x = trained(name, "flow", arguments), load(name).train
        low, high = x.amin(0), x.amax(0)
        yield {"law": name, "integral": claims.integral(model, low - (high - low), high + (high - low), points=1500)}


def tightness(arguments: argparse.Namespace) -> Rows:
    """Of diffusion on a law whose entropy is known, over 2,000 fresh points."""
    law, model = toys.named("grid-25"), trained("grid-25", "diffusion", arguments)
    x = law.sample(2000, rng=stream(0, 99))
    entropy = -float(law.log_prob(x).mean())
    yield {"law": "grid-25", "entropy": entropy, **claims.tightness(model, x.float(), entropy=entropy)}


def trained(source: str, family: str, arguments: argparse.Namespace) -> Any:
    """The model of a run, which is made if it is not there."""
    to = arguments.to / f"{Path(source).stem}-{family}"
    return ac.load(ac.train(source, to=to, recipe=RECIPES[family], steps=arguments.steps, seed=0).path)


CLAIMS: dict[str, Callable[[argparse.Namespace], Rows]] = {
    each.__name__: each for each in (spread, stacked, chain, lines, integral, tightness)
}


def main() -> None:
    """What the first lines of this file say."""
    parser = argparse.ArgumentParser(description="What is said of the four families, measured.")
    parser.add_argument("claim", choices=list(CLAIMS))
    parser.add_argument("--families", nargs="+", default=list(RECIPES), choices=list(RECIPES))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=None, help="by default the recipe's")
    parser.add_argument("--to", type=Path, default=Path("runs/claims"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.to.mkdir(parents=True, exist_ok=True)
    for row in CLAIMS[arguments.claim](arguments):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
