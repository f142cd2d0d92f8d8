"""Work over the cores there are."""

import gc
import os
import pickle
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import BinaryIO, TypeVar

from ancestral.data.machine import usable_cores

S = TypeVar("S")
T = TypeVar("T")


def spread(work: Callable[[S], T], parts: Sequence[S]) -> Iterator[T]:
    """What `work` makes of each part, in their order, from as many processes as there are cores.

    The processes are forks, which have the parts without being sent them and end when nobody reads what they make; to
    decode a small image takes more of Python than of the decoder, which threads cannot share. Where forking is not
    safe they are threads, and on one core there is neither.

    Raises:
        MemoryError: if a process ends before its work does, as the system ends those for which it has no memory.
    """
    n = min(usable_cores(), len(parts))
    if n <= 1:
        yield from map(work, parts)
    elif sys.platform == "linux":
        yield from _forked(work, parts, n)
    else:
        with ThreadPoolExecutor(n) as pool:
            try:
                yield from pool.map(work, parts)
            finally:
                pool.shutdown(cancel_futures=True)


def _forked(work: Callable[[S], T], parts: Sequence[S], n: int) -> Iterator[T]:
    pipes: list[BinaryIO] = []
    children: list[int] = []
    try:
        for k in range(n):
            read, write = os.pipe()
            pipes.append(os.fdopen(read, "rb"))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # of threads, whose locks a child does not ask for
                child = os.fork()
            if child == 0:
                _serve(work, parts[k::n], pipes, write)
            os.close(write)
            children.append(child)
        for k in range(len(parts)):
            try:
                yield pickle.load(pipes[k % n])
            except (EOFError, pickle.UnpicklingError):
                raise MemoryError("a process ended before its work did") from None
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        for pipe in pipes:
            pipe.close()


def _serve(work: Callable[[S], T], parts: Sequence[S], pipes: list[BinaryIO], write: int) -> None:
    """The life of a child; it leaves without a word, and without what its parent would do at the end."""
    with suppress(BaseException):
        gc.freeze()  # what the parent has is not looked through again
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        for pipe in pipes:
            pipe.close()
        with os.fdopen(write, "wb") as file:
            for part in parts:
                pickle.dump(work(part), file, pickle.HIGHEST_PROTOCOL)
                file.flush()
    os._exit(0)
