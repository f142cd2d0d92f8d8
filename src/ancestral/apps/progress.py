"""Progress on stderr: a bar with ETA on a terminal, a plain line now and then elsewhere."""

import sys
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

EVERY = 10.0
"""Seconds between plain lines."""


class Progress:
    """What is being done and how much of it, with the time that is left; nothing where another process speaks."""

    def __init__(self, quiet: bool = False) -> None:
        self.console, self.quiet = Console(stderr=True, quiet=quiet), quiet
        self.bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=self.console,
            transient=True,
        )
        self.tasks: dict[str, Task] = {}
        self.said = time.monotonic()

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.console.is_terminal:
            self.bar.stop()

    def update(self, what: str, done: int, of: int, note: str = "") -> None:
        """`what` is at `done` of `of`; called as often as one likes. With less done than before it begins again."""
        now, task = time.monotonic(), self.tasks.get(what)
        if task is None or done < task.done:
            task = self.tasks[what] = Task(now, done, done, self._shown(what, of, task))
        task.done = done
        if task.bar is not None:
            self.bar.update(task.bar, completed=done, total=of, note=escape(note))
        elif now - self.said >= EVERY and done > task.first and not self.quiet:
            self.said = now
            left = (now - task.began) / (done - task.first) * (of - done)
            print(f"{what}: {done:,} of {of:,}, {span(left)} left {note}".rstrip(), file=sys.stderr, flush=True)  # noqa: T201

    def _shown(self, what: str, of: int, before: "Task | None") -> TaskID | None:
        """The bar of a task that begins, on a terminal."""
        if not self.console.is_terminal:
            return None
        if before is None or before.bar is None:
            return self.bar.add_task(escape(what), total=of, note="")
        self.bar.reset(before.bar, total=of)
        return before.bar


@dataclass
class Task:
    """What is under way: since when, how much was done then and is done now, and where it is shown on a terminal."""

    began: float
    first: int
    done: int
    bar: TaskID | None


def span(seconds: float) -> str:
    """A time as a person says it.

    Example:
        >>> span(42.4), span(150), span(5400)
        ('42 s', '2 min 30 s', '1 h 30 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
