"""Samples stream to the disk, are seen on their way, and go on where they stopped."""

import csv
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image
from torch import nn
from typer.testing import CliRunner

from ancestral.apps import sampling, walking
from ancestral.apps.cli import app
from ancestral.data import draw, load
from ancestral.diffusion.bend import Errors
from ancestral.diffusion.denoise import NetworkDenoiser
from ancestral.diffusion.fit import Fit
from ancestral.diffusion.grids import GRIDS
from ancestral.diffusion.model import Diffusion
from ancestral.diffusion.process import Instant, cosine
from ancestral.diffusion.sample import SAMPLERS, grid, walk
from ancestral.diffusion.watch import Glimpse
from ancestral.errors import OptionError
from ancestral.measure.chain import best_times
from ancestral.rng import streams
from ancestral.training import checkpoint, durable, recipes

QUICK = ["unet.width=8", "unet.blocks=1", "unet.octaves=1", "unet.precision=float32"]


def ancestral(*words: object):
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run of one step on the digits, whose network knows the classes."""
    path = tmp_path_factory.mktemp("runs") / "digits"
    settings = [part for change in [*QUICK, "unet.labels=true"] for part in ("--set", change)]
    result = ancestral("train", "digits", "--to", path, "--steps", 1, *settings)
    assert result.exit_code == 0, result.output
    return path


@pytest.fixture(scope="module")
def model():
    facts = load("digits").facts
    torch.manual_seed(0)
    return recipes.build(recipes.change(recipes.choose(facts), QUICK), facts).eval()


def command(*words: object) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "ancestral", *map(str, words)]
    return subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def whole(run: Path, folder: Path, *words: object) -> dict[str, bytes]:
    """The files of a command that nothing disturbs."""
    result = ancestral("sample", run, "--out", folder, *words)
    assert result.exit_code == 0, result.output
    return tree(folder)


def interrupted_after(batches: int, monkeypatch, error: type[BaseException] | OSError) -> None:
    """From now on the writing of the batch after so many fails."""
    left = iter(range(batches))
    append = sampling.Partial.append

    def failing(self, x) -> None:
        if next(left, None) is None:
            raise error
        append(self, x)

    monkeypatch.setattr(sampling.Partial, "append", failing)


# Streaming.


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of a process is read from /proc")
def test_the_memory_of_5000_samples_is_that_of_500(tmp_path):
    """Real-valued images of 7 KB: kept until the end, 4,500 more of them would take at least 30 MiB."""
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(20, 3, 24, 24)).astype(np.float32))
    settings = ["--recipe", "vectors", "--set", "mlp.width=8", "--set", "mlp.depth=1", "--steps", 1]
    result = ancestral("train", tmp_path / "x.npy", "--to", tmp_path / "run", *settings)
    assert result.exit_code == 0, result.output
    code = (
        "import sys; from pathlib import Path; from ancestral.apps.cli import app\n"
        "app(['sample', sys.argv[1], '-n', sys.argv[2], '--steps', '1', '--sheet'], standalone_mode=False)\n"
        "print(Path('/proc/self/status').read_text().partition('VmHWM:')[2].split()[0])"
    )  # getrusage would say the peak of the process that started this one, if that was higher

    def peak(n: int) -> float:
        words = [sys.executable, "-c", code, str(tmp_path / "run"), str(n)]
        said = subprocess.run(words, capture_output=True, text=True, check=True).stdout
        return int(said.split()[-1]) / 1024

    assert peak(5000) - peak(500) < 8  # MiB
    assert (tmp_path / "run" / "samples" / "sample-0002.npy").stat().st_size == 128 + 500 * 6912


def test_the_array_is_one_that_numpy_maps_and_the_recipe_lies_beside_it(trained, tmp_path):
    record = json.loads(ancestral("sample", trained, "-n", 150, "--steps", 3, "--out", tmp_path, "--json").stdout)
    x = np.load(record["artifacts"]["npy"], mmap_mode="r")
    assert (x.shape, x.dtype) == ((150, 1, 8, 8), np.uint8)
    assert json.loads(Path(record["artifacts"]["recipe"]).read_text())["n"] == 150
    assert record["images_per_second"] == pytest.approx(150 / record["seconds"], rel=0.01, abs=0.1)
    data = load(record["artifacts"]["npy"])  # it can be learnt from
    assert data.facts.shape == (1, 8, 8)


def test_samples_of_a_table_are_a_table_with_the_names_of_its_columns(trained, tmp_path):
    rows = np.random.default_rng(0).normal(size=(60, 2)) * [1e-3, 1e6]
    with (tmp_path / "t.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerows([["width, mm", "word", 'prix "€"'], *([a, "x", b] for a, b in rows)])
    settings = ["--set", "mlp.width=8", "--set", "mlp.depth=1", "--steps", 1]
    result = ancestral("train", tmp_path / "t.csv", "--to", tmp_path / "run", *settings)
    assert result.exit_code == 0, result.output
    artifacts = json.loads(ancestral("sample", tmp_path / "run", "-n", 70, "--steps", 2, "--json").stdout)["artifacts"]
    with Path(artifacts["csv"]).open(newline="", encoding="utf-8") as file:
        names, *drawn = csv.reader(file)
    assert names == ["width, mm", 'prix "€"']
    assert np.array_equal(np.array(drawn, dtype=np.float32), np.load(artifacts["npy"]))
    again = load(artifacts["csv"])
    assert (again.facts.features, again.facts.n_train + again.facts.n_held_out) == (tuple(names), 70)
    assert "csv" not in json.loads(ancestral("sample", trained, "--out", tmp_path, "--json").stdout)["artifacts"]


def test_batches_are_the_samples_of_the_command_and_shares_of_them_make_the_whole(trained, tmp_path):
    model = checkpoint.load(trained)
    record = json.loads(ancestral("sample", trained, "-n", 150, "--steps", 3, "--out", tmp_path, "--json").stdout)
    x = torch.from_numpy(np.load(record["artifacts"]["npy"]))
    assert torch.equal(torch.cat(list(model.sample_batches(150, steps=3))), x)
    first, third = model.sample_batches(150, steps=3, every=2)
    (second,) = model.sample_batches(150 - 64, start=64, steps=3, every=2)
    assert torch.equal(torch.cat([first, second, third]), x)


def test_a_class_is_drawn_in_every_batch_and_an_unknown_one_leaves_nothing(trained, tmp_path):
    words = ["sample", trained, "-n", 80, "--steps", 3, "--json"]
    record = json.loads(ancestral(*words, "--label", "7", "--out", tmp_path / "seven").stdout)
    x = torch.from_numpy(np.load(record["artifacts"]["npy"]))
    model, sevens = checkpoint.load(trained), torch.full((80,), 7)
    assert torch.equal(torch.cat(list(model.sample_batches(80, steps=3, labels=sevens))), x)
    refused = ancestral(*words, "--label", "ten", "--out", tmp_path / "ten")
    assert refused.exit_code == 2
    assert "unknown class 'ten'" in refused.stderr
    assert not (tmp_path / "ten").exists()


# Which sampler, and at which times.


@pytest.mark.parametrize("label", sorted(set(GRIDS) - {"uniform", "quadratic"}))
def test_a_named_grid_asks_for_no_less_noise_than_the_network_was_trained_on(label):
    """On a chain of 50 steps, of which each takes 1/50: not on one of 1000, and not to log-SNR 12."""
    facts = load("digits").facts
    model = recipes.build(recipes.change(recipes.choose(facts), [*QUICK, "diffusion.chain=50"]), facts)
    times = model.times(label, 10)
    assert len(times) == 10
    assert float(times[-1]) == pytest.approx(1 / 10 if label == "trailing" else 1 / 50, rel=1e-9)
    if label in ("beta", "trailing", "leading", "linspace"):
        with pytest.raises(OptionError, match="at most the 50 of the chain, received 51"):
            model.times(label, 51)


def test_the_command_draws_by_the_sampler_and_the_grid_that_it_names(trained, tmp_path):
    words = ["-n", 5, "--steps", 4, "--sampler", "unipc-2", "--grid", "karras", "--out", tmp_path, "--json"]
    artifacts = json.loads(ancestral("sample", trained, *words).stdout)["artifacts"]
    model = checkpoint.load(trained)
    x = model.sample(5, sampler=SAMPLERS["unipc-2"], steps=model.times("karras", 4))
    np.testing.assert_array_equal(np.load(artifacts["npy"]), x)
    recipe = json.loads(Path(artifacts["recipe"]).read_text())
    assert (recipe["sampler"], recipe["grid"], recipe["steps"]) == ("unipc-2", "karras", 4)


def test_a_fit_is_made_once_and_again_where_what_was_kept_is_none(trained, tmp_path, monkeypatch):
    """For the weights and the number of evaluations; a file that was cut or changed is no reason to stop."""
    none, fits = Errors(0.0, 0.0, 0.0, 0.0), []
    found = Fit("ddim", (1.0, 0.4), 2, none, ("ddim", "uniform"), none, 1)
    monkeypatch.setattr(Diffusion, "fitted", lambda self, evaluations: fits.append(evaluations) or found)
    words = ["-n", 5, "--steps", 2, "--sampler", "fitted", "--out", tmp_path, "--json"]

    def drawn() -> np.ndarray:
        return np.load(json.loads(ancestral("sample", trained, *words).stdout)["artifacts"]["npy"])

    expected = checkpoint.load(trained).sample(5, sampler=SAMPLERS["ddim"], steps=found.steps)
    for _ in range(2):
        np.testing.assert_array_equal(drawn(), expected)
    assert fits == [2]
    (kept,) = (trained / "fits").glob("*.json")
    record = json.loads(kept.read_text())
    for changed in ({}, None, record | {"sampler": "gone"}, record | {"times": [0.4, 1.0]}, record | {"times": ["a"]}):
        kept.write_text(json.dumps(changed))
        np.testing.assert_array_equal(drawn(), expected)
    assert fits == [2] * 6


def test_the_best_steps_of_the_chain_are_learnt_once_from_the_data_of_the_run(trained, tmp_path, monkeypatch):
    """They are of the chain, and the model's bound of training examples is less on them than on as many even steps."""
    words = ["-n", 5, "--steps", 6, "--grid", "best", "--out", tmp_path, "--json"]

    def drawn() -> tuple[np.ndarray, list[float]]:
        artifacts = json.loads(ancestral("sample", trained, *words).stdout)["artifacts"]
        return np.load(artifacts["npy"]), json.loads(Path(artifacts["recipe"]).read_text())["times"]

    samples, times = drawn()
    model, data = checkpoint.load(trained), load("digits")
    assert set(times) <= set(grid(model.process, model.chain).tolist())
    assert times == best_times(model, data, 6).tolist()
    best = torch.tensor(times, dtype=torch.float64)
    np.testing.assert_array_equal(samples, model.sample(5, steps=best))
    chosen, even = (model.bound(data.train[:256], rng=0, steps=t).nats.mean() for t in (best, 6))
    assert chosen < even
    monkeypatch.setattr(walking, "best_times", None)  # what is kept is asked for first
    np.testing.assert_array_equal(drawn()[0], samples)
    monkeypatch.setattr(walking, "reload", lambda run, progress: load("ring-8"))
    other = ancestral("sample", trained, *words[:3], 7, *words[4:])
    assert other.exit_code == 2
    assert "has changed since the run, which learns its best chain from it" in other.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--grid", "best", "--steps", 1001], "the best steps are of the chain's 1,000, received --steps 1001"),
        (["--sampler", "hein"], "unknown sampler 'hein': did you mean 'heun'?"),
        (["--grid", "kars"], "unknown grid 'kars': did you mean 'karras'?"),
        (["--grid", "linspace", "--steps", 1001], "at most the 1000 of the chain, received 1001"),
        (
            ["--sampler", "fitted", "--grid", "karras"],
            "times of its own, received --grid karras",
        ),
        (["--steps", 10**9], "Invalid value for '--steps': Input should be less than or equal to 100000"),
    ],
)
def test_what_cannot_be_walked_is_one_sentence_and_nothing_is_written(trained, tmp_path, words, sentence):
    result = ancestral("sample", trained, "-n", 2, *words, "--out", tmp_path / "none")
    assert result.exit_code == 2
    assert sentence in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.output
    assert not (tmp_path / "none").exists()


# Going on.


def test_killed_and_continued_is_uninterrupted_byte_for_byte(trained, tmp_path):
    """A real process: SIGTERM is exit code 3 and a sentence, SIGKILL leaves no final name, and then it ends."""
    words = ["-n", 700, "--steps", 40, "--gif", "--sheet"]
    folder, done = tmp_path / "stopped", 0
    for number in (signal.SIGTERM, signal.SIGKILL):
        process, growing = command("sample", trained, "--out", folder, *words), folder / "sample-0001.partial"
        try:
            while not (file := growing / "sample-0001.npy").exists() or file.stat().st_size <= 128 + 64 * (done + 64):
                assert process.poll() is None, process.communicate()
                time.sleep(0.005)
            process.send_signal(number)
            _, said = process.communicate(timeout=60)
        finally:
            process.kill()
        assert [path.name for path in folder.iterdir()] == ["sample-0001.partial"]
        before, done = done, (file.stat().st_size - 128) // 64 // 64 * 64
        assert 64 <= before + 64 <= done < 700
        if number == signal.SIGTERM:
            assert process.returncode == 3
            assert f"stopped; {done} of 700 samples are kept, and the same command goes on from there" in said
    record = json.loads(ancestral("sample", trained, "--out", folder, *words, "--json").stdout)
    assert record["begun_at"] == done
    assert record["evaluations"] == (700 - done) * 40
    assert tree(folder) == whole(trained, tmp_path / "whole", *words)


@pytest.mark.parametrize("torn", [b"", b"half a batch"])
def test_a_batch_that_was_written_in_part_is_drawn_again(trained, tmp_path, monkeypatch, torn):
    words = ["-n", 150, "--steps", 3]
    with monkeypatch.context() as patch:
        interrupted_after(1, patch, KeyboardInterrupt)
        stopped = ancestral("sample", trained, "--out", tmp_path / "stopped", *words)
    assert stopped.exit_code == 3
    with (tmp_path / "stopped" / "sample-0001.partial" / "sample-0001.npy").open("ab") as file:
        file.write(torn)
    assert whole(trained, tmp_path / "stopped", *words) == whole(trained, tmp_path / "whole", *words)


@pytest.mark.parametrize("suffix", [".png", ".gif", ".npy"])
def test_killed_between_two_final_names_it_ends_the_same(trained, tmp_path, monkeypatch, suffix):
    """Renaming stops for good at one of the files; those that have their names are whole, and the rest follow."""
    words, replace = ["-n", 70, "--steps", 3, "--gif"], Path.replace

    def stopping(self: Path, target: Path) -> Path:
        if self.parent.suffix == ".partial" and target.parent != self.parent and target.suffix == suffix:
            raise KeyboardInterrupt
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", stopping)
        assert ancestral("sample", trained, "--out", tmp_path / "stopped", *words).exit_code == 3
    undisturbed = whole(trained, tmp_path / "whole", *words)
    assert all(
        undisturbed[path.name] == path.read_bytes() for path in (tmp_path / "stopped").glob("*.*") if path.is_file()
    )
    assert whole(trained, tmp_path / "stopped", *words) == undisturbed


def test_stopped_before_the_first_batch_nothing_is_left(trained, tmp_path, monkeypatch):
    interrupted_after(0, monkeypatch, KeyboardInterrupt)
    result = ancestral("sample", trained, "-n", 150, "--steps", 3, "--out", tmp_path)
    assert result.exit_code == 3
    assert "stopped; there was no whole batch, and nothing is kept" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_exit_code_4_and_what_is_done_is_gone_on_with(trained, tmp_path, monkeypatch):
    words = ["-n", 150, "--steps", 3]
    with monkeypatch.context() as patch:
        interrupted_after(1, patch, OSError(28, "No space left on device"))
        result = ancestral("sample", trained, "--out", tmp_path / "full", *words)
    assert result.exit_code == 4
    assert (
        "the disk has no space for 150 samples; 64 of 150 samples are kept, and the same command goes on"
        in result.stderr
    )
    assert result.stderr.count("\n") == 1
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["sample-0001.partial"]
    assert whole(trained, tmp_path / "full", *words) == whole(trained, tmp_path / "whole", *words)


def test_what_cannot_fit_on_the_disk_is_not_begun(trained, tmp_path, monkeypatch):
    monkeypatch.setattr("ancestral.training.resources.free_disk", lambda path: 150 * 64 - 1)
    result = ancestral("sample", trained, "-n", 150, "--steps", 3, "--out", tmp_path)
    assert result.exit_code == 4
    assert "the disk has no space for 150 samples; there was no whole batch, and nothing is kept" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_only_the_same_job_is_gone_on_with(trained, tmp_path, monkeypatch):
    """Another seed, other pictures and other weights begin anew and leave what was begun alone."""

    def drawn(*words: object) -> dict:
        command = ["sample", trained, "-n", 150, "--steps", 3, "--out", tmp_path, "--json", *words]
        return json.loads(ancestral(*command).stdout)

    with monkeypatch.context() as patch:
        interrupted_after(1, patch, KeyboardInterrupt)
        assert drawn()["exit_code"] == 3
    begun, manifest = tree(tmp_path / "sample-0001.partial"), trained / "final" / durable.MANIFEST
    assert [drawn(*words)["begun_at"] for words in (["--seed", 1], ["--sheet"])] == [0, 0]
    kept = manifest.read_text()
    manifest.write_text(kept + "\n")  # as other weights would have another
    other = drawn()
    manifest.write_text(kept)
    assert other["begun_at"] == 0
    assert tree(tmp_path / "sample-0001.partial") == begun
    same = drawn()
    assert same["begun_at"] == 64
    assert same["artifacts"]["npy"] == str(tmp_path / "sample-0001.npy")


def test_two_commands_do_not_write_one_file(trained, tmp_path, monkeypatch):
    """What another process works on is left to it, and the next number taken; when nobody does, it is gone on with."""
    words = ["sample", trained, "-n", 150, "--steps", 3, "--out", tmp_path, "--json"]
    with monkeypatch.context() as patch:
        interrupted_after(1, patch, KeyboardInterrupt)
        assert ancestral(*words).exit_code == 3
    with FileLock(tmp_path / "sample-0001.partial" / ".lock"):
        second = json.loads(ancestral(*words).stdout)
    first = json.loads(ancestral(*words).stdout)
    for record, number, begun_at in ((second, 2, 0), (first, 1, 64)):
        assert record["artifacts"]["npy"] == str(tmp_path / f"sample-000{number}.npy")
        assert record["begun_at"] == begun_at
    assert not list(tmp_path.glob("*.partial"))


# What is seen.


def seen(model, n: int, steps: int, **options) -> list[Glimpse]:
    """Every glimpse of a first batch."""
    found: list[Glimpse] = []
    next(model.sample_batches(n, steps=steps, watch=lambda _, glimpse: found.append(glimpse), **options))
    return found


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_glimpse_is_a_point_and_the_guess_made_there_at_no_further_evaluation(model, name):
    before = model.network.asked
    points = list(model.sample_path(3, steps=5, sampler=SAMPLERS[name]))
    plain, before = model.network.asked - before, model.network.asked
    found = seen(model, 3, 5, sampler=SAMPLERS[name])
    assert model.network.asked - before == plain
    assert [glimpse.t for glimpse in found] == [point.t for point in points]
    instants = model.process.instants([point.t for point in points[:-1]])
    for glimpse, point, t in zip(found, points, [*instants, None], strict=True):
        assert torch.equal(glimpse.x_t, point.x)
        with torch.no_grad():
            guess = point.x if t is None else model.denoiser(point.x, t)
        torch.testing.assert_close(glimpse.x_0_hat, guess, rtol=1e-5, atol=1e-5)


def tiles(picture: Image.Image, rows: int, columns: int) -> np.ndarray:
    """The levels 0 .. 16 of each 8x8 tile of a sheet, (rows, 2, columns, 8, 8); each is of flat squares."""
    zoom, gap, apart = draw.PATH // (8 * columns), draw.GAP, draw.APART
    side, pixels = 8 * zoom, np.asarray(picture).astype(float)
    assert pixels.shape == (rows * (2 * side + gap) + (rows - 1) * apart, columns * side + (columns - 1) * gap)
    found = np.empty((rows, 2, columns, 8, 8))
    for row, half, column in np.ndindex(rows, 2, columns):
        top, left = row * (2 * side + gap + apart) + half * (side + gap), column * (side + gap)
        blocks = pixels[top : top + side, left : left + side].reshape(8, zoom, 8, zoom)
        assert (blocks.min((1, 3)) == blocks.max((1, 3))).all()
        found[row, half, column] = blocks[:, 0, :, 0]
    return np.rint(found * 16 / 255)


@pytest.mark.parametrize("sampler", ["ancestral", "heun"])
def test_the_sheet_has_the_path_in_its_columns_and_ends_with_the_samples(trained, tmp_path, sampler):
    words = ["-n", 10, "--steps", 16, "--sampler", sampler, "--sheet", "--out", tmp_path, "--json"]
    artifacts = json.loads(ancestral("sample", trained, *words).stdout)["artifacts"]
    model, n = checkpoint.load(trained), walking.ROWS
    with Image.open(artifacts["sheet"]) as picture:
        shown = tiles(picture, n, 9)
    assert draw.read_recipe(artifacts["sheet"]) == json.loads(Path(artifacts["recipe"]).read_text())
    x = np.load(artifacts["npy"])[:n, 0]
    np.testing.assert_array_equal(shown[:, 0, -1], x)
    np.testing.assert_array_equal(shown[:, 1, -1], x)
    points = list(model.sample_path(10, steps=16, sampler=SAMPLERS[sampler]))[::2]
    instants = model.process.instants([point.t for point in points[:-1]])
    for column, (point, t) in enumerate(zip(points[:-1], instants, strict=True)):
        x_t = model.facts.to_raw(point.x[:n] / (t.alpha**2 + t.sigma**2) ** 0.5)
        with torch.no_grad():
            x_0_hat = model.facts.to_raw(model.denoiser(point.x, t)[:n])
        np.testing.assert_array_equal(shown[:, 0, column], x_t[:, 0])
        np.testing.assert_array_equal(shown[:, 1, column], x_0_hat[:, 0])


def test_the_animation_shows_both_sides_and_ends_with_the_samples(trained, tmp_path):
    artifacts = json.loads(
        ancestral("sample", trained, "-n", 9, "--steps", 6, "--gif", "--out", tmp_path, "--json").stdout
    )["artifacts"]
    facts, x = checkpoint.load(trained).facts, torch.from_numpy(np.load(artifacts["npy"]))
    with Image.open(artifacts["gif"]) as animation:
        assert animation.n_frames == 7
        animation.seek(6)
        last = np.asarray(animation.convert("L")).astype(int)
    assert abs(last - np.asarray(draw.beside(facts, x, x))).max() <= 1  # a GIF has a palette


def test_previews_are_the_estimates_of_the_batch_at_work_and_cost_no_evaluation(trained, tmp_path, monkeypatch):
    """With a preview at every step, the picture that is there after a step is the grid of what was seen in it."""
    monkeypatch.setattr(walking, "EVERY", 0.0)
    previews: list[bytes] = []
    write = durable.write

    def kept(path: Path, data: bytes) -> None:
        write(path, data)
        if path.name == "preview.png":
            previews.append(np.asarray(Image.open(path)).tobytes())

    monkeypatch.setattr(durable, "write", kept)
    words = ["-n", 70, "--steps", 4, "--out", tmp_path, "--json"]
    plain = json.loads(ancestral("sample", trained, *words).stdout)
    assert plain["evaluations"] == 70 * 4
    expected: list[bytes] = []
    model = checkpoint.load(trained)

    def watch(_: int, glimpse: Glimpse) -> None:
        picture = draw.grid(model.facts, model.facts.to_raw(glimpse.x_0_hat))
        expected.append(np.asarray(picture).tobytes())

    list(model.sample_batches(70, steps=4, watch=watch))
    assert previews == expected
    drawn = json.loads(ancestral("sample", trained, *words, "--gif", "--sheet").stdout)
    assert drawn["evaluations"] == plain["evaluations"]
    assert Path(drawn["artifacts"]["npy"]).read_bytes() == Path(plain["artifacts"]["npy"]).read_bytes()
    assert not list(tmp_path.rglob("preview.png"))


def test_points_of_the_plane_are_drawn_where_they_are(tmp_path):
    """A cloud on a path has one scale at all moments: ink at the places of the points, and nowhere else."""
    facts = load("ring-8").facts
    centre, edge = facts.scale.inverse(torch.tensor([[0.0, 0.0], [1.0, 1.0]]))
    half = draw.REACH * float((edge - centre).max())
    corner = centre + torch.tensor([[0.5, 0.5]]) * half
    pixels = np.asarray(draw.sheet(facts, [(centre[None], corner), (corner, corner)])).min(2)
    assert pixels.shape == (2 * draw.PANEL + draw.APART, 2 * draw.PANEL + draw.GAP)
    middle, quarter, low = draw.PANEL // 2, draw.PANEL // 4, draw.PANEL + draw.APART
    right = draw.PANEL + draw.GAP
    dark = np.zeros_like(pixels, dtype=bool)
    for y, x in ((middle, middle), (low + quarter, 3 * quarter), (quarter, right + 3 * quarter)):
        dark[y - 4 : y + 4, x - 4 : x + 4] = True
    dark[low + quarter - 4 : low + quarter + 4, right + 3 * quarter - 4 : right + 3 * quarter + 4] = True
    assert (pixels[~dark] == 255).all()
    assert all(pixels[y, x] < 200 for y, x in ((middle, middle), (low + quarter, 3 * quarter)))


# From Python.


@pytest.fixture
def restless() -> Iterator[None]:
    """Threads change places as often as they can."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def at_once(*work: Callable[[], None]) -> None:
    threads = [threading.Thread(target=each) for each in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@pytest.mark.usefixtures("restless")
def test_two_threads_draw_from_one_model_what_each_would_alone(model):
    def drawn(seed: int) -> torch.Tensor:
        return torch.cat(list(model.sample_batches(48, batch=8, steps=6, rng=seed)))

    alone, found = [drawn(0), drawn(1)], {}
    at_once(lambda: found.update({0: drawn(0)}), lambda: found.update({1: drawn(1)}))
    assert torch.equal(found[0], alone[0])
    assert torch.equal(found[1], alone[1])


@pytest.mark.usefixtures("restless")
def test_no_evaluation_is_lost_from_the_count_among_threads():
    """Four threads ask a network that has nothing to do a thousand times each."""
    denoiser = NetworkDenoiser(Idle(), cosine())
    (t,), x = denoiser.process.instants([0.5]), torch.zeros(1, 1)

    def work() -> None:
        for _ in range(1000):
            denoiser(x, t)

    at_once(*[work] * 4)
    assert denoiser.asked == 4000


class Idle(nn.Module):
    """A network that gives back what it is given."""

    def forward(self, x, log_snr):
        return x


@pytest.mark.parametrize("at", [0, 3, 5])
@pytest.mark.parametrize("name", SAMPLERS)
def test_a_walk_is_taken_up_at_a_point_that_was_saved(model, name, at):
    sampler, times = SAMPLERS[name], [*grid(model.process, 6).tolist(), 0.0]
    options = {"variance": model.variance} if name == "ancestral" else {}
    rng = streams(0, 3)
    points = list(model.sample_path(3, steps=6, sampler=sampler, rng=0))
    *_, point = islice(model.sample_path(3, steps=6, sampler=sampler, rng=rng), at + 1)
    point, rng = pickle.loads(pickle.dumps((point, rng)))
    again = list(walk(sampler.step, model.denoiser, point, times[at:], rng=rng, **options))
    assert at == 0 or (isinstance(point.t, Instant) and point.t.log_snr == points[at].t.log_snr)
    assert [p.t for p in again] == [p.t for p in points[at:]]
    assert all(torch.equal(a.x, b.x) for a, b in zip(again, points[at:], strict=True))
