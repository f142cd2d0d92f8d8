"""Images, by the thousand: those of a folder, and what is common to all that hold images."""

import math
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from io import FileIO
from pathlib import Path
from statistics import median
from typing import Any, BinaryIO, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from ancestral.data import cache, cores, metadata
from ancestral.data.build import Build
from ancestral.data.dataset import (
    Examples,
    File,
    Fit,
    OnBad,
    Progress,
    content_key,
    held_out_by_key,
    numbered,
    printable,
)
from ancestral.data.pixels import MAX_PIXELS, Entry, Header, Stack, decode, measure
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
MAX_FILE = 2**29  # bytes of one file
PAUSE = 0.5  # seconds between reports of progress
CHUNK = 64  # files that a process takes at a time, at most
NAMED = 3  # unreadable files that a description names


class Item(NamedTuple):
    """One image file.

    Attributes:
        name: path below the root, with "/".
        open: how to read its bytes, of `where` they are.
        where: what `open` needs to know; the items of a source share all else.
        held_out: its side of the source's own split, None without one.
        label: its class, where metadata names one.
    """

    name: str
    open: Callable[[Any], BinaryIO]
    where: Any
    held_out: bool | None = None
    label: str | None = None


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
            raise self.refusal(str(bad))
        self.bad.append(bad)

    def refusal(self, bad: str) -> DataError:
        """Why a source is not read that holds this file."""
        return DataError(
            f"{self.where}: cannot read {bad}: repair or remove it, or let unreadable files be skipped (on_bad='skip')"
        )

    def over(
        self,
        items: Sequence[Item],
        work: Callable[[BinaryIO], T],
        stage: str,
        chunk: int = CHUNK,
        before: int = 0,
        packed: Callable[[Iterable[T | Bad]], Iterable[T | Bad]] = list,
    ) -> Iterator[tuple[Item, T | Bad]]:
        """Each item with what `work` makes of its bytes, or why it cannot; so many were done before.

        What came of a chunk travels from one process to another as `packed` has it.
        """
        done, of, told = before, before + len(items), -math.inf
        chunks = [items[start : start + chunk] for start in range(0, len(items), chunk)]
        made = cores.spread(lambda own: packed(_attempt(work, own)), chunks)
        for own in chunks:
            try:
                results = next(made)
            except MemoryError:
                raise DataError(
                    f"{self.where}: a process that was {stage} {printable(own[0].name)} and those that follow "
                    "was ended, for want of memory or by a damaged file: free memory, or try without these files"
                ) from None
            yield from zip(own, results, strict=True)
            done += len(own)
            if self.progress and (done == of or time.monotonic() - told >= PAUSE):
                self.progress(stage, done, of)
                told = time.monotonic()


def read_folder(root: Path, reading: Reading) -> Examples:
    """All images below a folder; hidden files, `__MACOSX` and what has no image suffix are passed over.

    Raises:
        DataError: if nothing can be read, or if something cannot and `on_bad` is "fail".
    """
    items, opened = [], partial(_below, str(root))
    for found in _walk(root, "", set(), root.resolve()):
        if isinstance(found, Bad):
            reading.reject(found)
        else:
            items.append(Item(found, opened, found))
    return read_items(reading, items)


def _below(root: str, name: str) -> BinaryIO:
    file = FileIO(f"{root}/{name}")
    size = os.fstat(file.fileno()).st_size
    if size > MAX_FILE:
        file.close()
        raise ValueError(f"{size:,} bytes, at most {MAX_FILE:,} are read")
    return file


def _walk(folder: Path, prefix: str, seen: set[Path], root: Path) -> Iterator[str | Bad]:
    """The names of the files below a folder that are wanted."""
    real = folder.resolve()
    if real in seen:  # a link to a folder above
        return
    seen.add(real)
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        yield Bad(prefix or str(folder), reason(error))
        return
    for entry in entries:
        if _passed_over(entry.name):
            continue
        name = prefix + entry.name
        try:
            if entry.is_symlink():
                entry.stat()  # fails where it leads nowhere
            is_folder, is_file = entry.is_dir(), entry.is_file()
        except OSError as error:
            yield Bad(name, reason(error))
            continue
        if entry.is_symlink() and not Path(entry).resolve().is_relative_to(root):
            yield Bad(name, "a link that leads out of the folder")
        elif is_folder:
            yield from _walk(Path(entry), f"{name}/", seen, root)
        elif is_file and _is_known(entry.name):  # opening a FIFO would wait for ever
            yield name


def is_wanted(name: str) -> bool:
    """Whether a file of this name, a path with "/", is an image or metadata of images by its name."""
    parts = name.split("/")
    return _is_known(parts[-1]) and not any(map(_passed_over, parts))


def _is_known(name: str) -> bool:
    return name[name.rfind(".") :].lower() in SUFFIXES or name in metadata.NAMES


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
        return _decoded(reading, items, Stack(reading.where))
    items.sort(key=lambda item: item.name)
    readable, key_of = [], cache.Key()
    for item, found in reading.over(items, cache.digest, "comparing"):
        if isinstance(found, Bad):
            reading.reject(found)
        else:
            readable.append(item)
            key_of.add(item.name, found)
    rejected = len(reading.bad)
    key = key_of.read_as([reading.size, reading.fit, list(map(str, reading.bad))])
    kept = cache.find(reading.cache, key)
    try:
        if kept is None:
            with Build(reading.cache / f"{key}.partial") as build:
                kept = cache.find(reading.cache, key)  # another process may have made it in the meantime
                if kept is None:
                    kept = cache.keep(reading.cache, key, build, _decoded(reading, readable, build))
                build.remove()
    except OSError as error:
        del reading.bad[rejected:]
        examples = _decoded(reading, readable, Stack(reading.where))
        return replace(examples, notes=(*examples.notes, f"the cache could not be written ({reason(error)})"))
    if kept.bad and reading.on_bad == "fail":
        raise reading.refusal(kept.bad[0])
    return kept


def _decoded(reading: Reading, items: list[Item], stack: Stack | Build) -> Examples:
    bad = reading.bad
    items, notes = _labelled(reading, sorted(items, key=lambda item: item.name))
    if not items and not bad:
        raise DataError(f"{reading.where}: holds no images: expected files ending in {', '.join(sorted(SUFFIXES))}")
    items, said = _own_split(items)
    notes += said
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # odd metadata; the pixels are judged by themselves
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        items, headers = _decode_all(reading, items, stack)
    if not items:
        raise DataError(f"{reading.where}: nothing in it can be read as an image ({bad[0]})")
    x, keys = stack.finished()
    if reading.size is None and len({header[:2] for header in headers}) > 1:
        notes.append(f"sizes differ: {BROUGHT[reading.fit]} {x.shape[3]}x{x.shape[2]}")
    if bad:
        more = "; ..." if len(bad) > NAMED else ""
        notes.append(f"skipped {len(bad):,} unreadable ({'; '.join(map(str, bad[:NAMED]))}{more})")
    classes, labels = _classes(items)
    return Examples(
        x=x,
        levels=256,
        labels=labels,
        classes=classes,
        held_out=_held_out(reading, items, keys),
        files=tuple(File(item.name, *header) for item, header in zip(items, headers, strict=True)),
        bad=tuple(map(str, bad)),
        notes=tuple(notes),
    )


def _held_out(reading: Reading, items: list[Item], keys: Sequence[int]) -> NDArray[np.bool_]:
    if items[0].held_out is not None:
        return np.array([item.held_out for item in items])
    try:
        return held_out_by_key(keys)
    except DataError as error:
        raise DataError(f"{reading.where}: {error}") from None


def _labelled(reading: Reading, items: list[Item]) -> tuple[list[Item], list[str]]:
    """The images, with their classes where metadata files name them; what these do not list is left out then."""
    beside = [item for item in items if item.name.rpartition("/")[2] in metadata.NAMES]
    images = [item for item in items if item.name.rpartition("/")[2] not in metadata.NAMES]
    labels: dict[str, str] = {}
    for item, found in zip(beside, _attempt(metadata.read, beside), strict=True):
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
    return [item._replace(label=labels[item.name]) for item in images if item.name in labels], said


def _passed_over(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _decode_all(reading: Reading, items: list[Item], stack: Stack | Build) -> tuple[list[Item], list[Header]]:
    """The items that can be read, and their headers, with their pixels in the stack at one size.

    All are presumed to have the size of the first: most sets are like that, and to measure takes half as long as to
    decode. Where one differs, all are measured; where then those that decode have another size in common, that it is.
    """
    rejected = len(reading.bad)
    if reading.size:
        return _decode_at(reading, items, stack, (reading.size, reading.size))
    target = stack.target or next(
        (found[:2] for item in items for found in _attempt(measure, [item]) if isinstance(found, Header)), (1, 1)
    )
    kept, headers = _decode_at(reading, items, stack, target, alike=True)
    if any(header[:2] != target for header in headers):
        del reading.bad[rejected:]
        target = _common([found for _, found in reading.over(items, measure, "measuring") if isinstance(found, Header)])
        kept, headers = _decode_at(reading, items, stack, target)
        if headers and _common(headers) != target:
            del reading.bad[rejected:]
            kept, headers = _decode_at(reading, items, stack, _common(headers))
    return kept, headers


def _decode_at(
    reading: Reading, items: list[Item], stack: Stack | Build, target: tuple[int, int], *, alike: bool = False
) -> tuple[list[Item], list[Header]]:
    """The items that can be read, and their headers, with their pixels in the stack at this size.

    Args:
        alike: end at the first that had another size.
    """
    width, height = target
    done = stack.begin(len(items), width, height)
    kept: list[Item] = []
    headers: list[Header] = []

    def take(item: Item, header: Header) -> bool:
        kept.append(item)
        headers.append(header)
        return not alike or header[:2] == target

    for item, entry in zip(items, done, strict=False):
        if isinstance(entry, str):
            reading.reject(Bad(item.name, entry))
        elif not take(item, entry):
            return kept, headers
    split = bool(items) and items[0].held_out is not None
    work = partial(_entry, width=width, height=height, fit=reading.fit, keyed=not split)
    chunk = max(1, min(CHUNK, 2**20 // (3 * width * height)))
    for item, found in reading.over(items[len(done) :], work, "decoding", chunk, len(done), Packed):
        if isinstance(found, Bad):
            stack.add(found.reason)
            reading.reject(found)
        else:
            stack.add(found)
            if not take(item, found[0]):
                break
    return kept, headers


class Packed:
    """Entries whose pixels are in one array: to send one for each takes longer than to decode a small image."""

    def __init__(self, entries: Iterable[Entry | Bad]) -> None:
        self.found: list[tuple[Header, int, tuple[int, ...]] | Bad] = []
        pixels = bytearray()
        for each in entries:
            if isinstance(each, Bad):
                self.found.append(each)
            else:
                header, key, image = each
                self.found.append((header, key, image.shape))
                pixels += image.data
        self.pixels = np.frombuffer(pixels, dtype=np.uint8)

    def __iter__(self) -> Iterator[Entry | Bad]:
        start = 0
        for each in self.found:
            if isinstance(each, Bad):
                yield each
            else:
                header, key, shape = each
                stop = start + math.prod(shape)
                yield header, key, self.pixels[start:stop].reshape(shape)
                start = stop


def _entry(file: BinaryIO, *, width: int, height: int, fit: Fit, keyed: bool) -> Entry:
    header, pixels = decode(file, width=width, height=height, fit=fit)
    return header, content_key(pixels) if keyed else 0, pixels


def _own_split(items: list[Item]) -> tuple[list[Item], list[str]]:
    """Each item on its side, if the folders say so; what is on neither side is left out.

    Held out is what lies in a folder named test, or, where there is none, val (valid, validation). To learn from is
    what lies in a folder named train, or, where there is none, everything else. The outermost such folder counts.
    """
    side_of = {
        folder: next((SIDES[part.lower()] for part in folder.split("/") if part.lower() in SIDES), "")
        for folder in set(map(_folder, items))
    }
    sides = [side_of[_folder(item)] for item in items]
    held = "test" if "test" in sides else "val"
    train = "train" if "train" in sides else ""
    if held not in sides or train not in sides:
        return items, []
    kept = [
        Item(item.name, item.open, item.where, own == held, item.label)
        for own in (train, held)  # as the division wants them, which then has nothing to move
        for item, side in zip(items, sides, strict=True)
        if side == own
    ]
    left_out = len(items) - len(kept)
    return kept, [f"left out {left_out:,} images on neither side of its own split"] if left_out else []


def _classes(items: list[Item]) -> tuple[tuple[str, ...] | None, NDArray[np.int64] | None]:
    """Classes from metadata; or the folders that hold images, if every image is in one, none holds another, and there
    are two."""
    if items[0].label is not None:
        return numbered([str(item.label) for item in items])
    split = items[0].held_out is not None
    parts_of = {
        folder: tuple(part for part in folder.split("/") if part and not (split and part.lower() in SIDES))
        for folder in set(map(_folder, items))
    }
    own = set(parts_of.values())
    if () in own or not {parts[:-1] for parts in own}.isdisjoint(own):
        return None, None
    classes = sorted({parts[-1] for parts in own})
    if len(classes) < 2:
        return None, None
    index = {name: label for label, name in enumerate(classes)}
    return tuple(map(printable, classes)), np.array([index[parts_of[_folder(item)][-1]] for item in items])


def _folder(item: Item) -> str:
    return item.name.rpartition("/")[0]


def _attempt(work: Callable[[BinaryIO], T], items: Sequence[Item]) -> Iterator[T | Bad]:
    for item in items:
        try:
            with item.open(item.where) as file:
                made: T | Bad = work(file)
        except MemoryError:
            raise
        except Exception as error:  # a damaged or hostile file can raise nearly anything
            made = Bad(item.name, reason(error))
        yield made


def _common(headers: Sequence[Header]) -> tuple[int, int]:
    """The width and height to bring all images to."""
    if len({header[:2] for header in headers}) == 1:
        return headers[0][:2]
    side = 64 if headers and median(min(header[:2]) for header in headers) >= 64 else 32
    return side, side
