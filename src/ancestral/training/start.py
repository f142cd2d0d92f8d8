"""How a run comes to be: a new one, planned and then given a directory, or one that goes on where it stopped."""

import errno
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any, TypedDict, Unpack

from filelock import FileLock, Timeout

from ancestral import data as sources
from ancestral.data import Data, draw, machine
from ancestral.data.dataset import Fit, OnBad, Progress
from ancestral.errors import OptionError, RunError
from ancestral.training import checkpoint, durable, loop, recipes, resources
from ancestral.training.checkpoint import Saved
from ancestral.training.loop import State
from ancestral.training.processes import ALONE, Processes
from ancestral.training.recipes import Model
from ancestral.training.resources import Cost
from ancestral.training.run import POINTS, SHOWN, Run
from ancestral.training.settings import Family, Setup

PACE = (4.0, 30.0)
"""Seconds that measuring the pace may take, at least and at most; between them, 3% of the budget."""

MAY_CHANGE = {f"training.{key}" for key in ("checkpoints", "checkpoint_every", "keep", "pictures", "accumulate")}
"""Settings that do not enter the weights, and may be other ones when a run goes on."""


@dataclass(frozen=True)
class Plan:
    """What would be done: everything about a new run but its directory.

    Attributes:
        data: what is learnt from.
        setup: complete, with the number of steps.
        model: initialised.
        seed: of everything.
        seconds_per_step: measured on this machine, where minutes had to be turned into steps or it was asked for.
        cost: memory and disk that the run needs, estimated.
        record: what run.json will say.
    """

    data: Data
    setup: Setup
    model: Model
    seed: int
    seconds_per_step: float | None
    cost: Cost
    record: dict[str, Any]


class Wishes(TypedDict, total=False):
    """What a run is asked to be. What is left out, or None, is up to the recipe, or to the run that goes on.

    Attributes:
        minutes: of training, turned into steps by measuring the pace.
        steps: number of steps, in place of minutes.
        seed: of initialisation, batches, noise and times; 0 by default.
        size: side to which images are brought.
        fit: how images of other proportions get there: "crop" (the default), "pad" or "stretch".
        family: "diffusion" (the default), "vae", "flow" or "gan".
        recipe: name of a recipe; by default the one of the family for data of this shape.
        preset: name of a network of `recipes.PRESETS`; by default the recipe's own.
        changes: `section.key=value` settings that replace the recipe's.
        on_bad: "skip" files that cannot be read and count them (the default), or "fail".
        weights: a run, or a checkpoint inside one, whose averaged weights are begun with, in its set-up: to train for
            longer, or on other data of the same kind. The optimiser, the averages and the schedules begin anew.
    """

    minutes: float | None
    steps: int | None
    seed: int | None
    size: int | None
    fit: Fit | None
    family: Family | None
    recipe: str | None
    preset: str | None
    changes: Sequence[str]
    on_bad: OnBad | None
    weights: str | Path | None


def plan(
    source: str | Path | Data,
    *,
    argv: Sequence[str] = (),
    group: Processes = ALONE,
    progress: Progress | None = None,
    measure: bool = False,
    **wishes: Unpack[Wishes],
) -> Plan:
    """Read the data, settle the set-up, build the model, see that it fits, and measure its pace; nothing is written.

    Args:
        source: "digits", the name of a toy, a path to images or arrays, or data already loaded.
        argv: the command line, for the record.
        group: the processes that train together.
        progress: told (what, done, of) while data is read.
        measure: the pace, even when nothing depends on it.
        wishes: see `Wishes`.

    Raises:
        UserError: in one sentence, if anything is wrong with the input, or the model does not fit into memory.
    """
    size, fit, on_bad = wishes.get("size"), wishes.get("fit") or "crop", wishes.get("on_bad") or "skip"
    seed = _seed(wishes, 0)
    data = _data(source, size, fit, on_bad, progress)
    weights = _weights(wishes)
    setup = _settled(_chosen(data, wishes, weights), wishes)
    model = recipes.build(setup, data.facts, seed)
    if weights:
        _begin_with(model, weights)
    model.to(group.device)
    cost = resources.cost(model, setup, data)  # a set-up that cannot run fails here
    at_a_time = setup.training.batch // (group.count * setup.training.accumulate)
    resources.refuse_if_too_large(cost, at_a_time, min(group.gathered(machine.available_memory())) // group.local)
    seconds = None
    if setup.training.steps is None or measure:
        wanted = (setup.training.minutes or 1.0) * 60
        budget = min(max(PACE[0], 0.03 * wanted), PACE[1])
        seconds = loop.pace(model, data, setup.training, seed=seed, group=group, seconds=budget)
        if setup.training.steps is None:
            setup = recipes.change(setup, [f"training.steps={max(1, round(wanted / seconds))}"])
    record = {
        "status": "ready",
        "seed": seed,
        "argv": list(argv),
        "data": {
            "source": data.facts.source,
            "size": size,
            "fit": fit,
            "on_bad": on_bad,
            "digest": data.facts.digest,
        },
        **({"weights": _origin(weights)} if weights else {}),
        **({"seconds_per_step": round(seconds, 6)} if seconds else {}),
        "sessions": [],
    }
    return Plan(data, setup, model, seed, seconds, cost, record)


def prepare(
    source: str | Path | Data | None = None,
    *,
    to: str | Path | None = None,
    resume: str | Path | None = None,
    argv: Sequence[str] = (),
    group: Processes = ALONE,
    progress: Progress | None = None,
    **wishes: Unpack[Wishes],
) -> Run:
    """Make a run ready: a new one, or one that goes on because it is named by `resume` or is in `to` already.

    The directory of a new run appears last of all, when nothing can be wrong with the input any more. A run that
    goes on starts from its newest checkpoint that is whole, with the set-up it was begun with.

    Args:
        source: "digits", the name of a toy, a path to images or arrays, or data already loaded; by default, what the
            run that goes on was begun with.
        to: the run directory; by default the next free runs/NAME-0001.
        resume: a run directory that must be there.
        argv: the command line, for the record.
        group: the processes that train together.
        progress: told (what, done, of) while data is read.
        wishes: see `Wishes`.

    Raises:
        UserError: in one sentence, if anything is wrong with the input, or a run that goes on was begun with other
            settings.
    """
    if resume is not None and to is not None:
        raise OptionError(f"received both --to {to} and --resume {resume}: a run that goes on stays where it is")
    if group.count > 1 and resume is None and to is None:
        raise OptionError("several processes need a run directory with a name: give one with --to, or --resume RUN")
    path = Path(resume) if resume is not None else Path(to) if to is not None else None
    if path is None or (resume is None and not group.told(_occupied(path))):
        if source is None:
            raise OptionError("received no DATA: name 'digits', a toy or a path, or a run that goes on with --resume")
        planned = plan(source, argv=argv, group=group, progress=progress, **wishes)
        return _begin(path, planned, argv, group)
    record, begun = _read(path, resume is not None)
    was = record["data"]
    size = was["size"] if wishes.get("size") is None else wishes["size"]
    fit, on_bad = wishes.get("fit") or was.get("fit", "crop"), wishes.get("on_bad") or was["on_bad"]
    data = _data(was["source"] if source is None else source, size, fit, on_bad, progress)
    if resume is None:
        weights = _weights(wishes)
        if (weights and _origin(weights)["sha256"]) != record.get("weights", {}).get("sha256"):
            raise RunError(
                f"{path}: was begun with other weights, {record.get('weights', {}).get('run', 'random ones')}; go on "
                "with --resume, or train anew with another --to"
            )
        wanted, seed = _chosen(data, wishes, weights), _seed(wishes, 0)
    elif any(wishes.get(name) for name in ("family", "recipe", "preset", "weights")):
        raise OptionError(f"{path}: a run that goes on has its family, recipe, preset and weights; leave them out")
    else:
        wanted, seed = begun, _seed(wishes, record["seed"])
    return _go_on(path, data, record, begun, _settled(wanted, wishes), seed, argv, group)


def train(source: str | Path | Data, *, to: str | Path | None = None, **wishes: Unpack[Wishes]) -> Run:
    """Train a model to the end and return its finished run, going on with what is in `to`; see `prepare`."""
    run = prepare(source, to=to, **wishes)
    for _ in run.steps():
        pass
    return run


def _data(source: str | Path | Data, size: int | None, fit: Fit, on_bad: OnBad, progress: Progress | None) -> Data:
    if isinstance(source, Data):
        return source
    return sources.load(source, size=size, fit=fit, on_bad=on_bad, progress=progress)


def _chosen(data: Data, wishes: Wishes, weights: Saved | None) -> Setup:
    recipe, preset, family = wishes.get("recipe"), wishes.get("preset"), wishes.get("family")
    if weights is None:
        return recipes.choose(data.facts, recipe, preset, family)
    if recipe or preset or family:
        raise OptionError(f"{weights.path}: weights have their family, recipe and preset; leave them out")
    return weights.setup


def _weights(wishes: Wishes) -> Saved | None:
    """What a run is begun with, if not with random weights."""
    run = wishes.get("weights")
    return None if run is None else checkpoint.open_run(run)


def _origin(weights: Saved) -> dict[str, Any]:
    """Where weights come from, for the record."""
    manifest = json.loads((weights.path / durable.MANIFEST).read_bytes())  # which was verified when they were read
    digest = manifest[checkpoint.WEIGHTS]["sha256"]
    return {"run": str(checkpoint.run_of(weights.path)), "step": weights.step, "sha256": digest}


def _begin_with(model: Model, weights: Saved) -> None:
    """Give a model the averaged weights of another.

    Raises:
        OptionError: if they are of another network.
    """
    theirs = weights.model.players()
    try:
        for name, player in model.players().items():
            player.module.load_state_dict(theirs[name].module.state_dict())
    except (KeyError, RuntimeError) as error:
        reason = str(error).splitlines()[-1].strip().rstrip(".")
        raise OptionError(
            f"{weights.path}: are weights of another network, made for data of shape {weights.facts.shape} with "
            f"{weights.facts.levels or 'no'} levels and {len(weights.facts.classes or ()) or 'no'} classes ({reason}); "
            "leave --from out, or what changes the network"
        ) from None


def _settled(setup: Setup, wishes: Wishes) -> Setup:
    """The set-up with the changes and the budget that were wished for."""
    minutes, steps = wishes.get("minutes"), wishes.get("steps")
    if minutes is not None and steps is not None:
        raise OptionError("received both minutes and steps: give one of them")
    budget = [f"training.minutes={minutes}", "training.steps=null"] if minutes is not None else []
    budget += [f"training.steps={steps}", "training.minutes=null"] if steps is not None else []
    return recipes.change(setup, [*wishes.get("changes", ()), *budget])


def _seed(wishes: Wishes, default: int) -> int:
    seed = wishes.get("seed")
    if seed is not None and not 0 <= seed < 2**63:
        raise OptionError(f"a seed is a whole number from 0 to 2^63 - 1, received {seed}")
    return default if seed is None else seed


def _begin(path: Path | None, planned: Plan, argv: Sequence[str], group: Processes) -> Run:
    """Make the directory of a new run: written under a temporary name, and renamed when it holds all a run needs."""
    state = State(planned.model, planned.setup.training, group)
    tensors = state.tensors()
    if group.first:
        path = _claim(path, planned, tensors)
    path = group.told(path)
    assert path is not None
    return _ready(path, planned.data, planned.setup, planned.model, state, planned.seed, planned.record, argv)


def _claim(path: Path | None, planned: Plan, tensors: checkpoint.Tensors) -> Path:
    facts = planned.data.facts
    stem = "".join(c if c.isalnum() or c in "-_." else "-" for c in facts.name)[:100]
    names = iter([path]) if path else (Path("runs") / f"{stem}-{number:04d}" for number in count(1))
    parent = path.parent if path else Path("runs")
    parent.mkdir(parents=True, exist_ok=True)
    temporary = parent / f".{stem}.new-{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        for name in ("samples", "checkpoints", "averages"):
            (temporary / name).mkdir(parents=True)
        durable.write_json(temporary / "config.json", planned.setup.model_dump(mode="json"))
        durable.write_json(temporary / "run.json", planned.record)
        image = draw.grid(facts, planned.data.train[: SHOWN if facts.is_image else POINTS])
        draw.save_png(image, temporary / "samples" / "data.png", {"data": facts.name})
        checkpoint.save(checkpoint.folder(temporary, "checkpoints", 0), tensors, planned.setup, facts, 0)
        for candidate in names:
            if _occupied(candidate):
                continue
            try:
                temporary.rename(candidate)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
                continue
            durable.flush(parent)
            return candidate
        raise RunError(f"{path}: was made by another process in the meantime; name another directory with --to")
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _occupied(path: Path) -> bool:
    """Whether something is there that a new run must not replace: anything but an empty directory."""
    for parent in path.parents:
        if parent.is_file():
            raise RunError(f"{parent}: is a file, so there can be no run in it; name another directory with --to")
    return path.exists() and not (path.is_dir() and not any(path.iterdir()))


def _read(path: Path, named: bool) -> tuple[dict[str, Any], Setup]:
    """What run.json and config.json of a run say."""
    if not path.is_dir():
        remedy = f"'ancestral train DATA --to {path}' makes one" if named else "name another with --to"
        raise RunError(f"{path}: {'there is no such run directory' if named else 'is a file'}; {remedy}")
    try:
        record = json.loads((path / "run.json").read_bytes())
        begun = recipes.read(json.loads((path / "config.json").read_bytes()))
        keys = (record["seed"], record["data"]["digest"], record["data"]["source"], record["sessions"])
        assert None not in keys
    except FileNotFoundError:
        raise RunError(f"{path}: already exists and is not a run; name another directory with --to") from None
    except (ValueError, KeyError, TypeError, AssertionError, OptionError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RunError(f"{path}: run.json or config.json is damaged or of another version ({reason})") from None
    return record, begun


def _go_on(
    path: Path,
    data: Data,
    record: dict[str, Any],
    begun: Setup,
    wanted: Setup,
    seed: int,
    argv: Sequence[str],
    group: Processes,
) -> Run:
    """A run from its newest checkpoint that is whole, if nothing that enters the result has changed."""
    training = wanted.training
    if training.steps is None and training.minutes == begun.training.minutes:
        wanted = recipes.change(wanted, [f"training.steps={begun.training.steps}"])
    changed = [f"{name} {old!r} -> {new!r}" for name, old, new in _differences(begun, wanted)]
    changed += [f"seed {record['seed']} -> {seed}"] if seed != record["seed"] else []
    if changed:
        raise RunError(
            f"{path}: was begun with other settings, so it cannot go on with {', '.join(changed)}; leave these out, "
            f"or train on from what it has learnt with --from {path} and another --to"
        )
    if data.facts.digest != record["data"]["digest"]:
        raise RunError(f"{path}: its data has changed since it was begun: {data.facts.source} holds something else now")
    model = recipes.build(wanted, data.facts, seed).to(group.device)
    state = State(model, wanted.training, group)
    run = _ready(path, data, wanted, model, state, seed, record, argv)
    try:
        if group.first:
            record.update(
                json.loads((path / "run.json").read_bytes())
            )  # another command may have worked on it meanwhile
            durable.sweep(path)
        found = group.told(checkpoint.newest(path) if group.first else None)
        assert found is not None
        done = checkpoint.restore(found, state)
        if group.first:
            checkpoint.put_aside(path, done)
            durable.write_json(path / "config.json", wanted.model_dump(mode="json"))
    except BaseException:
        if run.lock:
            run.lock.release()
        raise
    return replace(run, done=done)


def _ready(
    path: Path,
    data: Data,
    setup: Setup,
    model: Model,
    state: State,
    seed: int,
    record: dict[str, Any],
    argv: Sequence[str],
) -> Run:
    """The run at its start, locked by the process that writes."""
    lock = FileLock(path / ".lock") if state.group.first else None
    try:
        if lock:
            lock.acquire(timeout=0)
    except Timeout:
        raise RunError(f"{path}: is being trained by another process; wait for it, or stop it") from None
    return Run(path, data, setup, model, state, 0, seed, record, tuple(argv), lock)


def _differences(begun: Setup, wanted: Setup) -> list[tuple[str, Any, Any]]:
    """Settings that enter the result and are not the same: name, as begun, as wanted."""
    old, new = flat(begun), flat(wanted)
    return [
        (name, old.get(name), new.get(name))
        for name in sorted({*old, *new})
        if old.get(name) != new.get(name) and name not in MAY_CHANGE
    ]


def flat(setup: Setup) -> dict[str, Any]:
    """Every setting by its name, as `--set` takes it."""
    return {
        f"{section}.{key}": value
        for section, keys in setup.model_dump(mode="json").items()
        for key, value in (keys.items() if isinstance(keys, dict) else [("", keys)])
    }
