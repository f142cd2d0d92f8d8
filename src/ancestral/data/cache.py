"""Decoded images on the disk, so that they are decoded once: named by content, verified when read, mapped into memory.

CACHE/KEY/
  x.npy            the images, those to learn from first
  record.json      labels, classes, files, and what is to be said
  manifest.json    SHA-256 of both

A key is a hash of every file's name and bytes and of how they are read. A folder appears whole, by a rename; one that
does not verify is made again. Nothing here can execute.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ancestral.data.dataset import Examples, File, held_out_by_content

VERSION = 1  # of how pixels come about
CHUNK = 2**20  # bytes that are written at a time


def digest(file: BinaryIO) -> str:
    """A hash of the bytes of a file."""
    return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]  # whatever is opened has readinto


def key_of(files: Iterable[tuple[str, str]], how: object) -> str:
    """The key of files, given as name and digest, that are read in this way."""
    whole = hashlib.sha256(json.dumps([VERSION, how]).encode())
    for name, own in sorted(files):
        whole.update(f"{len(name)}:{name}{own}".encode("utf-8", "surrogateescape"))
    return whole.hexdigest()[:32]


def find(root: Path, key: str) -> Examples | None:
    """The examples under this key, mapped into memory, if they are there and whole."""
    folder = root / key
    try:
        manifest = json.loads((folder / "manifest.json").read_bytes())
        for name in ("x.npy", "record.json"):
            with (folder / name).open("rb") as file:
                if digest(file) != manifest[name]:
                    return None
        record = json.loads((folder / "record.json").read_bytes())
        x = np.load(folder / "x.npy", mmap_mode="c", allow_pickle=False)  # written to in memory, never on the disk
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return Examples(
        x=x,
        levels=record["levels"],
        labels=None if record["labels"] is None else np.array(record["labels"], dtype=np.int64),
        classes=None if record["classes"] is None else tuple(record["classes"]),
        held_out=np.arange(len(x)) >= record["n_train"],
        files=tuple(File(*file) for file in record["files"]),
        bad=tuple(record["bad"]),
        notes=tuple(record["notes"]),
    )


def keep(root: Path, key: str, examples: Examples) -> None:
    """Write decoded images under this key.

    Raises:
        OSError: if that cannot be done; nothing is left behind.
        DataError: if the examples cannot be divided.
    """
    held_out = held_out_by_content(examples.x) if examples.held_out is None else examples.held_out
    order = np.argsort(held_out, kind="stable")
    record = {
        "levels": examples.levels,
        "labels": None if examples.labels is None else examples.labels[order].tolist(),
        "classes": examples.classes,
        "n_train": int((~held_out).sum()),
        "files": [(examples.files or ())[k] for k in order],
        "bad": examples.bad,
        "notes": examples.notes,
    }
    root.mkdir(parents=True, exist_ok=True)
    temporary = root / f".{key}-{os.getpid()}"
    try:
        temporary.mkdir()
        with (temporary / "x.npy").open("wb") as file:
            header = {"descr": examples.x.dtype.str, "fortran_order": False, "shape": examples.x.shape}
            np.lib.format.write_array_header_1_0(file, header)
            step = max(1, CHUNK // examples.x[0].nbytes)
            for start in range(0, len(order), step):
                file.write(examples.x[order[start : start + step]].tobytes())
        (temporary / "record.json").write_text(json.dumps(record))
        manifest = {}
        for name in ("x.npy", "record.json"):
            with (temporary / name).open("rb") as file:
                manifest[name] = digest(file)
                os.fsync(file.fileno())
        (temporary / "manifest.json").write_text(json.dumps(manifest))
        shutil.rmtree(root / key, ignore_errors=True)  # one that did not verify
        temporary.rename(root / key)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
