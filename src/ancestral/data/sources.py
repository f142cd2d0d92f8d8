"""`load`: from a name or a path to data."""

import os
import stat
from importlib.resources import files
from pathlib import Path
from typing import get_args

import numpy as np
import torch

from ancestral import toys
from ancestral.data import arrays, tables
from ancestral.data.dataset import Data, Examples, Fit, OnBad, Progress, divide, printable
from ancestral.errors import DataError, OptionError, unknown
from ancestral.rng import stream

TOY_TRAIN, TOY_HELD_OUT = 20_000, 5_000
MAX_SIZE = 4096
ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz")
ROWS = (".parquet", ".arrow", ".feather")
HUB = "hf:"


def load(
    source: str | Path,
    *,
    size: int | None = None,
    fit: Fit = "crop",
    on_bad: OnBad = "skip",
    seed: int = 0,
    progress: Progress | None = None,
) -> Data:
    """The data that `source` names, divided into what is learnt from and what is held out.

    A source is "digits", the name of a toy (`ancestral.toys.TOYS`), or a path: a folder, a .zip
    or a .tar(.gz) of images, a .csv or .tsv table, an .npy or .npz array, an IDX file, a folder of IDX files under
    MNIST's names, or, with an extra, HDF5, Parquet, Arrow, and what Hugging Face's library saves. "hf:NAME" is a data
    set of its hub, and the only source that downloads anything. A path is only ever read. A split of the
    source's own (folders or arrays called train and test, or val where there is no test) is kept; otherwise about 20%
    of up to 10,000 examples, or 10% of more, are held out by a hash of their content. Names win over paths: write
    "./digits" for a folder called digits.

    Args:
        source: what to load.
        size: side in pixels to bring images to. Without it images of one size stay as they are, and mixed
            sizes become the larger of 32 and 64 that is at most the median shorter side (32 if neither is).
        fit: how images of other proportions get there: "crop" their centre, "pad" them with black, or "stretch" them.
        on_bad: "skip" files, or rows of a table, that cannot be read, and say so; or "fail" on the first.
        seed: of a toy's draws; nothing else is random.
        progress: called about twice a second with a stage, the files done and the files in all.

    Raises:
        DataError: if there is no such source, or it cannot be used; the sentence names it.
        OptionError: if an option is outside what is allowed.

    Example:
        >>> load("digits").description
        'digits: 1,476 train + 321 held-out images of 1x8x8, 17 levels, 10 classes'
    """
    if on_bad not in get_args(OnBad):
        raise unknown("on_bad", on_bad, get_args(OnBad))
    if fit not in get_args(Fit):
        raise unknown("fit", fit, get_args(Fit))
    if fit != "crop" and not is_resized(source):
        raise OptionError(f"received fit={fit} for {source}: only folders and archives of images are fitted to a size")
    if size is not None and not 1 <= size <= MAX_SIZE:
        raise OptionError(f"received size={size}: a side in pixels is between 1 and {MAX_SIZE:,}")

    if source == "digits":
        name, where, examples = "digits", "digits", _digits()
    elif isinstance(source, str) and source in toys.TOYS:
        name, where, examples = source, source, _toy(source, seed)
    elif isinstance(source, str) and source.startswith(HUB):
        name, where = printable(source.rpartition("/")[2].removeprefix(HUB)), source
        examples = _download(source, size, fit, on_bad, progress)
    else:
        path = Path(source)
        examples = _read(path, size, fit, on_bad, progress)
        name, where = _title(path), str(path.absolute())

    if size is not None and examples.x.shape[2:] != (size, size):
        raise OptionError(
            f"received size={size} for {name}, whose examples are {'x'.join(map(str, examples.x.shape[1:]))}: "
            "only folders and archives of images are resized"
        )
    return divide(examples, name=name, source=where)


def is_resized(source: str | Path) -> bool:
    """Whether a source holds files of images, which are brought to a size; judged by its name."""
    named = source == "digits" or (isinstance(source, str) and source in toys.TOYS)
    return not named and (
        Path(source).is_dir() or str(source).startswith(HUB) or str(source).lower().endswith((*ARCHIVES, *ROWS))
    )


def _title(path: Path) -> str:
    """What to call the data at this path: the name without what says how it is packed."""
    named = path.resolve() if path.name in ("", "..") else path
    return printable(named.name if path.is_dir() else Path(named.name.removesuffix(".gz")).stem) or "data"


def _read(path: Path, size: int | None, fit: Fit, on_bad: OnBad, progress: Progress | None) -> Examples:
    where = printable(str(path))
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        if len(path.parts) > 1 or path.suffix:
            raise DataError(f"{where}: no such file or folder") from None
        names = unknown("data", where, ["digits", *toys.TOYS])
        raise DataError(f"{names}, and no file or folder has that name") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{where}: cannot be opened ({error})") from None

    from ancestral.data import archives, images, stores  # Pillow is loaded when there are images to read

    suffix, reading = path.suffix.lower(), images.Reading(where, size, fit, on_bad, progress, _cache())
    if stat.S_ISDIR(mode):
        return arrays.read_idx_folder(path) or stores.read_saved(path, reading) or images.read_folder(path, reading)
    if not stat.S_ISREG(mode):
        raise DataError(f"{where}: neither a regular file nor a folder")
    if path.name.lower().endswith(ARCHIVES):
        return archives.read_archive(path, reading)
    if suffix == ".npy":
        return arrays.read_npy(path)
    if suffix == ".npz":
        return arrays.read_npz(path)
    if suffix in ROWS:
        return stores.read_parquet(path, reading)
    if suffix in (".h5", ".hdf5"):
        return stores.read_hdf5(path)
    if path.name.lower().endswith(tables.SUFFIXES):
        return tables.read_table(path, on_bad=on_bad)
    if "idx" in path.name.lower():
        return arrays.read_idx(path)
    if suffix in images.SUFFIXES:
        raise DataError(f"{where}: is one image: give the folder that holds it and others")
    raise DataError(
        f"{where}: not a kind of file that is read: give a folder, .zip or .tar of images, a .csv, .tsv or "
        ".parquet table, an .npy, .npz or .h5 array, or IDX files"
    )


def _cache() -> Path | None:
    """Where decoded images are kept, if the user has named a place."""
    named = os.environ.get("ANCESTRAL_CACHE")
    return Path(named) if named else None


def _download(source: str, size: int | None, fit: Fit, on_bad: OnBad, progress: Progress | None) -> Examples:
    from ancestral.data import images, stores

    if progress:
        progress(f"downloading {printable(source)}", 0, 1)
    reading = images.Reading(printable(source), size, fit, on_bad, progress, _cache())
    return stores.read_hub(source.removeprefix(HUB), reading)


def _digits() -> Examples:
    """8x8 handwritten digits on 17 levels; DIGITS.md beside the file says whose they are."""
    with files("ancestral.data").joinpath("digits.npz").open("rb") as file, np.load(file) as archive:
        return Examples(
            x=archive["x"],
            levels=17,
            labels=archive["y"].astype(np.int64),
            classes=tuple("0123456789"),
        )


def _toy(name: str, seed: int) -> Examples:
    toy = toys.TOYS[name]()
    draws = [toy.sample(n, rng=stream(seed, key)) for key, n in enumerate((TOY_TRAIN, TOY_HELD_OUT))]
    return Examples(
        x=torch.cat(draws).to(torch.float32).numpy(),
        levels=None,
        held_out=np.arange(TOY_TRAIN + TOY_HELD_OUT) >= TOY_TRAIN,
    )
