"""Zip and tar archives of images: read where they are, and not trusted with a name, a size or a count."""

import gzip
import os
import stat
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import IO, BinaryIO

from ancestral.data.dataset import Examples, printable
from ancestral.data.images import Bad, Item, Reading, is_wanted, read_items, reason
from ancestral.errors import DataError

Bytes = IO[bytes] | gzip.GzipFile

MAX_MEMBER = 2**28  # bytes of one member
MAX_MEMBERS = 2_000_000  # of one archive
MAX_DECLARED = 2**36  # bytes that the members of one archive unpack to
MAX_HEADER = 2**20  # bytes of what stands before a member of a tar archive
MAX_HELD = 2**30  # bytes of images of a gzipped tar archive, which are kept packed in memory
MAX_RATIO = 200  # by which more than MODEST bytes may exceed a gzipped tar archive
MODEST = 2**28


def read_archive(path: Path, reading: Reading) -> Examples:
    """All images in a zip or tar archive, under the rules of a folder of images; nothing is unpacked to disk.

    Raises:
        DataError: if the archive is damaged, holds a member that points outside it, or is out of bounds; and as
            `images.read_folder` does.
    """
    return _read_zip(path, reading) if path.suffix.lower() == ".zip" else _read_tar(path, reading)


def _read_zip(path: Path, reading: Reading) -> Examples:
    try:
        archive = zipfile.ZipFile(path)
    except Exception as error:  # a damaged directory surfaces as nearly anything
        raise _damaged(reading, "zip", error) from None
    with archive:
        members = archive.infolist()
        _check_count(reading, len(members), sum(member.file_size for member in members))
        lock, owner = threading.Lock(), [os.getpid()]  # members share one file position

        def opened(member: zipfile.ZipInfo) -> BinaryIO:
            _check_member(member.file_size)
            with lock:
                if owner != [os.getpid()]:  # and so would processes that are forked
                    archive.fp, owner[0] = path.open("rb"), os.getpid()
                return BytesIO(archive.read(member))

        items = []
        for member in members:
            name = _safe_name(reading, member.filename, link=stat.S_ISLNK(member.external_attr >> 16))
            if not member.is_dir() and is_wanted(name):
                items.append(Item(name, opened, member))
        return read_items(reading, items)


def _read_tar(path: Path, reading: Reading) -> Examples:
    """A plain archive is read member by member where it lies; of a gzipped one, the images are kept as files."""
    packed = path.suffix.lower() != ".tar"
    limit = max(MODEST, MAX_RATIO * path.stat().st_size) if packed else MAX_DECLARED
    items, held = [], 0
    with gzip.open(path) if packed else path.open("rb") as file:
        part = partial(_part, path)
        for member in _members(reading, file, limit):
            name = _safe_name(reading, member.name, link=member.issym() or member.islnk())
            if not member.isreg() or not is_wanted(name):
                continue
            if member.issparse() or member.size > MAX_MEMBER:
                items.append(Item(name, _refuse, member.size))
            elif not packed:
                items.append(Item(name, part, (member.offset_data, member.size)))
            else:
                held += member.size
                if held > MAX_HELD:
                    raise DataError(
                        f"{reading.where}: holds more than {MAX_HELD:,} bytes of images: unpack it, or pack it as .tar"
                    )
                try:
                    file.seek(member.offset_data)
                    items.append(Item(name, BytesIO, file.read(member.size)))
                except Exception as error:  # the packing is damaged
                    reading.reject(Bad(name, reason(error)))
    return read_items(reading, items)


def _members(reading: Reading, file: Bytes, limit: int) -> Iterator[tarfile.TarInfo]:
    """The members of a tar archive, as far as it is whole; where damage hides the rest, that is said."""
    count = declared = 0
    try:
        archive = tarfile.TarFile(fileobj=_Headers(file))  # type: ignore[arg-type]
    except Exception as error:
        raise _damaged(reading, "tar", error) from None
    while True:
        try:
            member = archive.next()
            archive.members.clear()  # type: ignore[attr-defined]  # they are not needed again
            if member is None:
                file.seek(archive.offset)
                if any(file.read(tarfile.BLOCKSIZE)):  # tarfile takes a damaged header for the end
                    raise ValueError("a damaged header")
                return
        except Exception as error:
            reading.reject(Bad("archive", f"damaged after {count:,} members, the rest is lost ({reason(error)})"))
            return
        count, declared = count + 1, declared + member.size
        _check_count(reading, count, declared, limit)
        yield member


class _Headers:
    """A file of which only headers are read, so that none can claim to be longer than any is."""

    def __init__(self, file: Bytes) -> None:
        self.file, self.seek, self.tell = file, file.seek, file.tell

    def read(self, size: int) -> bytes:
        if size > MAX_HEADER:
            raise ValueError(f"a header of {size:,} bytes")
        return self.file.read(size)


def _part(path: Path, place: tuple[int, int]) -> BinaryIO:
    offset, size = place
    with path.open("rb") as file:
        file.seek(offset)
        return BytesIO(file.read(size))


def _refuse(size: int) -> BinaryIO:
    _check_member(size)
    raise ValueError("stored with holes")


def _check_member(size: int) -> None:
    if size > MAX_MEMBER:
        raise ValueError(f"{size:,} bytes, at most {MAX_MEMBER:,} are read")


def _check_count(reading: Reading, count: int, declared: int, limit: int = MAX_DECLARED) -> None:
    limit = min(limit, MAX_DECLARED)
    if count > MAX_MEMBERS:
        raise DataError(f"{reading.where}: holds {count:,} members, at most {MAX_MEMBERS:,} are read")
    if declared > limit:
        raise DataError(f"{reading.where}: unpacks to {declared:,} bytes, at most {limit:,} are read")


def _damaged(reading: Reading, kind: str, error: Exception) -> DataError:
    return DataError(f"{reading.where}: damaged, or no {kind} archive ({reason(error)}): pack it again")


def _safe_name(reading: Reading, name: str, *, link: bool) -> str:
    """The path of a member below the root, with "/"; whatever would leave the archive is refused."""
    plain = name.replace("\\", "/")
    parts = plain.split("/")
    if plain.startswith("/") or parts[0].endswith(":") or ".." in parts or link:
        raise DataError(
            f"{reading.where}: member {printable(name[:200])!r} points outside the archive, which is refused: "
            "pack it again with plain relative names and no links"
        )
    return "/".join(part for part in parts if part not in ("", "."))
