"""metadata.csv and metadata.jsonl beside images: which class each of them has.

One row, or one JSON object a line, for each image: `file_name`, its path from the metadata's own folder, and `label`.
"""

import csv
import io
import json
from typing import Any, BinaryIO

from ancestral.data import tables

NAMES = frozenset({"metadata.csv", "metadata.jsonl"})
MAX_BYTES = 2**27


def read(file: BinaryIO) -> dict[str, str]:
    """The class of each file, by its path with "/"; empty if no class is named.

    Raises:
        ValueError: if a row has no file name or no class, or the text is damaged.
    """
    content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise ValueError(f"more than {MAX_BYTES:,} bytes")
    text = content.decode("utf-8-sig")
    lines = text.lstrip().startswith("{")
    rows = [json.loads(line) for line in text.splitlines() if line.strip()] if lines else _table(text)
    if not rows or not any(map(tables.may_name_classes, rows[0])):
        return {}
    label = next(filter(tables.may_name_classes, rows[0]))
    found = {}
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or not row.get("file_name") or row.get(label) in (None, ""):
            raise ValueError(f"row {number:,} lacks a file_name or a {label}")
        path = str(row["file_name"]).replace("\\", "/")
        found["/".join(part for part in path.split("/") if part not in ("", "."))] = str(row[label])
    return found


def _table(text: str) -> list[dict[str, Any]]:
    return list(csv.DictReader(io.StringIO(text, newline=""), strict=True))
