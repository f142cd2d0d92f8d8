"""Images, by the thousand: those of a folder, and what is common to all that hold images."""

import math
import os
import stat
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import BinaryIO, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from ancestral.data import cache, metadata
from ancestral.data.dataset import Examples, File, Fit, OnBad, Progress, numbered, printable
from ancestral.data.pixels import MAX_PIXELS, Stack, decode, measure
from ancestral.errors import DataError

T = TypeVar("T")

SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm"}
)
SIDES = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}

BROUGHT = {
    "crop": "centre-cropped and resized to",
    "pad": "resized and padded with black to",
    "stretch": "stretched to",
}
MAX_MEMORY = 2**33  # bytes that the decoded set takes
CHUNK = 8  # files that a thread takes at a time
NAMED = 3  # unreadable files that a description names


@dataclass(frozen=True)
class Item:
    """One image file.

    Attributes:
        name: path below the root, with "/".
        open: how to read its bytes.
        held_out: its side of the source's own split, None without one.
        label: its class, where metadata names one.
        size: upright width and height once measured.
        mode: of its pixels, likewise.
    """

    name: str
    open: Callable[[], BinaryIO]
    held_out: bool | None = None
    label: str | None = None
    size: tuple[int, int] = (0, 0)
    mode: str = ""


@dataclass(frozen=True)
class Bad:
    """Something that cannot be read, and why."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{printable(self.name)}: {self.reason}"


@dataclass(frozen=True)
class Reading:
    """One reading of one source: what to bring images to, what to do about those that cannot be read, and those met.

    Attributes:
        where: the source, as people read it.
        size: side in pixels, or None to keep one common size or choose one.
        fit: how an image of other proportions gets there.
        on_bad: "skip" what cannot be read, or "fail".
        progress: told (stage, done, of).
        cache: folder of decoded images (`data.cache`), or None.
        bad: what could not be read so far.
    """

    where: str
    size: int | None = None
    fit: Fit = "crop"
    on_bad: OnBad = "skip"
    progress: Progress | None = None
    cache: Path | None = None
    bad: list[Bad] = field(default_factory=list)

    def reject(self, bad: Bad) -> None:
        """Count a file that cannot be read, or refuse the source for it."""
        if self.on_bad == "fail":
            raise DataError(
                f"{self.where}: cannot read {bad}: repair or remove it, "
                "or let unreadable files be skipped (on_bad='skip')"
            )
        self.bad.append(bad)

    def over(
        self, items: list[Item], work: Callable[[BinaryIO], T], stage: str, take: Callable[[T], None]
    ) -> list[Item]:
        """The items on which `work` succeeds, whose results are taken one by one; the others are rejected."""
        kept = []
        told = -math.inf
        chunks = [items[start : start + CHUNK] for start in range(0, len(items), CHUNK)]
        pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1))  # decoders release the interpreter's lock
        try:
            for number, tried in enumerate(pool.map(partial(_attempt, work), chunks), 1):
                for item, result in tried:
                    if isinstance(result, Bad):
                        self.reject(result)
                    else:
                        kept.append(item)
                        take(result)
                if self.progress and (number == len(chunks) or time.monotonic() - told >= 0.5):
                    self.progress(stage, min(number * CHUNK, len(items)), len(items))
                    told = time.monotonic()
        finally:
            pool.shutdown(cancel_futures=True)
        return kept


def read_folder(root: Path, reading: Reading) -> Examples:
    """All images below a folder; hidden files, `__MACOSX` and what has no image suffix are passed over.

    Raises:
        DataError: if nothing can be read, or if something cannot and `on_bad` is "fail".
    """
    items = []
    for found in _walk(root, "", set(), root.resolve()):
        if isinstance(found, Bad):
            reading.reject(found)
        else:
            items.append(found)
    return read_items(reading, items)


def _walk(folder: Path, prefix: str, seen: set[Path], root: Path) -> Iterator[Item | Bad]:
    real = folder.resolve()
    if real in seen:  # a link to a folder above
        return
    seen.add(real)
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        yield Bad(prefix or str(folder), reason(error))
        return
    for entry in entries:
        if _passed_over(entry.name):
            continue
        name = prefix + entry.name
        try:
            mode = entry.stat().st_mode
        except OSError as error:
            yield Bad(name, reason(error))
            continue
        if entry.is_symlink() and not entry.resolve().is_relative_to(root):
            yield Bad(name, "a link that leads out of the folder")
        elif stat.S_ISDIR(mode):
            yield from _walk(entry, f"{name}/", seen, root)
        elif stat.S_ISREG(mode) and is_wanted(entry.name):  # opening a FIFO would wait for ever
            yield Item(name, partial(_binary, entry))


def _binary(path: Path) -> BinaryIO:
    return path.open("rb")


def is_wanted(name: str) -> bool:
    """Whether a file of this name, a path with "/", is an image or metadata of images by its name."""
    parts = name.split("/")
    known = os.path.splitext(parts[-1])[1].lower() in SUFFIXES or parts[-1] in metadata.NAMES  # noqa: PTH122
    return known and not any(map(_passed_over, parts))


def reason(error: Exception) -> str:
    """What is wrong with a file, in a few words."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image"
    if isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
        return f"more than {MAX_PIXELS:,} pixels"
    words = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return printable(words.partition("\n")[0][:120].rstrip(".")) or type(error).__name__


def read_items(reading: Reading, items: list[Item]) -> Examples:
    """The images among files, decoded and brought to one size, with classes from metadata or from their folders.

    With a cache, what has been decoded before is not decoded again.

    Raises:
        DataError: if there is none, or something cannot be read and `reading.on_bad` is "fail".
    """
    if reading.cache is None:
        return _decoded(reading, items)
    digests: list[str] = []
    items = reading.over(items, cache.digest, "comparing", digests.append)
    how = [reading.size, reading.fit, list(map(str, reading.bad))]
    key = cache.key_of(zip((item.name for item in items), digests, strict=True), how)
    found = cache.find(reading.cache, key)
    if found is not None and (reading.on_bad == "skip" or not found.bad):
        return found
    examples = _decoded(reading, items)
    try:
        cache.keep(reading.cache, key, examples)
    except DataError:  # too few to be divided, which is said by who divides them
        return examples
    except OSError as error:
        return replace(examples, notes=(*examples.notes, f"the cache could not be written ({reason(error)})"))
    return examples


def _decoded(reading: Reading, items: list[Item]) -> Examples:
    bad, size = reading.bad, reading.size
    items, notes = _labelled(reading, sorted(items, key=lambda item: item.name))
    if not items and not bad:
        raise DataError(f"{reading.where}: holds no images: expected files ending in {', '.join(sorted(SUFFIXES))}")
    items, said = _own_split(items)
    notes += said
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # odd metadata; the pixels are judged by themselves
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        items, pixels = _decode_all(reading, items)
    if not items:
        raise DataError(f"{reading.where}: nothing in it can be read as an image ({bad[0]})")
    if size is None and len({item.size for item in items}) > 1:
        notes.append("sizes differ: {} {}x{}".format(BROUGHT[reading.fit], *_common(items)))
    if bad:
        more = "; ..." if len(bad) > NAMED else ""
        notes.append(f"skipped {len(bad):,} unreadable ({'; '.join(map(str, bad[:NAMED]))}{more})")
    classes, labels = _classes(items)
    return Examples(
        x=pixels.x,
        levels=256,
        labels=labels,
        classes=classes,
        held_out=None if items[0].held_out is None else np.array([item.held_out for item in items]),
        files=tuple(File(item.name, *item.size, item.mode) for item in items),
        bad=tuple(map(str, bad)),
        notes=tuple(notes),
    )


def _labelled(reading: Reading, items: list[Item]) -> tuple[list[Item], list[str]]:
    """The images, with their classes where metadata files name them; what these do not list is left out then."""
    beside = [item for item in items if item.name.rpartition("/")[2] in metadata.NAMES]
    images = [item for item in items if item.name.rpartition("/")[2] not in metadata.NAMES]
    labels: dict[str, str] = {}
    for item, found in _attempt(metadata.read, beside):
        if isinstance(found, Bad):
            reading.reject(found)
        else:
            folder = item.name.rpartition("/")[0]
            labels |= {f"{folder}/{name}".lstrip("/"): label for name, label in found.items()}
    if not labels:
        return images, []
    there = {item.name for item in images}
    for name in labels.keys() - there:
        reading.reject(Bad(name, "listed in the metadata, and not there"))
    left_out = len(there - labels.keys())
    said = [f"left out {left_out:,} images that the metadata does not list"] if left_out else []
    return [replace(item, label=labels[item.name]) for item in images if item.name in labels], said


def _passed_over(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _decode_all(reading: Reading, items: list[Item]) -> tuple[list[Item], Stack]:
    """The items that can be read, and their pixels at one size."""
    size = reading.size
    if size is None:
        measured: list[tuple[int, int, str]] = []
        items = reading.over(items, measure, "measuring", measured.append)
        items = [replace(item, size=own[:2], mode=own[2]) for item, own in zip(items, measured, strict=True)]
    while True:
        width, height = (size, size) if size else _common(items)
        if 3 * width * height * len(items) > MAX_MEMORY:
            raise DataError(
                f"{reading.where}: {len(items):,} images of {width}x{height} take more than {MAX_MEMORY:,} bytes: "
                "ask for a smaller size"
            )
        pixels = Stack(len(items), width, height)
        work = partial(decode, width=width, height=height, fit=reading.fit)
        kept = reading.over(items, work, "decoding", pixels.add)
        if size or _common(kept) == (width, height):
            return kept, pixels
        items = kept  # a damaged file has decided the size of the sound ones: once more without it


def _own_split(items: list[Item]) -> tuple[list[Item], list[str]]:
    """Each item on its side, if the folders say so; what is on neither side is left out.

    Held out is what lies in a folder named test, or, where there is none, val (valid, validation). To learn from is
    what lies in a folder named train, or, where there is none, everything else. The outermost such folder counts.
    """
    sides = [next((SIDES[part.lower()] for part in _folders(item) if part.lower() in SIDES), "") for item in items]
    held = "test" if "test" in sides else "val"
    train = "train" if "train" in sides else ""
    if held not in sides or train not in sides:
        return items, []
    kept = [
        replace(item, held_out=side == held) for item, side in zip(items, sides, strict=True) if side in (held, train)
    ]
    left_out = len(items) - len(kept)
    return kept, [f"left out {left_out:,} images on neither side of its own split"] if left_out else []


def _classes(items: list[Item]) -> tuple[tuple[str, ...] | None, NDArray[np.int64] | None]:
    """Classes from metadata; or the folders that hold images, if every image is in one, none holds another, and there
    are two."""
    if items[0].label is not None:
        return numbered([str(item.label) for item in items])
    split = items[0].held_out is not None
    folders = [tuple(part for part in _folders(item) if not (split and part.lower() in SIDES)) for item in items]
    if not all(folders) or not {parts[:-1] for parts in folders}.isdisjoint(folders):
        return None, None
    names = [parts[-1] for parts in folders]
    classes = sorted(set(names))
    if len(classes) < 2:
        return None, None
    index = {name: label for label, name in enumerate(classes)}
    return tuple(map(printable, classes)), np.array([index[name] for name in names])


def _folders(item: Item) -> list[str]:
    return item.name.split("/")[:-1]


def _attempt(work: Callable[[BinaryIO], T], items: list[Item]) -> list[tuple[Item, T | Bad]]:
    tried: list[tuple[Item, T | Bad]] = []
    for item in items:
        try:
            with item.open() as file:
                tried.append((item, work(file)))
        except MemoryError:
            raise
        except Exception as error:  # a damaged or hostile file can raise nearly anything
            tried.append((item, Bad(item.name, reason(error))))
    return tried


def _common(items: list[Item]) -> tuple[int, int]:
    """The width and height to bring all images to."""
    if len({item.size for item in items}) == 1:
        return items[0].size
    side = 64 if items and median(min(item.size) for item in items) >= 64 else 32
    return side, side
