"""The way of a diffusion model to its samples: a sampler and its times, watched as it walks from noise to data."""

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ancestral.apps.sampling import BATCH, Partial, Share, weights
from ancestral.data import draw
from ancestral.diffusion import sample as samplers
from ancestral.diffusion.fit import Fit
from ancestral.diffusion.grids import GRIDS
from ancestral.diffusion.grids import grid as grid_of
from ancestral.diffusion.model import Diffusion
from ancestral.diffusion.watch import Glimpse
from ancestral.errors import OptionError, RunError, unknown
from ancestral.measure.chain import best_times
from ancestral.training import durable
from ancestral.training.checkpoint import Saved
from ancestral.training.processes import ALONE, Processes
from ancestral.training.run import reload

FRAMES, COLUMNS, ROWS = 40, 9, 6
"""Frames of an animation; columns and rows of a sheet."""

EVERY = 2.0
"""Seconds between previews."""

FITTED, BEST = "fitted", "best"
"""The names of a sampler that is chosen for the model, and of a grid that is."""


class Walk:
    """The way of a diffusion model.

    Args:
        model: to draw from.
        sampler: one of `samplers.SAMPLERS`.
        steps: of the sampler, or its times.
        recipe: what the files say of it.
        gif: also animate the first batch.
        sheet: also draw a contact sheet of the first samples.
    """

    def __init__(
        self,
        model: Diffusion,
        sampler: samplers.Sampler,
        steps: int | Tensor,
        recipe: Mapping[str, Any],
        *,
        gif: bool = False,
        sheet: bool = False,
    ) -> None:
        self.model, self.sampler, self.steps = model, sampler, steps
        self.recipe: Mapping[str, Any] = recipe
        self.pictures: Mapping[str, bool] = {"gif": gif, "sheet": sheet}

    def batches(self, share: Share) -> Iterator[Tensor]:
        """A walk for each batch."""
        return self.model.sample_batches(
            share.n - share.start,
            batch=BATCH,
            steps=self.steps,
            sampler=self.sampler,
            rng=share.seed,
            start=share.start,
            every=share.every,
            labels=None if share.labels is None else share.labels[share.start :],
            watch=_Watch(self, share),
        )

    def evaluations(self) -> int:
        """Of the network, for one example each."""
        return self.model.network.asked


def way(
    saved: Saved,
    model: Diffusion,
    sampler: str,
    grid: str | None,
    steps: int,
    folder: Path,
    *,
    gif: bool,
    sheet: bool,
    progress: Callable[..., None],
    group: Processes = ALONE,
) -> Walk:
    """The walk by a sampler of that name, in so many steps.

    Args:
        saved: the checkpoint to draw from.
        model: its model.
        sampler: a key of `samplers.SAMPLERS`; or "fitted", the one that serves this model best, and its times. What is
            found is kept in the folder, and read again for the same weights and number of evaluations.
        grid: a key of `GRIDS`; "best" for the steps of the chain with the least bound, learnt from some of the data
            that the run was trained on, and kept in the same way; None for the default one.
        steps: their number, or for "fitted" that of evaluations.
        folder: for what was found.
        gif: also animate the first batch.
        sheet: also draw a contact sheet of the first samples.
        progress: told (what, done, of).
        group: the processes that work together, the first of which fits.

    Raises:
        OptionError: if there is no such sampler or grid, or a fitted one is to have another grid.
        RunError: if the data that a best chain would be learnt from are not what they were.
    """
    if grid not in (None, BEST, *GRIDS):
        raise unknown("grid", grid, (BEST, *GRIDS))
    if sampler == FITTED:
        if grid is not None:
            raise OptionError(f"a fitted sampler has times of its own, received --grid {grid}: leave one of them out")
        found = group.told(_fitted(saved, model, steps, folder, progress) if group.first else None)
        assert found is not None
        recipe: dict[str, Any] = {"sampler": found.sampler, "steps": len(found.times), "times": list(found.times)}
        return Walk(model, samplers.SAMPLERS[found.sampler], found.steps, recipe, gif=gif, sheet=sheet)
    if sampler not in samplers.SAMPLERS:
        raise unknown("sampler", sampler, (FITTED, *samplers.SAMPLERS))
    recipe = {"sampler": sampler, "steps": steps} | ({"grid": grid} if grid else {})
    if grid == BEST:
        best = group.told(_best(saved, model, steps, folder, progress) if group.first else None)
        assert best is not None
        recipe["times"] = best.tolist()
        return Walk(model, samplers.SAMPLERS[sampler], best, recipe, gif=gif, sheet=sheet)
    times = model.times(grid, steps) if grid else steps
    return Walk(model, samplers.SAMPLERS[sampler], times, recipe, gif=gif, sheet=sheet)


def _best(saved: Saved, model: Diffusion, steps: int, folder: Path, progress: Callable[..., None]) -> Tensor:
    """The best steps of the chain, as they were found for these weights or are found now."""
    path = _kept(saved, folder, f"chain-{steps}")
    with suppress(OSError, ValueError, TypeError):
        times = torch.tensor(json.loads(path.read_bytes()), dtype=torch.float64)
        if len(grid_of(model.process, times)) == steps:
            return times
    if steps > model.chain:
        raise OptionError(f"the best steps are of the chain's {model.chain:,}, received --steps {steps}: give fewer")
    data = reload(saved.path, progress)
    if data.facts.digest != saved.facts.digest:
        raise RunError(
            f"{data.facts.source}: has changed since the run, which learns its best chain from it: give another --grid"
        )
    progress("learning the best chain", 0, 1)
    times = best_times(model, data, steps)
    progress("learning the best chain", 1, 1)
    folder.mkdir(parents=True, exist_ok=True)
    durable.write_json(path, times.tolist())
    return times


def _fitted(saved: Saved, model: Diffusion, evaluations: int, folder: Path, progress: Callable[..., None]) -> Fit:
    """What was found for these weights, or is found now."""
    path = _kept(saved, folder, f"evaluations-{evaluations}")
    with suppress(OSError, ValueError, TypeError):  # there is none, or it is no longer one
        found = Fit(**json.loads(path.read_bytes()))
        if found.sampler in samplers.SAMPLERS and len(grid_of(model.process, found.steps)):
            return found
    progress("fitting a sampler to the model", 0, 1)
    found = model.fitted(evaluations)
    progress("fitting a sampler to the model", 1, 1)
    folder.mkdir(parents=True, exist_ok=True)
    durable.write_json(path, asdict(found))
    return found


def _kept(saved: Saved, folder: Path, what: str) -> Path:
    """Where something that was found for these weights is."""
    return folder / f"{weights(saved)[:12]}-average-{saved.ema:g}-{what}.json"


class _Watch:
    """Told of every glimpse: says the progress, renews the preview, and draws how the first batch came about."""

    def __init__(self, walk: Walk, share: Share) -> None:
        self.model, self.partial, self.n, self.progress = walk.model, share.partial, share.n, share.progress
        self.last, facts = len(grid_of(walk.model.process, walk.steps)), walk.model.facts
        self.fit = max(2, draw.WIDTH // facts.shape[-1]) ** 2 if facts.is_image else BATCH  # in a picture on the way
        self.frames = _evenly(self.last, FRAMES) if walk.pictures["gif"] else set()
        self.columns = _evenly(self.last, COLUMNS - 1) if walk.pictures["sheet"] else set()
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
