"""Progress on stderr: a bar with ETA on a terminal, a plain line now and then elsewhere."""

import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
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
        self.tasks: dict[str, int] = {}
        self.began: dict[str, tuple[float, int]] = {}
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
        """`what` is at `done` of `of`; called as often as one likes."""
        if self.console.is_terminal:
            if what not in self.tasks:
                self.tasks[what] = self.bar.add_task(escape(what), total=of, note="")
            self.bar.update(self.tasks[what], completed=done, total=of, note=escape(note))  # type: ignore[arg-type]
            return
        now = time.monotonic()
        began, first = self.began.setdefault(what, (now, done))
        if now - self.said >= EVERY and done > first and not self.quiet:
            self.said = now
            left = (now - began) / (done - first) * (of - done)
            print(f"{what}: {done:,} of {of:,}, {left:.0f} s left {note}".rstrip(), file=sys.stderr, flush=True)  # noqa: T201
