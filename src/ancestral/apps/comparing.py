"""What `ancestral compare` does: trains every family from every seed under one protocol, measures all, writes a report.

DIR/
  runs/FAMILY-SEED/        the runs, as `ancestral train` makes them
  measured/FAMILY-SEED-*.json  what each reached, by a hash of its model, so that a comparison that was stopped goes on
  compare.json, report.html, samples/FAMILY.png
"""

import hashlib
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, get_args

import torch
from pydantic import ValidationError

import ancestral
from ancestral.apps import report
from ancestral.apps.output import number
from ancestral.data import Data, draw, load
from ancestral.errors import AncestralError, Diverged, NoSpace, OptionError, RunError, Stopped, unknown
from ancestral.measure.compare import BETTER, EDITION, Contest, Entrant, Row, assess, rows
from ancestral.measure.quality import METRICS, Bench
from ancestral.training import checkpoint, durable
from ancestral.training.run import reload
from ancestral.training.settings import Family, Setup
from ancestral.training.start import MAY_CHANGE, flat

SHOWN = 64
"""Samples of each family that are shown, from the seed 0."""

DEFINITIONS = {
    "likelihood": "Of held-out examples: the negative log-likelihood, or a bound on it, by the family's own estimate.",
    "rate": "Samples for each second, drawn 64 at a time on all cores; means over seeds are geometric.",
    "gap": "How much likelier training examples are than held-out ones: 0 in expectation where nothing was memorised.",
} | {name: metric.says for name, metric in METRICS.items()}

Tell = Callable[..., None]


@dataclass(frozen=True)
class Plan:
    """What is compared: runs that are to be trained, or that are there.

    Attributes:
        where: the directory of the comparison.
        data: that all are measured on.
        source: what the runs are trained on, as `ancestral train` is told.
        entries: of each run its directory, its family and its seed.
        minutes: of training for each; None where they are there.
        n: samples of each, at most.
        features: in which they are compared.
        command: line that makes all of it again.
    """

    where: Path
    data: Data
    source: str | None
    entries: tuple[tuple[Path, str, int], ...]
    minutes: float | None
    n: int
    features: str | None
    command: str

    @property
    def together(self) -> int:
        """Runs that are trained at a time, each on one core."""
        return max(1, min(os.cpu_count() or 1, len(self.entries)))

    def promise(self, runs: int) -> float:
        """Minutes that the training of so many takes."""
        return -(-runs // self.together) * (self.minutes or 0.0)


def plan(
    given: Sequence[str],
    *,
    families: Sequence[str],
    minutes: float,
    seeds: int,
    n: int,
    features: str | None,
    to: Path | None,
    argv: Sequence[str],
    progress: Tell | None = None,
) -> Plan:
    """What is asked for; nothing is written.

    Raises:
        OptionError: if a family is unknown, or runs are of different data.
    """
    families = list(dict.fromkeys(families))
    for family in families:
        if family not in get_args(Family):
            raise unknown("family", family, get_args(Family))
    runs = [Path(each) for each in given if (Path(each) / "run.json").is_file()]
    command = shlex.join(argv)
    if runs and len(runs) == len(given):
        return _finished(runs, n, features, to, command, progress)
    if len(given) != 1:
        others = ", ".join(each for each in given if Path(each) not in runs)
        raise OptionError(
            f"received {len(given)} things to compare, of which these are no runs: {others}; give one DATA, or run "
            "directories only"
        )
    data = load(given[0], progress=progress)
    where = to or Path("runs") / f"{data.facts.name}-compared"
    entries = tuple(
        (where / "runs" / f"{family}-{seed}", family, seed) for seed, family in product(range(seeds), families)
    )
    return Plan(where, data, given[0], entries, minutes, n, features, command)


def _finished(
    runs: list[Path], n: int, features: str | None, to: Path | None, command: str, progress: Tell | None
) -> Plan:
    """Runs that are there: those with the same settings are seeds of one row."""
    if len(runs) < 2:
        raise OptionError(f"received one run, {runs[0]}: give another to compare it with, or DATA to train on")
    seeds = [_seed(run) for run in runs]
    opened, data = [checkpoint.open_run(run) for run in runs], reload(runs[0], progress)
    for run, saved in zip(runs, opened, strict=True):
        if saved.facts.digest != data.facts.digest:
            raise OptionError(f"{run}: was trained on other data than {runs[0]}: only runs on the same are compared")
    entries = tuple(zip(runs, labels(runs, [saved.setup for saved in opened]), seeds, strict=True))
    which = hashlib.sha256("\n".join(sorted(str(run.absolute()) for run in runs)).encode()).hexdigest()[:8]
    where = to or Path("runs") / f"{data.facts.name}-compared-{which}"
    return Plan(where, data, None, entries, None, n, features, command)


def _seed(run: Path) -> int:
    """Of a run that is finished.

    Raises:
        RunError: if it is not, or its record cannot be read.
    """
    try:
        record = json.loads((run / "run.json").read_bytes())
        status, seed = str(record["status"]), int(record["seed"])
    except (ValueError, KeyError, TypeError):
        raise RunError(f"{run / 'run.json'}: cannot be read, it was changed or damaged; train again") from None
    if status != "finished":
        raise RunError(f"{run}: is not finished ({status}); 'ancestral train --resume {run}' goes on with it")
    return seed


def labels(runs: Sequence[Path], setups: Sequence[Setup]) -> list[str]:
    """What the row of each run is called: its recipe, or, where runs of that recipe have other settings too, the first
    run with the same.

    The number of steps is a setting where it was not turned from minutes, and what does not enter the weights is none.

    Args:
        runs: their directories, which are named by what they do not have in common.
        setups: of each.
    """
    keys = [json.dumps({k: v for k, v in flat(each).items() if k not in _aside(each)}) for each in setups]
    above = os.path.commonpath([run.parent.absolute() for run in runs])
    recipes = defaultdict[str, set[str]](set)
    for key, setup in zip(keys, setups, strict=True):
        recipes[setup.recipe].add(key)
    return [
        setup.recipe if len(recipes[setup.recipe]) == 1 else os.path.relpath(runs[keys.index(key)], above)
        for key, setup in zip(keys, setups, strict=True)
    ]


def _aside(setup: Setup) -> set[str]:
    return MAY_CHANGE | ({"training.steps"} if setup.training.minutes else set())


def compare(planned: Plan, progress: Tell, note: Callable[[str], None]) -> Contest:
    """Train what is to be trained, measure all of it, and write the comparison with its report.

    Args:
        planned: see `plan`.
        progress: told (what, done, of).
        note: told a line when a run has ended.

    Raises:
        Stopped: when asked to by a signal; the same command goes on.
    """
    bench = Bench(planned.data, n=planned.n, features=planned.features)  # what cannot be compared fails here
    planned.where.mkdir(parents=True, exist_ok=True)
    failed = train(planned, progress, note) if planned.minutes is not None else {}
    entrants = []
    for i, (run, family, seed) in enumerate(planned.entries):
        entrants.append(_entrant(planned, bench, run, family, seed, failed.get(run), progress))
        progress("measuring", i + 1, len(planned.entries))
    result = Contest(
        data=planned.data.facts.name,
        unit=planned.data.facts.unit,
        n=bench.n,
        minutes=planned.minutes,
        seeds=len({seed for _, _, seed in planned.entries}),
        features=bench.features,
        rows=rows(entrants),
        held_out=bench.held_out,
        training=bench.training,
        entrants=entrants,
        definitions=DEFINITIONS,
        version=ancestral.__version__,
        command=planned.command,
        artifacts={
            "report": str(planned.where / "report.html"),
            "comparison": str(planned.where / "compare.json"),
        },
    )
    pictures = _pictures(planned, result, bench)
    durable.write(planned.where / "report.html", report.page(result, pictures).encode())
    durable.write_json(planned.where / "compare.json", result.model_dump(mode="json"))
    return result


def train(planned: Plan, progress: Tell, note: Callable[[str], None]) -> dict[Path, str]:
    """Every run to its end, as many at a time as there are cores; and of those that failed, why.

    Each is a command of its own on one core, so all have the same clock and the same share of the machine.
    """
    waiting = [entry for entry in planned.entries if not _ended(entry[0], planned)]
    working, failed = dict[Path, Working](), dict[Path, str]()
    began, done, promise = time.monotonic(), len(planned.entries) - len(waiting), 60 * planned.promise(len(waiting))
    (planned.where / "runs").mkdir(exist_ok=True)
    try:
        while waiting or working:
            while waiting and len(working) < planned.together:
                run, family, seed = waiting.pop(0)
                working[run] = _started(planned, run, family, seed)
            for run, own in list(working.items()):
                if own.process.poll() is None:
                    continue
                del working[run]
                done += 1
                why = own.outcome(run)
                if why:
                    failed[run] = why
                note(f"{run.name}: {why or 'trained'}")
            elapsed = int(time.monotonic() - began)
            ended = f"{done} of {len(planned.entries)} runs ended"
            progress("training, in seconds", elapsed, max(elapsed, math.ceil(promise)), ended)
            time.sleep(0.5)
    finally:
        for own in working.values():
            own.process.terminate()
        for own in working.values():
            own.process.wait()
    return failed


def _ended(run: Path, planned: Plan) -> bool:
    """Whether a run is there that was trained to its end for as long as is asked for.

    Raises:
        OptionError: if it was trained on other data.
    """
    try:
        record, setup = (json.loads((run / name).read_bytes()) for name in ("run.json", "config.json"))
        digest, ended = record["data"]["digest"], record["status"] == "finished"
        as_long = setup["training"]["minutes"] == planned.minutes
    except (FileNotFoundError, ValueError, KeyError):
        return False
    if digest != planned.data.facts.digest:
        raise OptionError(
            f"{run}: was trained on other data than {planned.source} holds now: give another directory with --to"
        )
    return bool(ended and as_long)


@dataclass(frozen=True)
class Working:
    """A run that is being trained.

    Attributes:
        process: that trains it.
        log: what it says, to which earlier sessions may have written.
        before: how many bytes they wrote.
    """

    process: "subprocess.Popen[bytes]"
    log: Path
    before: int

    def outcome(self, run: Path) -> str | None:
        """Why a process that has ended left no model, or None.

        Raises:
            AncestralError: if the model is not to blame: it was stopped, a full disk, wrong input, or a bug.
        """
        code = self.process.returncode
        if code == 0:
            return None
        if code < 0:
            return f"killed by signal {-code}{', perhaps for want of memory' if code == -signal.SIGKILL else ''}"
        said = self.log.read_bytes()[self.before :].decode(errors="replace").strip().splitlines()
        reason = said[-1].removeprefix("ancestral: ") if said else f"ended with exit code {code}"
        if code == Diverged.exit_code:
            return reason
        kinds = {kind.exit_code: kind for kind in (Stopped, NoSpace, RunError)}
        raise kinds.get(code, AncestralError)(f"{run}: {reason.removeprefix(f'{run}: ')}")


def _started(planned: Plan, run: Path, family: str, seed: int) -> Working:
    command = [sys.executable, "-m", "ancestral", "train", str(planned.source), "--family", family, "--to", str(run)]
    command += ["--minutes", f"{planned.minutes:g}", "--seed", str(seed), "--set", "training.keep=1000"]
    environment, path = {**os.environ, "OMP_NUM_THREADS": "1"}, run.with_name(f"{run.name}.log")
    with path.open("ab") as log:
        before = log.tell()
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=log, env=environment, start_new_session=True
        )
        return Working(process, path, before)


def _entrant(
    planned: Plan, bench: Bench, run: Path, family: str, seed: int, failed: str | None, progress: Tell
) -> Entrant:
    """What a run reached: read again if it was measured in the same way before."""
    if failed:
        record = json.loads((run / "run.json").read_bytes()) if (run / "run.json").is_file() else {}
        return Entrant(family=family, seed=seed, run=str(run), failed=failed, seconds=record.get("seconds", 0.0))
    model = hashlib.sha256((checkpoint.find(run) / durable.MANIFEST).read_bytes()).hexdigest()
    path = planned.where / "measured" / f"{run.name}-{model[:8]}.json"
    key: dict[str, Any] = {"n": bench.n, "features": bench.features, "edition": EDITION}
    try:
        kept = json.loads(path.read_bytes())
        if {name: kept[name] for name in key} == key:
            kept = Entrant.model_validate(kept["entrant"])
            return kept.model_copy(update={"family": family, "seed": seed, "run": str(run)})
    except (FileNotFoundError, ValueError, KeyError, ValidationError):
        pass  # not measured yet, or by another version: it is measured now
    found = assess(run, planned.data, bench, family=family, seed=seed, progress=progress)
    path.parent.mkdir(exist_ok=True)
    durable.write_json(path, {**key, "entrant": found.model_dump(mode="json")})
    return found


def _pictures(planned: Plan, result: Contest, bench: Bench) -> dict[str, Any]:
    """Samples of every row's first run that ended, from the same seeds, and data beside them."""
    facts, folder = planned.data.facts, planned.where / "samples"
    found = {"held-out data": draw.grid(facts, planned.data.held_out[: SHOWN if facts.is_image else bench.n])}
    folder.mkdir(exist_ok=True)
    for row in result.rows:
        ended = next((each for each in result.entrants if each.family == row.family and not each.failed), None)
        if ended is None:
            continue
        with torch.inference_mode():
            drawn = checkpoint.load(ended.run).sample(SHOWN if facts.is_image else bench.n, rng=0)
        found[row.family] = draw.grid(facts, drawn)
        name = row.family.replace(os.sep, "-")
        draw.save_png(found[row.family], folder / f"{name}.png", {"run": ended.run, "seed": 0})
    return found


def lines(result: Contest) -> list[str]:
    """The comparison as a person reads it."""
    names = [name for name in BETTER if any(name in row.numbers for row in result.rows)]
    said = [
        f"{result.data}: {len(result.rows)} families, {result.seeds} seeds, {result.n:,} samples of each against as "
        f"many held-out examples, in {result.features}; means over seeds with 95% intervals"
    ]
    for name in names:
        said.append(f"  {report.title(name, result)}")
        said += [f"    {row.family:<18}{_cell(row, name)}" for row in result.rows if name in row.numbers]
        for label, standing in (("held-out data", result.held_out), ("training data", result.training)):
            if name in standing:
                said.append(f"    {label:<18}{number(standing[name])}")
    said += [f"  {row.family}: {row.failed} of {row.runs} runs failed" for row in result.rows if row.failed]
    return said + [f"  {path}" for path in result.artifacts.values()]


def _cell(row: Row, name: str) -> str:
    """A number with its interval, and how it stands to the best."""
    text, verdict = number(row.numbers[name]), row.verdicts.get(name)
    if verdict is None or verdict.word == "worse":
        return text
    return f"{text}   {verdict.word if verdict.word == 'best' else f'no difference from {verdict.best} at this N'}"
