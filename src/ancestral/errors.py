"""Every error a user can meet, as one tree.

    AncestralError
    ├── UserError            exit code 2: the input or an option is wrong, nothing was written
    │   ├── DataError        a file, folder or array cannot be used; the sentence names it
    │   ├── OptionError      a value outside what is allowed; the sentence names the close match
    │   └── RunError         a run directory or checkpoint is missing, foreign or damaged
    ├── Lost                 exit code 1: another process of the job has died
    ├── Stopped              exit code 3: stopped by a signal, what was done is kept
    ├── NoSpace              exit code 4: the disk is full, what was done before is kept
    ├── Diverged             exit code 5: training diverged, the last good checkpoint is named
    └── Refused              exit code 6: something that `certify` graded did not pass, and it has said why

    RunWarning               a damaged checkpoint was passed over for an earlier one

A message is one sentence: what was received and where, what is allowed, what to type next.
"""

from collections.abc import Iterable
from difflib import get_close_matches


class AncestralError(Exception):
    """Base of all errors raised on purpose; `exit_code` is what the command returns."""

    exit_code = 1


class UserError(AncestralError):
    """The input or an option is wrong; nothing was written."""

    exit_code = 2


class DataError(UserError):
    """A file, folder or array cannot be used."""


class OptionError(UserError, ValueError):
    """A value outside what is allowed."""


class RunError(UserError):
    """A run directory or checkpoint is missing, foreign or damaged."""


class Lost(AncestralError):
    """Another process of the job has died."""


class Stopped(AncestralError):
    """Training or sampling was asked to stop; what was done is kept."""

    exit_code = 3


class NoSpace(AncestralError):
    """The disk is full; what was done before is kept."""

    exit_code = 4


class Diverged(AncestralError):
    """Training diverged; the last good checkpoint is named."""

    exit_code = 5


class Refused(AncestralError):
    """Something that was graded did not pass; the certificate says what and why."""

    exit_code = 6


class RunWarning(UserWarning):
    """A damaged checkpoint was passed over for an earlier one."""


def unknown(kind: str, received: object, allowed: Iterable[str]) -> OptionError:
    """The error for a name that is not among `allowed`, with the close match when there is one.

    Example:
        >>> str(unknown("schedule", "cosin", ["cosine", "linear"]))
        "unknown schedule 'cosin': did you mean 'cosine'? (one of: cosine, linear)"
    """
    allowed = sorted(allowed)
    close = get_close_matches(str(received), allowed, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return OptionError(f"unknown {kind} {received!r}: {hint}(one of: {', '.join(allowed)})")
