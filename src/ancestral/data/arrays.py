"""Arrays in .npy, .npz and IDX files, read without pickle and without believing a header.

What an array means follows from its type and shape:

    uint8                                   256 levels
    bool                                    2 levels
    other integers within 0 .. 65,535       as many levels as the largest value asks for
    floating point                          real-valued, kept as float32
    (N,)                                    vectors of one feature
    (N, D)                                  vectors
    (N, H, W) of integers                   grey images
    (N, C, H, W) or (N, H, W, C), C 1 or 3  images
    anything else                           arrays of that shape
"""

import gzip
import math
import re
import struct
import warnings
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ancestral.data.dataset import Examples, printable
from ancestral.errors import DataError

T = TypeVar("T")

EXAMPLES = ("x", "images", "data")
LABELS = ("y", "labels")
IDX_NAME = re.compile(r"(train|t10k|test)-(images|labels)[-.]idx\d-ubyte(\.gz)?")
IDX_TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
MAX_LEVELS = 2**16
MAX_MEMORY = 2**33  # bytes of one array


@dataclass(frozen=True, eq=False)
class Part:
    """Examples as one file or array holds them, with their labels."""

    where: str
    x: NDArray[Any]
    y: NDArray[Any] | None = None


def read_npy(path: Path) -> Examples:
    """One .npy array, an example for each index of its first axis.

    Raises:
        DataError: if the file is damaged, or holds objects, nothing, or values that are not finite.
    """
    where = printable(str(path))
    return examples_of([Part(where, guarded(where, lambda: _mapped(path)))])


def read_npz(path: Path) -> Examples:
    """The array x, images or data of an .npz file, or else its first, with the labels y or labels if it has them.

    Names with a side, such as x_train and x_test or train_images and test_images, are the file's own split; a side
    called val is held out where none is called test.

    Raises:
        DataError: as `read_npy` does.
    """
    where = printable(str(path))
    with guarded(where, lambda: zipfile.ZipFile(path)) as archive:
        named = pairs([name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")])
        if not named:
            raise DataError(f"{where}: holds no array of examples: save them under the name x, images or data")
        return examples_of(
            [
                Part(f"{where}[{printable(x)}]", _member(where, archive, x), _member(where, archive, y) if y else None)
                for x, y in named
            ]
        )


def read_idx(path: Path) -> Examples:
    """One IDX file of examples, gzipped or not, with the labels beside it under the usual name if they are there.

    Reference: LeCun, Cortes and Burges (1998), the MNIST database, "The IDX file format".

    Raises:
        DataError: if the file is damaged or not as long as its header says, or holds labels alone.
    """
    labels = path.with_name(path.name.replace("images", "labels").replace("idx3", "idx1"))
    part = _idx_part(path, labels if labels != path and labels.is_file() else None)
    if part.x.ndim < 2:
        raise DataError(
            f"{part.where}: holds single numbers, as a file of labels does: give the images or their folder"
        )
    return examples_of([part])


def read_idx_folder(folder: Path) -> Examples | None:
    """The IDX files of a folder under MNIST's names, train-* to learn from, t10k-* or test-* held out; or None.

    Raises:
        DataError: as `read_idx` does.
    """
    try:
        paths = sorted(folder.iterdir())
    except OSError:  # said by whoever reads the folder's images
        return None
    found: dict[tuple[str, str], Path] = {}
    for path in paths:
        match = IDX_NAME.fullmatch(path.name)
        if match and path.is_file():
            found.setdefault((match[1], match[2]), path)
    parts = [
        _idx_part(found[side, "images"], found.get((side, "labels")))
        for side in ("train", "t10k", "test")
        if (side, "images") in found
    ]
    return examples_of(parts[:2]) if parts else None


def _idx_part(images: Path, labels: Path | None) -> Part:
    return Part(printable(str(images)), _idx(images), None if labels is None else _idx(labels))


def _idx(path: Path) -> NDArray[Any]:
    where = printable(str(path))
    return guarded(where, lambda: _read_idx(path))


def _read_idx(path: Path) -> NDArray[Any]:
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        zero, kind, axes = struct.unpack(">HBB", file.read(4))
        if zero or kind not in IDX_TYPES:
            raise ValueError("no IDX header")
        shape = struct.unpack(f">{axes}I", file.read(4 * axes))
        dtype = np.dtype(IDX_TYPES[kind])
        size = math.prod(shape) * dtype.itemsize
        check_memory(size)
        body = file.read(size + 1)
    if len(body) != size:
        held = f"{len(body):,}" if len(body) < size else "more"
        raise ValueError(f"its header asks for {'x'.join(map(str, shape))} = {size:,} bytes and {held} follow")
    return np.frombuffer(body, dtype).reshape(shape)


def _mapped(path: Path) -> NDArray[Any]:
    mapped = np.lib.format.open_memmap(path, mode="r")
    check_memory(mapped.nbytes)
    return mapped


def _member(where: str, archive: zipfile.ZipFile, name: str) -> NDArray[Any]:
    def read() -> NDArray[Any]:
        check_memory(archive.getinfo(f"{name}.npy").file_size)
        with archive.open(f"{name}.npy") as file:
            return np.lib.format.read_array(file, allow_pickle=False)

    return guarded(f"{where}[{printable(name)}]", read)


def pairs(names: list[str]) -> list[tuple[str, str | None]]:
    """The names of examples and labels to read: one pair, or two, to learn from and held out."""

    def pair(side: str) -> tuple[str, str | None] | None:
        x = _named(names, EXAMPLES, side)
        return None if x is None else (x, _named(names, LABELS, side))

    train, held_out = pair("train"), pair("test") or pair("val")
    if train and held_out:
        return [train, held_out]
    whole = pair("") or train
    if whole:
        return [whole]
    labels = _named(names, LABELS, "")
    return [(name, labels) for name in names if name != labels][:1]


def _named(names: list[str], words: Sequence[str], side: str) -> str | None:
    """The first name made of one of these words and the side: x, or x_train, or train_images."""
    wanted = [{word, side} - {""} for word in words]
    return next((name for parts in wanted for name in names if set(name.lower().split("_")) == parts), None)


def guarded(where: str, read: Callable[[], T], what: str = "an array of numbers") -> T:
    """What `read` gives; whatever it raises is a DataError in one sentence."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # NumPy warns of a shape that overflows before it fails
            return read()
    except DataError:
        raise
    except Exception as error:  # a damaged or hostile file can raise nearly anything
        reason = (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__
        reason = printable(reason.partition("\n")[0][:200])
        raise DataError(f"{where}: cannot be read as {what} ({reason}): save it again as plain values") from None


def check_memory(size: int) -> None:
    """See that an array of so many bytes may be held."""
    if size > MAX_MEMORY:
        raise ValueError(f"{size:,} bytes, at most {MAX_MEMORY:,} are read")


def examples_of(parts: list[Part]) -> Examples:
    """Examples from one part, or from two of which the second is held out."""
    arrays = [_checked(part) for part in parts]
    for part, x in zip(parts[1:], arrays[1:], strict=True):
        if x.shape[1:] != arrays[0].shape[1:] or x.dtype != arrays[0].dtype:
            raise DataError(
                f"{part.where}: holds {x.dtype} examples of shape {x.shape[1:]} and {parts[0].where} holds "
                f"{arrays[0].dtype} of shape {arrays[0].shape[1:]}: both sides of a split must agree"
            )
    x = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
    levels = _levels(parts[0].where, x)
    dtype = np.float32 if levels is None else np.uint8 if levels <= 256 else np.int32
    classes, labels, notes = _classes(parts)
    return Examples(
        x=np.ascontiguousarray(x, dtype=dtype),
        levels=levels,
        labels=labels,
        classes=classes,
        held_out=np.arange(len(x)) >= len(arrays[0]) if len(parts) == 2 else None,
        notes=notes,
    )


def _checked(part: Part) -> NDArray[Any]:
    """The part's numbers, finite, floats as float32, one example per row, channels first."""
    x = np.asarray(part.x)
    if x.dtype.kind not in "biuf":
        raise DataError(f"{part.where}: holds values of type {x.dtype}: give integers or floating-point numbers")
    if x.size == 0:
        raise DataError(f"{part.where}: holds no values (its shape is {x.shape}): give one example per row")
    if x.dtype.kind == "f":
        with np.errstate(over="ignore"):
            narrow = x.astype(np.float32, copy=False)
        wrong = ~np.isfinite(narrow)
        if wrong.any():
            first = tuple(map(int, np.unravel_index(int(wrong.argmax()), x.shape)))
            raise DataError(
                f"{part.where}: {int(wrong.sum()):,} of {x.size:,} values are not finite float32 numbers, the first is "
                f"{x[first]} at index {first}: repair or remove those examples"
            )
        x = narrow
    if x.ndim < 2:
        return x.reshape(-1, 1)
    if x.ndim == 3 and x.dtype.kind != "f":
        return x[:, None]
    if x.ndim == 4 and x.shape[1] not in (1, 3) and x.shape[3] in (1, 3):
        return np.moveaxis(x, 3, 1)
    return x


def _levels(where: str, x: NDArray[Any]) -> int | None:
    if x.dtype.kind == "f":
        return None
    if x.dtype == np.uint8:
        return 256
    low, high = int(x.min()), int(x.max())
    if low < 0 or high >= MAX_LEVELS:
        raise DataError(
            f"{where}: holds integers from {low:,} to {high:,}: levels run from 0 to at most {MAX_LEVELS - 1:,}; "
            "shift them, or save the array as floating-point numbers"
        )
    return max(high + 1, 2)


def _classes(
    parts: list[Part],
) -> tuple[tuple[str, ...] | None, NDArray[np.int64] | None, tuple[str, ...]]:
    """Classes, labels, and what to say about them."""
    ys = []
    for part in parts:
        if part.y is None:
            return None, None, ()
        y = np.asarray(part.y)
        if y.shape not in {(len(part.x),), (len(part.x), 1)}:
            raise DataError(
                f"{part.where}: {len(part.x):,} examples have labels of shape {y.shape}: give one label each"
            )
        if y.dtype.kind not in "biuU":
            return None, None, (f"left out its labels: {y.dtype} values are not classes",)
        ys.append(y.ravel())
    names, labels = np.unique(np.concatenate(ys), return_inverse=True)
    return tuple(printable(str(name)) for name in names), labels.astype(np.int64), ()
