"""A set of examples, divided once and for all into what is learnt from and what is measured on."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from ancestral.data.facts import Facts, Scale, is_image
from ancestral.errors import DataError

OnBad = Literal["skip", "fail"]
Fit = Literal["crop", "pad", "stretch"]
"""How an image of other proportions comes to the size: its centre, all of it on black, or all of it distorted."""

Progress = Callable[[str, int, int], None]

CHUNK = 2**18  # bytes that are moved at a time
LARGE = 2**14  # bytes of an example above which its fingerprint stands for it where contents are hashed


class File(NamedTuple):
    """Where an example came from.

    Attributes:
        name: path below the source's root, with "/".
        width: in pixels before it was brought to a size; 0 where that was not measured.
        height: the same.
        mode: of its pixels, as Pillow calls it; empty where that was not looked at.
    """

    name: str
    width: int = 0
    height: int = 0
    mode: str = ""


@dataclass(frozen=True, eq=False)
class Data:
    """Examples in the user's units, with the facts and the scale that bring them to the model's.

    Attributes:
        facts: what is known about them.
        train: shape (n_train, *shape), uint8 or int32 on levels, float32 otherwise.
        held_out: shape (n_held_out, *shape), never learnt from.
        train_labels: index into `facts.classes` of each training example, int64, or None.
        held_out_labels: the same for the held-out examples.
        train_files: where each training example came from, or None if they are not files.
        held_out_files: the same for the held-out examples.
        bad: what could not be read, each with the reason.
        notes: what a reader should know about how the data was read.
        mapped: whether the examples lie in a file that is mapped into memory, which takes none of its own.
    """

    facts: Facts
    train: Tensor
    held_out: Tensor
    train_labels: Tensor | None = None
    held_out_labels: Tensor | None = None
    train_files: tuple[File, ...] | None = None
    held_out_files: tuple[File, ...] | None = None
    bad: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    mapped: bool = False

    def batch(self, indices: Tensor | Sequence[int]) -> Tensor:
        """The training examples at these indices in the model's units, float32, shape (B, *shape)."""
        return self.facts.scale.forward(self.train[torch.as_tensor(indices)])

    @property
    def description(self) -> str:
        """One line for people."""
        facts = self.facts
        kind = "images" if facts.is_image else "vectors" if len(facts.shape) == 1 else "arrays"
        parts = [
            f"{facts.name}: {facts.n_train:,} train + {facts.n_held_out:,} held-out {kind} of "
            f"{'x'.join(map(str, facts.shape))}",
            f"{facts.levels:,} levels" if facts.levels else "real-valued",
        ]
        if facts.classes:
            parts.append(f"{len(facts.classes):,} classes")
        return "; ".join([", ".join(parts), *self.notes])


@dataclass(frozen=True, eq=False)
class Examples:
    """Everything a source holds, in its own order, before it is divided.

    Attributes:
        x: shape (N, *shape); uint8 for up to 256 levels, int32 for more, float32 for real-valued data.
        levels: the values are 0 .. levels - 1; None for real-valued data.
        labels: index into `classes` of each example, or None.
        classes: names of the classes, or None.
        held_out: the source's own split, True where held out; None to divide by content.
        features: names of the features of a vector, or None.
        files: where each example came from, or None.
        bad: files, or rows of a table, that could not be read, each with the reason.
        notes: what a reader should know.
        digest: of what they are divided into, where that is known, as when they lie in a file that is mapped.
    """

    x: NDArray[Any]
    levels: int | None
    labels: NDArray[np.int64] | None = None
    classes: tuple[str, ...] | None = None
    held_out: NDArray[np.bool_] | None = None
    features: tuple[str, ...] | None = None
    files: tuple[File, ...] | None = None
    bad: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    digest: str | None = None


def printable(name: str) -> str:
    """A name from a file system as one line of text: names may hold newlines, escape codes and stray bytes."""
    return name if name.isprintable() else ascii(name)


def numbered(words: Sequence[str]) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """The classes that these names come to, in the order of numbers where all are whole, and the index of each name.

    Example:
        >>> numbered(["10", "9", "10"])
        (('9', '10'), array([1, 0, 1]))
    """
    names = sorted(set(words))
    if all(name.isdecimal() for name in names):
        names.sort(key=int)
    index = {name: label for label, name in enumerate(names)}
    return tuple(map(printable, names)), np.array([index[word] for word in words], dtype=np.int64)


def held_out_by_content(x: NDArray[Any]) -> NDArray[np.bool_]:
    """Which examples are held out: those whose hash is small, in any order, equal examples always together.

    About 20% are held out of 10,000 examples or fewer and about 10% of more. The smallest hash is always held out
    and the two largest never, so that both sides of a very small set have something.

    Reference: Aumasson, Neves, Wilcox-O'Hearn and Winnerlein (2013), BLAKE2.

    Args:
        x: examples, shape (N, ...).

    Returns:
        True where held out, shape (N,).

    Raises:
        DataError: if fewer than three examples differ.

    Example:
        >>> x = np.arange(1000)
        >>> int(held_out_by_content(x).sum())
        209
    """
    return held_out_by_key([content_key(example) for example in x])


def held_out_by_key(contents: Sequence[int]) -> NDArray[np.bool_]:
    """What `held_out_by_content` says of examples with these contents, each as 64 bits."""
    keys = np.array(contents, dtype=np.uint64)
    distinct = np.unique(keys)
    if len(distinct) < 3:
        raise DataError(
            f"holds {len(distinct)} different examples: at least 3 are needed, 2 to learn from and 1 held out"
        )
    share = 0.2 if len(keys) <= 10_000 else 0.1
    return keys <= np.clip(np.uint64(int(share * 2**64)), distinct[0], distinct[-3])


def divide(examples: Examples, *, name: str, source: str) -> Data:
    """Split the examples, measure the scale on the training side, and write down the facts.

    The array of the examples is taken over: where it can be written, its rows are moved and not copied.

    Raises:
        DataError: if fewer than 2 examples are left to learn from, or none is held out.
    """
    where = printable(source)
    try:
        held_out = held_out_by_content(examples.x) if examples.held_out is None else examples.held_out
    except DataError as error:
        raise DataError(f"{where}: {error}") from None
    n_held_out = int(held_out.sum())
    n_train = len(held_out) - n_held_out
    if n_train < 2 or n_held_out < 1:
        raise DataError(f"{where}: {n_train} train and {n_held_out} held-out examples: at least 2 and 1 are needed")

    train, held = map(torch.from_numpy, _parted(examples.x, held_out))
    labels = examples.labels
    train_labels = None if labels is None else torch.from_numpy(labels[~held_out])
    held_out_labels = None if labels is None else torch.from_numpy(labels[held_out])

    shape = tuple(train.shape[1:])
    facts = Facts(
        name=name,
        source=source,
        shape=shape,
        levels=examples.levels,
        # One unit for all pixels: near a border they hardly vary, and a unit of their own would magnify noise.
        scale=Scale.of_levels(examples.levels) if examples.levels else Scale.of_values(train, shared=is_image(shape)),
        classes=examples.classes,
        class_counts=None
        if labels is None
        else tuple(np.bincount(labels[~held_out], minlength=len(examples.classes or ())).tolist()),
        features=examples.features,
        n_train=n_train,
        n_held_out=n_held_out,
        skipped=len(examples.bad),
        digest=examples.digest or digest_of(train, held, train_labels, held_out_labels),
    )
    return Data(
        facts,
        train,
        held,
        train_labels,
        held_out_labels,
        _chosen(examples.files, ~held_out),
        _chosen(examples.files, held_out),
        examples.bad,
        examples.notes,
        mapped=examples.digest is not None,
    )


def _parted(x: NDArray[Any], held_out: NDArray[np.bool_]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Both sides, each in its own order. No more than the held-out side is copied, if x can be written."""
    n_train = int((~held_out).sum())
    if x.flags.writeable and not held_out[:n_train].any():  # as a cache keeps them
        return x[:n_train], x[n_train:]
    if not x.flags.writeable:
        return x[~held_out], x[held_out]
    learnt, held = np.flatnonzero(~held_out), x[held_out]
    step = max(1, CHUNK // x[0].nbytes)
    for start in range(0, len(learnt), step):  # a row only ever moves forward, over one that has moved or is held out
        rows = learnt[start : start + step]
        x[start : start + len(rows)] = x[rows]
    return x[: len(learnt)], held


def _chosen(files: tuple[File, ...] | None, where: NDArray[np.bool_]) -> tuple[File, ...] | None:
    return None if files is None else tuple(files[k] for k in np.flatnonzero(where))


def content_key(example: NDArray[Any]) -> int:
    """The content of an example as 64 bits."""
    return int.from_bytes(hashlib.blake2b(_condensed(example), digest_size=8).digest(), "big")


def _condensed(example: NDArray[Any]) -> memoryview | bytes:
    """The bytes of an example; of a large one a fingerprint, 128 bits of XXH3, made at the speed of memory."""
    content = np.ascontiguousarray(example).data
    return content if content.nbytes <= LARGE else xxhash.xxh3_128_digest(content)


def digest_of(*tensors: Tensor | None) -> str:
    """SHA-256 of both sides and their labels, as `Facts.digest` has it: of bytes, and of fingerprints of large ones."""
    digest = hashlib.sha256()
    for tensor in tensors:
        if tensor is None:
            digest.update(b"none;")
            continue
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)};".encode())
        if tensor[:1].nbytes > LARGE:
            for example in tensor.numpy():
                digest.update(_condensed(example))
        else:
            digest.update(tensor.numpy().reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
