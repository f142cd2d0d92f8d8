"""A run: one directory that says how a model was made, and the verb that makes one.

RUN/
  run.json               status, versions, seed, command line, data, pace
  config.json            the complete set-up
  metrics.jsonl          loss, gradient norm, rate and speed along the way
  log.txt                what was said
  samples/step-*.png     samples of the averaged weights, always from the same seeds; data.png beside them
  checkpoints/step-*/    see `checkpoint`
  final/                 the checkpoint of the finished run, with a README.md
"""

import json
import math
import platform
import shlex
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from itertools import count
from pathlib import Path
from typing import Any

import torch

from ancestral import data as sources
from ancestral.data import Data, draw
from ancestral.data.dataset import OnBad, Progress
from ancestral.diffusion.model import Diffusion
from ancestral.errors import Diverged, OptionError, RunError
from ancestral.rng import stream
from ancestral.training import checkpoint, loop, recipes
from ancestral.training.loop import Average, Record
from ancestral.training.recipes import Setup

KEPT = 2
"""Checkpoints of a run that are kept; an older one is removed once a newer one is on the disk."""

SHOWN, POINTS = 64, 2000
"""Images in a grid, and points in a scatter."""

PACE = (4.0, 30.0)
"""Seconds that measuring the pace may take, at least and at most; between them, 3% of the budget."""


@dataclass(frozen=True)
class Run:
    """A training run that is ready to start: its directory is claimed, and empty.

    Attributes:
        path: the run directory.
        data: what is learnt from.
        setup: complete, with the number of steps.
        model: initialised.
        seed: of everything.
        record: what run.json will say.
    """

    path: Path
    data: Data
    setup: Setup
    model: Diffusion
    seed: int
    record: dict[str, Any]

    @property
    def total(self) -> int:
        """Number of steps."""
        return self.setup.training.steps or 0

    def steps(self) -> Generator[Record, None, None]:
        """Train to the end, writing the run directory on the way, and yield a record after every step.

        A run that is interrupted or diverges leaves its last checkpoint and says so in run.json.

        Raises:
            Diverged: naming the last good checkpoint.
        """
        self._open()
        section = self.setup.training
        averages = {name: Average(player.module, section.ema) for name, player in self.model.players().items()}
        every = max(1, self.total // 500)
        shown = {math.ceil(self.total * (i + 1) / section.checkpoints) for i in range(section.checkpoints)}
        step, began = 0, time.perf_counter()
        try:
            with (self.path / "metrics.jsonl").open("x", buffering=1) as metrics:
                for record in loop.steps(self.model, self.data, section, self.total, seed=self.seed, averages=averages):
                    step = record.step
                    if step % every == 0 or step in (1, self.total):
                        metrics.write(json.dumps(_metrics(record, section.batch)) + "\n")
                    if step in shown:
                        self._checkpoint(averages, step)
                        self._show(averages, step)
                    yield record
            seconds = time.perf_counter() - began
            self._save(self.path / "final", averages, step, readme=self._card(step, seconds))
            self._status("finished", steps=step, seconds=round(seconds, 1))
        except (KeyboardInterrupt, GeneratorExit):
            if step and step not in shown:
                self._checkpoint(averages, step)
            self._status("stopped", steps=step)
            raise
        except Diverged as error:
            good = checkpoint.checkpoints(self.path)
            reason = f"{error}; " + (f"{good[-1]} is the last good checkpoint" if good else "no checkpoint was due yet")
            self._status("diverged", steps=step, reason=reason)
            raise Diverged(reason) from None
        except BaseException as error:
            self._status("failed", steps=step, reason=str(error) or type(error).__name__)
            raise

    def log(self, line: str) -> None:
        """Add a line to log.txt."""
        with (self.path / "log.txt").open("a") as file:
            file.write(line + "\n")

    def _open(self) -> None:
        """Fill the directory with what is known before the first step, and a picture of the data to compare with."""
        (self.path / "samples").mkdir()
        (self.path / "checkpoints").mkdir()
        checkpoint.write_json(self.path / "config.json", self.setup.model_dump(mode="json"))
        self._status("training")
        facts = self.data.facts
        image = draw.grid(facts, self.data.train[: SHOWN if facts.is_image else POINTS])
        draw.save_png(image, self.path / "samples" / "data.png", {"data": facts.name})

    def _save(self, path: Path, averages: Mapping[str, Average], step: int, readme: str | None = None) -> None:
        modules = {name: average.module for name, average in averages.items()}
        checkpoint.save_checkpoint(path, modules, self.setup, self.data.facts, step, readme)

    def _checkpoint(self, averages: Mapping[str, Average], step: int) -> None:
        self._save(self.path / "checkpoints" / f"step-{step:07d}", averages, step)
        checkpoint.prune(self.path, KEPT)

    def _show(self, averages: Mapping[str, Average], step: int) -> None:
        """Samples of the averaged weights, from the same seeds every time."""
        model, facts = recipes.build(self.setup, self.data.facts), self.data.facts
        for name, player in model.players().items():
            player.module.load_state_dict(averages[name].module.state_dict())
        image = draw.grid(facts, model.eval().sample(SHOWN if facts.is_image else POINTS, rng=0))
        recipe = {"run": self.path.name, "step": step, "sampler": "ancestral", "steps": 50, "seed": 0}
        draw.save_png(image, self.path / "samples" / f"step-{step:07d}.png", recipe)

    def _status(self, status: str, **more: Any) -> None:
        self.record.update(status=status, **more)
        checkpoint.write_json(self.path / "run.json", self.record)

    def _card(self, step: int, seconds: float) -> str:
        facts, parameters = self.data.facts, sum(p.numel() for p in self.model.parameters())
        return (
            f"# {self.path.name}\n\nA diffusion model of {self.data.description}.\n\n"
            f"Trained for {step:,} steps of {self.setup.training.batch} examples in {seconds / 60:.1f} minutes "
            f"({parameters:,} parameters, recipe `{self.setup.recipe}`, seed {self.seed})"
            + (f" by\n\n    {shlex.join(self.record['argv'])}\n\n" if self.record["argv"] else ".\n\n")
            + "Load it with `ancestral.load`, measure it with `ancestral evaluate`. Its likelihood is a bound, and "
            f"only for data like {facts.name}: examples of shape {facts.shape}"
            + (f" on {facts.levels} levels.\n" if facts.levels else " of real values.\n")
        )


def prepare(
    source: str | Path | Data,
    *,
    to: str | Path | None = None,
    minutes: float | None = None,
    steps: int | None = None,
    seed: int = 0,
    size: int | None = None,
    recipe: str | None = None,
    changes: Sequence[str] = (),
    on_bad: OnBad = "skip",
    argv: Sequence[str] = (),
    progress: Progress | None = None,
) -> Run:
    """Read the data, settle the set-up, build the model and measure its pace; last of all, claim the run directory.

    Args:
        source: "digits", the name of a toy, a path to images or arrays, or data already loaded.
        to: the run directory, which must not exist; by default the next free runs/NAME-0001.
        minutes: of training, turned into steps by measuring the pace.
        steps: number of steps, in place of minutes.
        seed: of initialisation, batches, noise and times.
        size: side to which images are brought.
        recipe: name of a recipe; by default the one for data of this shape.
        changes: `section.key=value` settings that replace the recipe's.
        on_bad: "skip" files that cannot be read and count them, or "fail".
        argv: the command line, for the record.
        progress: told (what, done, of) while data is read.

    Raises:
        UserError: in one sentence, if anything is wrong with the input.
    """
    if minutes is not None and steps is not None:
        raise OptionError("received both minutes and steps: give one of them")
    if not 0 <= seed < 2**63:
        raise OptionError(f"a seed is a whole number from 0 to 2^63 - 1, received {seed}")
    if to is not None and Path(to).exists():
        raise _taken(Path(to))
    data = source if isinstance(source, Data) else sources.load(source, size=size, on_bad=on_bad, progress=progress)
    budget = [f"training.minutes={minutes}", "training.steps=null"] if minutes is not None else []
    budget += [f"training.steps={steps}", "training.minutes=null"] if steps is not None else []
    setup = recipes.change(recipes.choose(data.facts, recipe), [*changes, *budget])
    model = recipes.build(setup, data.facts, seed)
    record = {
        "status": "ready",
        "version": version("ancestral"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "argv": list(argv),
        "seed": seed,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "data": {"source": data.facts.source, "size": size, "on_bad": on_bad, "digest": data.facts.digest},
    }
    with torch.no_grad():
        model.loss(data.batch([0]), stream(seed))  # a set-up that cannot run fails here, with nothing written
    if setup.training.steps is None:
        wanted = (setup.training.minutes or 1.0) * 60
        seconds = loop.pace(model, data, setup.training, seed=seed, seconds=min(max(PACE[0], 0.03 * wanted), PACE[1]))
        setup = recipes.change(setup, [f"training.steps={max(1, round(wanted / seconds))}"])
        record["seconds_per_step"] = round(seconds, 6)
    return Run(_claim(to, data.facts.name), data, setup, model, seed, record)


def train(
    source: str | Path | Data,
    *,
    to: str | Path | None = None,
    minutes: float | None = None,
    steps: int | None = None,
    seed: int = 0,
    recipe: str | None = None,
    changes: Sequence[str] = (),
) -> Run:
    """Train a model to the end and return its finished run; `prepare` explains the arguments."""
    run = prepare(source, to=to, minutes=minutes, steps=steps, seed=seed, recipe=recipe, changes=changes)
    for _ in run.steps():
        pass
    return run


def reload(run: Path, progress: Progress | None = None) -> Data:
    """The data that a run was trained on, read again in the same way.

    Raises:
        RunError: if the run does not say, and what `data.load` raises if it can no longer be read.
    """
    path = checkpoint.run_of(run) / "run.json"
    try:
        record = json.loads(path.read_text())["data"]
        source, size, on_bad = record["source"], record["size"], record["on_bad"]
    except (OSError, ValueError, KeyError, TypeError):
        raise RunError(f"{path}: does not say what the run was trained on; name the data with --data") from None
    return sources.load(source, size=size, on_bad=on_bad, progress=progress)


def _claim(to: str | Path | None, name: str) -> Path:
    """Make the run directory: the one named, or the first free one of runs/NAME-0001, runs/NAME-0002, ..."""
    if to is not None:
        try:
            Path(to).mkdir(parents=True)
        except FileExistsError:
            raise _taken(Path(to)) from None
        return Path(to)
    stem = "".join(c if c.isalnum() or c in "-_." else "-" for c in name)[:100]
    for number in count(1):
        path = Path("runs") / f"{stem}-{number:04d}"
        with suppress(FileExistsError):
            path.mkdir(parents=True)
            return path
    raise AssertionError("unreachable")


def _taken(path: Path) -> RunError:
    return RunError(f"{path}: already exists, and a run is never overwritten; name another directory with --to")


def _metrics(record: Record, batch: int) -> dict[str, Any]:
    return {
        "step": record.step,
        "loss": {name: round(value, 6) for name, value in record.loss.items()},
        "grad_norm": {name: round(value, 6) for name, value in record.grad_norm.items()},
        "rate": record.rate,
        "seconds": round(record.seconds, 3),
        "images_per_second": round(record.step * batch / max(record.seconds, 1e-9), 1),
    }
