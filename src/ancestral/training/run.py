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
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import ancestral
from ancestral import data as sources
from ancestral.data import Data, draw
from ancestral.data.dataset import OnBad, Progress
from ancestral.diffusion.model import Diffusion
from ancestral.errors import Diverged, OptionError, RunError
from ancestral.training import checkpoint, recipes
from ancestral.training import train as loop
from ancestral.training.recipes import Setup
from ancestral.training.train import Average, Record

KEPT = 2
"""Checkpoints of a run that are kept; an older one is removed once a newer one is on the disk."""

SHOWN, POINTS = 64, 2000
"""Images in a grid, and points in a scatter."""


@dataclass(frozen=True)
class Run:
    """A training run that is ready to start: nothing has been written yet.

    Attributes:
        path: the run directory, which does not exist.
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

    def steps(self) -> Iterator[Record]:
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
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / "log.txt").open("a") as file:
            file.write(line + "\n")

    def _open(self) -> None:
        """Make the directory, and show the data beside which samples will stand."""
        (self.path / "samples").mkdir(parents=True, exist_ok=True)
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
            f"({parameters:,} parameters, recipe `{self.setup.recipe}`, seed {self.seed}) by\n\n"
            f"    {' '.join(self.record['argv'])}\n\n"
            "Load it with `ancestral.load`, measure it with `ancestral evaluate`. Its likelihood is a bound, and only "
            f"for data like {facts.name}: examples of shape {facts.shape}"
            + (f" on {facts.levels} levels.\n" if facts.levels else " of real values.\n")
        )


def prepare(
    source: str | Path,
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
    """Read the data, settle the set-up, build the model and measure its pace; nothing is written.

    Args:
        source: "digits", the name of a toy, or a path to images or arrays.
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
    path = _fresh(to, Path(source).name or "run") if to is None else Path(to)
    if path.exists():
        raise RunError(f"{path}: already exists, and a run is never overwritten; name another directory with --to")
    data = sources.load(source, size=size, on_bad=on_bad, progress=progress)
    budget = [f"training.minutes={minutes}", "training.steps=null"] if minutes is not None else []
    budget += [f"training.steps={steps}"] if steps is not None else []
    setup = recipes.change(recipes.choose(data.facts, recipe), [*changes, *budget])
    model = recipes.build(setup, data.facts, seed)
    record = {
        "status": "ready",
        "version": ancestral.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "argv": list(argv),
        "seed": seed,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "data": {"source": str(source), "size": size, "on_bad": on_bad, "digest": data.facts.digest},
    }
    if setup.training.steps is None:
        wanted = (setup.training.minutes or 1.0) * 60
        seconds = loop.pace(model, data, setup.training, seed=seed, seconds=max(4.0, 0.03 * wanted))
        setup = recipes.change(setup, [f"training.steps={max(1, round(wanted / seconds))}"])
        record["seconds_per_step"] = round(seconds, 6)
    return Run(path, data, setup, model, seed, record)


def train(source: str | Path, **options: Any) -> Run:
    """Train a model to the end and return its finished run; the options are those of `prepare`."""
    run = prepare(source, **options)
    for _ in run.steps():
        pass
    return run


def _fresh(to: str | Path | None, name: str) -> Path:
    """The first of runs/NAME-0001, runs/NAME-0002, ... that does not exist."""
    stem = "".join(c if c.isalnum() or c in "-_." else "-" for c in Path(name).stem)[:100] or "run"
    number = 1
    while (path := Path("runs") / f"{stem}-{number:04d}").exists():
        number += 1
    return path


def _metrics(record: Record, batch: int) -> dict[str, Any]:
    return {
        "step": record.step,
        "loss": {name: round(value, 6) for name, value in record.loss.items()},
        "grad_norm": {name: round(value, 6) for name, value in record.grad_norm.items()},
        "rate": record.rate,
        "seconds": round(record.seconds, 3),
        "images_per_second": round(record.step * batch / max(record.seconds, 1e-9), 1),
    }
