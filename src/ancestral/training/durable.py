"""Files and folders that appear whole or not at all, and can be verified when they are read.

Everything is written under a temporary name beside the target, flushed to the disk, and renamed last; the folder that
holds it is flushed after that. Killed at any moment, a writer leaves the old state or the new one, and perhaps a
temporary name, which `sweep` removes. Every folder holds a manifest with the size and SHA-256 of each of its files.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ancestral.errors import NoSpace

MANIFEST = "manifest.json"
Writer = Callable[[Path], None]

_MARK = ".partial"


def write(path: Path, data: bytes) -> None:
    """Write a file so that it is either the old one or the whole new one.

    Raises:
        NoSpace: if the disk is full; the old file is kept.
    """
    temporary = _temporary(path)
    try:
        temporary.write_bytes(data)
        flush(temporary)
        temporary.replace(path)
        flush(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise _told(error, path) from error


def write_json(path: Path, record: Any) -> None:
    """Write JSON as `write` does."""
    write(path, json.dumps(record, indent=2).encode() + b"\n")


def write_folder(path: Path, files: Mapping[str, Writer], *, unlisted: Mapping[str, Writer] | None = None) -> Path:
    """Write a folder of files and their manifest, in place of a folder of that name if there is one.

    Args:
        path: of the folder.
        files: name -> function that writes it to the path it is given.
        unlisted: the same for files that may be edited and are not in the manifest.

    Raises:
        NoSpace: if the disk is full; what was there before is kept.
    """
    temporary, aside = _temporary(path), path.with_name(f"{path.name}.old{_MARK}-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        for name, writer in {**(unlisted or {}), **files}.items():
            writer(temporary / name)
            flush(temporary / name)
        manifest = {name: _fingerprint(temporary / name) for name in files}
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
        for name in files:
            shutil.copymode(temporary / MANIFEST, temporary / name)  # libraries may write for the owner alone
        flush(temporary / MANIFEST)
        flush(temporary)
        if path.exists():
            path.rename(aside)
        temporary.rename(path)
        flush(path.parent)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise _told(error, path) from error
    shutil.rmtree(aside, ignore_errors=True)
    return path


def fault(folder: Path, needed: set[str]) -> str | None:
    """What is wrong with a folder that needs these files and their manifest, naming the file; None if nothing."""
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        entries = {name: (entry["size"], entry["sha256"]) for name, entry in manifest.items()}
    except FileNotFoundError:
        return f"{folder / MANIFEST}: missing"
    except (ValueError, TypeError, KeyError, AttributeError):
        return f"{folder / MANIFEST}: damaged"
    if not needed <= set(entries):
        return f"{folder / MANIFEST}: damaged, it does not list {', '.join(sorted(needed - set(entries)))}"
    for name, (size, digest) in entries.items():
        if not (folder / name).is_file():
            return f"{folder / name}: missing"
        if _fingerprint(folder / name) != {"size": size, "sha256": digest}:
            return f"{folder / name}: does not match its checksum, it was changed or damaged"
    return None


def sweep(folder: Path) -> None:
    """Remove what killed writers left in a folder and the folders in it; nobody else may be writing there."""
    for path in [*folder.glob(f"*{_MARK}-*"), *folder.glob(f"*/*{_MARK}-*")]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}{_MARK}-{os.getpid()}")


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def flush(path: Path) -> None:
    """Make a file's bytes durable, or the names in a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _told(error: OSError, path: Path) -> Exception:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return NoSpace(f"{path}: no space left on the disk; what was saved before it is whole")
    return error
