"""What a family of generative models is, as types: a capability that is absent is a method that is absent."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from torch import Tensor, nn

from ancestral.rng import Rows, Seeds


@dataclass(frozen=True)
class Density:
    """A log-density or log-probability, and what kind of number it is.

    Attributes:
        nats: log p(x) per example, shape (B,), in nats.
        kind: "exact", a "lower bound" (in expectation over its own noise), or an unbiased "estimate".
        stderr: standard error of each value over Monte-Carlo noise, shape (B,), nats; None when there is no noise
            or when one draw was made.
    """

    nats: Tensor
    kind: Literal["exact", "lower bound", "estimate"]
    stderr: Tensor | None = None


@dataclass(frozen=True)
class Batch:
    """What one step learns from, or one process's share of it.

    Attributes:
        x: examples in the model's units, shape (B, ...).
        rows: which rows of the whole batch these are, and their randomness.
        labels: index of the class of each example, int64, shape (B,), or None.
    """

    x: Tensor
    rows: Rows
    labels: Tensor | None = None


@dataclass(frozen=True)
class Player:
    """One thing to optimise: a GAN has two, every other family has one.

    Attributes:
        module: the parameters that this player owns.
        loss: batch -> scalar to minimise, a mean over examples.
        every: take a step once in so many steps of training.
    """

    module: nn.Module
    loss: Callable[[Batch], Tensor]
    every: int = 1


@runtime_checkable
class Generative(Protocol):
    """A family that can be trained and sampled."""

    def players(self) -> Mapping[str, Player]: ...

    def sample(self, n: int, *, rng: Seeds = 0, start: int = 0, labels: Tensor | None = None) -> Tensor: ...


@runtime_checkable
class Watchful(Protocol):
    """A family whose training can go wrong unseen by its losses."""

    def check(self, batch: Batch) -> str | None:
        """Why there is no use in going on, as the end of a sentence, or None."""
        ...

    def standing(self, batch: Batch, held_out: Tensor) -> Mapping[str, float]:
        """How training stands, on a batch and on held-out examples in the model's units."""
        ...


@runtime_checkable
class HasDensity(Protocol):
    """A family that can say how likely an example is."""

    def log_prob(self, x: Tensor, *, rng: Seeds = 0, start: int = 0, labels: Tensor | None = None) -> Density: ...


@runtime_checkable
class HasLatent(Protocol):
    """A family with a latent code for every example."""

    def encode(self, x: Tensor) -> Tensor: ...

    def decode(self, z: Tensor) -> Tensor: ...
