"""Tables in text: CSV and TSV, gzipped or not, whose numeric columns are the features of a vector.

The encoding, the delimiter and the header are found, never asked for; whatever is left out is said. Text is bounded
before it is believed: in the length of a line, in all, and in how far it unpacks.
"""

import csv
import gzip
import io
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import numpy as np
from numpy.typing import NDArray

from ancestral.data.dataset import Examples, OnBad, numbered, printable
from ancestral.errors import DataError

if TYPE_CHECKING:
    from _csv import Reader

SUFFIXES = (".csv", ".tsv", ".csv.gz", ".tsv.gz")
MISSING = frozenset({"", "na", "n/a", "nan", "null", "none", "nil", "-", "?", "."})
LABELS = frozenset({"label", "labels", "class", "target"})
COUNTERS = frozenset({"", "id", "index", "unnamed: 0"})
DELIMITERS = "\t;|,"

MAX_LINE = 2**22  # characters
MAX_TEXT = 2**34  # characters of one table
MAX_RATIO = 200  # by which more than MODEST characters may exceed the file
MODEST = 2**26
MAX_MEMORY = 2**33  # bytes that the numbers take
MAX_CLASSES = 1000
SAMPLE = 50  # lines from which the delimiter is found
CHUNK = 5000  # rows that are converted at a time
NAMED = 3  # rows that a description names
LISTED = 8  # columns that a description names


@dataclass(eq=False)
class Column:
    """One column as it is read: its numbers while all are numbers, its words while they may be classes.

    Attributes:
        name: from the header, or its place.
        numbers: float32, NaN where nothing is given; None once something is no number.
        word: the first value that is no number.
        words: every value, while few differ and the name is one for classes.
    """

    name: str
    numbers: list[NDArray[np.float32]] | None = field(default_factory=list)
    word: str | None = None
    words: list[str] | None = None
    distinct: set[str] = field(default_factory=set)

    def add(self, cells: Sequence[str], decimal: str) -> None:
        """Take the next values."""
        if self.numbers is not None:
            values, self.word = _numbers(cells, decimal)
            self.numbers = None if values is None else [*self.numbers, values]
        if self.words is not None:
            words = [cell.strip() for cell in cells]
            self.distinct.update(words)
            self.words = None if len(self.distinct) > MAX_CLASSES else [*self.words, *words]


def read_table(path: Path, *, on_bad: OnBad) -> Examples:
    """The numeric columns of a CSV or TSV file as real-valued vectors, one for each row.

    Rows without a finite number in each of these columns are left out and counted; so are, under `on_bad`, rows with
    more or fewer fields than the others. A column called label, class or target that holds whole numbers or words, few
    of them different, gives the classes. A column called id or index, or without a name, that counts the rows is left
    out.

    Raises:
        DataError: if the file is no text or holds no numeric column, or a row is too long or too short and `on_bad`
            is "fail".
    """
    where = printable(str(path))
    try:
        for encoding in _encodings(path):
            try:
                return _read(where, path, encoding, on_bad)
            except UnicodeDecodeError:
                continue
    except DataError:
        raise
    except (OSError, EOFError, ValueError, csv.Error, zlib.error) as error:
        reason = (isinstance(error, OSError) and error.strerror) or str(error)
        raise DataError(f"{where}: cannot be read as a table ({printable(reason)}): save it as CSV again") from None
    raise AssertionError("latin-1 decodes whatever there is")


def from_columns(
    where: str,
    columns: Iterable[Column],
    notes: Sequence[str] = (),
    bad: Sequence[str] = (),
    held_out: NDArray[np.bool_] | None = None,
) -> Examples:
    """Vectors from the columns of a table, which all have as many rows.

    Args:
        where: the table, as people read it.
        columns: numbers and words.
        notes: what is already to be said.
        bad: rows that could not be read.
        held_out: the table's own split, for each row; None without one.

    Raises:
        DataError: if no column, or no row, has numbers.
    """
    columns, notes = list(columns), list(notes)
    classes = next((column for column in columns if _is_classes(column)), None)
    features, others = [], []
    for column in columns:
        values = np.concatenate(column.numbers) if column.numbers else None
        if column is classes:
            notes.append(f"column {_quoted(column)} gives the classes")
        elif values is None or np.isnan(values).all():
            others.append(column)
        elif column.name.lower() in COUNTERS and len(values) > 2 and (np.diff(values) == 1).all():
            notes.append(f"left out column {_quoted(column)}, which counts the rows")
        else:
            features.append((column, values))
    if not features:
        example = next((f": {_quoted(column)} holds {column.word!a}" for column in others if column.word), "")
        raise DataError(f"{where}: holds no column of numbers{example[:200]}; give at least one numeric column")
    if others:
        more = ", ..." if len(others) > LISTED else ""
        notes.append(f"left out columns without numbers: {', '.join(map(_quoted, others[:LISTED]))}{more}")
    x = np.stack([values for _, values in features], axis=1)
    whole = np.isfinite(np.abs(x).max(axis=1))
    words = classes.words if classes else None
    if words:
        whole &= np.array([word.lower() not in MISSING for word in words])
    if not whole.any():
        column, values = min(features, key=lambda pair: np.isfinite(pair[1]).sum())
        raise DataError(
            f"{where}: no row has a number in every column; {_quoted(column)} has {np.isfinite(values).sum():,} in "
            f"{len(values):,} rows: remove such columns"
        )
    if not whole.all():
        notes.append(f"left out {len(whole) - whole.sum():,} rows with missing or infinite values")
    names, labels = numbered([words[row] for row in np.flatnonzero(whole)]) if words else (None, None)
    return Examples(
        x=np.ascontiguousarray(x[whole]),
        levels=None,
        labels=labels,
        classes=names,
        held_out=None if held_out is None else held_out[whole],
        features=tuple(column.name for column, _ in features),
        bad=tuple(bad),
        notes=tuple(notes),
    )


def may_name_classes(name: str) -> bool:
    """Whether a column of this name may hold classes."""
    return name.strip().lower() in LABELS


def _read(where: str, path: Path, encoding: str, on_bad: OnBad) -> Examples:
    bad: list[str] = []
    columns: list[Column] = []
    with _opened(path, encoding) as file:
        lines = _lines(file, path.stat().st_size)
        lines = chain([line for line in islice(lines, 1) if not line.startswith("#")], lines)
        sample = list(islice(lines, SAMPLE))
        delimiter, width = _layout(sample)
        decimal = "," if delimiter == ";" else "."
        reader = csv.reader(chain(sample, lines), delimiter=delimiter, skipinitialspace=True, strict=True)
        n_rows = 0
        rows = _rows(where, reader, width, on_bad, bad)
        first = list(islice(rows, 2))
        header = first and _is_header(first, decimal)
        names = [name.strip() for name in first[0]] if header else [str(k + 1) for k in range(width)]
        columns = [Column(printable(name), words=[] if may_name_classes(name) else None) for name in names]
        rows = chain(first[1:] if header else first, rows)
        while chunk := list(islice(rows, CHUNK)):
            n_rows += len(chunk)
            if 4 * n_rows * width > MAX_MEMORY:
                raise ValueError(f"more than {MAX_MEMORY:,} bytes of numbers")
            for column, cells in zip(columns, zip(*chunk, strict=True), strict=True):
                column.add(cells, decimal)
    if not n_rows:
        raise DataError(f"{where}: holds no rows: give one example per row, under a header or without one")
    notes = [f"read as {encoding}"] if encoding == "latin-1" else []
    if bad:
        more = "; ..." if len(bad) > NAMED else ""
        notes.append(f"skipped {len(bad):,} rows of another length ({'; '.join(bad[:NAMED])}{more})")
    return from_columns(where, columns, notes, bad)


def _encodings(path: Path) -> list[str]:
    """What the text may be encoded in, by its first bytes; the last decodes anything."""
    with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
        start = file.read(512)
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):
        return ["utf-16", "latin-1"]
    even, odd = start[::2].count(0), start[1::2].count(0)
    if max(even, odd) > 0.4 * len(start) / 2:
        return ["utf-16-le" if odd > even else "utf-16-be", "latin-1"]
    return ["utf-8-sig", "latin-1"]


def _opened(path: Path, encoding: str) -> TextIO:
    file = gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb")  # noqa: SIM115
    return io.TextIOWrapper(file, encoding=encoding, newline="")


def _lines(file: TextIO, size: int) -> Iterator[str]:
    """Lines of bounded length, as long as there are not too many."""
    number = total = 0
    while line := file.readline(MAX_LINE):
        number, total = number + 1, total + len(line)
        if "\0" in line:
            raise ValueError(f"line {number:,} holds a NUL, as no text does")
        if len(line) == MAX_LINE:
            raise ValueError(f"line {number:,} has {MAX_LINE:,} characters or more")
        if total > MAX_TEXT or total > max(MODEST, MAX_RATIO * size):
            raise ValueError(f"unpacks to more than {total:,} characters")
        yield line


def _layout(sample: list[str]) -> tuple[str, int]:
    """The delimiter that leaves the most numbers, and how many fields a row then has."""
    best = (-1, 1, ",")
    for delimiter in DELIMITERS:
        rows = [row for row in csv.reader(sample, delimiter=delimiter, skipinitialspace=True) if row]
        width = Counter(map(len, rows)).most_common(1)[0][0] if rows else 1
        decimal = "," if delimiter == ";" else "."
        numbers = sum(_is_number(cell, decimal) for row in rows if len(row) == width for cell in row)
        if width > 1:
            best = max(best, (numbers, width, delimiter))
    return best[2], best[1]


def _rows(where: str, reader: "Reader", width: int, on_bad: OnBad, bad: list[str]) -> Iterator[list[str]]:
    """Rows of this many fields; others are noted, or refused."""
    try:
        for row in reader:
            if len(row) == width:
                yield row
            elif any(cell.strip() for cell in row):
                bad.append(f"line {reader.line_num:,}: {len(row):,} fields where others have {width:,}")
                if on_bad == "fail":
                    raise DataError(
                        f"{where}: {bad[-1]}: repair or remove it, or let such rows be skipped (on_bad='skip')"
                    )
    except csv.Error as error:
        raise ValueError(f"line {reader.line_num:,}: {error}") from None


def _is_header(rows: list[list[str]], decimal: str) -> bool:
    """Whether the first row names the columns: none of its fields is a number, or one of them stands above a number.

    A row that counts 0, 1, 2, ... is what a data frame without names leaves behind.
    """
    first = [cell.strip() for cell in rows[0]]
    if len(first) > 2 and first == [str(k) for k in range(len(first))]:
        return True
    numbers = [_is_number(cell, decimal) for cell in first]
    if not any(numbers):
        return any(cell.lower() not in MISSING for cell in first)
    below = [_is_number(cell, decimal) for cell in rows[-1]]
    return any(
        under and not number and cell.lower() not in MISSING
        for cell, number, under in zip(first, numbers, below, strict=True)
    )


def _is_number(cell: str, decimal: str) -> bool:
    try:
        float(cell.replace(",", ".") if decimal == "," else cell)
    except ValueError:
        return False
    return cell.strip().lower() not in MISSING


def _numbers(cells: Sequence[str], decimal: str) -> tuple[NDArray[np.float32] | None, str | None]:
    """The numbers, NaN where none is given; or None and the first value that is no number."""
    if decimal == ",":
        cells = [cell.replace(",", ".") for cell in cells]
    try:
        values = np.array(cells, dtype=np.float64)
    except ValueError:
        try:
            values = np.array([np.nan if cell.strip().lower() in MISSING else float(cell) for cell in cells])
        except ValueError:
            return None, next(c for c in cells if not _is_number(c, ".") and c.strip().lower() not in MISSING)
    with np.errstate(over="ignore"):
        return values.astype(np.float32), None


def _is_classes(column: Column) -> bool:
    """Whether a column gives classes: words or whole numbers, each of them twice on average."""
    if column.words is None or not 2 <= len(column.distinct) <= len(column.words) / 2:
        return False
    return all(re.fullmatch(r"\s*[+-]?\d+(\.0*)?\s*", word) or not _is_number(word, ".") for word in column.distinct)


def _quoted(column: Column) -> str:
    name = column.name if len(column.name) <= 40 else column.name[:37] + "..."
    return f"'{name}'"
