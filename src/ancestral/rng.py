"""Randomness as an argument.

Every stochastic function takes `rng`: one generator, from which the whole batch is drawn; one per example, so that
example i depends on seed i and never on the batch it is in; or `Rows`, a share of a batch that several processes
divide among them. A generator is named by a key of integers: equal keys give equal numbers, different keys give
independent streams, so nothing has to be saved in order to resume.
"""

import hashlib
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from ancestral.errors import OptionError

GROUP = 16
"""Rows of a training batch that share a generator."""


class Rows:
    """The randomness of rows start .. stop - 1 of a batch of `of`: the same numbers however the batch is divided.

    Groups of `GROUP` consecutive rows have a generator each, named by the key and the group, so drawing a share costs
    what the share costs.

    Args:
        key: names the batch, such as (seed, step).
        of: rows in the whole batch.
        start: first row of the share.
        stop: row after the last of the share; by default all.

    Example:
        >>> whole, half = Rows((0, 7), 64), Rows((0, 7), 64, start=32)
        >>> torch.equal(randn((64, 3), whole)[32:], randn((32, 3), half))
        True
    """

    def __init__(self, key: Sequence[int], of: int, start: int = 0, stop: int | None = None) -> None:
        self.of, self.start, self.stop = of, start, of if stop is None else stop
        self.common = stream(*key)
        self._groups = [stream(*key, group) for group in range(start // GROUP, -(-self.stop // GROUP))]

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def index(self) -> Tensor:
        """Which rows of the batch these are, int64, shape (stop - start,)."""
        return torch.arange(self.start, self.stop)

    def draw(self, n: int, each: Callable[[np.random.Generator], Tensor]) -> Tensor:
        """The share of what `each` draws for every group, which has `GROUP` rows.

        Raises:
            OptionError: if n is not the number of rows.
        """
        if n != len(self):
            raise OptionError(f"received the randomness of {len(self)} rows for {n} examples: give as many of each")
        first = self.start % GROUP
        return torch.cat([each(generator) for generator in self._groups])[first : first + n]


Rng = np.random.Generator | Sequence[np.random.Generator] | Rows
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
    if isinstance(seeds, np.random.Generator | Rows):
        return seeds
    if isinstance(seeds, int):
        return [stream(seeds, start + i) for i in range(n)]
    _one_each(n, seeds)
    return [seed if isinstance(seed, np.random.Generator) else stream(seed) for seed in seeds]


def randn(shape: Sequence[int], rng: Rng, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal numbers of the given shape, batch first, from one generator, one per example, or `Rows`."""
    kind = np.float64 if dtype == torch.float64 else np.float32
    if isinstance(rng, Rows):
        return rng.draw(shape[0], lambda generator: randn((GROUP, *shape[1:]), generator, dtype=dtype))
    if isinstance(rng, np.random.Generator):
        return torch.from_numpy(rng.standard_normal(tuple(shape), dtype=kind)).to(dtype)
    _one_each(shape[0], rng)
    out = np.empty(tuple(shape), dtype=kind)
    for row, generator in zip(out.reshape(shape[0], -1), rng, strict=True):
        generator.standard_normal(out=row, dtype=kind)
    return torch.from_numpy(out).to(dtype)


def randn_like(x: Tensor, rng: Rng) -> Tensor:
    """Standard normal numbers of the shape, dtype and device of x."""
    return randn(x.shape, rng, dtype=x.dtype).to(x.device)


def rand(shape: Sequence[int], rng: Rng, *, dtype: torch.dtype = torch.float64) -> Tensor:
    """Uniform numbers in [0, 1) of the given shape, batch first, from one generator, one per example, or `Rows`."""
    if isinstance(rng, Rows):
        return rng.draw(shape[0], lambda generator: rand((GROUP, *shape[1:]), generator, dtype=dtype))
    if isinstance(rng, np.random.Generator):
        return torch.from_numpy(rng.random(tuple(shape))).to(dtype)
    _one_each(shape[0], rng)
    return torch.from_numpy(np.stack([generator.random(tuple(shape[1:])) for generator in rng])).to(dtype)


def _one_each(n: int, rng: object) -> None:
    if not isinstance(rng, Sequence):
        raise OptionError(f"received rng = {rng!r}: give a generator, as in rng.stream(0), or one per example")
    if len(rng) != n:
        raise OptionError(f"received {len(rng)} seeds for {n} examples: give one, or one per example")
