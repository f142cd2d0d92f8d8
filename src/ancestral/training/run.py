"""A run: one directory that says how a model was made; `start` makes one ready, its steps fill it.

RUN/
  run.json               status, versions, seed, command line, data, pace, and every session that worked on it
  config.json            the complete set-up
  metrics.jsonl          loss, gradient norm, rate, and held-out loss at checkpoints: a function of the set-up
  pace.jsonl             how fast it went: a function of the machine
  log.txt                what was said
  samples/step-*.png     samples of the averaged weights, always from the same seeds; data.png beside them
  averages/step-*/       averages of the weights, from which any other is made
  checkpoints/step-*/    see `checkpoint`
  final/                 the model of the finished run, with a README.md

The directory appears whole, with a checkpoint of step 0, so a run that was killed can always go on.
"""

import json
import math
import platform
import shlex
import time
from collections.abc import Callable, Generator
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor

from ancestral import data as sources
from ancestral.data import Data, draw
from ancestral.data.dataset import Fit, Progress
from ancestral.diffusion.model import Diffusion
from ancestral.errors import Diverged, NoSpace, RunError, Stopped
from ancestral.protocol import Batch, Watchful
from ancestral.rng import Rows
from ancestral.training import average, checkpoint, durable, loop
from ancestral.training.loop import Record, State
from ancestral.training.recipes import Model
from ancestral.training.settings import Setup

SETTLED, LOOKED = 1000, 256
"""Steps before which a model that looks collapsed has only not begun, and examples that it is looked at with."""

SHOWN, POINTS = 64, 2000
"""Images in a grid, and points in a scatter."""

CARDS = {
    "diffusion": ("diffusion model", "Its likelihood is a bound"),
    "vae": ("variational autoencoder", "Its likelihood is a bound"),
    "flow": ("normalizing flow", "Its likelihood is exact, but for a bound where values lie on levels"),
    "continuous": (
        "continuous normalizing flow",
        "Its likelihood is a bound, or that of its ODE up to a solver's error",
    ),
    "gan": ("generative adversarial network", "It has no likelihood"),
}
"""What each family is called, or a recipe that is not like its family, and what is to be known of its likelihood."""


@dataclass(frozen=True)
class Run:
    """A training run that is ready to start or to go on: its directory is there, and locked.

    Attributes:
        path: the run directory.
        data: what is learnt from.
        setup: complete, with the number of steps.
        model: whose weights are trained.
        state: what the next step starts from.
        done: steps that are done.
        seed: of everything.
        record: what run.json says.
        argv: the command line of this session.
        lock: held while this process works on the run; None where another process holds it.
    """

    path: Path
    data: Data
    setup: Setup
    model: Model
    state: State
    done: int
    seed: int
    record: dict[str, Any]
    argv: tuple[str, ...]
    lock: FileLock | None

    @property
    def total(self) -> int:
        """Number of steps."""
        return self.setup.training.steps or 0

    def steps(self, stop: Callable[[], bool] = lambda: False) -> Generator[Record, None, None]:
        """Train to the end, writing the run directory on the way, and yield a record after every step.

        Closing the generator between two steps, too, writes a checkpoint.

        Args:
            stop: asked once a step; when true, a checkpoint is written and training stops.

        Raises:
            Stopped: after a checkpoint, when asked to stop.
            Diverged: naming the last good checkpoint.
        """
        first, step, began = self.state.group.first, self.done, time.perf_counter()
        before, schedule = self.record.get("seconds", 0.0), _Schedule.of(self.setup)

        def took() -> float:
            return round(before + time.perf_counter() - began, 1)

        try:
            rows = self._rewind() if first else []
            if first and self.done < self.total:
                self.record["sessions"].append(self._session())
                self._status("training")
            records = loop.steps(self.state, self.data, self.total, seed=self.seed, start=self.done, stop=stop)
            for record in records:
                step = record.step
                if step >= SETTLED and step in schedule.checkpoints:
                    self._watch(step)
                self._keep(record, schedule, rows)
                yield record
            if step < self.total:
                raise Stopped(f"{self.path}: stopped after step {step} of {self.total}; {self.again}")
            self._finish(took())
            self.state.group.wait()
        except (Stopped, GeneratorExit):
            if step not in schedule.checkpoints:
                tensors = self.state.tensors()
                if first:
                    durable.write(self.path / "metrics.jsonl", "".join(rows).encode())
                self._checkpoint(tensors, step, None)
            self._status("stopped", steps=step, seconds=took())
            raise
        except Diverged as error:
            good = checkpoint.checkpoints(self.path)[-1]
            reason = f"{error}; {good} is the last good checkpoint"
            self._status("diverged", steps=step, seconds=took(), reason=reason)
            raise Diverged(reason) from None
        except KeyboardInterrupt:
            with suppress(OSError, NoSpace):
                self._status("stopped", steps=step, seconds=took())
            raise
        except BaseException as error:
            with suppress(OSError, NoSpace):
                self._status("failed", steps=step, seconds=took(), reason=str(error) or type(error).__name__)
            raise
        finally:
            if self.lock:
                self.lock.release()

    @property
    def again(self) -> str:
        """What to type to go on."""
        return f"'ancestral train --resume {shlex.quote(str(self.path))}' goes on from there"

    @property
    def rounding(self) -> str | None:
        """What has changed since the last session so that the result is the same up to rounding, and not to the bit."""
        last = self.record["sessions"][-1] if self.record["sessions"] else {}
        now = self._machine()
        changed = [f"{key} {last[key]} -> {now[key]}" for key in now if key in last and last[key] != now[key]]
        return ", ".join(changed) or None

    def log(self, line: str) -> None:
        """Add a line to log.txt."""
        if self.state.group.first:
            with (self.path / "log.txt").open("a") as file:
                file.write(line + "\n")

    def _watch(self, step: int) -> None:
        """Stops a run that there is no use in going on with, before it has a checkpoint of it.

        Raises:
            Diverged: saying why.
        """
        if isinstance(self.model, Watchful) and (reason := self.model.check(self._examples(step)[0])):
            raise Diverged(
                f"step {step}: training has collapsed, {reason}; try another --seed, a larger --set training.batch, or "
                f"a lower rate, such as --set training.rate={self.setup.training.rate / 4:g}"
            )

    def _examples(self, step: int) -> tuple[Batch, Tensor]:
        """Examples and randomness for looking at a model after a step, and as many held-out examples."""
        n, device = min(LOOKED, len(self.data.train), len(self.data.held_out)), self.state.group.device
        labels = None if self.data.train_labels is None else self.data.train_labels[:n].to(device)
        batch = Batch(self.data.batch(range(n)).to(device), Rows((self.seed, step), n), labels)
        return batch, self.data.facts.scale.forward(self.data.held_out[:n]).to(device)

    def _keep(self, record: Record, schedule: "_Schedule", rows: list[str]) -> None:
        """Write what is due after a step. The checkpoint comes last, so a run that goes on from it has the rest."""
        step, held_out, row = record.step, None, _metrics(record)
        due, drawn, kept = (step in s for s in (schedule.checkpoints, schedule.pictures, schedule.snapshots))
        tensors = self.state.tensors() if due or drawn or kept else {}
        if not self.state.group.first:
            return
        if due or drawn:
            model = checkpoint.averaged(tensors, self.setup, self.data.facts).to(self.state.group.device)
        if due:
            held_out = row["held_out"] = round(sum(loop.held_out_loss(model, self.data, self.seed).values()), 6)
        best = None if isinstance(self.model, Watchful) else held_out  # the losses of a game are no measure of it
        if drawn:
            self._draw(model, step)
        if kept:
            checkpoint.save_averages(self.path, tensors, step)
        if due and isinstance(self.model, Watchful):
            row["standing"] = {
                key: round(value, 6) for key, value in self.model.standing(*self._examples(step)).items()
            }
        if due or step in schedule.rows:
            rows.append(json.dumps(row) + "\n")
            with (self.path / "metrics.jsonl").open("a") as metrics, (self.path / "pace.jsonl").open("a") as pace:
                metrics.write(rows[-1])
                pace.write(json.dumps(self._pace(record)) + "\n")
        if due:
            durable.write(self.path / "metrics.jsonl", "".join(rows).encode())
            self._checkpoint(tensors, step, best)

    def _checkpoint(self, tensors: checkpoint.Tensors, step: int, held_out: float | None) -> None:
        if self.state.group.first:
            path = checkpoint.folder(self.path, "checkpoints", step)
            checkpoint.save(path, tensors, self.setup, self.data.facts, step, held_out)
            checkpoint.prune(self.path, self.setup.training.keep)

    def _draw(self, model: Model, step: int) -> None:
        """Samples of the averaged weights, from the same seeds every time."""
        facts = self.data.facts
        image = draw.grid(facts, model.sample(SHOWN if facts.is_image else POINTS, rng=0))
        recipe = {"run": self.path.name, "step": step, "seed": 0}
        recipe |= {"sampler": "ancestral", "steps": 50} if isinstance(model, Diffusion) else {}
        draw.save_png(image, self.path / "samples" / f"step-{step:07d}.png", recipe)

    def _rewind(self) -> list[str]:
        """The rows of metrics.jsonl up to the step that is gone on from; later and torn ones are removed."""
        path, kept = self.path / "metrics.jsonl", list[str]()
        for line in path.read_text().splitlines() if path.is_file() else []:
            with suppress(ValueError):
                if json.loads(line)["step"] <= self.done:
                    kept.append(line + "\n")
        durable.write(path, "".join(kept).encode())
        return kept

    def _finish(self, seconds: float) -> None:
        final, tensors = self.path / "final", self.state.tensors()
        if not self.state.group.first:
            return
        if durable.fault(final, {checkpoint.WEIGHTS, checkpoint.MODEL}):
            checkpoint.save_final(final, tensors, self.setup, self.data.facts, self.total, self._card(seconds))
        self._status("finished", steps=self.total, seconds=seconds)

    def _status(self, status: str, **more: Any) -> None:
        if self.state.group.first:
            self.record.update(status=status, **more)
            durable.write_json(self.path / "run.json", self.record)

    def _session(self) -> dict[str, Any]:
        return {
            "from_step": self.done,
            "argv": list(self.argv),
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "python": platform.python_version(),
            **self._machine(),
        }

    def _machine(self) -> dict[str, Any]:
        """What equal bits depend on beside the data and the seed, and may be another when a run goes on."""
        device = self.state.group.device
        lowered = any(getattr(module, "lowered", False) for module in self.model.modules())
        return {
            "version": version("ancestral"),
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name(device)
            if device.type == "cuda"
            else torch.backends.cpu.get_cpu_capability(),
            "bfloat16": lowered,
            "processes": self.state.group.count,
            "accumulate": self.setup.training.accumulate,
            "threads": torch.get_num_threads(),
        }

    def _pace(self, record: Record) -> dict[str, Any]:
        speed = (record.step - self.done) * self.setup.training.batch / max(record.seconds, 1e-9)
        return {"step": record.step, "seconds": round(record.seconds, 3), "images_per_second": round(speed, 1)}

    def _card(self, seconds: float) -> str:
        facts, parameters = self.data.facts, sum(p.numel() for p in self.model.parameters())
        kind, likelihood = CARDS[self.setup.recipe if self.setup.recipe in CARDS else self.setup.family]
        return (
            f"# {self.path.name}\n\nA {kind} of {self.data.description}.\n\n"
            f"Trained for {self.total:,} steps of {self.setup.training.batch} examples in {seconds / 60:.1f} minutes "
            f"({parameters:,} parameters, recipe `{self.setup.recipe}`, seed {self.seed})"
            + (f" by\n\n    {shlex.join(self.record['argv'])}\n\n" if self.record["argv"] else ".\n\n")
            + f"Load it with `ancestral.load`, measure it with `ancestral evaluate`. {likelihood}. It is for data like "
            f"{facts.name} only: examples of shape {facts.shape}"
            + (f" on {facts.levels} levels.\n" if facts.levels else " of real values.\n")
        )


@dataclass(frozen=True)
class _Schedule:
    """After which steps something is written; a function of the set-up."""

    rows: range
    checkpoints: frozenset[int]
    pictures: frozenset[int]
    snapshots: frozenset[int]

    @classmethod
    def of(cls, setup: Setup) -> "_Schedule":
        section, total = setup.training, setup.training.steps or 0

        def evenly(n: int) -> frozenset[int]:
            return frozenset(math.ceil(total * (i + 1) / n) for i in range(n))

        every = section.checkpoint_every
        return cls(
            range(1, total + 1, max(1, total // 500)),
            frozenset({*range(every, total, every), total}) if every else evenly(section.checkpoints),
            evenly(section.pictures),
            frozenset(average.snapshot_steps(total, section.snapshots)),
        )


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
    return sources.load(source, size=size, fit=fit_of(run), on_bad=on_bad, progress=progress)


def fit_of(run: Path) -> Fit:
    """How the images that a run was trained on came to their size."""
    try:
        return json.loads((checkpoint.run_of(run) / "run.json").read_text())["data"]["fit"]
    except (OSError, ValueError, KeyError, TypeError):  # a run from before there was a choice, or a model alone
        return "crop"


def _metrics(record: Record) -> dict[str, Any]:
    return {
        "step": record.step,
        "loss": {name: round(value, 6) for name, value in record.loss.items()},
        "grad_norm": {name: round(value, 6) for name, value in record.grad_norm.items()},
        "rate": record.rate,
    }
