"""Decoded images on the disk, so that they are decoded once: named by content, verified when read, mapped into memory.

CACHE/KEY/
  x.npy            the images, those to learn from first
  record.json      labels, classes, files, and what is to be said
  manifest.json    SHA-256 of the images with their labels, and of record.json
CACHE/KEY.partial/ the same while it is being made (`build`)

A key is a hash of every file's name and bytes and of how they are read. A folder appears whole, by a rename; one that
does not verify is made again. Nothing here can execute.
"""

import hashlib
import json
import mmap
import os
import shutil
import sys
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray

from ancestral.data.build import Build
from ancestral.data.dataset import Examples, File, digest_of

VERSION = 3  # of how pixels come about and are kept
CHUNK = 2**20  # bytes that are written at a time


def digest(file: BinaryIO) -> str:
    """A hash of the bytes of a file."""
    return hashlib.sha256(file.read()).hexdigest()


class Key:
    """The key of files: they are added by name and digest, in the order of their names."""

    def __init__(self) -> None:
        self.whole = hashlib.sha256()

    def add(self, name: str, digest: str) -> None:
        """One more."""
        self.whole.update(f"{len(name)}:{name}{digest}".encode("utf-8", "surrogateescape"))

    def read_as(self, how: object) -> str:
        """The key of all that were added, read in this way."""
        self.whole.update(json.dumps([VERSION, how]).encode())
        return self.whole.hexdigest()[:32]


def find(root: Path, key: str) -> Examples | None:
    """The examples under this key, mapped into memory, if they are there and whole."""
    folder = root / key
    try:
        manifest = json.loads((folder / "manifest.json").read_bytes())
        with (folder / "record.json").open("rb") as file:
            if digest(file) != manifest["record.json"]:
                return None
        examples = _opened(folder)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return examples if examples.digest == manifest["x.npy"] else None


def _opened(folder: Path) -> Examples:
    """The examples of a folder, and their digest as it is."""
    record = json.loads((folder / "record.json").read_bytes())
    x, n_train = _mapped(folder / "x.npy"), record["n_train"]
    labels = None if record["labels"] is None else np.array(record["labels"], dtype=np.int64)
    sides = slice(None, n_train), slice(n_train, None)
    parts = [None if whole is None else torch.from_numpy(whole[side]) for whole in (x, labels) for side in sides]
    return Examples(
        x=x,
        levels=record["levels"],
        labels=labels,
        classes=None if record["classes"] is None else tuple(record["classes"]),
        held_out=np.arange(len(x)) >= n_train,
        files=tuple(map(File, *record["files"])),
        bad=tuple(record["bad"]),
        notes=tuple(record["notes"]),
        digest=digest_of(*parts),
    )


def _mapped(path: Path) -> NDArray[np.uint8]:
    """An array that is written to in memory and never on the disk, whether memory could hold all of it or not."""
    if sys.platform != "linux":
        return np.load(path, mmap_mode="c", allow_pickle=False)
    with path.open("rb") as file:
        np.lib.format.read_magic(file)
        shape, _, _ = np.lib.format.read_array_header_1_0(file)
        # By itself the system refuses to map more than it could hold if all of it were written to.
        flags = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0x4000)
        pages = mmap.mmap(file.fileno(), 0, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        return np.frombuffer(pages, dtype=np.uint8, offset=file.tell()).reshape(shape)


def keep(root: Path, key: str, build: Build, examples: Examples) -> Examples:
    """Write decoded images under this key, and give them back as they are mapped from there.

    Args:
        root: of the cache.
        key: of the entry.
        build: where they were decoded to.
        examples: what they came to, with the side of each.

    Raises:
        OSError: if that cannot be done.
    """
    assert examples.held_out is not None
    order = np.argsort(examples.held_out, kind="stable")
    record = {
        "levels": examples.levels,
        "labels": None if examples.labels is None else examples.labels[order].tolist(),
        "classes": examples.classes,
        "n_train": int((~examples.held_out).sum()),
        "files": list(zip(*((examples.files or ())[k] for k in order), strict=True)),
        "bad": examples.bad,
        "notes": examples.notes,
    }
    whole = build.folder / "whole"
    shutil.rmtree(whole, ignore_errors=True)
    whole.mkdir()
    with (whole / "x.npy").open("wb") as file:
        header = {"descr": examples.x.dtype.str, "fortran_order": False, "shape": examples.x.shape}
        np.lib.format.write_array_header_1_0(file, header)
        step = max(1, CHUNK // examples.x[0].nbytes)
        for start in range(0, len(order), step):
            file.write(examples.x[order[start : start + step]].data)
        file.flush()
        os.fsync(file.fileno())
    (whole / "record.json").write_text(json.dumps(record))
    kept = _opened(whole)
    with (whole / "record.json").open("rb") as own:
        manifest: dict[str, Any] = {"x.npy": kept.digest, "record.json": digest(own)}
        os.fsync(own.fileno())
    (whole / "manifest.json").write_text(json.dumps(manifest))
    shutil.rmtree(root / key, ignore_errors=True)  # one that did not verify
    whole.rename(root / key)
    return kept
