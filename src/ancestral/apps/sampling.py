"""Samples on their way to the disk: one file that grows batch by batch, and pictures of how the first came about.

FOLDER/
  sample-0001.npy          the samples in the data's units; np.load(path, mmap_mode="r") reads what is looked at
  sample-0001.csv          of a table, the same under the names of its columns
  sample-0001.json         how they were made
  sample-0001.png          the first of them, and on request sample-0001.gif and sample-0001-sheet.png
  sample-0001.partial/     all of this while it is being made, and preview.png

Nothing leaves the partial directory before it is whole, and the samples leave it last. Sample i depends on seed i, so
what is there is all that has to be known in order to go on: whole batches count, and the rest of the file is cut off.
"""

import csv
import errno
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ancestral import __version__
from ancestral.apps.output import fresh
from ancestral.data import Facts, draw
from ancestral.errors import NoSpace, OptionError, Stopped, unknown
from ancestral.training import durable, resources
from ancestral.training.checkpoint import Saved
from ancestral.training.processes import ALONE, Processes
from ancestral.training.recipes import Model

BATCH = 64
SHOWN, POINTS = 256, 2_000
"""Samples in a batch; images and points in a picture, at most."""

JOB = "job.json"
"""What a partial directory was asked for."""


@dataclass(frozen=True)
class Drawn:
    """What was left behind, and what it took this time.

    Attributes:
        artifacts: path of each file, by what it is.
        begun_at: samples that were there already.
        evaluations: of the network.
        seconds: from the first batch to the last file.
    """

    artifacts: dict[str, str]
    begun_at: int
    evaluations: int
    seconds: float

    def lines(self, recipe: Mapping[str, Any]) -> list[str]:
        """What was drawn, as a person reads it."""
        said = "{n:,} samples".format(**recipe)
        said += " by {sampler} in {steps} steps".format(**recipe) if "sampler" in recipe else ""
        said += ", seed {seed}".format(**recipe)
        there = f", after {self.begun_at:,} that were there" if self.begun_at else ""
        took = f"{self.seconds:.1f} s, {self.evaluations:,} evaluations{there}"
        return [f"{said}: {took}", *(f"  {path}" for path in self.artifacts.values())]

    def record(self, recipe: Mapping[str, Any]) -> dict[str, Any]:
        """What was drawn, as a record."""
        return {
            "images": recipe["n"],
            "begun_at": self.begun_at,
            "evaluations": self.evaluations,
            "seconds": round(self.seconds, 3),
            "images_per_second": round((recipe["n"] - self.begun_at) / self.seconds, 1),
            "seed": recipe["seed"],
            "artifacts": self.artifacts,
        }


@dataclass(frozen=True)
class Partial:
    """A directory in which n samples are being made, which no other process works on."""

    path: Path
    facts: Facts
    n: int
    recipe: Mapping[str, Any]
    lock: FileLock

    @property
    def samples(self) -> Path:
        """The file that grows."""
        return self.named(".npy")

    def named(self, suffix: str) -> Path:
        """A file in here under its final name."""
        return self.path / f"{self.path.stem}{suffix}"

    def done(self) -> int:
        """How many samples there are in whole batches."""
        size, header = self.samples.stat().st_size if self.samples.exists() else 0, _header(self.facts, self.n)
        there = (size - len(header)) // _size(self.facts)
        return self.n if there >= self.n else max(0, there // BATCH * BATCH)

    def begin(self) -> int:
        """Make the file ready for the next batch, cutting off what follows the last whole one; how many there are."""
        header, done = _header(self.facts, self.n), self.done()
        self.samples.touch()
        with self.samples.open("r+b") as file:
            file.write(header)
            file.truncate(len(header) + done * _size(self.facts))
        return done

    def append(self, x: Tensor) -> None:
        """Add a batch to the file. It is not mapped into memory, where a full disk would be a crash and no error."""
        with self.samples.open("ab") as file:
            file.write(x.numpy().tobytes())
        durable.flush(self.samples)

    def picture(self, image: Image.Image, name: str) -> Path:
        """Write a picture that carries the recipe, in place of the one of that name."""
        buffer, path = BytesIO(), self.path / name
        draw.save_png(image, buffer, self.recipe)
        durable.write(path, buffer.getvalue())
        return path

    def table(self, x: NDArray[Any], columns: tuple[str, ...]) -> None:
        """Write vectors as a table, each value with as many digits as tell it from others."""
        path = self.named(".csv")
        with path.open("w", newline="", encoding="utf-8") as file:
            rows = csv.writer(file)
            rows.writerow(columns)
            rows.writerows(x)
        durable.flush(path)

    def finish(self) -> dict[str, str]:
        """Give every file its final name, the samples last: once they have it, this directory only has to go."""
        x = np.load(self.samples, mmap_mode="r")
        shown = torch.from_numpy(x[: SHOWN if self.facts.is_image else POINTS].copy())
        self.picture(draw.grid(self.facts, shown), self.named(".png").name)
        if self.facts.features:
            self.table(x, self.facts.features)
        durable.write_json(self.named(".json"), self.recipe)
        final = {name: self.path.parent / self.named(suffix).name for name, suffix in ARTIFACTS.items()}
        for path in final.values():
            with suppress(FileNotFoundError):  # it was not asked for, or is there since before an interruption
                (self.path / path.name).replace(path)
        durable.flush(self.path.parent)
        return {name: str(path) for name, path in final.items() if path.exists()}


ARTIFACTS = {"png": ".png", "sheet": "-sheet.png", "gif": ".gif", "recipe": ".json", "csv": ".csv", "npy": ".npy"}
"""Suffix of each file, in the order in which they get their final names."""


def claim(folder: Path, facts: Facts, n: int, recipe: Mapping[str, Any], job: Mapping[str, Any]) -> Partial:
    """The partial directory that was begun for the same job and that nobody works on, or a new one."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(folder.glob("sample-*.partial")):
        lock = FileLock(path / ".lock")
        with suppress(Timeout, OSError, ValueError):
            if json.loads((path / JOB).read_bytes()) == job:
                lock.acquire(timeout=0)
                if not (folder / f"{path.stem}.npy").exists():
                    return Partial(path, facts, n, recipe, lock)
                shutil.rmtree(path)  # killed when all else was done
    while True:
        path = fresh(folder, "sample").with_suffix(".partial")
        with suppress(FileExistsError):  # another process took the number at this moment
            path.mkdir()
            break
    lock = FileLock(path / ".lock")
    lock.acquire()
    durable.write_json(path / JOB, job)
    return Partial(path, facts, n, recipe, lock)


def weights(saved: Saved) -> str:
    """A digest of what is drawn from: of the manifest that has those of all files of a checkpoint."""
    return hashlib.sha256((saved.path / durable.MANIFEST).read_bytes()).hexdigest()


class Way(Protocol):
    """A way to draw from a model.

    Attributes:
        recipe: what the files say of it.
        pictures: what is drawn of the way itself.
    """

    recipe: Mapping[str, Any]
    pictures: Mapping[str, bool]

    def batches(self, share: "Share") -> Iterator[Tensor]:
        """The share's batches, in the data's units, each computed when it is asked for."""
        ...

    def evaluations(self) -> int:
        """Evaluations of the network, for one example each, so far."""
        ...


@dataclass(frozen=True)
class Share:
    """The batches that one process draws.

    Attributes:
        n: samples in all.
        start: index of the first of its own.
        every: it draws the first of so many batches, and passes over the others.
        seed: sample i has the stream (seed, i).
        labels: class of each sample of the whole set, int64, shape (n,), or None.
        partial: where the samples go, in the first process.
        progress: told (what, done, of, note).
    """

    n: int
    start: int
    every: int
    seed: int
    labels: Tensor | None
    partial: Partial | None
    progress: Callable[..., None]


class AtOnce:
    """The way of a model that draws an example in one pass of its network.

    Args:
        model: of any family but diffusion.
        recipe: what the files say of the options.
        options: of its `sample`.
    """

    def __init__(self, model: Model, recipe: Mapping[str, Any], **options: Any) -> None:
        self.model, self.options, self.drawn = model, options, 0
        self.recipe = recipe
        self.pictures: Mapping[str, bool] = {}

    def batches(self, share: Share) -> Iterator[Tensor]:
        """One call of `sample` for each batch."""
        for first in range(share.start, share.n, BATCH * share.every):
            size = min(BATCH, share.n - first)
            labels = None if share.labels is None else share.labels[first : first + size]
            self.drawn += size
            yield self.model.sample(size, rng=share.seed, start=first, labels=labels, **self.options)
            share.progress("sampling", first + size, share.n)

    def evaluations(self) -> int:
        """As many as samples."""
        return self.drawn


def draw_samples(
    saved: Saved,
    folder: Path,
    n: int,
    recipe: Mapping[str, Any],
    way: Way,
    *,
    seed: int,
    label: str | None = None,
    progress: Callable[..., None],
    group: Processes = ALONE,
) -> Drawn:
    """Draw n samples into a folder in the memory of one batch, going on where the same job stopped.

    The batches, which the processes divide among them, are the same whatever the number of processes and however
    often it was stopped; the first process writes.

    Args:
        saved: the checkpoint to draw from; what was drawn from other weights is never gone on with.
        folder: for the files.
        n: how many.
        recipe: how they are made, which the files carry.
        way: to draw them.
        seed: sample i has the stream (seed, i).
        label: name of the class to draw from.
        progress: told (what, done, of, note).
        group: the processes that work together.

    Raises:
        OptionError: if the model knows no such class.
        Stopped: by a signal; what is done is kept.
        NoSpace: if the disk is full; what is done is kept.
    """
    model = saved.model
    labels = None if label is None else torch.tensor([_class_of(label, saved)]).expand(n)
    job = {
        "recipe": dict(recipe),
        "pictures": dict(way.pictures),
        "weights": weights(saved),
        "batch": BATCH,
        "versions": {"ancestral": __version__, "torch": torch.__version__},
    }
    partial = claim(folder, model.facts, n, recipe, job) if group.first else None
    done = begun_at = group.told(partial.begin() if partial else 0)
    share = Share(n, done + BATCH * group.rank, group.count, seed, labels, partial, progress)
    batches, artifacts = way.batches(share), {}
    began, before = time.perf_counter(), way.evaluations()
    with _stopping_well(folder, partial, n):
        while done < n:
            for x in group.gathered(next(batches, None)):
                if x is not None and partial:
                    partial.append(x)
                done += 0 if x is None else len(x)
        if partial:
            artifacts = partial.finish()
    evaluations = sum(group.gathered(way.evaluations() - before))
    return Drawn(artifacts, begun_at, evaluations, time.perf_counter() - began)


@contextmanager
def _stopping_well(folder: Path, partial: Partial | None, n: int) -> Iterator[None]:
    """Says, when the work within is stopped, how much is kept; lets go of the partial directory, or removes it."""

    def kept() -> str:
        done = partial.done() if partial else 0
        if done == 0:
            return "there was no whole batch, and nothing is kept"
        return f"{done:,} of {n:,} samples are kept, and the same command goes on from there"

    try:
        if partial and (n - partial.done()) * _size(partial.facts) > resources.free_disk(folder):
            raise OSError(errno.ENOSPC, "what is to come does not fit", str(folder))
        yield
    except KeyboardInterrupt:
        raise Stopped(f"{folder}: stopped; {kept()}") from None
    except (OSError, NoSpace) as error:
        if isinstance(error, OSError) and error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise NoSpace(f"{folder}: the disk has no space for {n:,} samples; {kept()}") from None
    finally:
        if partial:
            if not partial.done():  # there is nothing in it, or no longer
                shutil.rmtree(partial.path)
            partial.lock.release()


def _header(facts: Facts, n: int) -> bytes:
    """What a .npy file of n examples begins with."""
    buffer, kind = BytesIO(), np.lib.format.dtype_to_descr(_dtype(facts))
    np.lib.format.write_array_header_1_0(buffer, {"descr": kind, "fortran_order": False, "shape": (n, *facts.shape)})
    return buffer.getvalue()


def _dtype(facts: Facts) -> np.dtype[Any]:
    return torch.empty(0, dtype=facts.dtype).numpy().dtype


def _size(facts: Facts) -> int:
    return facts.dims * _dtype(facts).itemsize


def _class_of(label: str, saved: Saved) -> int:
    if not saved.setup.labels:
        raise OptionError(f"received --label {label}, but this model was not trained with labels: leave it out")
    classes = saved.facts.classes or ()
    if label not in classes:
        raise unknown("class", label, classes)
    return classes.index(label)
