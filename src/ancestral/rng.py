"""Randomness as an argument.

Every stochastic function takes `rng`: either one `torch.Generator`, from which the whole batch is drawn,
or a list of them, one per example, so that example i depends on seed i and never on the batch it is in.
A stream is named by a key of integers: equal keys give equal numbers on every machine, different keys
give independent streams, so nothing has to be saved in order to resume.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ancestral.errors import OptionError

Rng = torch.Generator | Sequence[torch.Generator]


def stream(*key: int) -> torch.Generator:
    """One generator named by a key, such as (seed, step).

    Reference: O'Neill (2015), the entropy-pool hash behind `numpy.random.SeedSequence`.

    Example:
        >>> torch.equal(randn((3,), stream(0, 7)), randn((3,), stream(0, 7)))
        True
    """
    word = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(word) >> 1)


def streams(seeds: int | Sequence[int], n: int, *, start: int = 0) -> list[torch.Generator]:
    """One generator per example: keys (seed, start), (seed, start + 1), ... or the given seeds, one each.

    Args:
        seeds: one seed for all examples, or exactly `n` of them.
        n: number of examples.
        start: index of the first example, for drawing a long set in batches.

    Raises:
        OptionError: if `seeds` is a list of another length.
    """
    if isinstance(seeds, int):
        return [stream(seeds, start + i) for i in range(n)]
    if len(seeds) != n:
        raise OptionError(f"received {len(seeds)} seeds for {n} examples: give one seed, or one per example")
    return [stream(seed) for seed in seeds]


def randn(shape: Sequence[int], rng: Rng, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal numbers of the given shape, batch first, from one generator or one per example."""
    if isinstance(rng, torch.Generator):
        return torch.randn(tuple(shape), generator=rng, dtype=dtype)
    _one_each(shape, rng)
    return torch.stack([torch.randn(tuple(shape[1:]), generator=g, dtype=dtype) for g in rng])


def rand(shape: Sequence[int], rng: Rng, *, dtype: torch.dtype = torch.float64) -> Tensor:
    """Uniform numbers in [0, 1) of the given shape, batch first, from one generator or one per example."""
    if isinstance(rng, torch.Generator):
        return torch.rand(tuple(shape), generator=rng, dtype=dtype)
    _one_each(shape, rng)
    return torch.stack([torch.rand(tuple(shape[1:]), generator=g, dtype=dtype) for g in rng])


def _one_each(shape: Sequence[int], rng: Sequence[torch.Generator]) -> None:
    if len(rng) != shape[0]:
        raise OptionError(f"received {len(rng)} generators for a batch of {shape[0]}: give one, or one per example")
