"""Randomness as an argument.

Every stochastic function takes `rng`: either one generator, from which the whole batch is drawn, or one per example,
so that example i depends on seed i and never on the batch it is in. A generator is named by a key of integers: equal
keys give equal numbers, different keys give independent streams, so nothing has to be saved in order to resume.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ancestral.errors import OptionError

Rng = np.random.Generator | Sequence[np.random.Generator]
Seeds = int | Sequence[int] | Rng
"""What a public function takes: a seed, one seed per example, or generators."""


def stream(*key: int) -> np.random.Generator:
    """The generator named by a key, such as (seed, step): Philox under a 128-bit hash of the whole key.

    Reference: Salmon et al. (2011), parallel random numbers, as easy as 1, 2, 3.

    Example:
        >>> torch.equal(randn((3,), stream(0, 7)), randn((3,), stream(0, 7)))
        True
    """
    digest = hashlib.blake2b(repr(tuple(map(int, key))).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


def streams(seeds: Seeds, n: int, *, start: int = 0) -> Rng:
    """Generators for n examples: from one seed, the streams (seed, start), (seed, start + 1), ...; or those given.

    Args:
        seeds: one seed for all examples, one seed each, or generators, which are returned as they are.
        n: number of examples.
        start: index of the first example, for drawing a long set in batches.

    Raises:
        OptionError: if one each was given, for another number of examples.
    """
    if isinstance(seeds, np.random.Generator):
        return seeds
    if isinstance(seeds, int):
        return [stream(seeds, start + i) for i in range(n)]
    _one_each(n, seeds)
    return [seed if isinstance(seed, np.random.Generator) else stream(seed) for seed in seeds]


def randn(shape: Sequence[int], rng: Rng, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal numbers of the given shape, batch first, from one generator or one per example."""
    kind = np.float64 if dtype == torch.float64 else np.float32
    if isinstance(rng, np.random.Generator):
        return torch.from_numpy(rng.standard_normal(tuple(shape), dtype=kind)).to(dtype)
    _one_each(shape[0], rng)
    out = np.empty(tuple(shape), dtype=kind)
    for row, generator in zip(out.reshape(shape[0], -1), rng, strict=True):
        generator.standard_normal(out=row, dtype=kind)
    return torch.from_numpy(out).to(dtype)


def rand(shape: Sequence[int], rng: Rng, *, dtype: torch.dtype = torch.float64) -> Tensor:
    """Uniform numbers in [0, 1) of the given shape, batch first, from one generator or one per example."""
    if isinstance(rng, np.random.Generator):
        return torch.from_numpy(rng.random(tuple(shape))).to(dtype)
    _one_each(shape[0], rng)
    return torch.from_numpy(np.stack([generator.random(tuple(shape[1:])) for generator in rng])).to(dtype)


def _one_each(n: int, rng: object) -> None:
    if not isinstance(rng, Sequence):
        raise OptionError(f"received rng = {rng!r}: give a generator, as in rng.stream(0), or one per example")
    if len(rng) != n:
        raise OptionError(f"received {len(rng)} seeds for {n} examples: give one, or one per example")
