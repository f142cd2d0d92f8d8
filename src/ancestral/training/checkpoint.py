"""Checkpoints: a directory of safetensors and JSON that appears whole or not at all, and is verified when read.

    CHECKPOINT/
      weights.safetensors    the averaged weights, which are sampled and measured
      model.json             step, set-up and facts of the data: everything needed to rebuild the model
      manifest.json          size and SHA-256 of every other file

Files are written under a temporary name beside the target, flushed to the disk, and the directory is renamed last.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

from ancestral.data import Facts
from ancestral.diffusion.model import Diffusion
from ancestral.errors import NoSpace, OptionError, RunError
from ancestral.training import recipes
from ancestral.training.recipes import Setup

WEIGHTS, MODEL, MANIFEST = "weights.safetensors", "model.json", "manifest.json"


def write_json(path: Path, record: Any) -> None:
    """Write JSON so that the file is either the old one or the whole new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        _write(temporary, json.dumps(record, indent=2).encode() + b"\n")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    _flush(path.parent)


def save_checkpoint(
    path: Path, modules: Mapping[str, nn.Module], setup: Setup, facts: Facts, step: int, readme: str | None = None
) -> Path:
    """Write a checkpoint of every player's weights to `path`, which must not exist, and return the path.

    A readme goes beside the files and not into the manifest: it may be edited.

    Raises:
        NoSpace: if the disk is full; nothing is left behind.
    """
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    model = {"step": step, "setup": setup.model_dump(mode="json"), "facts": facts.model_dump(mode="json")}
    tensors = {
        f"{player}.{name}": tensor.contiguous()
        for player, module in modules.items()
        for name, tensor in module.state_dict().items()
    }
    files = {WEIGHTS: save(tensors), MODEL: json.dumps(model, indent=2).encode() + b"\n"}
    manifest = {name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()}
    try:
        temporary.mkdir(parents=True)
        files[MANIFEST] = json.dumps(manifest, indent=2).encode() + b"\n"
        if readme:
            files["README.md"] = readme.encode()
        for name, data in files.items():
            _write(temporary / name, data)
        _flush(temporary)
        temporary.rename(path)
        _flush(path.parent)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if error.errno == errno.ENOSPC:
            raise NoSpace(f"{path}: no space left on the disk; earlier checkpoints beside it are whole") from None
        raise
    return path


def load(run: str | Path) -> Diffusion:
    """The model of a run: its final weights, or its newest checkpoint when it has not finished; or a checkpoint itself.

    Args:
        run: a run directory, or a checkpoint directory inside one.

    Raises:
        RunError: if there is no run or it is damaged, naming the file and what to load instead.
    """
    return load_with_setup(run)[0]


def load_with_setup(run: str | Path) -> tuple[Diffusion, Setup, Path]:
    """The model, its set-up, and the checkpoint directory that was read; see `load`."""
    path = find(Path(run))
    _verify(path)
    try:
        record = json.loads((path / MODEL).read_bytes())
        setup, facts = recipes.read(record["setup"]), Facts.model_validate(record["facts"])
        model = recipes.build(setup, facts)
        tensors = load_file(path / WEIGHTS)
        for name, player in model.players().items():
            own = {key: tensor for key, tensor in tensors.items() if key.startswith(f"{name}.")}
            player.module.load_state_dict({key.removeprefix(f"{name}."): tensor for key, tensor in own.items()})
    except (KeyError, ValueError, ValidationError, OptionError, SafetensorError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise RunError(f"{path}: written by another version of this program and cannot be read ({reason})") from None
    return model.eval(), setup, path


def find(run: Path) -> Path:
    """The checkpoint directory that stands for a run.

    Raises:
        RunError: if there is none.
    """
    if not run.is_dir():
        raise RunError(f"{run}: there is no such run directory; 'ancestral train DATA --to {run}' makes one")
    candidates = [run, run / "final", *reversed(checkpoints(run))]
    for path in candidates:
        if (path / MANIFEST).is_file():
            return path
    if (run / "run.json").is_file():
        raise RunError(f"{run}: the run was stopped before its first checkpoint, so there is no model yet; train again")
    raise RunError(f"{run}: not a run directory, it holds no checkpoint; name one made by 'train'")


def run_of(path: Path) -> Path:
    """The run that a checkpoint directory belongs to, or the run itself."""
    if path.name == "final":
        return path.parent
    return path.parent.parent if path.parent.name == "checkpoints" else path


def prune(run: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints of a run."""
    for path in checkpoints(run)[:-keep]:
        shutil.rmtree(path)


def checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    return sorted((run / "checkpoints").glob("step-*"))


def _verify(path: Path) -> None:
    """Compare every file with the manifest."""
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        entries = [(path / name, entry["size"], entry["sha256"]) for name, entry in manifest.items()]
    except (ValueError, TypeError, KeyError, AttributeError):
        raise RunError(f"{path / MANIFEST}: damaged, the checkpoint cannot be trusted; {_remedy(path)}") from None
    if {file.name for file, _, _ in entries} != {WEIGHTS, MODEL}:
        raise RunError(f"{path / MANIFEST}: damaged, it does not list the files of a checkpoint; {_remedy(path)}")
    for file, size, digest in entries:
        if not file.is_file():
            raise RunError(f"{file}: missing; {_remedy(path)}")
        data = file.read_bytes()
        if len(data) != size or hashlib.sha256(data).hexdigest() != digest:
            raise RunError(f"{file}: does not match its checksum, it was changed or damaged; {_remedy(path)}")


def _remedy(path: Path) -> str:
    others = [other for other in checkpoints(run_of(path)) if other != path]
    return f"{others[-1]} can be used in its place" if others else "train again, or restore it from a copy"


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _flush(folder: Path) -> None:
    """Make the names in a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
