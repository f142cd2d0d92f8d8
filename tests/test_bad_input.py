"""Every bad input is refused in one sentence that names it, or skipped and counted; no file of the user's changes."""

import gzip
import os
import re
import stat
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ancestral.data import archives, images, load, pixels
from ancestral.errors import AncestralError, DataError, OptionError


@pytest.fixture(autouse=True)
def untouched(tmp_path):
    """Whatever a test does with the files it made, they hold the same bytes afterwards, and no file is added."""
    before: dict[Path, bytes] = {}

    def snapshot() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    yield lambda: before.update(snapshot())
    if before:
        assert snapshot() == before


def good(root: Path, n: int = 6) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for seed in range(n):
        pixels = np.random.default_rng(seed).integers(0, 256, (12, 12, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"good-{seed}.png")
    return root


def refusal(source: Path | str, **options) -> str:
    """The sentence that refuses a source; it is one line and costs exit code 2."""
    with pytest.raises(AncestralError) as caught:
        load(source, **options)
    sentence = str(caught.value)
    assert isinstance(caught.value, DataError)
    assert caught.value.exit_code == 2
    assert sentence.isprintable()
    return sentence


def text_as_png(path: Path) -> None:
    path.write_text("I am not a picture.")


def empty(path: Path) -> None:
    path.write_bytes(b"")


def truncated_jpeg(path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, "JPEG")
    path.write_bytes(path.read_bytes()[:1500])


def truncated_png(path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, "PNG")
    path.write_bytes(path.read_bytes()[:5000])


def png_of(path: Path, width: int, height: int, *chunks: tuple[bytes, bytes]) -> None:
    """A 1-bit PNG with a sound header of this size and hardly any pixels."""
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n"
    for kind, body in [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(b"\0")), (b"IEND", b"")]:
        data += struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    path.write_bytes(data)


def bomb(path: Path) -> None:
    png_of(path, 13_000, 13_000)  # below what Pillow refuses by itself, 1.35 GB when decoded


def big_bomb(path: Path) -> None:
    png_of(path, 60_000, 60_000)


def warned_bomb(path: Path) -> None:
    png_of(path, 10_000, 10_000)


def text_bomb(path: Path) -> None:
    png_of(path, 12, 12, (b"zTXt", b"Comment\0\0" + zlib.compress(b"a" * 2**22)))


def float_tiff(path: Path) -> None:
    Image.fromarray(np.zeros((12, 12), dtype=np.float32)).save(path, "TIFF")


def fits(path: Path) -> None:
    path.write_bytes(b"SIMPLE  =                    T" + b" " * 2850)


BAD_IMAGES: dict[str, Callable[[Path], None]] = {
    maker.__name__: maker
    for maker in (
        text_as_png,
        empty,
        truncated_jpeg,
        truncated_png,
        bomb,
        big_bomb,
        warned_bomb,
        text_bomb,
        float_tiff,
        fits,
    )
}


class TestImages:
    @pytest.mark.parametrize("maker", BAD_IMAGES.values(), ids=BAD_IMAGES.keys())
    def test_a_bad_one_among_good_is_skipped_counted_and_named(self, tmp_path, untouched, maker):
        maker(good(tmp_path / "set") / "bad.png")
        untouched()
        data = load(tmp_path / "set")
        assert data.facts.skipped == 1
        assert data.facts.n_train + data.facts.n_held_out == 6
        assert "skipped 1 unreadable (bad.png: " in data.description

    @pytest.mark.parametrize("maker", BAD_IMAGES.values(), ids=BAD_IMAGES.keys())
    def test_a_bad_one_among_good_is_refused_on_request(self, tmp_path, untouched, maker):
        maker(good(tmp_path / "set") / "bad.png")
        untouched()
        assert "cannot read bad.png: " in refusal(tmp_path / "set", on_bad="fail")

    @pytest.mark.parametrize("maker", BAD_IMAGES.values(), ids=BAD_IMAGES.keys())
    def test_alone_it_is_refused(self, tmp_path, untouched, maker):
        maker(tmp_path / "bad.png")
        untouched()
        sentence = refusal(tmp_path)
        assert "bad.png" in sentence
        assert str(tmp_path) in sentence

    @pytest.mark.parametrize("size", [None, 8])
    @pytest.mark.parametrize("side", [8193, 10_000, 13_000, 60_000])
    def test_a_bomb_is_refused_by_its_header(self, tmp_path, side, size):
        png_of(good(tmp_path) / "bad.png", side, side)
        assert "bad.png: more than 67,108,864 pixels" in load(tmp_path, size=size).description

    def test_a_damaged_one_does_not_change_the_size_of_the_sound(self, tmp_path):
        truncated_png(good(tmp_path) / "bad.png")
        data = load(tmp_path)
        assert data.facts.shape == (3, 12, 12)
        assert "resized" not in data.description

    def test_many_bad_ones_are_counted_and_the_first_are_named(self, tmp_path):
        good(tmp_path)
        for k in range(50):
            empty(tmp_path / f"bad-{k:02}.png")
        description = load(tmp_path).description
        assert "skipped 50 unreadable (bad-00.png" in description
        assert len(description) < 300

    def test_names_that_would_break_a_line_are_shown_safely(self, tmp_path):
        good(tmp_path)
        text_as_png(tmp_path / "two\nlines \x1b[31m.png")
        (tmp_path / os.fsdecode(b"stray\xff.png")).write_bytes(b"")
        data = load(tmp_path)
        assert data.facts.skipped == 2
        assert data.description.isprintable()
        assert "two\\nlines" in data.description

    def test_pillows_warnings_do_not_reach_the_user(self, tmp_path, capfd):
        warned_bomb(good(tmp_path) / "bad.png")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            load(tmp_path)
        assert caught == []
        assert capfd.readouterr() == ("", "")


class TestFolders:
    def test_an_empty_one_is_refused(self, tmp_path):
        assert "holds no images: expected files ending in" in refusal(tmp_path)

    def test_one_without_images_is_refused(self, tmp_path):
        (tmp_path / "notes.txt").write_text("hello")
        (tmp_path / ".hidden.png").write_text("hello")
        assert "holds no images" in refusal(tmp_path)

    @pytest.mark.timeout(60)
    def test_a_pipe_among_images_does_not_block(self, tmp_path):
        os.mkfifo(good(tmp_path) / "pipe.png")
        assert load(tmp_path).facts.n_train >= 2

    @pytest.mark.timeout(60)
    def test_a_pipe_as_the_source_is_refused(self, tmp_path):
        os.mkfifo(tmp_path / "pipe.npy")
        assert "neither a regular file nor a folder" in refusal(tmp_path / "pipe.npy")

    def test_an_unreadable_one_inside_is_said(self, tmp_path, monkeypatch):
        good(tmp_path)
        good(tmp_path / "locked")
        listing = os.scandir

        def scandir(path):
            if Path(path).name == "locked":
                raise PermissionError(13, "Permission denied")
            return listing(path)

        monkeypatch.setattr(os, "scandir", scandir)
        assert "skipped 1 unreadable (locked/: Permission denied)" in load(tmp_path).description
        assert "cannot read locked/: Permission denied" in refusal(tmp_path, on_bad="fail")
        assert "Permission denied" in refusal(tmp_path / "locked")

    def test_a_broken_link_is_said(self, tmp_path):
        (good(tmp_path) / "gone.png").symlink_to(tmp_path / "nowhere")
        assert "gone.png: No such file" in load(tmp_path).description

    def test_too_few_images_are_refused(self, tmp_path):
        assert "holds 2 different examples: at least 3 are needed" in refusal(good(tmp_path, 2))

    def test_copies_of_one_image_are_refused(self, tmp_path):
        for k in range(9):
            Image.new("L", (4, 4), 7).save(tmp_path / f"{k}.png")
        assert "holds 1 different examples" in refusal(tmp_path)

    def test_a_split_with_nothing_readable_on_one_side_is_refused(self, tmp_path):
        good(tmp_path / "train")
        (tmp_path / "test").mkdir()
        empty(tmp_path / "test" / "bad.png")
        assert "6 train and 0 held-out examples: at least 2 and 1 are needed" in refusal(tmp_path)

    def test_more_than_memory_is_refused_before_decoding(self, tmp_path, monkeypatch):
        monkeypatch.setattr(pixels, "available_memory", lambda: 6 * 12 * 12 * 3 - 1)
        monkeypatch.setattr(images, "decode", None)
        assert "set ANCESTRAL_CACHE to a folder on a disk that can hold them" in refusal(good(tmp_path))


def packed(path: Path, root: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(root.iterdir()):
            archive.write(file, file.name)
    return path


class TestZip:
    def test_empty_and_truncated_ones_are_refused(self, tmp_path, untouched):
        whole = packed(tmp_path / "whole.zip", good(tmp_path / "set")).read_bytes()
        for name, content in {"empty.zip": b"", "cut.zip": whole[: len(whole) // 2], "text.zip": b"hello" * 99}.items():
            (tmp_path / name).write_bytes(content)
        untouched()
        for name in ("empty.zip", "cut.zip", "text.zip"):
            assert f"{name}: damaged, or no zip archive" in refusal(tmp_path / name)

    def test_one_without_images_is_refused(self, tmp_path):
        (tmp_path / "notes").mkdir()
        (tmp_path / "notes" / "a.txt").write_text("hello")
        assert "a.zip: holds no images" in refusal(packed(tmp_path / "a.zip", tmp_path / "notes"))

    @pytest.mark.parametrize("name", ["../out.png", "a/../../out.png", "/etc/out.png", "C:\\out.png", "..\\out.png"])
    def test_a_member_that_points_outside_is_refused(self, tmp_path, untouched, name):
        path = packed(tmp_path / "a.zip", good(tmp_path / "set"))
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr(name, (tmp_path / "set" / "good-0.png").read_bytes())
        untouched()
        sentence = refusal(path)
        assert "out.png" in sentence
        assert "points outside the archive" in sentence

    def test_a_member_that_is_a_link_is_refused(self, tmp_path):
        path = packed(tmp_path / "a.zip", good(tmp_path / "set"))
        link = zipfile.ZipInfo("link.png")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr(link, "/etc/passwd")
        assert "'link.png' points outside the archive" in refusal(path)

    def test_a_damaged_member_is_skipped_and_counted(self, tmp_path, untouched):
        path = packed(tmp_path / "a.zip", good(tmp_path / "set"))
        content = bytearray(path.read_bytes())
        content[content.index(b"IDAT") + 50] ^= 0xFF
        path.write_bytes(content)
        untouched()
        data = load(path)
        assert data.facts.skipped == 1
        assert "good-0.png: Bad CRC-32" in data.description
        assert "cannot read good-0.png" in refusal(path, on_bad="fail")

    @pytest.mark.parametrize(("bound", "words"), [("MAX_MEMBERS", "holds 6 members"), ("MAX_DECLARED", "unpacks to")])
    def test_count_and_declared_size_are_bounded(self, tmp_path, monkeypatch, bound, words):
        path = packed(tmp_path / "a.zip", good(tmp_path / "set"))
        monkeypatch.setattr(archives, bound, 5)
        assert words in refusal(path)

    def test_a_huge_member_is_not_unpacked(self, tmp_path, monkeypatch):
        path = packed(tmp_path / "a.zip", good(tmp_path / "set"))
        with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("zeros.png", bytes(2**20))
        monkeypatch.setattr(archives, "MAX_MEMBER", 2**19)
        assert "zeros.png: 1,048,576 bytes" in load(path).description


def npy(path: Path, array: np.ndarray) -> bytes:
    np.save(path, array)
    return path.read_bytes()


class TestArrays:
    @pytest.mark.parametrize("name", ["x.npy", "x.npz"])
    def test_what_is_not_finite_is_counted_and_located(self, tmp_path, untouched, name):
        array = np.zeros((10, 4))
        array[3, 2] = np.nan
        array[5] = np.inf
        np.save(tmp_path / name, array) if name.endswith("npy") else np.savez(tmp_path / name, x=array)
        untouched()
        sentence = refusal(tmp_path / name)
        assert name in sentence
        assert "5 of 40 values are not finite" in sentence
        assert "the first is nan at index (3, 2)" in sentence

    def test_what_overflows_float32_is_refused(self, tmp_path):
        np.save(tmp_path / "x.npy", np.array([[1.0], [1e300], [2.0]]))
        assert "the first is 1e+300 at index (1, 0)" in refusal(tmp_path / "x.npy")

    def test_objects_are_never_unpickled(self, tmp_path, untouched):
        class Trap:
            def __reduce__(self):
                return (Path.touch, (tmp_path / "sprung",))

        np.save(tmp_path / "x.npy", np.array([Trap()] * 3), allow_pickle=True)
        np.savez(tmp_path / "x.npz", x=np.array([Trap()] * 3))
        untouched()
        for name in ("x.npy", "x.npz"):
            assert re.search(rf"{name}.*cannot be read as an array of numbers \(.*[Oo]bject", refusal(tmp_path / name))

    @pytest.mark.parametrize(
        ("array", "words"),
        [
            (np.zeros((0, 4)), "holds no values"),
            (np.array(["a", "b", "c"]), "holds values of type <U1"),
            (np.zeros((4, 2), dtype=complex), "holds values of type complex128"),
            (np.array([[-1], [0], [1]]), "holds integers from -1 to 1"),
            (np.array([[0], [1], [70_000]]), "holds integers from 0 to 70,000"),
        ],
    )
    def test_arrays_without_a_meaning_are_refused(self, tmp_path, array, words):
        np.save(tmp_path / "x.npy", array)
        sentence = refusal(tmp_path / "x.npy")
        assert "x.npy: " in sentence
        assert words in sentence

    def test_damaged_files_are_refused_without_a_warning(self, tmp_path, untouched):
        whole = npy(tmp_path / "whole.npy", np.arange(40.0).reshape(10, 4))
        huge = whole.replace(b"(10, 4), }" + b" " * 20, b"(4000000000000000000, 3000), }")
        assert len(huge) == len(whole)
        files = {
            "empty": b"",
            "text": b"hello" * 99,
            "cut": whole[:-8],
            "head": whole[:70],
            "huge": huge,
            "zip": b"PK\3\4",
        }
        for name, content in files.items():
            (tmp_path / f"{name}.npy").write_bytes(content)
            with zipfile.ZipFile(tmp_path / f"{name}-inside.npz", "w") as archive:
                archive.writestr("x.npy", content)
            (tmp_path / f"{name}.npz").write_bytes(content)
        untouched()
        for name in files:
            for file in (f"{name}.npy", f"{name}.npz", f"{name}-inside.npz"):
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    assert file in refusal(tmp_path / file)
                assert caught == []

    def test_labels_must_fit(self, tmp_path):
        np.savez(tmp_path / "x.npz", x=np.arange(12.0).reshape(6, 2), y=np.arange(5))
        assert "6 examples have labels of shape (5,)" in refusal(tmp_path / "x.npz")

    def test_sides_must_agree(self, tmp_path):
        np.savez(tmp_path / "x.npz", x_train=np.zeros((6, 2)), x_test=np.zeros((3, 5)))
        assert "both sides of a split must agree" in refusal(tmp_path / "x.npz")

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (lambda whole: whole[:-1], "asks for 9x4x4 = 144 bytes and 143 follow"),
            (lambda whole: whole + b"\0", "asks for 9x4x4 = 144 bytes and more follow"),
            (lambda whole: b"\1" + whole[1:], "no IDX header"),
            (lambda whole: whole[:4] + b"\xff" * 12 + whole[16:], "at most"),
            (lambda whole: whole[:6], "cannot be read"),
            (lambda whole: b"", "cannot be read"),
        ],
    )
    def test_idx_must_be_as_long_as_it_says(self, tmp_path, untouched, change, words):
        whole = struct.pack(">HBB3I", 0, 8, 3, 9, 4, 4) + bytes(range(144))
        for name, content in {"a.idx": change(whole), "a.idx.gz": gzip.compress(change(whole))}.items():
            (tmp_path / name).write_bytes(content)
        (tmp_path / "cut.idx.gz").write_bytes(gzip.compress(whole)[:-20])
        untouched()
        for name in ("a.idx", "a.idx.gz"):
            sentence = refusal(tmp_path / name)
            assert f"{name}: " in sentence
            assert words in sentence
        assert "cut.idx.gz: cannot be read" in refusal(tmp_path / "cut.idx.gz")

    def test_labels_alone_are_no_examples(self, tmp_path):
        (tmp_path / "train-labels-idx1-ubyte").write_bytes(struct.pack(">HBBI", 0, 8, 1, 9) + bytes(9))
        assert "train-labels-idx1-ubyte: holds single numbers" in refusal(tmp_path / "train-labels-idx1-ubyte")


class TestSources:
    @pytest.mark.parametrize(("name", "meant"), [("digts", "digits"), ("two-moon", "two-moons")])
    def test_an_unknown_name_gets_the_close_match(self, name, meant):
        assert f"did you mean {meant!r}?" in refusal(name)

    def test_a_path_that_does_not_exist_is_named(self, tmp_path):
        assert refusal(tmp_path / "nowhere").endswith("nowhere: no such file or folder")
        assert "photos.zip: no such file or folder" in refusal("photos.zip")
        assert "cannot be opened" in refusal("a" * 5000)

    def test_files_of_other_kinds_are_refused(self, tmp_path, untouched):
        (tmp_path / "table.xlsx").write_text("a,b\n1,2\n")
        good(tmp_path / "set", 1)
        untouched()
        assert "table.xlsx: not a kind of file that is read" in refusal(tmp_path / "table.xlsx")
        assert "good-0.png: is one image" in refusal(tmp_path / "set" / "good-0.png")

    def test_options_outside_their_range_are_refused(self):
        for options, words in [
            ({"size": 0}, "between 1 and"),
            ({"size": 10**9}, "between 1 and"),
            ({"size": 9}, "received size=9 for digits, whose examples are 1x8x8"),
            ({"on_bad": "skipp"}, "did you mean 'skip'"),
        ]:
            with pytest.raises(OptionError, match=re.escape(words)):
                load("digits", **options)
        assert load("digits", size=8).facts.shape == (1, 8, 8)
