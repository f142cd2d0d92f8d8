"""Work over the cores there are."""

import gc
import mmap
import os
import pickle
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Generic, TypeVar

from ancestral.data.machine import usable_cores

S = TypeVar("S")
T = TypeVar("T")

AHEAD = 2  # results that a process may have made and nobody has read
ROOM = 2**21  # bytes of arrays of one result that its reader finds in shared memory; what exceeds them is sent
ALIGNED = 64  # bytes


def spread(work: Callable[[S], T], parts: Sequence[S]) -> Iterator[T]:
    """What `work` makes of each part, in their order, from as many processes as there are cores.

    The processes are forks, which have the parts without being sent them and end when nobody reads what they make; to
    decode a small image takes more of Python than of the decoder, which threads cannot share. Where forking is not
    safe they are threads, and on one core there is neither.

    An array in a result is the reader's until the next result is asked for: its memory is used again.

    Raises:
        MemoryError: if a process ends before its work does, as the system ends those for which it has no memory.
    """
    n = min(usable_cores(), len(parts))
    if n <= 1:
        yield from map(work, parts)
    elif sys.platform == "linux":
        children: list[_Child[T]] = []
        try:
            for k in range(n):
                children.append(_Child(work, parts[k::n], children))
            for k in range(len(parts)):
                yield children[k % n].result()
        finally:
            for child in children:
                child.end()
    else:
        with ThreadPoolExecutor(n) as pool:
            try:
                yield from pool.map(work, parts)
            finally:
                pool.shutdown(cancel_futures=True)


class _Child(Generic[T]):
    """A process that works on its parts, `AHEAD` of what is asked for, and the pipes and the memory it is read by.

    Args:
        work: what it does.
        parts: what to, one after the other.
        others: the children before it, whose pipes are not its own.
    """

    def __init__(self, work: Callable[[S], T], parts: Sequence[S], others: "Sequence[_Child[T]]") -> None:
        self.room, self.count = mmap.mmap(-1, AHEAD * ROOM), 0
        read, write = os.pipe()
        asked, ask = os.pipe()
        self.results, self.ask = os.fdopen(read, "rb"), os.fdopen(ask, "wb", buffering=0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of threads, whose locks a child does not ask for
            self.process = os.fork()
        if self.process == 0:
            for child in (*others, self):
                child.close()
            self.serve(work, parts, asked, write)
        os.close(asked)
        os.close(write)

    def result(self) -> T:
        """The next, as it comes; its arrays lie where the process writes again once the one after it is asked for."""
        slot = self.slot()
        if self.count > 1:
            with suppress(OSError):  # it may be done with everything
                self.ask.write(b".")
        try:
            places = pickle.load(self.results)
            result: T = pickle.load(self.results, buffers=[slot[start:stop] for start, stop in places])
        except (EOFError, pickle.UnpicklingError):
            raise MemoryError("a process ended before its work did") from None
        return result

    def slot(self) -> memoryview:
        """Where the arrays of the next result are."""
        start = self.count % AHEAD * ROOM
        self.count += 1
        return memoryview(self.room)[start : start + ROOM]

    def serve(self, work: Callable[[S], T], parts: Sequence[S], asked: int, write: int) -> None:
        """The life of the process; it leaves without a word, and without what its parent would do at the end."""
        with suppress(BaseException), os.fdopen(write, "wb") as results:
            gc.freeze()  # what the parent has is not looked through again
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_DFL)
            for part in parts:
                made, slot = work(part), self.slot()
                if self.count > AHEAD and not os.read(asked, 1):
                    break  # nobody is there to ask
                places, rest = _placed(made, slot)
                pickle.dump(places, results, pickle.HIGHEST_PROTOCOL)
                results.write(rest)
                results.flush()
        os._exit(0)

    def close(self) -> None:
        """The parent's ends of the pipes."""
        self.results.close()
        self.ask.close()

    def end(self) -> None:
        """End the process, if it has not ended."""
        os.kill(self.process, signal.SIGKILL)
        os.waitpid(self.process, 0)
        self.close()


def _placed(made: object, slot: memoryview) -> tuple[list[tuple[int, int]], bytes]:
    """Where the arrays of a result were put, those that there was room for, and the pickle of all else."""
    places: list[tuple[int, int]] = []

    def put(array: pickle.PickleBuffer) -> bool:
        start = -(-places[-1][1] // ALIGNED) * ALIGNED if places else 0
        content = array.raw()
        stop = start + content.nbytes
        if stop > len(slot):
            return True  # pickled with all else
        slot[start:stop] = content
        places.append((start, stop))
        return False

    return places, pickle.dumps(made, pickle.HIGHEST_PROTOCOL, buffer_callback=put)
