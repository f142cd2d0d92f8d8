"""What is known about a set of data: its shape, its levels, its units, and the way to and from them."""

import math
from collections.abc import Sequence
from typing import Annotated, Literal, Self, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, model_validator
from torch import Tensor

from ancestral.errors import OptionError

PositiveFloat = Annotated[FiniteFloat, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Nats = TypeVar("Nats", float, Tensor)


def is_image(shape: Sequence[int]) -> bool:
    """Whether an example of this shape is a grey or an RGB image, (1, H, W) or (3, H, W)."""
    return len(shape) == 3 and shape[0] in (1, 3)


class Scale(BaseModel):
    """The invertible affine map between the user's units and the model's.

        x = (raw - offset) / factor,    log p_raw(raw) = log p_x(x) + log |det dx/draw|

    Attributes:
        offset: one number for every feature, or one per feature in the order of the flattened example; user's units.
        factor: as many numbers, positive; user's units.

    Example:
        >>> scale = Scale.of_levels(17)
        >>> x = scale.forward(torch.tensor([[0, 8, 16]]))
        >>> x, scale.inverse(x)
        (tensor([[-1.,  0.,  1.]]), tensor([[ 0.,  8., 16.]]))
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    offset: tuple[FiniteFloat, ...] = Field(min_length=1)
    factor: tuple[PositiveFloat, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _paired(self) -> Self:
        if len(self.offset) != len(self.factor):
            raise ValueError(
                f"received {len(self.offset)} offsets and {len(self.factor)} factors: give as many of each"
            )
        return self

    @classmethod
    def of_levels(cls, levels: int) -> Self:
        """The map that sends level k of L to 2k/(L - 1) - 1, so that the end levels are -1 and 1.

        Raises:
            OptionError: if there are fewer than two levels.
        """
        if levels < 2:
            raise OptionError(f"received {levels} levels: data on levels has at least 2")
        return cls(offset=((levels - 1) / 2,), factor=((levels - 1) / 2,))

    @classmethod
    def of_values(cls, train: Tensor, *, shared: bool = False) -> Self:
        """The map that gives real-valued data mean 0 and standard deviation 1 over `train`.

        A feature that never changes keeps its unit: its factor is 1.

        Args:
            train: examples in the user's units, shape (N, ...).
            shared: one mean and deviation for all features together, instead of one per feature.
        """
        flat = train.reshape(-1, 1) if shared else train.reshape(len(train), -1)
        flat = flat.to(torch.float64)
        constant = flat.amin(0) == flat.amax(0)
        deviation = flat.std(0, correction=0)
        return cls(offset=tuple(flat.mean(0).tolist()), factor=tuple(deviation.where(~constant, 1.0).tolist()))

    def forward(self, raw: Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
        """The model's x for examples in the user's units: computed in float64, cast once.

        Args:
            raw: examples, shape (B, ...).
            dtype: of the result.
        """
        offset, factor = self._like(raw.shape[1:])
        return ((raw.to(torch.float64) - offset) / factor).to(dtype)

    def inverse(self, x: Tensor) -> Tensor:
        """The user's units for the model's x, shape (B, ...), in the dtype of x and not rounded to levels."""
        offset, factor = self._like(x.shape[1:])
        return (x.to(torch.float64) * factor + offset).to(x.dtype)

    def log_det(self, shape: Sequence[int]) -> float:
        """log |det dx/draw| = -sum_i log factor_i over one example of this shape, in nats."""
        factor = self._like(shape)[1]
        return -float(factor.log().expand(tuple(shape)).sum())

    def _like(self, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Offset and factor as float64 tensors that broadcast over examples of this shape."""
        both = torch.tensor([self.offset, self.factor], dtype=torch.float64)
        if len(self.factor) > 1:
            if math.prod(shape) != len(self.factor):
                raise OptionError(
                    f"received examples of shape {tuple(shape)}: this scale is for {len(self.factor)} features"
                )
            both = both.reshape(2, *shape)
        return both[0], both[1]


class Facts(BaseModel):
    """What a model must know about its data, and a reader wants to; it travels with every run as JSON.

    Attributes:
        name: what to call the data.
        source: the built-in name or the path it was loaded from.
        shape: of one example: (C, H, W) for images, (D,) for vectors, anything else for other arrays.
        levels: the values are the integers 0 .. levels - 1; None for real-valued data.
        scale: the map between the user's units and the model's.
        classes: names of the classes, in the order of the labels; None without labels.
        class_counts: examples to learn from in each class, in that order; None without labels.
        features: names of the features of a vector, in its order; None without names.
        n_train: examples to learn from.
        n_held_out: examples to measure on, never learnt from.
        skipped: files, or rows of a table, that could not be read.
        digest: SHA-256 of the examples, or fingerprints of large ones, and the labels on both sides of the split:
            equal digests, equal data.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    source: str
    shape: tuple[Annotated[int, Field(ge=1)], ...] = Field(min_length=1)
    levels: Annotated[int, Field(ge=2)] | None
    scale: Scale
    classes: tuple[str, ...] | None
    class_counts: tuple[Annotated[int, Field(ge=0)], ...] | None = None
    features: tuple[str, ...] | None = None
    n_train: Count
    n_held_out: Count
    skipped: Count
    digest: str

    @property
    def is_image(self) -> bool:
        """Whether an example is a grey or an RGB image."""
        return is_image(self.shape)

    @property
    def dims(self) -> int:
        """Numbers in one example."""
        return math.prod(self.shape)

    @property
    def unit(self) -> Literal["bits/dim", "nats"]:
        """The unit in which a likelihood of this data is told to people: bits per dimension need levels."""
        return "nats" if self.levels is None else "bits/dim"

    @property
    def dtype(self) -> torch.dtype:
        """How the user's values are kept: the smallest type that holds the levels, or float32."""
        if self.levels is None:
            return torch.float32
        return torch.uint8 if self.levels <= 256 else torch.int32

    def bits_per_dim(self, nats: Nats) -> Nats:
        """Nats per example as bits per dimension, b = nats / (D ln 2): the one place where nats become bits."""
        return nats / (self.dims * math.log(2))

    def to_raw(self, x: Tensor) -> Tensor:
        """The user's values nearest to the model's x, shape (B, ...): rounded to a level where there are levels."""
        raw = self.scale.inverse(x)
        if self.levels is not None:
            raw = raw.round().clamp(0, self.levels - 1)
        return raw.to(self.dtype)
