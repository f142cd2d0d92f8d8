"""`data check` finds what was hidden in the data, names it, and stays silent about what is sound."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from jsonschema import Draft202012Validator
from PIL import Image
from typer.testing import CliRunner

from ancestral.apps.cli import app
from ancestral.data import load
from ancestral.data.check import Check, check

SCHEMA = Path(__file__).parent.parent / "docs" / "data-check.schema.json"


def smooth(seed: int, side: int = 32) -> Image.Image:
    """A picture with structure at every scale, unlike any of another seed."""
    coarse = np.random.default_rng(seed).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)


@pytest.fixture
def photos(tmp_path) -> Path:
    root = tmp_path / "photos"
    for seed in range(40):
        path = root / ("train" if seed < 30 else "test") / "ab"[seed % 2] / f"{seed:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        smooth(seed).save(path)
    return root


def test_sound_data_have_no_problems(photos):
    found = check(load(photos))
    assert found.problems == []
    assert (found.kind, found.shape, found.n_train, found.n_held_out) == ("images", (3, 32, 32), 30, 10)
    assert (found.sizes, found.modes, found.classes) == ({"32x32": 40}, {"RGB": 40}, {"a": 20, "b": 20})
    assert (found.duplicates.exact, found.duplicates.near, found.n_constant) == (0, 0, 0)


class TestDuplicates:
    def test_a_copy_across_the_split_is_named(self, photos):
        (photos / "test" / "a" / "copy.png").write_bytes((photos / "train" / "a" / "04.png").read_bytes())
        found = check(load(photos))
        assert (found.duplicates.exact, found.duplicates.exact_across) == (1, 1)
        assert found.duplicates.pairs == [("train/a/04.png", "test/a/copy.png")]
        assert "1 held-out examples are copies" in found.problems[0]

    @pytest.mark.parametrize(
        "change",
        [
            lambda image: jpeg(image, 75),
            lambda image: image.resize((50, 50), Image.Resampling.BICUBIC),
            lambda image: image.point(lambda v: round(v * 0.8 + 20)),
            lambda image: Image.blend(image, Image.effect_noise(image.size, 40).convert("RGB"), 0.05),
        ],
        ids=["JPEG", "resized", "dimmed", "noise"],
    )
    def test_what_only_looks_like_a_copy_is_near(self, photos, change):
        change(smooth(4)).save(photos / "test" / "a" / "again.png")
        found = check(load(photos, size=32))
        assert (found.duplicates.exact, found.duplicates.near, found.duplicates.near_across) == (0, 1, 1)
        assert found.duplicates.pairs == [("train/a/04.png", "test/a/again.png")]

    def test_other_pictures_of_one_kind_are_not(self):
        found = check(load("digits"))
        assert found.duplicates.near <= 5
        assert found.duplicates.exact == 0

    def test_rows_of_a_table_are_compared_exactly(self, tmp_path):
        x = np.random.default_rng(0).normal(size=(100, 3))
        np.save(tmp_path / "x.npy", np.concatenate([x, x[:7], x[:7]]))
        found = check(load(tmp_path / "x.npy"))
        assert (found.duplicates.exact, found.duplicates.near) == (14, None)


def jpeg(image: Image.Image, quality: int) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file)


class TestProblems:
    def test_constant_and_unreadable_files_are_named(self, photos):
        Image.new("RGB", (32, 32), "teal").save(photos / "train" / "b" / "flat.png")
        (photos / "train" / "a" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
        found = check(load(photos))
        assert found.constant == ["train/b/flat.png"]
        assert found.unreadable[0].startswith("train/a/broken.png: ")
        assert [problem.partition(" (")[0] for problem in found.problems] == [
            "1 could not be read",
            "1 hold one value or colour throughout",
        ]

    def test_columns_are_judged_by_name(self, tmp_path):
        rng = np.random.default_rng(0)
        rows = [f"{a},{k % 3},7,{b}" for k, (a, b) in enumerate(rng.normal(size=(2000, 2)))]
        rows[10] = "0.1,1,7,1000"
        (tmp_path / "t.csv").write_text("\n".join(["fine,few,one,far", *rows]))
        found = check(load(tmp_path / "t.csv"))
        assert (found.constant_features, found.discrete_features, found.outliers) == (["one"], ["few"], {"far": 1})
        assert len(found.problems) == 3

    def test_uneven_classes_are_said(self, tmp_path):
        x = np.random.default_rng(0).integers(0, 256, (120, 4, 4), dtype=np.uint8)
        np.savez(tmp_path / "x.npz", x=x, y=np.arange(120) < 5)
        assert check(load(tmp_path / "x.npz")).problems == ["classes are uneven: 115 of 'False' and 5 of 'True'"]

    def test_levels_that_occur_are_counted(self, tmp_path):
        x = np.random.default_rng(0).integers(0, 5, (40, 4, 4), dtype=np.uint8) * 50
        np.save(tmp_path / "x.npy", x)
        found = check(load(tmp_path / "x.npy"))
        assert (found.levels, found.levels_used, found.minimum, found.maximum) == (256, 5, 0, 200)


class TestCommand:
    def test_json_validates_and_suggests_and_nothing_is_written(self, photos, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        before = sorted(tmp_path.rglob("*"))
        done = CliRunner().invoke(app, ["data", "check", str(photos), "--size", "8", "--json"])
        assert done.exit_code == 0, done.output
        record = json.loads(done.stdout)
        Draft202012Validator(json.loads(SCHEMA.read_text())).validate(record)
        assert (record["suggestion"]["size"], record["suggestion"]["recipe"]) == (8, "digits")
        assert record["suggestion"]["minutes"] > 0
        assert "ancestral train" in done.stderr
        assert sorted(tmp_path.rglob("*")) == before

    def test_the_published_schema_is_the_one_in_the_code(self):
        """Renew with: python -m ancestral.data.check > docs/data-check.schema.json."""
        assert json.loads(SCHEMA.read_text()) == Check.model_json_schema()

    def test_what_is_not_there_is_one_sentence(self):
        done = CliRunner().invoke(app, ["data", "check", "no/such/folder"])
        assert done.exit_code == 2
        assert done.stderr == "ancestral: no/such/folder: no such file or folder\n"

    def test_training_says_in_one_line_what_is_wrong(self, photos, tmp_path):
        (photos / "test" / "a" / "copy.png").write_bytes((photos / "train" / "a" / "04.png").read_bytes())
        small = ["--size", "8", "--steps", "1", "--set", "training.batch=4", "--set", "unet.width=8"]
        done = CliRunner().invoke(app, ["train", str(photos), "--to", str(tmp_path / "run"), *small])
        assert done.exit_code == 0, done.output
        (line,) = [line for line in done.output.splitlines() if line.startswith("note: 1 held-out examples are copies")]
        assert f"'ancestral data check {photos}' shows more" in line
