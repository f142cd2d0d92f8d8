"""The command: one sentence for every bad input, one JSON object when asked, files that carry their recipe."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from jsonschema import Draft202012Validator
from PIL import Image
from typer.testing import CliRunner

from ancestral.apps.cli import app
from ancestral.data import draw
from ancestral.flow.model import DRAWS
from ancestral.measure.record import Evaluation
from ancestral.training import recipes

SCHEMA = Path(__file__).parent.parent / "docs" / "evaluation.schema.json"
QUICK = [f"--set={change}" for change in ("unet.width=8", "unet.blocks=1", "unet.octaves=1", "training.batch=16")]


def ancestral(*words: object):
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run of a few steps on the digits."""
    path = tmp_path_factory.mktemp("runs") / "digits"
    result = ancestral("train", "digits", "--to", path, "--steps", 20, *QUICK)
    assert result.exit_code == 0, result.output
    return path


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its bytes."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_train_says_what_it_does_and_where_it_is(trained):
    log = (trained / "log.txt").read_text()
    assert "1,476 train + 321 held-out images of 1x8x8, 17 levels" in log
    assert "20 steps of 16 examples, seed 0" in log
    assert str(trained) in log


def test_train_json_is_one_object(tmp_path):
    result = ancestral("train", "ring-8", "--to", tmp_path / "run", "--steps", 3, "--seed", 5, "--json")
    record = json.loads(result.stdout)
    assert result.exit_code == 0
    assert record["run"] == str(tmp_path / "run")
    assert (record["steps"], record["seed"]) == (3, 5)
    assert record["images_per_second"] == pytest.approx(3 * 2048 / record["seconds"], rel=0.05)
    assert "examples/s" in result.stderr


def test_sample_writes_files_that_carry_their_recipe(trained, tmp_path):
    result = ancestral("sample", trained, "-n", 5, "--steps", 6, "--seed", 3, "--out", tmp_path, "--gif", "--json")
    record = json.loads(result.stdout)
    assert (record["images"], record["evaluations"], record["seed"]) == (5, 30, 3)
    recipe = draw.read_recipe(record["artifacts"]["png"])
    assert recipe == {"run": str(trained / "final"), "n": 5, "sampler": "ancestral", "steps": 6, "seed": 3}
    x = np.load(record["artifacts"]["npy"])
    assert x.shape == (5, 1, 8, 8)
    assert x.max() <= 16
    assert json.loads(Path(record["artifacts"]["recipe"]).read_text()) == recipe
    with Image.open(record["artifacts"]["gif"]) as animation:
        assert animation.n_frames == 7
        assert json.loads(animation.info["comment"]) == recipe


def test_the_same_seed_gives_the_same_samples_in_any_number(trained, tmp_path):
    def samples(n: int) -> np.ndarray:
        result = ancestral("sample", trained, "-n", n, "--steps", 6, "--out", tmp_path, "--json")
        return np.load(json.loads(result.stdout)["artifacts"]["npy"])

    few, many = samples(3), samples(300)
    different = (few.astype(int) - many[:3].astype(int)) != 0
    assert different.mean() < 0.02  # a level may flip where rounding of the network meets rounding to levels
    suffixes = ("json", "npy", "png")
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"sample-000{i}.{s}" for i in (1, 2) for s in suffixes]


@pytest.mark.parametrize("sampler", ["ancestral", "ddim", "euler", "heun", "annealed-langevin"])
def test_every_sampler_can_be_named(trained, tmp_path, sampler):
    result = ancestral("sample", trained, "-n", 2, "--steps", 3, "--sampler", sampler, "--out", tmp_path, "--json")
    assert result.exit_code == 0, result.output
    assert draw.read_recipe(json.loads(result.stdout)["artifacts"]["png"])["sampler"] == sampler


def test_evaluate_json_validates_against_the_published_schema(trained):
    result = ancestral("evaluate", trained, "--n", 40, "--json")
    record = json.loads(result.stdout)
    Draft202012Validator(json.loads(SCHEMA.read_text())).validate(record)
    bits = record["bits_per_dim"]
    assert bits["value"] == pytest.approx(bits["prior"] + bits["diffusion"] + bits["decoder"], abs=1e-9)
    assert record["n_images"] == 40
    assert record["n_evaluations"] == 40 * 25 + 40 * 2 * 9  # the pilot, and two replicates
    left = max(0.0, bits["stderr"] ** 2 - bits["stderr_noise"] ** 2)
    assert bits["stderr_examples"] ** 2 == pytest.approx(left, abs=1e-12)
    assert record["baselines"]["independent_pixels"] == pytest.approx(2.43, abs=0.15)
    assert record["margins"]["gaussian"]["value"] == pytest.approx(
        record["baselines"]["gaussian"] - bits["value"], abs=1e-9
    )
    assert all(Path(path).is_file() for path in record["artifacts"].values())
    assert json.loads(Path(record["artifacts"]["evaluation"]).read_text()) == record
    assert f"{bits['value']:.4f} ± {bits['stderr']:.4f}" in result.stderr


def test_the_published_schema_is_the_one_in_the_code():
    """Renew with: python -m ancestral.measure.record > docs/evaluation.schema.json."""
    assert json.loads(SCHEMA.read_text()) == Evaluation.model_json_schema()


def test_evaluate_agrees_with_all_steps_and_with_itself(trained):
    def value(*options: object) -> dict:
        return json.loads(ancestral("evaluate", trained, "--n", 16, "--json", *options).stdout)["bits_per_dim"]

    some, again, every = value(), value(), value("--likelihood", "all-steps")
    assert some == again
    assert abs(some["value"] - every["value"]) < 4 * (some["stderr"] ** 2 + every["stderr"] ** 2) ** 0.5


def test_real_valued_data_is_measured_in_nats(tmp_path):
    path = tmp_path / "run"
    assert ancestral("train", "ring-8", "--to", path, "--steps", 5).exit_code == 0
    answer = ancestral("evaluate", path, "--n", 50, "--json")
    record = json.loads(answer.stdout)
    Draft202012Validator(json.loads(SCHEMA.read_text())).validate(record)
    assert "independent values" in answer.stderr
    assert record["unit"] == "nats"
    assert "bits_per_dim" not in record
    assert record["baselines"]["gaussian"] == pytest.approx(3.5, abs=0.3)


def png(path: Path, text: str | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if text is None:
        Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(path)
    else:
        path.write_text(text)


def bad_inputs(folder: Path) -> dict[str, tuple[list[object], str]]:
    """Name -> (command, what the sentence must say)."""
    (folder / "empty").mkdir()
    png(folder / "texts" / "note.png", "not an image")
    (folder / "zero.zip").write_bytes(b"")
    np.save(folder / "nan.npy", np.array([[1.0, np.nan], [2.0, 3.0]]))
    (folder / "not-a-run").mkdir()
    for i in range(6):
        png(folder / "some" / f"{i}.png")
    whole = (folder / "some" / "0.png").read_bytes()
    (folder / "some" / "cut.png").write_bytes(whole[: len(whole) // 2])
    return {
        "an empty folder": (["train", folder / "empty"], "empty"),
        "a text file named .png": (["train", folder / "texts"], "note.png"),
        "a 0-byte zip": (["train", folder / "zero.zip"], "zero.zip"),
        "NaN in an array": (["train", folder / "nan.npy"], "nan.npy"),
        "a truncated image with --on-bad fail": (["train", folder / "some", "--on-bad", "fail"], "cut.png"),
        "a path that is not there": (["train", folder / "nowhere.npy"], "nowhere.npy"),
        "a name close to another": (["train", "digit"], "did you mean 'digits'"),
        "an unknown schedule": (["train", "digits", "--set", "process.schedule=cosin"], "did you mean 'cosine'"),
        "T = 0": (["train", "digits", "--set", "diffusion.chain=0"], "diffusion.chain = 0"),
        "no steps": (["train", "digits", "--steps", 0], "training.steps = 0"),
        "no minutes": (["train", "digits", "--minutes", -1], "training.minutes = -1"),
        "minutes and steps": (["train", "digits", "--minutes", 1, "--steps", 5], "give one of them"),
        "an unknown setting": (["train", "digits", "--set", "unet.widht=3"], "did you mean 'unet.width'"),
        "an unknown recipe": (["train", "digits", "--recipe", "digit"], "did you mean 'digits'"),
        "a size for what has none": (["train", "digits", "--size", 16], "size=16"),
        "a run that is not there": (["sample", folder / "gone"], "no such run"),
        "a directory that is no run": (["evaluate", folder / "not-a-run"], "not a run directory"),
        "a file in place of a run": (["sample", folder / "zero.zip"], "zero.zip"),
        "a run inside a file": (
            ["train", "digits", "--to", folder / "zero.zip" / "run", "--steps", 1],
            "zero.zip: is a file",
        ),
        "an image recipe for points": (["train", "ring-8", "--recipe", "images"], "use 'vectors'"),
        "a variance no network has": (["train", "digits", "--set", "diffusion.variance=optimal"], "use 'beta'"),
        "no betas": (["train", "digits", "--set", "process.betas=[]"], "betas must be a list"),
        "no levels in a U-Net": (["train", "digits", "--set", "unet.multipliers=[0, 1]"], "unet.multipliers"),
        "endless minutes": (["train", "digits", "--minutes", "inf"], "training.minutes"),
        "too large a seed": (["train", "digits", "--seed", 10**25], "a seed is a whole number"),
    }


BAD = [
    "an empty folder", "a text file named .png", "a 0-byte zip", "NaN in an array",
    "a truncated image with --on-bad fail", "a path that is not there", "a name close to another",
    "an unknown schedule", "T = 0", "no steps", "no minutes", "minutes and steps", "an unknown setting",
    "an unknown recipe", "a size for what has none", "a run that is not there", "a directory that is no run",
    "a file in place of a run", "a run inside a file", "an image recipe for points", "a variance no network has",
    "no betas", "no levels in a U-Net", "endless minutes", "too large a seed",
]  # fmt: skip


def test_every_bad_input_is_tried(tmp_path):
    assert list(bad_inputs(tmp_path)) == BAD


@pytest.mark.parametrize("name", BAD)
def test_bad_input_gets_one_sentence_exit_code_2_and_nothing_written(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command, says = bad_inputs(tmp_path)[name]
    before = tree(tmp_path)
    result = ancestral(*command)
    assert result.exit_code == 2
    assert says in result.stderr
    assert result.stderr.startswith("ancestral: ")
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""
    assert tree(tmp_path) == before
    as_json = ancestral(*command, "--json")
    assert json.loads(as_json.stdout)["exit_code"] == as_json.exit_code == 2


def test_a_truncated_image_is_skipped_and_counted(tmp_path):
    bad_inputs(tmp_path)
    for i in range(8):
        image = Image.fromarray(np.full((8, 8), 30 * i, dtype=np.uint8))
        image.save(tmp_path / "some" / f"grey{i}.png")
    result = ancestral("train", tmp_path / "some", "--to", tmp_path / "run", "--steps", 1, *QUICK)
    assert result.exit_code == 0, result.output
    assert "cut.png" in result.stdout
    assert json.loads((tmp_path / "run" / "final" / "model.json").read_text())["facts"]["skipped"] == 1


def test_a_flipped_byte_is_passed_over_with_a_note_or_refused_where_it_was_named(trained, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(trained, copy)
    weights = copy / "final" / "weights.safetensors"
    data = bytearray(weights.read_bytes())
    data[-100] ^= 4
    weights.write_bytes(data)
    before = tree(copy)
    result = ancestral("sample", copy / "final", "-n", 1, "--steps", 2)
    assert result.exit_code == 2
    assert "weights.safetensors: does not match its checksum" in result.stderr
    assert "checkpoints/step-0000020 can be used in its place" in result.stderr
    assert tree(copy) == before
    result = ancestral("sample", copy, "-n", 1, "--steps", 2, "--json")
    assert result.exit_code == 0
    assert "note: " in result.stderr
    assert "an earlier checkpoint is used in its place" in result.stderr
    assert json.loads(result.stdout)["images"] == 1


def test_other_data_must_be_of_the_same_kind(trained):
    result = ancestral("evaluate", trained, "--data", "ring-8")
    assert result.exit_code == 2
    assert "trained on shape (1, 8, 8)" in result.stderr


@pytest.mark.parametrize("verb", [[], ["train"], ["sample"], ["evaluate"], ["figures"]])
def test_help_fits_a_screen_and_shows_an_example(verb):
    result = ancestral(*verb, "--help")
    lines = result.stdout.splitlines()
    assert result.exit_code == 0
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 80
    assert "ancestral " + (verb[0] if verb else "train digits") in result.stdout


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_keeps_a_checkpoint_and_exits_with_3(tmp_path, number):
    """A real process, a real signal: what was saved is whole and can be sampled."""
    path = tmp_path / "run"
    command = [sys.executable, "-m", "ancestral.apps.cli", "train", "digits", "--to", str(path), "--steps", "100000"]
    process = subprocess.Popen(
        [*command, *QUICK], stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    try:
        while not (path / "metrics.jsonl").exists() or len((path / "metrics.jsonl").read_text()) == 0:
            assert process.poll() is None
        process.send_signal(number)
        _, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 3
    assert "stopped" in stderr
    assert json.loads((path / "run.json").read_text())["status"] == "stopped"
    assert ancestral("sample", path, "-n", 1, "--steps", 2).exit_code == 0


def test_what_a_family_cannot_answer_is_refused_before_anything_is_measured(trained, tmp_path, monkeypatch):
    for family in ("gan", "vae"):
        assert ancestral("train", "digits", "--family", family, "--to", tmp_path / family, "--steps", 1).exit_code == 0
    monkeypatch.setattr("ancestral.apps.evaluating.evaluate", None)
    for words, sentence in (
        ((trained, "--compare", tmp_path / "gan"), f"{tmp_path / 'gan' / 'final'} is a gan, which has none"),
        ((trained, "--compare", tmp_path / "vae", "--steps", 5), "--steps is about the chain of a diffusion model"),
        ((tmp_path / "vae", "--tolerance", 0.1), "--tolerance is about the chain of a diffusion model"),
        ((tmp_path / "gan", "--likelihood", "ode"), "--likelihood ode is about the chain of a diffusion model"),
        ((trained, "--draws", 5), f"--draws is of importance weights, of which {trained / 'final'}, a diffusion"),
        ((tmp_path / "gan", "--draws", 5), "a gan, has none: leave it out"),
        ((tmp_path / "gan", "--compare", trained), "--compare is about a likelihood, and a gan has none: leave it out"),
    ):
        refused = ancestral("evaluate", *words)
        assert refused.exit_code == 2
        assert sentence in refused.stderr
        assert refused.stderr.strip().count("\n") == 0


def test_more_draws_of_a_flow_on_levels_bring_its_bound_down_and_are_recorded(tmp_path):
    """E[log mean_K(w)] rises with K: here by several standard errors of the noise."""
    assert ancestral("train", "digits", "--family", "flow", "--to", tmp_path / "flow", "--steps", 3).exit_code == 0
    found = []
    for draws in (1, 100, None):
        options = ("--n", 40, "--samples", 0, "--json", *(() if draws is None else ("--draws", draws)))
        record = json.loads(ancestral("evaluate", tmp_path / "flow", *options).stdout)
        assert record["draws"] == (draws or DRAWS)
        found.append(record["bits_per_dim"])
    assert found[0]["value"] - found[1]["value"] > 3 * found[0]["stderr_noise"]


def test_a_signal_ends_an_evaluation_with_3_and_leaves_nothing_half_written(trained):
    command = [sys.executable, "-m", "ancestral.apps.cli", "evaluate", str(trained), "--likelihood", "all-steps"]
    before = set(trained.iterdir())
    process = subprocess.Popen(
        [*command, "--steps", "3000"], stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    try:
        while "measuring the bound" not in process.stderr.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 3
    assert "ancestral: stopped" in stderr
    assert set(trained.iterdir()) == before


def test_samples_stay_on_the_levels(trained, tmp_path):
    record = json.loads(ancestral("sample", trained, "-n", 20, "--steps", 3, "--out", tmp_path, "--json").stdout)
    x = torch.from_numpy(np.load(record["artifacts"]["npy"]))
    assert x.dtype == torch.uint8
    assert x.unique().numel() > 2


@pytest.mark.parametrize("words", [["train", "digits", "--steps", "few"], ["sample", "x", "-n", "0"], ["trian"]])
def test_a_usage_error_is_one_sentence_too(words):
    command = [sys.executable, "-m", "ancestral.apps.cli", *words]
    plain = subprocess.run(command, capture_output=True, text=True, check=False)
    assert plain.returncode == 2
    assert plain.stdout == ""
    assert plain.stderr.count("\n") == 1
    assert "--help' shows what can be given" in plain.stderr
    as_json = subprocess.run([*command, "--json"], capture_output=True, text=True, check=False)
    assert json.loads(as_json.stdout)["exit_code"] == as_json.returncode == 2


def test_a_run_can_be_measured_from_another_directory(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    np.save(tmp_path / "here" / "x.npy", np.random.default_rng(0).integers(0, 256, (60, 8, 8), dtype=np.uint8))
    monkeypatch.chdir(tmp_path / "here")
    assert ancestral("train", "x.npy", "--to", tmp_path / "run", "--steps", 1, *QUICK).exit_code == 0
    monkeypatch.chdir(tmp_path / "there")
    assert ancestral("evaluate", tmp_path / "run", "--n", 4).exit_code == 0


def test_reported_evaluations_are_counted(trained, tmp_path):
    """Heun asks twice a step but once in the last; annealed Langevin asks once an update and once to close."""
    for sampler, evaluations in (("heun", 2 * (2 * 5 - 1)), ("annealed-langevin", 2 * (10 * 5 + 1))):
        result = ancestral("sample", trained, "-n", 2, "--steps", 5, "--sampler", sampler, "--out", tmp_path, "--json")
        assert json.loads(result.stdout)["evaluations"] == evaluations


def mixed_folder(folder: Path) -> None:
    """Grey, RGB, RGBA, palette, 16-bit, 1-bit and EXIF-rotated images of mixed sizes, in PNG, JPEG and GIF."""
    draw_from = np.random.default_rng(0)
    folder.mkdir()
    for i in range(40):
        width, height = (int(side) for side in draw_from.integers(33, 60, 2))
        ramp = np.linspace(0, 255, width * height).reshape(height, width) * draw_from.uniform(0.3, 1)
        image = Image.fromarray(np.stack([ramp, ramp[::-1], ramp[:, ::-1]], -1).astype(np.uint8))
        exif = Image.Exif()
        exif[0x0112] = 6
        save = [
            lambda path, im=image: im.convert("L").save(f"{path}.png"),
            lambda path, im=image: im.save(f"{path}.png"),
            lambda path, im=image: im.convert("RGBA").save(f"{path}.png"),
            lambda path, im=image: im.convert("P").save(f"{path}.gif"),
            lambda path, r=ramp: Image.fromarray((r * 257).astype(np.uint16)).save(f"{path}.png"),
            lambda path, im=image: im.convert("1").save(f"{path}.png"),
            lambda path, im=image, e=exif: im.save(f"{path}.jpg", exif=e),
        ]
        save[i % len(save)](folder / f"{i:02d}")


def test_a_folder_of_every_kind_of_image_trains_samples_and_evaluates(tmp_path):
    mixed_folder(tmp_path / "mixed")
    run = tmp_path / "run"
    quick = ["--set=unet.width=8", "--set=unet.blocks=1", "--set=training.batch=4"]
    trained = ancestral("train", tmp_path / "mixed", "--to", run, "--steps", 2, *quick)
    assert trained.exit_code == 0, trained.output
    assert "images of 3x32x32, 256 levels" in trained.stdout
    record = json.loads(ancestral("sample", run, "-n", 2, "--steps", 2, "--json").stdout)
    with Image.open(record["artifacts"]["png"]) as picture:
        assert picture.mode == "RGB"
    result = json.loads(ancestral("evaluate", run, "--json").stdout)
    Draft202012Validator(json.loads(SCHEMA.read_text())).validate(result)
    assert result["unit"] == "bits/dim"


def test_a_chain_that_does_not_forget_or_does_not_increase_is_remarked_on(tmp_path):
    quick = [*QUICK, "--set=process.betas=[0.1, 0.05, 0.2]", "--set=diffusion.chain=3", "--steps=1"]
    result = ancestral("train", "digits", "--to", tmp_path / "run", *quick)
    assert result.exit_code == 0, result.output
    assert "note: the betas of this chain do not increase throughout" in result.stdout
    assert "bits/dim of the data not forgotten" in result.stdout
    assert "note:" not in ancestral("train", "digits", "--to", tmp_path / "plain", "--steps=1", *QUICK).stdout


def test_a_dry_run_says_what_it_would_take_and_writes_nothing(tmp_path, monkeypatch):
    """The memory is that of the estimate, the ETA is steps times the pace that was measured."""
    monkeypatch.chdir(tmp_path)
    result = ancestral("train", "digits", "--dry-run", "--steps", 50, "--json", *QUICK)
    record = json.loads(result.stdout)
    assert result.exit_code == 0
    assert (record["steps"], record["batch"]) == (50, 16)
    assert record["eta_seconds"] == pytest.approx(50 * record["seconds_per_step"], abs=0.1)
    assert 10**8 < record["memory_bytes"] < record["available_memory_bytes"]
    assert 0 < record["disk_bytes"] < record["free_disk_bytes"]
    assert record["setup"]["unet"]["width"] == 8
    assert list(tmp_path.iterdir()) == []
    for words in (["--dry-run"], ["digits", "--dry-run", "--resume", "x"]):
        assert ancestral("train", *words).exit_code == 2


def test_what_does_not_fit_is_refused_with_a_batch_that_does(tmp_path, monkeypatch):
    monkeypatch.setattr("ancestral.data.machine.available_memory", lambda: 2**30)
    words = ["train", "digits", "--steps", 2, "--to", tmp_path / "run", "--set", "training.batch=1000000"]
    result = ancestral(*words)
    assert result.exit_code == 2
    assert "would fit: --set training.batch=" in result.stderr
    assert not (tmp_path / "run").exists()
    words[-1] = result.stderr.strip().split("--set ")[-1]
    assert int(words[-1].removeprefix("training.batch=")) > 100


def test_the_same_command_and_resume_go_on_and_say_so(tmp_path):
    words = ["train", "ring-8", "--to", tmp_path / "run", "--steps", 8, "--checkpoint-every", 4, "--set=mlp.width=8"]
    assert ancestral(*words).exit_code == 0
    again = ancestral(*words, "--json")
    assert "has been trained to its end" in again.stderr
    assert json.loads(again.stdout)["begun_at"] == 8
    shutil.rmtree(tmp_path / "run" / "final")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-0000008")
    resumed = ancestral("train", "--resume", tmp_path / "run", "--json")
    assert "goes on after step 4" in resumed.stderr
    assert json.loads(resumed.stdout)["steps"] == 8
    other = ancestral(*[7 if word == 8 else word for word in words])
    assert other.exit_code == 2
    assert "training.steps 8 -> 7" in other.stderr


def test_averages_of_any_length_are_measured_and_sampled(trained, tmp_path):
    """The one that was kept is measured as it is; each line of the sweep has its length and its error."""
    result = ancestral("evaluate", trained, "--n", 30, "--ema", "0.05,0.08,0.15", "--json")
    record = json.loads(result.stdout)
    Draft202012Validator(json.loads(SCHEMA.read_text())).validate(record)
    kept, middle, long = record["ema"]
    assert [each["length"] for each in record["ema"]] == [0.05, 0.08, 0.15]
    assert kept["residual"] == 0
    assert 0 < middle["residual"] < 0.05
    assert kept["likelihood"] == record["bits_per_dim"]
    assert middle["likelihood"]["value"] != long["likelihood"]["value"]
    assert "average of length 0.15" in result.stderr
    drawn = ancestral("sample", trained, "-n", 2, "--steps", 3, "--ema", "0.08", "--out", tmp_path, "--json")
    assert draw.read_recipe(json.loads(drawn.stdout)["artifacts"]["png"])["ema"] == 0.08
    for length, sentence in [("0.5", "not a power function's"), ("long", "--ema is a length")]:
        refused = ancestral("evaluate", trained, "--ema", length)
        assert refused.exit_code == 2
        assert sentence in refused.stderr


def test_the_doctor_and_the_presets_speak_json(monkeypatch):
    small = {name: recipes.PRESETS[name] for name in ("tiny", "dit-tiny")}
    monkeypatch.setattr(recipes, "PRESETS", small)
    found = json.loads(ancestral("doctor", "--json").stdout)
    assert found["torch"] == torch.__version__
    assert set(found["convolution_gflop_per_second"]) == {"float32", "bfloat16"}
    result = ancestral("presets", "--size", 8, "--channels", 1, "--json")
    table = json.loads(result.stdout)["presets"]
    assert [row["preset"] for row in table] == list(small)
    assert all(row["images_per_second"] > 0 for row in table)
    assert "| tiny |" in result.stderr
