"""Checkpoints: folders of safetensors and JSON that appear whole or not at all, and are verified when read.

RUN/checkpoints/step-*/
  weights.safetensors    the averaged weights, which are sampled and measured
  state.safetensors      everything a step hands to the next: weights, averages, the optimiser's moments
  model.json             step, held-out loss, set-up and facts of the data
  manifest.json          size and SHA-256 of every other file
RUN/final/               the same without state.safetensors, with a README.md
RUN/averages/step-*/     averages of the weights of two lengths, from which any other is made: see `average`
"""

import json
import os
import re
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ancestral.data import Facts
from ancestral.errors import OptionError, RunError, RunWarning
from ancestral.training import average, durable, recipes
from ancestral.training.average import LENGTHS
from ancestral.training.loop import State, average_key, under
from ancestral.training.recipes import Model
from ancestral.training.settings import Family, Setup

Tensors = Mapping[str, Tensor]

WEIGHTS, STATE, MODEL = "weights.safetensors", "state.safetensors", "model.json"


@dataclass(frozen=True)
class Saved:
    """A checkpoint that was read.

    Attributes:
        path: its folder.
        step: how many steps were done.
        setup: how the model was made.
        facts: of the data it was made for.
        model: with the averaged weights.
        held_out: loss on held-out examples, if it was measured.
        ema: length of the average that the weights are, relative to the run.
        residual: relative error of the average's profile over the steps; 0 for one that was kept while training.
    """

    path: Path
    step: int
    setup: Setup
    facts: Facts
    model: Model
    held_out: float | None
    ema: float
    residual: float = 0.0

    @property
    def family(self) -> Family:
        """Of the model."""
        return self.setup.family


def save(path: Path, tensors: Tensors, setup: Setup, facts: Facts, step: int, held_out: float | None = None) -> Path:
    """Write a checkpoint from which a run goes on to the bit, and return its path.

    Args:
        path: of its folder.
        tensors: what `State.tensors` gave.
        setup: how the model was made.
        facts: of the data.
        step: how many steps are done.
        held_out: loss on held-out examples, if it was measured.

    Raises:
        NoSpace: if the disk is full; nothing is left behind, and what was there is kept.
    """
    files = {**_model_files(tensors, setup, facts, step, held_out), STATE: _tensors(tensors)}
    return durable.write_folder(path, files)


def save_final(path: Path, tensors: Tensors, setup: Setup, facts: Facts, step: int, readme: str) -> Path:
    """Write the model of a finished run; its readme may be edited, so it is not in the manifest.

    Raises:
        NoSpace: if the disk is full.
    """
    files = _model_files(tensors, setup, facts, step, None)
    return durable.write_folder(path, files, unlisted={"README.md": lambda file: _text(file, readme)})


def save_averages(run: Path, tensors: Tensors, step: int) -> Path:
    """Write the averages of a step, from which `open_run` makes any other later."""
    files = {_average_name(length): _tensors(_averages(tensors, length)) for length in LENGTHS}
    return durable.write_folder(folder(run, "averages", step), files)


def averaged(tensors: Tensors, setup: Setup, facts: Facts) -> Model:
    """The model with the averaged weights of a training state."""
    model = recipes.build(setup, facts)
    for name, player in model.players().items():
        player.module.load_state_dict(under(tensors, average_key(name, setup.training.ema)))
    return model.eval().requires_grad_(False)


def load(run: str | Path) -> Model:
    """The model of a run: its final weights, or its newest checkpoint when it has not finished; or a checkpoint itself.

    What is damaged is passed over for the newest checkpoint that verifies, with a warning; a checkpoint that is named
    itself has to be whole.

    Args:
        run: a run directory, or a checkpoint inside one.

    Raises:
        RunError: if there is no run or nothing in it is whole, naming the file and what to load instead.
    """
    return open_run(run).model


def open_run(run: str | Path, ema: float | None = None) -> Saved:
    """The checkpoint that stands for a run, as `load` finds it, with an average of the weights of any length.

    Args:
        run: a run directory, or a checkpoint inside one.
        ema: length of the average, relative to the steps done; by default the one the run was trained with.

    Raises:
        RunError: as `load` does, and if the run kept no averages to make another from.
        OptionError: if the length is outside what a power function can have.
    """
    saved = read(find(Path(run)))
    return saved if ema is None or ema == saved.ema else _synthesised(saved, ema)


def read(path: Path) -> Saved:
    """A checkpoint that has been verified.

    Raises:
        RunError: if another version of this program wrote it.
    """
    try:
        record = json.loads((path / MODEL).read_bytes())
        setup, facts = recipes.read(record["setup"]), Facts.model_validate(record["facts"])
        model = recipes.build(setup, facts)
        tensors = load_file(path / WEIGHTS)
        for name, player in model.players().items():
            player.module.load_state_dict(under(tensors, f"{name}."))
        return Saved(path, record["step"], setup, facts, model.eval(), record["held_out"], setup.training.ema)
    except (KeyError, ValueError, ValidationError, OptionError, SafetensorError, RuntimeError) as error:
        raise _foreign(path, error) from None


def _synthesised(saved: Saved, length: float) -> Saved:
    """The same model with an average of another length, made from the averages that were kept."""
    run = run_of(saved.path)
    names = {_average_name(kept) for kept in LENGTHS}
    folders = [path for path in _steps(run / "averages") if step_of(path) <= saved.step]
    whole = [path for path in folders if durable.fault(path, names) is None]
    if not whole:
        raise RunError(
            f"{run / 'averages'}: holds no averages of the weights up to step {saved.step}, so one of length "
            f"{length:g} cannot be made; leave --ema out, or train with training.snapshots above 0"
        )
    kept = [(step_of(path), each) for path in whole for each in LENGTHS]
    coefficients, residual = average.coefficients(kept, saved.step, length)
    files = (load_file(path / _average_name(each)) for path in whole for each in LENGTHS)
    tensors = average.synthesise(files, coefficients)
    for name, player in saved.model.players().items():
        player.module.load_state_dict(under(tensors, f"{name}."))
    return replace(saved, ema=length, residual=residual)


def restore(path: Path, state: State) -> int:
    """Bring a training state to where a checkpoint left it, and return the step.

    Raises:
        RunError: if another version of this program wrote it.
    """
    try:
        state.restore(load_file(path / STATE))
        return int(json.loads((path / MODEL).read_bytes())["step"])
    except (KeyError, ValueError, SafetensorError, RuntimeError) as error:
        raise _foreign(path, error) from None


def find(run: Path) -> Path:
    """The checkpoint that stands for a run, verified: the final one, else the newest that is whole.

    Raises:
        RunError: if there is none, or the checkpoint that was named is damaged.
    """
    if not run.is_dir():
        raise RunError(f"{run}: there is no such run directory; 'ancestral train DATA --to {run}' makes one")
    if not (run / "run.json").is_file():
        if not (run / MODEL).is_file() and not (run / durable.MANIFEST).is_file():
            raise RunError(f"{run}: not a run directory, it holds no checkpoint; name one made by 'train'")
        if fault := durable.fault(run, {WEIGHTS, MODEL}):
            others = [path for path in checkpoints(run_of(run)) if path != run]
            raise RunError(f"{fault}; {_remedy(_newest_whole(others, {WEIGHTS, MODEL}, warn=False))}")
        return run
    final = [run / "final"] if (run / "final").is_dir() else []
    found = _newest_whole([*checkpoints(run), *final], {WEIGHTS, MODEL})
    if found is None:
        raise RunError(f"{run}: none of its checkpoints is whole; {_remedy(None)}")
    return found


def newest(run: Path) -> Path:
    """The newest checkpoint of a run that is whole, from which training goes on.

    Raises:
        RunError: if there is none: a run is never started again in the place of one that is lost.
    """
    found = _newest_whole(checkpoints(run), {WEIGHTS, MODEL, STATE})
    if found is None:
        raise RunError(
            f"{run / 'checkpoints'}: holds no checkpoint that is whole, so the run cannot go on; restore one from a "
            "copy, or train anew with another --to"
        )
    return found


def run_of(path: Path) -> Path:
    """The run that a checkpoint belongs to, or the run itself."""
    if path.name == "final":
        return path.parent
    return path.parent.parent if path.parent.name == "checkpoints" else path


def checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    return _steps(run / "checkpoints")


def prune(run: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints of a run and the one with the least held-out loss."""
    found = checkpoints(run)
    losses = {path: loss for path in found if (loss := _held_out(path)) is not None}
    best = min(losses, key=lambda path: losses[path], default=None)
    for path in found[:-keep]:
        if path != best:
            shutil.rmtree(path)


def _held_out(path: Path) -> float | None:
    """The held-out loss of a checkpoint, if it was measured and can be read."""
    try:
        loss: float | None = json.loads((path / MODEL).read_bytes())["held_out"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return loss


def put_aside(run: Path, after: int) -> None:
    """Rename the checkpoints beyond a step, which are damaged, so that they are no longer taken for checkpoints."""
    for path in checkpoints(run):
        if step_of(path) > after:
            names = (
                path.with_name(f"damaged-{path.name}{suffix}") for suffix in ("", *(f"-{i}" for i in range(2, 99)))
            )
            path.rename(next(name for name in names if not name.exists()))


def step_of(path: Path) -> int:
    """The step in the name of a folder."""
    return int(path.name.removeprefix("step-"))


def folder(run: Path, kind: str, step: int) -> Path:
    """RUN/KIND/step-0000000."""
    return run / kind / f"step-{step:07d}"


def _model_files(
    tensors: Tensors, setup: Setup, facts: Facts, step: int, held_out: float | None
) -> dict[str, durable.Writer]:
    record = {
        "step": step,
        "held_out": held_out,
        "setup": setup.model_dump(mode="json"),
        "facts": facts.model_dump(mode="json"),
    }
    return {
        WEIGHTS: _tensors(_averages(tensors, setup.training.ema)),
        MODEL: lambda file: _text(file, json.dumps(record, indent=2) + "\n"),
    }


def _averages(tensors: Tensors, length: float) -> dict[str, Tensor]:
    """Every player's averaged weights as PLAYER.NAME."""
    players = dict.fromkeys(key.partition("/")[0] for key in tensors)
    return {
        f"{name}.{key}": value for name in players for key, value in under(tensors, average_key(name, length)).items()
    }


def _average_name(length: float) -> str:
    return f"{length:g}.safetensors"


def _tensors(tensors: Tensors) -> durable.Writer:
    def write(file: Path) -> None:
        try:
            save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, file)
        except SafetensorError as error:
            if found := re.search(r"os error (\d+)", str(error)):
                raise OSError(int(found[1]), os.strerror(int(found[1])), str(file)) from error
            raise

    return write


def _text(file: Path, text: str) -> None:
    file.write_text(text)


def _steps(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if re.fullmatch(r"step-\d+", path.name))


def _newest_whole(candidates: list[Path], needed: set[str], warn: bool = True) -> Path | None:
    """The last of the candidates that verifies, saying which were passed over."""
    for path in reversed(candidates):
        fault = durable.fault(path, needed)
        if fault is None:
            return path
        if warn:
            warnings.warn(f"{fault}; an earlier checkpoint is used in its place", RunWarning, stacklevel=4)
    return None


def _remedy(other: Path | None) -> str:
    return f"{other} can be used in its place" if other else "train again, or restore it from a copy"


def _foreign(path: Path, error: Exception) -> RunError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return RunError(f"{path}: written by another version of this program and cannot be read ({reason})")
