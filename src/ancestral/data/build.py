"""Images that are being decoded, kept on the disk as they come, so that what is interrupted is gone on with.

FOLDER/
  pixels           the images so far, one behind the other
  files.jsonl      the size they are brought to, then for each file what was decoded, or why it cannot be read; a line
                   is a list of what was made durable together
"""

import json
import os
import shutil
import time
from array import array
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from ancestral.data.dataset import content_key
from ancestral.data.pixels import Entry, Header, coloured

EVERY = 1.0  # seconds of work that a kill may cost
BUFFER = 2**20  # bytes that are written at a time


class Build:
    """A folder of images that one process at a time works on; others wait to enter.

    It takes images as `pixels.Stack` does, in the memory of one. It is removed if the disk cannot be written, and kept
    whatever else interrupts.

    Args:
        folder: where they are kept.

    Attributes:
        target: width and height of the images that are there already, or None.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.target: tuple[int, int] | None = None
        self.channels, self.keys, self.colour = array("B"), array("Q"), False
        self.waiting: list[Any] = []
        self.committed = 0.0

    def __enter__(self) -> Self:
        self._lock()
        self.pixels = (self.folder / "pixels").open("ab", buffering=BUFFER)
        self.journal = (self.folder / "files.jsonl").open("ab")
        done, end = self._journal()
        size = 0
        if done:
            width, height = self.target = (done[0][0], done[0][1])
            size = width * height * sum(found[3] for found in done[1:] if not isinstance(found, str))
        if size > self.pixels.tell():
            self.target, end, size = None, 0, 0
        self.journal.truncate(end)
        self.pixels.truncate(size)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not isinstance(error, OSError):
            self._commit()
        for file in (self.pixels, self.journal):
            with suppress(OSError):
                file.close()
        if isinstance(error, OSError):
            self.remove()
        self.lock.release()

    def _lock(self) -> None:
        self.lock = FileLock(self.folder / ".lock")
        while True:
            self.folder.mkdir(parents=True, exist_ok=True)
            with suppress(FileNotFoundError):  # whoever had it was done, and has removed the folder
                self.lock.acquire()
                if (self.folder / ".lock").exists():
                    return
                self.lock.release()

    def remove(self) -> None:
        """Give the space back."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def begin(self, capacity: int, width: int, height: int) -> list[Header | str]:
        """What came of each file so far; nothing, if that was of another size."""
        if self.target != (width, height):
            self.target, self.waiting = (width, height), [(width, height)]
            self.journal.truncate(0)
            self.pixels.truncate(0)
        self._commit()
        done = self._journal()[0][1:]
        there = [found for found in done if not isinstance(found, str)]
        self.channels, self.keys = array("B", (found[3] for found in there)), array("Q", (found[4] for found in there))
        self.colour = 3 in self.channels
        return [found if isinstance(found, str) else Header(*found[:3]) for found in done]

    def add(self, entry: Entry | str) -> None:
        """Take the next image, or why a file cannot be read."""
        if isinstance(entry, str):
            self.waiting.append(entry)
        else:
            header, key, image = coloured(entry) if self.colour else entry
            self.colour = len(image) == 3
            self.waiting.append([*header, len(image), key])
            self.channels.append(len(image))
            self.keys.append(key)
            self.pixels.write(image.data)
        if time.monotonic() - self.committed >= EVERY:
            self._commit()

    def _journal(self) -> tuple[list[Any], int]:
        """What is in the journal, of lines that are whole, and how many bytes those take."""
        done, end = [], 0
        with suppress(ValueError):  # one that was cut short
            for line in (self.folder / "files.jsonl").read_bytes().splitlines(keepends=True):
                done += json.loads(line)
                end += len(line)
        return done, end

    def _commit(self) -> None:
        """Make durable what was taken: a line is written when the pixels that it speaks of are."""
        self.pixels.flush()
        os.fsync(self.pixels.fileno())
        if self.waiting:
            self.journal.write(json.dumps(self.waiting).encode() + b"\n")
            self.journal.flush()
        self.waiting, self.committed = [], time.monotonic()

    def finished(self) -> tuple[NDArray[np.uint8], Sequence[int]]:
        """All images, shape (N, C, H, W), mapped into memory, and the 64 bits of the content of each."""
        self._commit()
        (width, height), path = self.target or (1, 1), self.folder / "pixels"
        if len(set(self.channels)) > 1:  # grey ones before the first in colour
            path = self._widened(width * height)
        x = np.memmap(path, dtype=np.uint8, mode="r")
        return x.reshape(len(self.keys), max(self.channels), height, width), self.keys

    def _widened(self, size: int) -> Path:
        """A file of the images with three channels each; the keys change with them."""
        with (self.folder / "pixels").open("rb") as narrow, (self.folder / "wide").open("wb") as wide:
            for k, n in enumerate(self.channels):
                image = narrow.read(n * size)
                if n == 1:
                    image *= 3
                    self.keys[k] = self.keys[k] and content_key(np.frombuffer(image, dtype=np.uint8))
                wide.write(image)
        return self.folder / "wide"
