"""How samples stand to data: a distance that needs no likelihood, and whether they copy what was learnt from.

Each number stands beside that of held-out examples in the samples' place, which is what good looks like, and of
training examples in their place, which is what copying looks like.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ancestral.data import Data
from ancestral.errors import DataError
from ancestral.measure.metrics.copying import copied
from ancestral.measure.metrics.distances import BLOCKS, energy
from ancestral.measure.record import Samples, Stand
from ancestral.rng import stream

SAMPLES = 1000
"""Samples that are compared, at most."""


def compare(sample: Callable[[int], Tensor], data: Data, *, n: int = SAMPLES, seed: int = 0) -> Samples:
    """Samples of a model, held-out examples and training examples, each against other held-out examples.

    All sets are of the same size, so that none is nearer for being larger: half of the held-out examples at most.

    Args:
        sample: draws so many examples in the user's units.
        data: whose held-out split is divided in two: what is compared with, and what stands in the samples' place.
        n: examples in each set, at most.
        seed: of the choice of examples.

    Raises:
        DataError: if there are too few examples.
    """
    n = min(n, len(data.held_out) // 2, len(data.train))
    if n < BLOCKS:
        raise DataError(
            f"{data.facts.name}: comparing samples takes {2 * BLOCKS} held-out examples and {BLOCKS} to learn from, "
            f"and there are {len(data.held_out)} and {len(data.train)}"
        )
    order = torch.from_numpy(stream(seed, 1).permutation(len(data.held_out)))
    learnt = torch.from_numpy(stream(seed, 2).permutation(len(data.train)))[:n]
    sets = {
        "model": sample(n),
        "held_out": data.held_out[order[n : 2 * n]],
        "training": data.train[learnt],
    }
    points = {name: data.facts.scale.forward(x, dtype=torch.float64).flatten(1) for name, x in sets.items()}
    reference = data.facts.scale.forward(data.held_out[order[:n]], dtype=torch.float64).flatten(1)
    return Samples(
        n=n,
        **{
            name: Stand(energy=energy(x, reference), copied=copied(x, points["training"], reference))
            for name, x in points.items()
        },
    )
