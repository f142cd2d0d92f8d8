"""HDF5, Parquet and Arrow files, and the data sets that Hugging Face's library saves, each read with an extra.

What their columns mean follows from their types:

    a struct with `bytes`, or binary       encoded images
    lists of numbers, all of one length    vectors
    numbers                                the features of a vector, as in a table of text
    label, class or target                 classes
"""

import json
from collections.abc import Iterator
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ancestral.data import arrays, tables
from ancestral.data.dataset import Examples, printable
from ancestral.data.images import Item, Reading, read_items
from ancestral.errors import DataError

ROWS = 256  # of a batch that is read at a time
SIDES = {"train": "train", "test": "test", "validation": "val", "valid": "val", "val": "val"}

Batches = Iterator[Any]


def read_hdf5(path: Path) -> Examples:
    """The dataset x, images or data of an HDF5 file, with labels and split by name as in an .npz file.

    Only what the file itself holds is read: no links to other files, no virtual or external datasets.

    Raises:
        DataError: if h5py is not installed, or the file is damaged or holds no array of examples.
    """
    where = printable(str(path))
    try:
        import h5py
    except ImportError:
        raise _absent(where, "HDF5", "h5py") from None

    def opened() -> list[arrays.Part]:
        with h5py.File(path, "r") as file:
            found: dict[str, Any] = {}
            file.visititems(lambda name, node: found.update({name: node}) if isinstance(node, h5py.Dataset) else None)
            own = {name.replace("/", "_"): node for name, node in found.items() if not node.is_virtual}
            own = {name: node for name, node in own.items() if not node.external and node.ndim}
            return [
                arrays.Part(f"{where}[{printable(x)}]", _dataset(own[x]), _dataset(own[y]) if y else None)
                for x, y in arrays.pairs(list(own))
            ]

    parts = arrays.guarded(where, opened)
    if not parts:
        raise DataError(f"{where}: holds no array of examples: save them under the name x, images or data")
    return arrays.examples_of(parts)


def read_parquet(path: Path, reading: Reading) -> Examples:
    """The rows of a Parquet or Arrow file: images, vectors or a table.

    Raises:
        DataError: if pyarrow is not installed, or the file is damaged or holds nothing of these.
    """
    return _read({"": [path]}, reading)


def read_saved(folder: Path, reading: Reading) -> Examples | None:
    """A data set saved by Hugging Face's `save_to_disk`, with the splits train and test (or validation); or None.

    Raises:
        DataError: as `read_parquet` does.
    """
    if (folder / "dataset_dict.json").is_file():
        sides = {SIDES.get(path.name.lower(), ""): path for path in sorted(folder.iterdir()) if path.is_dir()}
    elif (folder / "state.json").is_file():
        sides = {"": folder}
    else:
        return None
    files = {side: sorted(path.glob("data-*.arrow")) for side, path in sides.items() if side or len(sides) == 1}
    return _read({side: paths for side, paths in files.items() if paths}, reading)


def read_hub(name: str, reading: Reading) -> Examples:
    """A data set by its name on the Hugging Face Hub: the only source that downloads, which is said.

    Raises:
        DataError: if the library `datasets` is not installed, or there is no such data set to be had.
    """
    try:
        import datasets
    except ImportError:
        raise _absent(reading.where, "a data set by name", "datasets", "hub") from None
    try:
        found = datasets.load_dataset(name)
        tables_of = {SIDES.get(str(side).lower(), ""): part.data.table for side, part in found.items()}
    except Exception as error:  # the library and the network raise nearly anything
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise DataError(f"{reading.where}: cannot be downloaded or read ({printable(reason)})") from None
    sides = {side: [table] for side, table in tables_of.items() if side or len(tables_of) == 1}
    examples = _read(sides, reading)
    return Examples(**{**vars(examples), "notes": (*examples.notes, f"downloaded as {name}")})


def _read(sides: dict[str, list[Any]], reading: Reading) -> Examples:
    """Examples of the sources on each side of a split, or on the only one."""
    try:
        import pyarrow
    except ImportError:
        raise _absent(reading.where, "Parquet and Arrow files", "pyarrow") from None
    if "train" in sides:
        held = next((side for side in ("test", "val") if side in sides), None)
        sides = {"train": sides["train"], **({"test": sides[held]} if held else {})}

    def batches() -> list[tuple[str, Any]]:
        found = [(side, batch) for side, sources in sides.items() for source in sources for batch in _batches(source)]
        for _, batch in found:
            batch.validate(full=True)  # what a damaged file says of its own parts is believed from here on
        return found

    found = [(side, batch) for side, batch in arrays.guarded(reading.where, batches, "rows") if batch.num_rows]
    if not found:
        raise DataError(f"{reading.where}: holds no rows: give one example per row")
    types, schema = pyarrow.types, found[0][1].schema
    label = next((field for field in schema if tables.may_name_classes(field.name)), None)
    for field in schema:
        kind = field.type
        encoded = types.is_struct(kind) and kind.get_field_index("bytes") >= 0
        if encoded or types.is_binary(kind) or types.is_large_binary(kind):
            items = arrays.guarded(reading.where, partial(_items, found, field.name, label), "images")
            return read_items(reading, items)
    for field in schema:
        if types.is_list(field.type) or types.is_fixed_size_list(field.type) or types.is_large_list(field.type):
            return arrays.guarded(reading.where, partial(_lists, reading.where, found, field.name, label))
    columns = arrays.guarded(reading.where, lambda: [_column(found, field, types) for field in schema], "a table")
    held_out = np.concatenate([np.full(batch.num_rows, side == "test") for side, batch in found])
    return tables.from_columns(reading.where, columns, held_out=held_out if held_out.any() else None)


def _batches(source: Any) -> Batches:
    """Record batches of a Parquet file, of an Arrow file or stream, or of a table."""
    import pyarrow
    from pyarrow import ipc, parquet

    if not isinstance(source, Path):
        yield from source.to_batches(max_chunksize=ROWS)
        return
    total = 0
    if source.suffix.lower() == ".parquet":
        with parquet.ParquetFile(source) as file:
            arrays.check_memory(4 * file.metadata.num_rows * file.metadata.num_columns)
            for batch in file.iter_batches(batch_size=ROWS):
                total += batch.nbytes
                arrays.check_memory(total)
                yield batch
        return
    with pyarrow.memory_map(str(source)) as mapped:
        try:
            opened = ipc.open_file(mapped)
            yield from (opened.get_batch(k) for k in range(opened.num_record_batches))
        except pyarrow.ArrowInvalid:
            mapped.seek(0)
            yield from ipc.open_stream(mapped)


def _items(found: list[tuple[str, Any]], column: str, label: Any) -> list[Item]:
    """The encoded images of a column, as files of as many folders as there are sides; each is taken out when read."""
    items: list[Item] = []
    names = _names(found[0][1].schema, label)
    for side, batch in found:
        values = batch.column(column)
        if values.type.num_fields:  # a struct, with a path beside the bytes
            values = values.flatten()[values.type.get_field_index("bytes")]
        opened = partial(_encoded, values)
        for k, word in enumerate(_words(batch, label, names)):
            items.append(Item(f"{side}/row-{len(items):09}.png".lstrip("/"), opened, k, label=word))
    return items


def _encoded(values: Any, k: int) -> BytesIO:
    return BytesIO(values[k].as_py() or b"")


def _lists(where: str, found: list[tuple[str, Any]], column: str, label: Any) -> Examples:
    """Vectors from a column of lists, all of one length."""
    parts = []
    for side in dict.fromkeys(side for side, _ in found):
        own = [batch for other, batch in found if other == side]
        x = np.stack([np.asarray(row) for batch in own for row in batch.column(column).to_numpy(zero_copy_only=False)])
        words = [word for batch in own for word in _words(batch, label, None)]
        parts.append(arrays.Part(f"{where}[{printable(column)}]", x, np.array(words) if label else None))
    return arrays.examples_of(parts)


def _column(found: list[tuple[str, Any]], field: Any, types: Any) -> tables.Column:
    """A column of numbers, NaN where none is given, or of words."""
    import pyarrow

    classes = tables.may_name_classes(field.name)
    column = tables.Column(printable(field.name), words=[] if classes else None)
    kind = field.type
    numeric = types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind) or types.is_decimal(kind)
    for _, batch in found:
        values = batch.column(field.name)
        if classes:
            words = [str(value) if value is not None else "" for value in values.to_pylist()]
            column.add(words, ".")
        elif numeric:
            integers = values.cast(pyarrow.int8()) if types.is_boolean(kind) else values
            numbers = integers.cast(pyarrow.float64(), safe=False).to_numpy(zero_copy_only=False)
            with np.errstate(over="ignore"):
                column.numbers = [*(column.numbers or []), numbers.astype(np.float32)]
        else:
            column.numbers, column.word = None, str(kind)
    return column


def _words(batch: Any, label: Any, names: list[str] | None) -> list[str | None]:
    if label is None:
        return [None] * batch.num_rows
    values = batch.column(label.name).to_pylist()
    if names is not None and all(isinstance(value, int) and 0 <= value < len(names) for value in values):
        return [names[value] for value in values]
    return [str(value) for value in values]


def _names(schema: Any, label: Any) -> list[str] | None:
    """The names of the classes, where the schema carries them as Hugging Face's library writes them."""
    try:
        names = json.loads(schema.metadata[b"huggingface"])["info"]["features"][label.name]["names"]
        return [str(name) for name in names]
    except (TypeError, KeyError, ValueError, AttributeError):
        return None


def _dataset(node: Any) -> NDArray[Any]:
    arrays.check_memory(node.nbytes)
    return np.asarray(node.asstr()[()] if node.dtype.kind == "O" else node[()]).astype(
        np.str_ if node.dtype.kind in "OS" else node.dtype
    )


def _absent(where: str, what: str, module: str, extra: str | None = None) -> DataError:
    return DataError(
        f"{where}: {what} needs {module}, which is not installed: pip install 'ancestral[{extra or module}]'"
    )
