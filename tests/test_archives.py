"""Archives mean what their folder means; metadata names classes; other proportions come to a size as was asked."""

import csv
import gzip
import io
import json
import tarfile
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from ancestral.apps.cli import app
from ancestral.data import archives, load
from ancestral.errors import DataError, OptionError


def picture(seed: int, height: int = 12, width: int = 12) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


FILES = {f"{'abc'[seed % 3]}/{seed:02}.png": png(picture(seed)) for seed in range(12)}


def tar(files: dict[str, bytes], *extra: tarfile.TarInfo, form: int = tarfile.PAX_FORMAT) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        for member in extra:
            archive.addfile(member)
    return file.getvalue()


def zipped(files: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return file.getvalue()


def folder(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def member(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.type, made.linkname = kind, target
    return made


@pytest.fixture(params=["tar", "tar.gz", "tgz"])
def packed(request, tmp_path):
    """Writes a tar archive, packed or not; gives its path."""

    def write(content: bytes) -> Path:
        path = tmp_path / f"set.{request.param}"
        path.write_bytes(content if request.param == "tar" else gzip.compress(content))
        return path

    return write


class TestTar:
    @pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
    def test_equals_the_folder_it_was_made_from(self, tmp_path, packed, form):
        files = {**FILES, ".hidden/x.png": b"", "__MACOSX/y.png": b"", "readme.txt": b"hello"}
        files["a/" + "long-" * 12 + "name.png"] = png(picture(99))
        path = packed(tar(files, form=form))
        whole, own = load(folder(tmp_path / "set", files)), load(path)
        assert own.facts.digest == whole.facts.digest
        assert own.description == whole.description
        assert own.facts.classes == ("a", "b", "c")
        assert own.facts.name == "set"

    @pytest.mark.parametrize("name", ["../out.png", "a/../../out.png", "/etc/out.png", "C:\\out.png"])
    def test_a_member_that_points_outside_is_refused(self, packed, name):
        with pytest.raises(DataError, match=r"out\.png' points outside the archive"):
            load(packed(tar({**FILES, name: FILES["a/00.png"]})))

    @pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
    def test_a_link_is_refused(self, packed, kind):
        with pytest.raises(DataError, match=r"'link\.png' points outside the archive"):
            load(packed(tar(FILES, member("link.png", kind, "/etc/passwd"))))

    def test_devices_and_pipes_are_passed_over(self, packed):
        extra = [member("pipe.png", tarfile.FIFOTYPE), member("null.png", tarfile.CHRTYPE)]
        data = load(packed(tar(FILES, *extra)), on_bad="fail")
        assert data.facts.n_train + data.facts.n_held_out == 12

    def test_damage_in_the_middle_hides_the_rest_and_is_said(self, packed):
        content = bytearray(tar(FILES))
        second = content.index(b"b/01.png")
        content[second : second + 4] = b"\xff\xff\xff\xff"
        path = packed(bytes(content) + tar({}))
        with pytest.raises(DataError, match="damaged after 1 members, the rest is lost"):
            load(path, on_bad="fail")
        whole = tar(FILES)
        last = whole.index(b"c/11.png")
        cut = packed(whole[: last + 700])
        data = load(cut)
        assert data.facts.n_train + data.facts.n_held_out == 11
        assert data.facts.skipped >= 1

    def test_one_that_ends_without_zeros_is_whole(self, packed):
        end = -(-len(tar(FILES).rstrip(b"\0")) // 512) * 512
        data = load(packed(tar(FILES)[:end]), on_bad="fail")
        assert data.facts.n_train + data.facts.n_held_out == 12

    @pytest.mark.parametrize("content", [b"", b"hello" * 300, bytes(10_240)])
    def test_what_is_no_archive_is_refused(self, packed, content):
        with pytest.raises(DataError, match=r"set\.t[^:]*: (damaged, or no tar archive|holds no images)"):
            load(packed(content))

    def test_bounds_hold(self, packed, monkeypatch):
        path = packed(tar(FILES))
        for bound, words in {"MAX_MEMBERS": "holds 6 members", "MAX_DECLARED": "unpacks to"}.items():
            with monkeypatch.context() as patch:
                patch.setattr(archives, bound, 5)
                with pytest.raises(DataError, match=words):
                    load(path)
        monkeypatch.setattr(archives, "MAX_MEMBER", 100)
        with pytest.raises(DataError, match="nothing in it can be read as an image"):
            load(path)

    def test_a_header_that_claims_gigabytes_is_not_believed(self, packed):
        huge = member("././@LongLink", tarfile.GNUTYPE_LONGNAME)
        huge.size = 2**32
        end = -(-len(tar(FILES).rstrip(b"\0")) // 512) * 512
        content = tar(FILES)[:end] + huge.tobuf(tarfile.GNU_FORMAT)
        data = load(packed(content + bytes(2048)))
        assert data.facts.n_train + data.facts.n_held_out == 12
        assert "the rest is lost" in data.description

    def test_a_gzipped_one_that_unpacks_beyond_measure_is_refused(self, tmp_path, monkeypatch):
        monkeypatch.setattr(archives, "MODEST", 2**20)
        path = tmp_path / "bomb.tar.gz"
        path.write_bytes(gzip.compress(tar({"zeros.bin": bytes(2**23), **FILES})))
        with pytest.raises(DataError, match="unpacks to"):
            load(path)


def table(rows: list[dict]) -> bytes:
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue().encode()


def lines(rows: list[dict]) -> bytes:
    return "\n".join(map(json.dumps, rows)).encode()


ROWS = [{"file_name": name, "label": ["ü, x", "10", "9"][k % 3]} for k, name in enumerate(sorted(FILES))]


class TestMetadata:
    @pytest.mark.parametrize("form", [("metadata.csv", table), ("metadata.jsonl", lines)])
    @pytest.mark.parametrize("kind", ["folder", "zip", "tar"])
    def test_names_the_class_of_each_image(self, tmp_path, form, kind):
        files = {**FILES, form[0]: form[1](ROWS)}
        if kind == "folder":
            path = folder(tmp_path / "set", files)
        else:
            path = tmp_path / f"set.{kind}"
            path.write_bytes(tar(files) if kind == "tar" else zipped(files))
        data = load(path, on_bad="fail")
        assert data.facts.classes == ("10", "9", "ü, x")
        label = {picture(int(row["file_name"][2:4])).transpose(2, 0, 1).tobytes(): row["label"] for row in ROWS}
        for x, y in [(data.train, data.train_labels), (data.held_out, data.held_out_labels)]:
            for image, index in zip(x, y.tolist(), strict=True):
                assert label[image.numpy().tobytes()] == data.facts.classes[index]

    def test_of_a_split_lies_in_its_folders_and_numbers_keep_their_order(self, tmp_path):
        files = {f"{side}/{k:02}.png": png(picture(k)) for k in range(12) for side in ["train" if k < 8 else "test"]}
        for side, ks in {"train": range(8), "test": range(8, 12)}.items():
            files[f"{side}/metadata.jsonl"] = lines([{"file_name": f"{k:02}.png", "label": k} for k in ks])
        data = load(folder(tmp_path, files))
        assert data.facts.classes == tuple(map(str, range(12)))
        assert data.train_labels.tolist() == list(range(8))
        assert data.held_out_labels.tolist() == list(range(8, 12))

    def test_what_it_does_not_list_is_left_out_and_what_is_not_there_is_counted(self, tmp_path):
        rows = [*ROWS[:9], {"file_name": "../../etc/passwd", "label": "9"}, {"file_name": "gone.png", "label": "9"}]
        data = load(folder(tmp_path, {**FILES, "metadata.csv": table(rows)}))
        assert data.facts.n_train + data.facts.n_held_out == 9
        assert data.facts.skipped == 2
        assert "left out 3 images that the metadata does not list" in data.description

    @pytest.mark.parametrize(
        "content",
        [b"file_name,label\na,\n", b'{"file_name": 1', b"[" * 9999, b"{" * 9999, b"\xff\xfe", b'{"label": 1}'],
    )
    def test_damaged_it_is_skipped_counted_and_named(self, tmp_path, content):
        name = "metadata.csv" if content.startswith(b"file") else "metadata.jsonl"
        path = folder(tmp_path, {**FILES, name: content})
        data = load(path)
        assert data.facts.classes == ("a", "b", "c")
        if data.facts.skipped:
            assert f"skipped 1 unreadable ({name}: " in data.description

    def test_without_labels_it_changes_nothing(self, tmp_path):
        rows = [{"file_name": name, "text": "a cat"} for name in FILES]
        data = load(folder(tmp_path, {**FILES, "metadata.jsonl": lines(rows)}), on_bad="fail")
        assert data.facts.classes == ("a", "b", "c")
        assert data.facts.n_train + data.facts.n_held_out == 12


class TestFit:
    @pytest.fixture
    def wide(self, tmp_path):
        """Half white, half grey from left to right, 60 x 20, held out; two other images to learn from."""
        pixels = np.full((20, 60, 3), 255, dtype=np.uint8)
        pixels[:, 30:] = 128
        files = {"train/a.png": png(picture(0)), "train/b.png": png(picture(1)), "test/wide.png": png(pixels)}
        files["train/tall.png"] = png(np.ascontiguousarray(pixels.transpose(1, 0, 2)))
        return folder(tmp_path / "set", files)

    def test_crop_keeps_the_centre(self, wide):
        image = load(wide, size=20).held_out[0, 0].numpy()
        assert (image[:, :10] == 255).all()
        assert (image[:, 10:] == 128).all()

    def test_pad_keeps_everything_on_black(self, wide):
        image = load(wide, size=60, fit="pad").held_out[0, 0].numpy()
        assert (image[:20] == 0).all()
        assert (image[40:] == 0).all()
        assert (image[20:40, :30] == 255).all()
        assert (image[20:40, 30:] == 128).all()

    def test_stretch_keeps_everything_and_distorts_it(self, wide):
        image = load(wide, size=20, fit="stretch").held_out[0, 0].numpy()
        assert np.abs(image[:, :8] - 255.0).max() <= 3
        assert np.abs(image[:, 12:] - 128.0).max() <= 3

    @pytest.mark.parametrize(
        ("fit", "words"), [("crop", "centre-cropped"), ("pad", "padded with black"), ("stretch", "stretched")]
    )
    def test_mixed_sizes_say_what_was_done(self, wide, fit, words):
        assert words in load(wide, fit=fit).description

    def test_equal_sizes_are_not_touched(self, tmp_path):
        path = folder(tmp_path, FILES)
        assert len({load(path, fit=fit).facts.digest for fit in ("crop", "pad", "stretch")}) == 1

    def test_is_refused_where_it_means_nothing(self, tmp_path):
        np.save(tmp_path / "x.npy", np.zeros((9, 2)))
        for source in ("digits", tmp_path / "x.npy"):
            with pytest.raises(OptionError, match="received fit=pad for"):
                load(source, fit="pad")
        with pytest.raises(OptionError, match="did you mean 'crop'"):
            load("digits", fit="crob")

    def test_a_run_reads_its_data_again_as_it_was_begun(self, tmp_path):
        """--resume and evaluate read the digest that was recorded, and so the same pixels."""
        files = {f"{seed}.png": png(picture(seed, 12, 20)) for seed in range(12)}
        path, run = folder(tmp_path / "set", files), tmp_path / "run"
        small = ["--set", "training.batch=4", "--set", "unet.width=8", "--steps", "2"]
        made = CliRunner().invoke(app, ["train", str(path), "--size", "8", "--fit", "pad", "--to", str(run), *small])
        assert made.exit_code == 0, made.output
        assert json.loads((run / "run.json").read_text())["data"]["fit"] == "pad"
        again = CliRunner().invoke(app, ["train", "--resume", str(run)])
        assert again.exit_code == 0, again.output
        for options in [[], ["--data", str(path)]]:
            measured = CliRunner().invoke(app, ["evaluate", str(run), "--n", "2", *options])
            assert measured.exit_code == 0, measured.output
            assert "has changed since" not in measured.output
        other = CliRunner().invoke(app, ["train", "--resume", str(run), "--fit", "crop"])
        assert other.exit_code == 2
        wrong = CliRunner().invoke(app, ["train", str(path), "--fit", "squash"])
        assert wrong.exit_code == 2


def test_images_of_an_archive_keep_their_pixels(packed):
    data = load(packed(tar(FILES)))
    seen = {row.numpy().tobytes() for row in torch.cat([data.train, data.held_out])}
    assert seen == {picture(seed).transpose(2, 0, 1).tobytes() for seed in range(12)}


@pytest.mark.parametrize("kind", ["folder", "zip", "tar"])
def test_reading_holds_the_decoded_images_little_more_than_once(tmp_path, kind):
    """Pixels go where they stay, and the split moves them: besides them there is the held-out side, and a chunk."""
    shades = [np.full((64, 64, 3), k, dtype=np.uint8) for k in range(250)]
    for k, shade in enumerate(shades):
        shade[k % 64, :, 1] = 255
    files = {f"{k}.png": png(shade) for k, shade in enumerate(shades)}
    path = folder(tmp_path / "set", files) if kind == "folder" else tmp_path / f"set.{kind}"
    if kind != "folder":
        path.write_bytes(tar(files) if kind == "tar" else zipped(files))
    load(path)
    tracemalloc.start()
    data = load(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert data.facts.n_train + data.facts.n_held_out == 250
    assert peak < 1.7 * 250 * 3 * 64 * 64
