"""Several processes train, sample and measure what one would."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from ancestral.data import load
from ancestral.errors import OptionError
from ancestral.rng import GROUP, Rows, rand, randn
from ancestral.training import checkpoint, loop, recipes
from ancestral.training.processes import Processes

NET = [
    "unet.width=8",
    "unet.blocks=1",
    "unet.octaves=1",
    "unet.precision=float32",
    "training.batch=32",
    "training.warmup=5",
]
TRAIN = ["train", "digits", "--steps", "60", "--checkpoint-every", "20", "--set", "training.pictures=0"]
SETTINGS = [part for change in NET for part in ("--set", change)]


def launch(processes: int, *arguments: str | Path, restarts: int = 0) -> subprocess.Popen:
    words = [sys.executable, "-m"]
    if processes > 1:
        words += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        words += ["--max-restarts", str(restarts), "-m"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    words += ["ancestral", *map(str, arguments)]
    return subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ancestral(processes: int, *arguments: str | Path) -> str:
    process = launch(processes, *arguments)
    said, complaints = process.communicate()
    assert process.returncode == 0, complaints
    return said


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> dict[int, Path]:
    """The same training by one process and by two."""
    folder = tmp_path_factory.mktemp("runs")
    for count in (1, 2):
        ancestral(count, *TRAIN, *SETTINGS, "--to", folder / str(count))
    return {count: folder / str(count) for count in (1, 2)}


MANY_TIMES = """
import os, sys, torch
from ancestral.training import processes
sys.setswitchinterval(0.2)  # whoever has the interpreter keeps it for longer
for attempt in range(25):
    os.environ["TORCHELASTIC_RESTART_COUNT"] = str(attempt)
    with processes.join() as group:
        module = group.joined(torch.nn.Linear(8, 8))
        module(torch.ones(2, 8)).sum().backward()
        group.wait()
    del module
"""


def test_what_was_trained_together_may_be_dropped_after_the_others_were_left():
    """Its destructor would else wait for threads that wait for the interpreter, which it has."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    environment = {**os.environ, **where, "OMP_NUM_THREADS": "1"}
    both = [subprocess.Popen([sys.executable, "-c", MANY_TIMES], env=environment | {"RANK": rank}) for rank in "01"]
    try:
        assert [each.wait(timeout=120) for each in both] == [0, 0]
    finally:
        for each in both:
            each.kill()
            each.wait()


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"]["denoiser"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_two_processes_have_the_loss_curve_of_one_with_the_whole_batch(trained):
    """Up to float32 rounding, which 60 steps carry along: every loss within 1e-3 of itself."""
    one, two = losses(trained[1]), losses(trained[2])
    assert len(one) == 60
    assert one[0] > 1.3 * one[-1]
    np.testing.assert_allclose(two, one, rtol=1e-3)
    assert json.loads((trained[2] / "run.json").read_text())["sessions"][0]["processes"] == 2


def test_weights_divided_among_processes_train_as_whole_ones_and_are_saved_whole(trained, tmp_path):
    """Fully sharded: the loss curve of one process, and a run that one process can load and go on with."""
    divided = tmp_path / "divided"
    ancestral(2, *TRAIN, *SETTINGS, "--set", "training.shard=true", "--to", divided)
    np.testing.assert_allclose(losses(divided), losses(trained[1]), rtol=1e-3)
    shutil.rmtree(divided / "final")
    shutil.rmtree(checkpoint.newest(divided))
    assert "up to rounding, not to the bit: processes 2 -> 1" in ancestral(1, "train", "--resume", divided)
    np.testing.assert_allclose(losses(divided), losses(trained[1]), rtol=1e-3)
    ancestral(1, "sample", divided, "-n", "2", "--steps", "3")


def test_three_processes_go_on_to_the_bit(tmp_path):
    """With three, what is added in which order matters: it is the same after a stop as without one."""
    settings = [part if part != "training.batch=32" else "training.batch=48" for part in SETTINGS]
    short = [part if part not in ("60", "20") else {"60": "6", "20": "3"}[part] for part in TRAIN]
    for name in ("whole", "stopped"):
        ancestral(3, *short, *settings, "--to", tmp_path / name)
    shutil.rmtree(tmp_path / "stopped" / "final")
    shutil.rmtree(checkpoint.newest(tmp_path / "stopped"))
    ancestral(3, *short, *settings, "--to", tmp_path / "stopped")
    weights = [(tmp_path / name / "final" / checkpoint.WEIGHTS).read_bytes() for name in ("whole", "stopped")]
    assert weights[0] == weights[1]


def test_only_the_first_process_writes(trained):
    """The same files from two processes as from one, each line of the metrics once."""
    files = [sorted(str(path.relative_to(run)) for path in run.rglob("*")) for run in trained.values()]
    assert files[0] == files[1]
    assert len((trained[2] / "metrics.jsonl").read_text().splitlines()) == 60


def test_samples_and_likelihoods_do_not_depend_on_the_number_of_processes(trained, tmp_path):
    """150 images in three batches, and 150 bounds, are equal to the bit."""
    for count in (1, 2):
        ancestral(count, "sample", trained[1], "-n", "150", "--steps", "5", "--out", tmp_path / str(count))
    one, two = (np.load(tmp_path / str(count) / "sample-0001.npy") for count in (1, 2))
    assert len(one) == 150
    np.testing.assert_array_equal(one, two)
    found = [json.loads(ancestral(count, "evaluate", trained[1], "-n", "300", "--json")) for count in (1, 2)]
    assert found[0]["bits_per_dim"] == found[1]["bits_per_dim"]
    assert found[0]["n_evaluations"] == found[1]["n_evaluations"]


def test_a_process_that_dies_fails_the_job_and_the_job_goes_on_from_the_checkpoint(trained, tmp_path):
    """One of two processes is killed; torchrun starts both again, and the weights are those of an undisturbed run."""
    arguments = [*TRAIN, *SETTINGS, "--to", tmp_path / "run"]
    arguments[arguments.index("60")] = "300"
    undisturbed = [tmp_path / "whole" if part == tmp_path / "run" else part for part in arguments]
    ancestral(2, *undisturbed)
    job = launch(2, *arguments, restarts=1)
    while not (tmp_path / "run").is_dir() or len(checkpoint.checkpoints(tmp_path / "run")) < 2:
        assert job.poll() is None, job.communicate()
        time.sleep(0.02)
    children = subprocess.run(["pgrep", "-P", str(job.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(children[-1]), signal.SIGKILL)
    _, complaints = job.communicate()
    assert job.returncode == 0, complaints
    assert "lost the others, one of which has died; run the same command again" in complaints
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["status"] == "finished"
    assert len(record["sessions"]) == 2
    assert record["sessions"][1]["from_step"] > 0
    final = Path("final") / checkpoint.WEIGHTS
    assert (tmp_path / "run" / final).read_bytes() == (tmp_path / "whole" / final).read_bytes()


@pytest.mark.parametrize("accumulate", [2, 4])
def test_taking_the_batch_in_parts_changes_nothing_but_rounding(accumulate):
    data = load("digits")
    curves = []
    for parts in (1, accumulate):
        setup = recipes.change(recipes.choose(data.facts), [*NET, f"training.accumulate={parts}"])
        state = loop.State(recipes.build(setup, data.facts), setup.training)
        curves.append([record.loss["denoiser"] for record in loop.steps(state, data, 15, seed=0)])
    np.testing.assert_allclose(curves[1], curves[0], rtol=1e-3)


def test_a_batch_that_cannot_be_divided_is_refused_with_one_that_can():
    data = load("digits")
    setup = recipes.change(recipes.choose(data.facts), [*NET, "training.batch=30"])
    with pytest.raises(OptionError, match=r"batch of 30 .* 4 processes .*training\.batch=32"):
        loop.State(recipes.build(setup, data.facts), setup.training, Processes(count=4))


@pytest.mark.parametrize("size", [1, 7, GROUP, 24, 40])
def test_rows_have_the_same_noise_however_the_batch_is_divided(size):
    whole = Rows((3, 5), 40)
    expected = [randn((40, 3), whole), rand((40,), whole), randn((40, 2), whole)]
    for start in range(0, 40, size):
        share = Rows((3, 5), 40, start, min(40, start + size))
        drawn = [randn((len(share), 3), share), rand((len(share),), share), randn((len(share), 2), share)]
        for got, all_of_them in zip(drawn, expected, strict=True):
            assert torch.equal(got, all_of_them[start : start + size])
    assert not torch.equal(expected[0][0], expected[0][1])
    assert torch.equal(rand((1,), share.common), rand((1,), Rows((3, 5), 40).common))
    with pytest.raises(OptionError, match="40 rows for 39 examples"):
        randn((39, 2), whole)
