"""Samples on their way to the disk: one file that grows batch by batch, and pictures of how the first came about.

FOLDER/
  sample-0001.npy          the samples in the data's units; np.load(path, mmap_mode="r") reads what is looked at
  sample-0001.json         how they were made
  sample-0001.png          the first of them, and on request sample-0001.gif and sample-0001-sheet.png
  sample-0001.partial/     all of this while it is being made, and preview.png

Nothing leaves the partial directory before it is whole, and the samples leave it last. Sample i depends on seed i, so
what is there is all that has to be known in order to go on: whole batches count, and the rest of the file is cut off.
"""

import errno
import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from PIL import Image
from torch import Tensor

from ancestral import __version__
from ancestral.apps.output import fresh
from ancestral.data import Facts, draw
from ancestral.diffusion import sample as samplers
from ancestral.diffusion.fit import Fit
from ancestral.diffusion.grids import GRIDS
from ancestral.diffusion.grids import grid as grid_of
from ancestral.diffusion.model import Diffusion
from ancestral.diffusion.watch import Glimpse
from ancestral.errors import NoSpace, OptionError, Stopped, unknown
from ancestral.training import durable, resources
from ancestral.training.checkpoint import Saved
from ancestral.training.processes import ALONE, Processes

BATCH = 64
SHOWN, POINTS = 256, 2_000
FRAMES, COLUMNS, ROWS = 40, 9, 6
"""Samples in a batch; images and points in a picture, at most; frames of an animation; columns and rows of a sheet."""

EVERY = 2.0
"""Seconds between previews."""

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
        said = "{n:,} samples by {sampler} in {steps} steps, seed {seed}".format(**recipe)
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

    def finish(self) -> dict[str, str]:
        """Give every file its final name, the samples last: once they have it, this directory only has to go."""
        x = np.load(self.samples, mmap_mode="r")
        shown = torch.from_numpy(x[: SHOWN if self.facts.is_image else POINTS].copy())
        self.picture(draw.grid(self.facts, shown), self.named(".png").name)
        durable.write_json(self.named(".json"), self.recipe)
        final = {name: self.path.parent / self.named(suffix).name for name, suffix in ARTIFACTS.items()}
        for path in final.values():
            with suppress(FileNotFoundError):  # it was not asked for, or is there since before an interruption
                (self.path / path.name).replace(path)
        durable.flush(self.path.parent)
        return {name: str(path) for name, path in final.items() if path.exists()}


ARTIFACTS = {"png": ".png", "sheet": "-sheet.png", "gif": ".gif", "recipe": ".json", "npy": ".npy"}
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


def way(
    saved: Saved,
    sampler: str,
    grid: str | None,
    steps: int,
    folder: Path,
    *,
    progress: Callable[..., None],
    group: Processes = ALONE,
) -> tuple[samplers.Sampler, int | Tensor, dict[str, Any]]:
    """A sampler, its steps, and what a recipe says of them.

    Args:
        saved: the checkpoint to draw from.
        sampler: a key of `samplers.SAMPLERS`; or "fitted", the one that serves this model best, and its times. What is
            found is kept in the folder, and read again for the same weights and number of evaluations.
        grid: a key of `GRIDS`; None for the default one.
        steps: their number, or for "fitted" that of evaluations.
        folder: for what was found.
        progress: told (what, done, of).
        group: the processes that work together, the first of which fits.

    Raises:
        OptionError: if there is no such sampler or grid, or a fitted one is to have another grid.
    """
    if grid is not None and grid not in GRIDS:
        raise unknown("grid", grid, GRIDS)
    if sampler == FITTED:
        if grid is not None:
            raise OptionError(f"a fitted sampler has times of its own, received --grid {grid}: leave one of them out")
        found = group.told(_fitted(saved, steps, folder, progress) if group.first else None)
        assert found is not None
        times = list(found.times)
        recipe = {"sampler": found.sampler, "steps": len(times), "times": times}
        return samplers.SAMPLERS[found.sampler], found.steps, recipe
    if sampler not in samplers.SAMPLERS:
        raise unknown("sampler", sampler, (FITTED, *samplers.SAMPLERS))
    recipe = {"sampler": sampler, "steps": steps} | ({"grid": grid} if grid else {})
    return samplers.SAMPLERS[sampler], GRIDS[grid](saved.model.process, steps) if grid else steps, recipe


def _fitted(saved: Saved, evaluations: int, folder: Path, progress: Callable[..., None]) -> Fit:
    """What was found for these weights, or is found now."""
    path = folder / f"{weights(saved)[:12]}-average-{saved.ema:g}-evaluations-{evaluations}.json"
    try:
        return Fit(**json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError):
        progress("fitting a sampler to the model", 0, 1)
        found = saved.model.fitted(evaluations)
        folder.mkdir(parents=True, exist_ok=True)
        durable.write_json(path, asdict(found))
        return found


FITTED = "fitted"
"""The name of a sampler that is chosen for the model."""


def weights(saved: Saved) -> str:
    """A digest of what is drawn from: of the manifest that has those of all files of a checkpoint."""
    return hashlib.sha256((saved.path / durable.MANIFEST).read_bytes()).hexdigest()


def draw_samples(
    saved: Saved,
    folder: Path,
    n: int,
    recipe: Mapping[str, Any],
    *,
    steps: int | Tensor,
    sampler: samplers.Sampler,
    seed: int,
    label: str | None = None,
    gif: bool = False,
    sheet: bool = False,
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
        steps: of the sampler, or its times.
        sampler: one of `samplers.SAMPLERS`.
        seed: sample i has the stream (seed, i).
        label: name of the class to draw from.
        gif: also animate the first batch.
        sheet: also draw a contact sheet of the first samples.
        progress: told (what, done, of, note).
        group: the processes that work together.

    Raises:
        OptionError: if the model knows no such class.
        Stopped: by a signal; what is done is kept.
        NoSpace: if the disk is full; what is done is kept.
    """
    model = saved.model
    labels = None if label is None else torch.tensor([_class_of(label, model.facts)])
    model.given(labels)  # refused before anything is written
    job = {
        "recipe": dict(recipe),
        "pictures": {"gif": gif, "sheet": sheet},
        "weights": weights(saved),
        "batch": BATCH,
        "versions": {"ancestral": __version__, "torch": torch.__version__},
    }
    partial = claim(folder, model.facts, n, recipe, job) if group.first else None
    done = begun_at = group.told(partial.begin() if partial else 0)
    start, artifacts = done + BATCH * group.rank, {}
    began, before = time.perf_counter(), model.network.asked
    batches = model.sample_batches(
        n - start,
        batch=BATCH,
        steps=steps,
        sampler=sampler,
        rng=seed,
        start=start,
        every=group.count,
        labels=None if labels is None else labels.expand(max(0, n - start)),
        watch=_Watch(model, partial, n, steps, gif=gif, sheet=sheet, progress=progress),
    )
    with _stopping_well(folder, partial, n):
        while done < n:
            for x in group.gathered(next(batches, None)):
                if x is not None and partial:
                    partial.append(x)
                done += 0 if x is None else len(x)
        if partial:
            artifacts = partial.finish()
    evaluations = sum(group.gathered(model.network.asked - before))
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


class _Watch:
    """Told of every glimpse: says the progress, renews the preview, and draws how the first batch came about."""

    def __init__(
        self,
        model: Diffusion,
        partial: Partial | None,
        n: int,
        steps: int | Tensor,
        *,
        gif: bool,
        sheet: bool,
        progress: Callable[..., None],
    ) -> None:
        self.model, self.partial, self.n, self.progress = model, partial, n, progress
        self.last, facts = len(grid_of(model.process, steps)), model.facts
        self.fit = max(2, draw.WIDTH // facts.shape[-1]) ** 2 if facts.is_image else BATCH  # in a picture on the way
        self.frames = _evenly(self.last, FRAMES) if gif else set()
        self.columns = _evenly(self.last, COLUMNS - 1) if sheet else set()
        self.first, self.step, self.previewed, self.note = -1, 0, time.monotonic(), ""
        self.animation: list[Image.Image] = []
        self.moments: list[tuple[Tensor, Tensor]] = []

    def __call__(self, first: int, glimpse: Glimpse) -> None:
        self.first, self.step = first, self.step + 1 if first == self.first else 0
        self.progress("sampling", first * self.last + len(glimpse.x_t) * self.step, self.n * self.last, note=self.note)
        if self.partial is None:
            return
        if time.monotonic() - self.previewed >= EVERY:
            _, x_0_hat = self._raw(glimpse, self.fit)
            path = self.partial.picture(draw.grid(self.model.facts, x_0_hat), "preview.png")
            self.previewed, self.note = time.monotonic(), f"(see {path})"
        if first == 0:
            self._draw(glimpse, self.partial)

    def _draw(self, glimpse: Glimpse, partial: Partial) -> None:
        facts = self.model.facts
        if self.step in self.frames:
            self.animation.append(draw.beside(facts, *self._raw(glimpse, self.fit)))
        if self.step in self.columns:
            self.moments.append(self._raw(glimpse, ROWS if facts.is_image else BATCH))
        if self.step == self.last and self.moments:
            partial.picture(draw.sheet(facts, self.moments), partial.named("-sheet.png").name)
        if self.step == self.last and self.animation:
            (image, *rest), buffer = self.animation, BytesIO()
            times, comment = [80] * len(rest) + [1500], json.dumps(partial.recipe).encode()
            image.save(buffer, "GIF", save_all=True, append_images=rest, duration=times, loop=0, comment=comment)
            durable.write(partial.named(".gif"), buffer.getvalue())

    def _raw(self, glimpse: Glimpse, many: int) -> tuple[Tensor, Tensor]:
        """x_t / sqrt(alpha_t^2 + sigma_t^2), which has the spread of data at every time, and x_0_hat, in data units."""
        spread = math.hypot(*map(float, self.model.process(glimpse.t)))
        x_t, x_0_hat = glimpse.x_t[:many].cpu() / spread, glimpse.x_0_hat[:many].cpu()
        return self.model.facts.to_raw(x_t), self.model.facts.to_raw(x_0_hat)


def _evenly(last: int, parts: int) -> set[int]:
    """Steps 0 to last, or so many of them evenly spaced."""
    return {round(last * i / parts) for i in range(parts + 1)}


def _header(facts: Facts, n: int) -> bytes:
    """What a .npy file of n examples begins with."""
    buffer, kind = BytesIO(), np.lib.format.dtype_to_descr(_dtype(facts))
    np.lib.format.write_array_header_1_0(buffer, {"descr": kind, "fortran_order": False, "shape": (n, *facts.shape)})
    return buffer.getvalue()


def _dtype(facts: Facts) -> np.dtype[Any]:
    return torch.empty(0, dtype=facts.dtype).numpy().dtype


def _size(facts: Facts) -> int:
    return facts.dims * _dtype(facts).itemsize


def _class_of(label: str, facts: Facts) -> int:
    if label not in (facts.classes or ()):
        raise unknown("class", label, facts.classes or ())
    return (facts.classes or ()).index(label)
