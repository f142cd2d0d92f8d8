"""A run goes on to the bit: after a signal, after SIGKILL at any moment, and after every fault of a disk."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from safetensors import SafetensorError

import ancestral
from ancestral.errors import NoSpace, OptionError, RunError, RunWarning, Stopped
from ancestral.rng import stream
from ancestral.training import checkpoint, durable, run, start

TINY = ["mlp.width=16", "mlp.depth=1", "training.batch=32", "training.snapshots=3", "training.pictures=0"]


def begin(path: Path, steps: int = 12, every: int = 4, **options) -> run.Run:
    changes = [*TINY, f"training.checkpoint_every={every}", *options.pop("changes", [])]
    return start.prepare(options.pop("source", "ring-8"), to=path, steps=steps, changes=changes, **options)


def finish(made: run.Run) -> run.Run:
    for _ in made.steps():
        pass
    return made


def outcome(path: Path) -> dict[str, bytes]:
    """Everything that a run promises to make the same, to the byte."""
    last = checkpoint.checkpoints(path)[-1]
    files = [
        path / "metrics.jsonl",
        path / "config.json",
        *(last / name for name in (checkpoint.WEIGHTS, checkpoint.STATE, checkpoint.MODEL)),
        *(path / "final" / name for name in (checkpoint.WEIGHTS, checkpoint.MODEL)),
        *sorted((path / "averages").glob("step-*/*")),
        *sorted((path / "samples").glob("*.png")),
    ]
    return {str(file.relative_to(path)): file.read_bytes() for file in files}


def command(path: Path, *more: str) -> list[str]:
    settings = [part for change in TINY for part in ("--set", change)]
    return [sys.executable, "-m", "ancestral", "train", "ring-8", "--to", str(path), *settings, *more]


def launch(*arguments: str) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ended(process: subprocess.Popen) -> tuple[int, str]:
    """The exit code, and what was said on stderr."""
    complaints = process.communicate()[1]
    return process.returncode, complaints


def test_a_run_killed_at_twenty_random_moments_ends_as_one_that_was_not(tmp_path):
    """SIGKILL, and the same call again: weights, averages, moments, metrics and set-up are equal byte for byte."""
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["ancestral.training.start"])
    wishes = {"steps": 600, "changes": [*TINY, "training.checkpoint_every=20"]}

    def training(name: str) -> BaseProcess:
        process = processes.Process(target=start.train, args=("ring-8",), kwargs={"to": tmp_path / name, **wishes})
        process.start()
        return process

    for name in ("warm", "whole"):
        began, process = time.monotonic(), training(name)
        process.join()
        assert process.exitcode == 0
    took, kills, moments, reached = time.monotonic() - began, 0, stream(int(time.time())), set()
    while kills < 20:
        process = training("killed")
        process.join(took * float(moments.uniform(0.1, 0.6)))
        if process.is_alive():
            process.kill()
            process.join()
            kills += 1
            reached |= {path.name for path in checkpoint.checkpoints(tmp_path / "killed")}
        else:
            shutil.rmtree(tmp_path / "killed")  # it ended before it could be killed twenty times: once more
    process = training("killed")
    process.join()
    assert process.exitcode == 0
    assert len(reached) > 2, "no kill came after the second checkpoint: the moments test nothing"
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole")
    assert not list((tmp_path / "killed").rglob("*.partial-*"))


def test_ctrl_c_once_leaves_a_checkpoint_of_that_step_from_which_the_run_goes_on(tmp_path):
    def asked_at(step: int) -> None:
        made = begin(tmp_path / "stopped")
        steps = iter(range(made.done + 1, step + 1))
        for _ in made.steps(stop=lambda: next(steps) == step):
            pass

    finish(begin(tmp_path / "whole"))
    for step in (3, 4, 9):
        with pytest.raises(Stopped, match=rf"stopped after step {step} of 12; .*--resume"):
            asked_at(step)
        record = json.loads((tmp_path / "stopped" / "run.json").read_text())
        assert (record["status"], record["steps"]) == ("stopped", step)
        assert checkpoint.newest(tmp_path / "stopped").name == f"step-{step:07d}"
    finish(start.prepare(resume=tmp_path / "stopped"))
    assert outcome(tmp_path / "stopped") == outcome(tmp_path / "whole")
    sessions = json.loads((tmp_path / "stopped" / "run.json").read_text())["sessions"]
    assert [session["from_step"] for session in sessions] == [0, 3, 4, 9]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_once_stops_with_a_checkpoint_and_twice_at_once(tmp_path, number):
    def signalled(path: Path, times: int) -> tuple[int, str]:
        process = launch(*command(path, "--steps", "1000000", "--checkpoint-every", "1000000"))
        while not (path / "pace.jsonl").exists():
            assert process.poll() is None, ended(process)
            time.sleep(0.02)
        for _ in range(times):
            process.send_signal(number)
        return ended(process)

    code, said = signalled(tmp_path / "once", 1)
    assert code == 3
    assert "goes on from there" in said
    assert checkpoint.step_of(checkpoint.newest(tmp_path / "once")) > 0

    code, said = signalled(tmp_path / "twice", 200)
    assert code != 0
    assert checkpoint.newest(tmp_path / "twice").is_dir()


class Killed(BaseException):
    """What SIGKILL would do: nothing after it runs."""


class Disk:
    """The calls by which durable writes, with a fault at one of them: no space, or the end of the process.

    `torn` cuts the file in half before the process ends, as a crash of the machine may.
    """

    def __init__(self, patch: pytest.MonkeyPatch, at: int, fault: str) -> None:
        self.at, self.fault, self.calls, self.dead = at, fault, 0, False
        calls = ((durable, "flush"), (os, "rename"), (os, "replace"), (os, "mkdir"), (shutil, "rmtree"))
        for owner, name in (*calls, (checkpoint, "save_file")):
            patch.setattr(owner, name, self.guarded(name, getattr(owner, name)))

    def guarded(self, name, real):
        def call(*arguments, **options):
            if self.dead:
                if name == "rmtree":
                    return None  # nothing is tidied up by a process that is gone
                raise Killed
            if name == "rmtree":
                return real(*arguments, **options)
            self.calls += 1
            if self.calls == self.at:
                if self.fault == "no space" and name == "save_file":
                    Path(arguments[1]).write_bytes(b"the half that fitted")
                    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
                if self.fault == "no space":
                    raise OSError(28, "No space left on device")
                if self.fault == "torn" and name == "flush" and Path(arguments[0]).is_file():
                    os.truncate(arguments[0], Path(arguments[0]).stat().st_size // 2)
                if self.fault == "after":
                    real(*arguments, **options)
                self.dead = True
                raise Killed
            return real(*arguments, **options)

        return call


@pytest.mark.parametrize("fault", ["no space", "before", "after", "torn"])
def test_no_fault_of_any_write_loses_a_run(tmp_path, fault):
    """At every flush, rename and mkdir in turn: the next attempt goes on, and ends as a run without a fault."""
    options = {"steps": 5, "every": 2, "changes": ["training.snapshots=1"]}
    finish(begin(tmp_path / "whole", **options))
    wanted = outcome(tmp_path / "whole")
    calls = 0
    while True:
        calls += 1
        path = tmp_path / f"faulty-{calls}"
        with pytest.MonkeyPatch.context() as patch:
            disk = Disk(patch, calls, fault)
            with suppress(Killed, NoSpace, OSError):
                finish(begin(path, **options))
        if disk.calls < calls:
            break
        if path.exists():
            assert json.loads((path / "run.json").read_text())["status"] in ("ready", "training", "failed", "finished")
        finish(begin(path, **options))
        assert outcome(path) == wanted
        assert not list(path.rglob("*.partial-*"))
        shutil.rmtree(path)
    assert calls > 40


@pytest.mark.parametrize("harm", ["flip", "truncate", "remove"])
@pytest.mark.parametrize("name", [checkpoint.WEIGHTS, checkpoint.STATE, checkpoint.MODEL, durable.MANIFEST])
def test_a_damaged_checkpoint_is_passed_over_with_a_word_and_the_end_is_the_same(tmp_path, name, harm):
    finish(begin(tmp_path / "whole"))
    made = begin(tmp_path / "run")
    steps = made.steps()
    while next(steps).step < 10:
        pass
    steps.close()
    newest = checkpoint.newest(tmp_path / "run")
    damage(newest / name, harm)
    with pytest.warns(RunWarning, match=f"{newest.name}.*an earlier checkpoint is used"):
        resumed = begin(tmp_path / "run")
    assert resumed.done == 8
    finish(resumed)
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")
    assert (newest.parent / f"damaged-{newest.name}").is_dir()


def test_an_old_checkpoint_that_is_damaged_does_not_stop_the_run(tmp_path):
    finish(begin(tmp_path / "whole"))
    made = begin(tmp_path / "run")
    steps = made.steps()
    while next(steps).step < 8:
        pass
    steps.close()
    damage(checkpoint.folder(tmp_path / "run", "checkpoints", 4) / checkpoint.MODEL, "truncate")
    finish(begin(tmp_path / "run"))
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


def damage(file: Path, harm: str) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    if harm == "remove":
        file.unlink()
    else:
        file.write_bytes(data if harm == "flip" else data[: len(data) // 3])


def test_a_run_without_a_checkpoint_is_an_error_and_never_a_fresh_start(tmp_path):
    made = begin(tmp_path / "run")
    made.lock.release()
    for path in checkpoint.checkpoints(tmp_path / "run"):
        shutil.rmtree(path)
    before = sorted(tmp_path.rglob("*"))
    for attempt in ({"to": tmp_path / "run"}, {"resume": tmp_path / "run"}):
        source = "ring-8" if "to" in attempt else None
        with pytest.raises(RunError, match="no checkpoint that is whole"):
            start.prepare(
                source, steps=12 if source else None, changes=[*TINY, "training.checkpoint_every=4"], **attempt
            )
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(RunError, match="there is no such run directory"):
        start.prepare(resume=tmp_path / "nowhere")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(RunError, match="already exists and is not a run"):
        begin(tmp_path / "other")


def test_only_settings_that_do_not_enter_the_weights_may_change(tmp_path):
    made = begin(tmp_path / "run", every=4)
    steps = made.steps()
    next(steps)
    steps.close()
    for options, sentence in [
        ({"changes": ["training.rate=0.1"]}, r"training\.rate 0\.003 -> 0\.1"),
        ({"changes": ["mlp.width=8"]}, r"mlp\.width 16 -> 8"),
        ({"steps": 13}, r"training\.steps 12 -> 13"),
        ({"seed": 1}, "seed 0 -> 1"),
        ({"source": "swiss-roll"}, "its data has changed"),
    ]:
        with pytest.raises(RunError, match=sentence):
            begin(tmp_path / "run", **options)
    with pytest.raises(RunError, match=r"training\.rate"):
        start.prepare(resume=tmp_path / "run", changes=["training.rate=0.1"])
    with pytest.raises(OptionError, match="has its family, recipe, preset and weights"):
        start.prepare(resume=tmp_path / "run", recipe="vectors")
    with pytest.raises(OptionError, match="received both"):
        start.prepare(resume=tmp_path / "run", to=tmp_path / "run")
    finish(begin(tmp_path / "run", every=5))
    finish(begin(tmp_path / "whole"))
    final = f"final/{checkpoint.WEIGHTS}"
    assert outcome(tmp_path / "run")[final] == outcome(tmp_path / "whole")[final]


def test_a_finished_run_is_left_as_it_is(tmp_path):
    finish(begin(tmp_path / "run"))
    before = outcome(tmp_path / "run")
    again = begin(tmp_path / "run")
    assert again.done == again.total
    finish(again)
    assert outcome(tmp_path / "run") == before


def test_minutes_that_became_steps_stay_those_steps(tmp_path):
    options = {"to": tmp_path / "run", "minutes": 0.2, "changes": TINY}
    made = start.prepare("ring-8", **options)
    steps = made.steps()
    next(steps)
    steps.close()
    assert start.prepare("ring-8", **options).total == made.total


def test_weights_of_another_run_are_where_a_run_begins(tmp_path):
    finish(begin(tmp_path / "first"))
    made = begin(tmp_path / "second", steps=8, weights=tmp_path / "first")
    assert made.setup.mlp == checkpoint.open_run(tmp_path / "first").setup.mlp
    begun, ended = (checkpoint.load(path).sample(50, rng=0) for path in (tmp_path / "second", tmp_path / "first"))
    assert begun.equal(ended)
    finish(made)
    assert not checkpoint.load(tmp_path / "second").sample(50, rng=0).equal(ended)
    assert made.record["weights"]["step"] == 12
    other = start.prepare("swiss-roll", to=tmp_path / "other", steps=2, weights=tmp_path / "first")
    theirs = checkpoint.open_run(tmp_path / "first").model.players()["denoiser"].module.state_dict()
    mine = other.model.players()["denoiser"].module.state_dict()
    assert all(mine[name].equal(theirs[name]) for name in theirs)


def test_a_run_from_weights_goes_on_to_the_bit_and_without_them(tmp_path):
    finish(begin(tmp_path / "first"))
    for name in ("whole", "run"):
        made = begin(tmp_path / name, steps=8, weights=tmp_path / "first", every=2)
        steps = made.steps()
        for _ in range(3):
            next(steps)
        if name == "run":
            steps.close()
            begin(tmp_path / name, steps=8, weights=tmp_path / "first", every=2).lock.release()  # the same command
            shutil.rmtree(tmp_path / "first")
            made = start.prepare(resume=tmp_path / name)
            steps = made.steps()
        for _ in steps:
            pass
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


def test_weights_that_do_not_fit_are_refused(tmp_path):
    finish(begin(tmp_path / "first"))
    begin(tmp_path / "plain").lock.release()
    first = tmp_path / "first"
    for options, sentence in [
        ({"recipe": "vectors"}, "weights have their family, recipe and preset"),
        ({"changes": ["mlp.width=8"]}, "weights of another network, made for data of shape"),
        ({"source": "digits"}, r"data of shape \(2,\) with no levels and no classes \(size mismatch"),
    ]:
        with pytest.raises(OptionError, match=sentence):
            begin(tmp_path / "new", weights=first, **options)
    with pytest.raises(RunError, match="was begun with other weights, random ones"):
        begin(tmp_path / "plain", weights=first)
    with pytest.raises(RunError, match="train on from what it has learnt with --from"):
        begin(tmp_path / "plain", steps=13)
    with pytest.raises(OptionError, match="preset and weights; leave them out"):
        start.prepare(resume=tmp_path / "plain", weights=first)
    assert not (tmp_path / "new").exists()


def test_two_processes_do_not_train_the_same_run(tmp_path):
    made = begin(tmp_path / "run")
    with pytest.raises(RunError, match="is being trained by another process"):
        begin(tmp_path / "run")
    finish(made)
    assert begin(tmp_path / "run").done == 12


def test_the_newest_checkpoints_and_the_best_are_kept(tmp_path):
    """Whatever their number, the one with the least held-out loss is among those that stay."""
    made = finish(begin(tmp_path / "run", steps=40, every=2, changes=["training.keep=2", "training.rate=0.3"]))
    kept = [checkpoint.step_of(path) for path in checkpoint.checkpoints(made.path)]
    rows = [json.loads(line) for line in (made.path / "metrics.jsonl").read_text().splitlines()]
    losses = {row["step"]: row["held_out"] for row in rows if "held_out" in row}
    assert sorted(losses) == list(range(2, 41, 2))
    best = min(losses, key=lambda step: losses[step])
    assert kept == sorted({best, 38, 40})
    assert ancestral.load(checkpoint.folder(made.path, "checkpoints", best)) is not None


def test_a_full_disk_keeps_the_last_checkpoint_and_says_so(tmp_path):
    made = begin(tmp_path / "run", every=2)
    steps = made.steps()
    for _ in range(3):
        next(steps)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(durable, "flush", lambda path: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(NoSpace, match="no space left"):
            next(steps)
    assert checkpoint.newest(tmp_path / "run").name == "step-0000002"
    finish(begin(tmp_path / "run", every=2))
    finish(begin(tmp_path / "whole", every=2))
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


def test_a_step_that_is_damaged_twice_is_put_aside_twice(tmp_path):
    for _ in range(2):
        checkpoint.folder(tmp_path, "checkpoints", 8).mkdir(parents=True)
        checkpoint.put_aside(tmp_path, 4)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "damaged-step-0000008",
        "damaged-step-0000008-2",
    ]


def test_the_time_of_all_sessions_is_counted(tmp_path):
    with pytest.raises(Stopped):
        for _ in begin(tmp_path / "run").steps(stop=lambda: time.sleep(0.3) or True):
            pass
    first = json.loads((tmp_path / "run" / "run.json").read_text())["seconds"]
    finish(start.prepare(resume=tmp_path / "run"))
    assert json.loads((tmp_path / "run" / "run.json").read_text())["seconds"] > first >= 0.3
