"""How a command speaks and ends: lines, one JSON object, sentences for failures with their exit codes, and signals."""

import contextlib
import errno
import json
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator
from typing import Any

import typer

from ancestral.errors import AncestralError, RunWarning


class Sayer:
    """Says lines on stdout, or on stderr when stdout is for JSON, and into the log of a run that is being made."""

    def __init__(self, as_json: bool, run: Any = None, quiet: bool = False) -> None:
        self.stream, self.run, self.quiet = sys.stderr if as_json else sys.stdout, run, quiet

    def __call__(self, line: str) -> None:
        if self.quiet:
            return
        print(line, file=self.stream, flush=True)
        if self.run is not None:
            self.run.log(line)


@contextlib.contextmanager
def guarded(as_json: bool, debug: bool) -> Iterator[None]:
    """Turns what goes wrong into one sentence on stderr and the exit code that stands for it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always", RunWarning)
            warnings.showwarning = lambda message, *_, **__: print(f"note: {message}", file=sys.stderr)  # noqa: T201
            yield
    except KeyboardInterrupt:
        _fail("stopped; what was saved is whole", 3, as_json)
    except AncestralError as error:
        if debug:
            traceback.print_exc()
        _fail(" ".join(str(error).split()), error.exit_code, as_json)
    except OSError as error:
        if debug:
            traceback.print_exc()
        full = error.errno == errno.ENOSPC
        _fail(f"{error.filename or 'the disk'}: {error.strerror or error}", 4 if full else 2, as_json)
    except Exception as error:
        if debug:
            raise
        _fail(f"a bug in ancestral: {type(error).__name__}: {error} (--debug shows where)", 1, as_json)


def _fail(sentence: str, code: int, as_json: bool) -> None:
    if code != 1 and os.environ.get("RANK", "0") != "0":
        raise typer.Exit(code)  # every process says the same: the first one says it
    raise typer.Exit(say_failure(sentence, code, as_json))


def say_failure(sentence: str, code: int, as_json: bool) -> int:
    """Say on stderr what is wrong, and as an object if that was asked for; the code is returned."""
    print(f"ancestral: {sentence}", file=sys.stderr)  # noqa: T201
    if as_json:
        print_json(error=sentence, exit_code=code)
    return code


def print_json(**record: Any) -> None:
    """One object on stdout."""
    print(json.dumps(record))  # noqa: T201


class Asked:
    """Whether a signal has asked this process to stop. At first that is at once; when patient, after a step."""

    def __init__(self) -> None:
        self.once, self.words = False, ""

    def patiently(self, words: str) -> None:
        """From now on the first signal only asks, and says these words; the second stops at once."""
        self.words = words

    def __call__(self, number: int, frame: Any) -> None:
        if self.once or not self.words:
            raise KeyboardInterrupt
        self.once = True
        print(f"\nancestral: {self.words}", file=sys.stderr, flush=True)  # noqa: T201


@contextlib.contextmanager
def signals() -> Iterator[Asked]:
    """Ctrl-C and SIGTERM ask to stop."""
    asked, numbers = Asked(), (signal.SIGINT, signal.SIGTERM)
    previous = {number: signal.getsignal(number) for number in numbers}
    for number in numbers:
        signal.signal(number, asked)
    try:
        yield asked
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
