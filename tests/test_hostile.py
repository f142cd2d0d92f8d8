"""A corpus of hostile files: each is refused in one sentence or skipped and counted, soon and in little memory, and
nothing is written. What only might be damaged, such as a file with one bit flipped, may also be read."""

import gzip
import io
import os
import pickle
import resource
import stat
import struct
import tarfile
import time
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pyarrow.ipc
import pyarrow.parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ancestral.data import Data, load
from ancestral.errors import DataError

MEMORY = 2**30  # bytes by which no file may make this process grow
SECONDS = 20.0  # that no file may take, on a busy machine
FORMATS = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP", "bmp": "BMP", "gif": "GIF", "tif": "TIFF", "ppm": "PPM"}


def encoded(seed: int, form: str = "PNG", side: int = 24) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form)
    return file.getvalue()


GOOD = {f"good-{seed}.png": encoded(seed) for seed in range(4)}


def listing(root: Path) -> dict[str, tuple[int, int]]:
    """Everything below a folder: its kind and size."""
    return {str(path): ((found := path.lstat()).st_mode, found.st_size) for path in root.rglob("*")}


class Tried:
    """What came of a source: a sentence or data."""

    def __init__(self, source: Path, around: Path) -> None:
        before, peak, begun = listing(around), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
        self.sentence, self.data = "", None
        try:
            self.data: Data | None = load(source)
        except DataError as error:
            self.sentence = str(error)
        assert time.monotonic() - begun < SECONDS
        assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) * 1024 < MEMORY
        assert listing(around) == before
        if self.data is None:
            assert self.sentence.isprintable()
            assert len(self.sentence) < 1500
        else:
            assert self.data.description.isprintable()
            assert torch.isfinite(self.data.train.float()).all()

    @property
    def refused_or_counted(self) -> bool:
        return self.data is None or self.data.facts.skipped > 0

    @property
    def refused(self) -> bool:
        return self.data is None


@pytest.fixture
def attempt(tmp_path, monkeypatch):
    """Loads bytes under a name, or what a builder makes of a folder; the working directory is watched as well."""
    (tmp_path / "in" / "deep").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "in")

    def tried(name: str, content: bytes | Callable[[Path], None]) -> Tried:
        path = tmp_path / "in" / "deep" / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            content(path)
        return Tried(path, tmp_path)

    return tried


def beside_good(name: str, content: bytes) -> Callable[[Path], None]:
    """A folder of sound images with one more file."""

    def build(folder: Path) -> None:
        folder.mkdir()
        for own, sound in {**GOOD, name: content}.items():
            (folder / own).write_bytes(sound)

    return build


def flipped(content: bytes, seed: int, bits: int = 3) -> bytes:
    damaged = bytearray(content)
    for place in np.random.default_rng(seed).integers(0, 8 * len(content), bits):
        damaged[place // 8] ^= 1 << (place % 8)
    return bytes(damaged)


def cut(content: bytes, share: float) -> bytes:
    return content[: int(share * len(content))]


# --- images ---------------------------------------------------------------------------------------------------------


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, *chunks: bytes, depth: int = 1, colour: int = 0) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    data = chunk(b"IDAT", zlib.compress(b"\0"))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(chunks) + data + chunk(b"IEND", b"")


def resized_header(form: str, at: int, layout: str, width: int, height: int) -> bytes:
    content = bytearray(encoded(0, form))
    struct.pack_into(layout, content, at, width, height)
    return bytes(content)


def jpeg_of(width: int, height: int) -> bytes:
    content = bytearray(encoded(0, "JPEG"))
    struct.pack_into(">HH", content, content.index(b"\xff\xc0") + 5, height, width)
    return bytes(content)


BOMBS = {
    **{f"png of {side}": png(side, side) for side in (8193, 13_000, 60_000, 2**31 - 1)},
    "png of no pixels": png(0, 0),
    "png of one row": png(2**31 - 1, 1),
    "png, text": png(12, 12, chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(2**24)))),
    "png, profile": png(12, 12, chunk(b"iCCP", b"icc\0\0" + zlib.compress(bytes(2**24)))),
    "png, international text": png(12, 12, chunk(b"iTXt", b"C\0\1\0\0\0" + zlib.compress(bytes(2**24)))),
    "png, palette without colours": png(12, 12, depth=8, colour=3),
    "png, length beyond the end": b"\x89PNG\r\n\x1a\n\xff\xff\xff\xffIHDR",
    "gif": resized_header("GIF", 6, "<HH", 65_535, 65_535),
    "bmp": resized_header("BMP", 18, "<ii", 2**30, 2**30),
    "bmp of negative width": resized_header("BMP", 18, "<ii", -(2**31), 2),
    "jpeg": jpeg_of(65_535, 65_535),
    "jpeg of no height": jpeg_of(24, 0),
    "webp": b"RIFF" + struct.pack("<I", 30) + b"WEBPVP8X" + struct.pack("<I", 10) + b"\0\0\0\0" + b"\xff\xff\xff" * 2,
    "ppm": b"P6 60000 60000 255\n" + bytes(100),
    "ppm of many digits": b"P6 " + b"9" * 5000 + b" 1 255\n",
    "ppm of levels beyond": b"P6 2 2 999999\n" + bytes(12),
    "pgm in text": b"P2 99999 99999 255\n" + b"1 " * 50,
    "tiff that points to itself": b"II*\0\x08\0\0\0\0\0\x08\0\0\0",
    "tiff of many tags": b"II*\0\x08\0\0\0\xff\xff" + b"\xff" * 400,
    "a page": b"<html><body>404 not found</body></html>",
    "a vector drawing": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99 99\n",
    "a pickle": pickle.dumps([1, 2, 3]),
    "zeros": bytes(4096),
    "nothing": b"",
}


class TestImages:
    @pytest.mark.parametrize("name", BOMBS)
    def test_one_that_lies_is_counted(self, attempt, name):
        tried = attempt("set", beside_good("bad.png", BOMBS[name]))
        assert tried.data is not None
        assert tried.data.facts.skipped == 1
        assert tried.data.facts.n_train + tried.data.facts.n_held_out == 4

    @pytest.mark.parametrize("suffix", FORMATS)
    @pytest.mark.parametrize("share", [0.02, 0.3, 0.9])
    def test_one_cut_short_is_counted(self, attempt, suffix, share):
        tried = attempt("set", beside_good(f"bad.{suffix}", cut(encoded(9, FORMATS[suffix]), share)))
        assert tried.data is not None
        assert tried.data.facts.skipped == 1

    @pytest.mark.parametrize("suffix", FORMATS)
    @pytest.mark.parametrize("seed", range(4))
    def test_one_with_flipped_bits_harms_nothing(self, attempt, suffix, seed):
        tried = attempt("set", beside_good(f"bad.{suffix}", flipped(encoded(9, FORMATS[suffix]), seed)))
        assert tried.data is not None
        assert tried.data.facts.skipped + tried.data.facts.n_train + tried.data.facts.n_held_out == 5


NAMES = {
    "long": "x" * 240 + ".png",
    "emoji": "🦊🦊.png",
    "from right to left": "\u202eجمل.png",
    "combining": "e\u0301\u0302\u0303" * 20 + ".png",
    "newline": "two\nlines.png",
    "escape": "\x1b[2J\x1b[31mred.png",
    "quotes": '\'; rm -rf "$HOME" `x` .png',
    "brackets": "[bold][link=x].png",
    "percent": "%s%n{0}{x!r}.png",
    "blank": " .png",
    "dash": "--help.png",
    "stray bytes": os.fsdecode(b"\xff\xfe\x80.png"),
    "two suffixes": "a.tar.gz.png",
}


class TestNames:
    @pytest.mark.parametrize("sound", [True, False], ids=["sound", "damaged"])
    @pytest.mark.parametrize("name", NAMES)
    def test_of_any_script_and_length_are_said_in_one_line(self, attempt, name, sound):
        tried = attempt("set", beside_good(NAMES[name], encoded(9) if sound else b"no"))
        assert tried.data is not None
        assert tried.data.facts.skipped == (0 if sound else 1)


def linked(target: str, name: str = "link.png") -> Callable[[Path], None]:
    def build(folder: Path) -> None:
        beside_good("last.png", encoded(5))(folder)
        (folder.parent / "outside").mkdir()
        (folder.parent / "outside" / "secret.png").write_bytes(encoded(77))
        (folder / name).symlink_to(target)

    return build


class TestLinks:
    @pytest.mark.parametrize(
        ("target", "name"),
        [
            ("../outside/secret.png", "link.png"),
            ("../outside", "link"),
            ("/etc/passwd", "link.png"),
            ("/etc", "link"),
            ("link.png", "link.png"),
            ("nowhere.png", "link.png"),
        ],
    )
    def test_out_of_the_tree_to_nothing_and_to_themselves_are_counted(self, attempt, target, name):
        tried = attempt("set", linked(target, name))
        assert tried.data is not None
        assert tried.data.facts.skipped == 1
        assert tried.data.facts.n_train + tried.data.facts.n_held_out == 5

    @pytest.mark.parametrize(("target", "name"), [(".", "again"), ("..", "up"), ("good-0.png", "same.png")])
    def test_that_go_round_or_stay_inside_end(self, attempt, target, name):
        tried = attempt("set", linked(target, name))
        assert tried.data is not None
        assert tried.data.facts.n_train + tried.data.facts.n_held_out <= 6


# --- zip ------------------------------------------------------------------------------------------------------------


def zipped(files: dict[str, bytes], *extra: tuple[zipfile.ZipInfo, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a name that is there twice
        for name, content in files.items():
            archive.writestr(name, content)
        for member, content in extra:
            archive.writestr(member, content)
    return file.getvalue()


def zip_link() -> tuple[zipfile.ZipInfo, bytes]:
    member = zipfile.ZipInfo("link.png")
    member.external_attr = (stat.S_IFLNK | 0o777) << 16
    return member, b"/etc/passwd"


def patched(content: bytes, mark: bytes, at: int, value: bytes) -> bytes:
    """The bytes with others at an offset from every occurrence of a mark."""
    damaged, place = bytearray(content), content.find(mark)
    while place >= 0:
        damaged[place + at : place + at + len(value)] = value
        place = content.find(mark, place + 1)
    return bytes(damaged)


SOUND_ZIP = zipped(GOOD)
OUTSIDE = [
    "../x.png",
    "a/../../x.png",
    "/x.png",
    "C:/x.png",
    "C:\\x.png",
    "..\\x.png",
    "\\\\host\\share\\x.png",
    "a/..",
]
ZIPS = {
    **{f"slip {name}": zipped({**GOOD, name: encoded(9)}) for name in OUTSIDE},
    "link": zipped(GOOD, zip_link()),
    "directory beyond the end": patched(SOUND_ZIP, b"PK\5\6", 16, b"\xff\xff\xff\x7f"),
    "directory larger than the file": patched(SOUND_ZIP, b"PK\5\6", 12, b"\xff\xff\xff\x7f"),
    "encrypted": patched(patched(SOUND_ZIP, b"PK\1\2", 8, b"\1\0"), b"PK\3\4", 6, b"\1\0"),
    "unknown compression": patched(patched(SOUND_ZIP, b"PK\1\2", 10, b"\x63\0"), b"PK\3\4", 8, b"\x63\0"),
    "members of gigabytes": patched(SOUND_ZIP, b"PK\1\2", 24, b"\xf0\xff\xff\xff"),
    "members smaller than they are": patched(SOUND_ZIP, b"PK\1\2", 24, b"\1\0\0\0"),
    "wrong sums": patched(SOUND_ZIP, b"PK\1\2", 16, b"\0\0\0\0"),
    "members of zeros": zipped({f"{k}.png": bytes(2**24) for k in range(4)}),
    "members in members": zipped({"inner.zip": SOUND_ZIP}),
    "members in members called images": zipped({f"{k}.png": SOUND_ZIP for k in range(4)}),
    "folders alone": zipped({"a/": b"", "b.png/": b""}),
    "the same name again": zipped({"a.png": b"no"}, *((zipfile.ZipInfo("a.png"), b"no") for _ in range(3))),
    "a comment like an end": SOUND_ZIP[:-2] + struct.pack("<H", 22) + b"PK\5\6" + bytes(18),
    "an end alone": b"PK\5\6" + bytes(18),
    "bytes before and none behind": b"x" * 999,
    "nothing": b"",
    "a tar": b"x" * 257 + b"ustar" + bytes(800),
}


class TestZip:
    @pytest.mark.parametrize("name", ZIPS)
    def test_one_that_lies_is_refused_or_counted(self, attempt, name):
        assert attempt("set.zip", ZIPS[name]).refused_or_counted

    def test_a_count_that_is_claimed_is_not_believed(self, attempt):
        tried = attempt("set.zip", patched(SOUND_ZIP, b"PK\5\6", 8, b"\xff\xff\xff\xff"))
        assert tried.refused or tried.data.facts.n_train + tried.data.facts.n_held_out == 4

    @pytest.mark.parametrize("share", [0.01, 0.5, 0.9, 0.99])
    def test_one_cut_short_is_refused(self, attempt, share):
        assert attempt("set.zip", cut(SOUND_ZIP, share)).refused

    @pytest.mark.parametrize("seed", range(10))
    def test_one_with_flipped_bits_harms_nothing(self, attempt, seed):
        attempt("set.zip", flipped(SOUND_ZIP, seed))

    @pytest.mark.parametrize("name", NAMES)
    def test_names_of_members_are_said_in_one_line(self, attempt, name):
        member = NAMES[name].encode("utf-8", "replace").decode()
        tried = attempt("set.zip", zipped({**GOOD, member: b"no"}))
        assert tried.refused_or_counted


# --- tar ------------------------------------------------------------------------------------------------------------


def tarred(files: dict[str, bytes], *extra: tarfile.TarInfo, form: int = tarfile.GNU_FORMAT) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        for member in extra:
            archive.addfile(member)
    return file.getvalue()


def member(kind: bytes = tarfile.REGTYPE, target: str = "", size: int = 0, **pax: str) -> tarfile.TarInfo:
    made = tarfile.TarInfo("evil.png")
    made.type, made.linkname, made.size, made.pax_headers = kind, target, size, pax
    return made


SOUND_TAR = tarred(GOOD)
BODY = SOUND_TAR[: -(-len(SOUND_TAR.rstrip(b"\0")) // 512) * 512]


def with_header(made: tarfile.TarInfo, form: int = tarfile.GNU_FORMAT) -> bytes:
    return BODY + made.tobuf(form) + bytes(1024)


TARS = {
    **{f"slip {name}": tarred({**GOOD, name: encoded(9)}) for name in OUTSIDE},
    "link": tarred(GOOD, member(tarfile.SYMTYPE, "/etc/passwd")),
    "link up": tarred(GOOD, member(tarfile.SYMTYPE, "../../outside.png")),
    "hard link": tarred(GOOD, member(tarfile.LNKTYPE, "/etc/passwd")),
    "path in an extended header": tarred(GOOD, member(path="../../evil.png"), form=tarfile.PAX_FORMAT),
    "absolute path in an extended header": tarred(GOOD, member(path="/evil.png"), form=tarfile.PAX_FORMAT),
    "member of terabytes": with_header(member(size=2**43)),
    "member longer than the file": with_header(member(size=10**6)),
    "member of negative size": patched(BODY, b"good-1.png", 124, b"\xff" * 12) + bytes(1024),
    "long name of gigabytes": with_header(member(tarfile.GNUTYPE_LONGNAME, size=2**32)),
    "extended header of gigabytes": with_header(member(tarfile.XHDTYPE, size=2**32)),
    "size that is no number": patched(BODY, b"good-2.png", 124, b"zzzzzzzzzzz\0") + bytes(1024),
    "wrong sum": patched(BODY, b"good-0.png", 148, b"000000\0 ") + bytes(1024),
    "wrong sum in the middle": patched(BODY, b"good-2.png", 148, b"000000\0 ") + bytes(1024),
    "sparse": with_header(member(tarfile.GNUTYPE_SPARSE, size=512)),
    "members in members": tarred({"inner.tar": SOUND_TAR}),
    "members in members called images": tarred({f"{k}.png": SOUND_TAR for k in range(4)}),
    "zeros": bytes(10_240),
    "text": b"hello " * 999,
    "nothing": b"",
    "a zip": SOUND_ZIP,
}


class TestTar:
    @pytest.mark.parametrize("name", TARS)
    def test_one_that_lies_is_refused_or_counted(self, attempt, name):
        assert attempt("set.tar", TARS[name]).refused_or_counted

    @pytest.mark.parametrize("name", TARS)
    def test_so_it_is_when_gzipped(self, attempt, name):
        assert attempt("set.tar.gz", gzip.compress(TARS[name], 1)).refused_or_counted

    @pytest.mark.parametrize("share", [0.01, 0.3, 0.6, 0.8])
    @pytest.mark.parametrize("name", ["set.tar", "set.tgz"])
    def test_one_cut_short_is_refused_or_counted(self, attempt, name, share):
        content = cut(BODY, share)
        assert attempt(name, content if name == "set.tar" else cut(gzip.compress(SOUND_TAR), share)).refused_or_counted

    @pytest.mark.parametrize("seed", range(8))
    @pytest.mark.parametrize("name", ["set.tar", "set.tar.gz"])
    def test_one_with_flipped_bits_harms_nothing(self, attempt, name, seed):
        attempt(name, flipped(SOUND_TAR if name == "set.tar" else gzip.compress(SOUND_TAR), seed))

    def test_one_that_unpacks_a_thousandfold_is_refused(self, attempt):
        content = io.BytesIO()
        with gzip.GzipFile(fileobj=content, mode="wb", compresslevel=1) as file:
            huge = member(size=2**29)
            file.write(huge.tobuf(tarfile.GNU_FORMAT))
            for _ in range(40):
                file.write(bytes(2**20))
        assert attempt("bomb.tar.gz", content.getvalue()).refused

    @pytest.mark.parametrize(
        "content", [gzip.compress(gzip.compress(SOUND_TAR)), SOUND_TAR, b"\x1f\x8b\x08" + b"\xff" * 99]
    )
    def test_what_is_packed_otherwise_is_refused(self, attempt, content):
        assert attempt("set.tar.gz", content).refused


# --- tables ---------------------------------------------------------------------------------------------------------

TABLES = {
    "nothing": b"",
    "blanks": b"  \n \n\t\n",
    "a mark alone": b"\xef\xbb\xbf",
    "a mark of UTF-16 alone": b"\xff\xfe",
    "half a character of UTF-16": "a,b\n1,2\n".encode("utf-16") + b"\x31",
    "UTF-32": "a,b\n1,2\n3,4\n".encode("utf-32"),
    "a header alone": b"a,b,c\n",
    "words alone": b"a,b\nx,y\nz,w\nu,v\n",
    "NULs": b"a,b\n1,2\n\0\0\0\n3,4\n",
    "zeros": bytes(5000),
    "an open quote": b'a,b\n1,2\n3,4\n5,"6\n7,8\n9,10\n',
    "a stray quote": b'a,b\n1,2\n3,"4"5\n6,7\n',
    "quotes": b'"' * 5001,
    "commas": b"," * 5000 + b"\n" + b"," * 5000,
    "ever longer rows": b"\n".join(b",".join([b"1"] * k) for k in range(1, 40)),
    "rows of two lengths": b"a,b\n" + b"1,2\n1,2,3\n4,5\n" * 9,
    "a preamble": b"exported by x\non monday\na,b,c\n" + b"1,2,3\n4,5,6\n7,8,9\n",
    "missing everywhere": b"a,b\n" + b"1,\n,2\n" * 9,
    "infinities": b"a\n" + b"inf\n-inf\nnan\n1e999\n" * 9,
    "the same row": b"a,b\n" + b"1,2\n" * 99,
    "two rows": b"a,b\n1,2\n3,4\n",
    "a formula": b"a\n=cmd|' /C calc'!A0\n",
    "a page": b"<html><table><tr><td>1</td></tr></table></html>",
    "a picture": encoded(0),
    "a pickle": pickle.dumps({"a": [1, 2, 3]}),
    "a zip": SOUND_ZIP,
    "a field of a megabyte": b"a,b\n1," + b"2" * 2**20 + b"\n3,4\n",
    "escapes": b"\x1b[2J,\x1b[31m\n\x1b[0m,x\ny,z\n",
}


class TestTables:
    @pytest.mark.parametrize("name", TABLES)
    def test_one_with_defects_is_refused_or_counted(self, attempt, name):
        assert attempt("t.csv", TABLES[name]).refused_or_counted

    @pytest.mark.parametrize("name", TABLES)
    def test_so_it_is_when_gzipped(self, attempt, name):
        assert attempt("t.tsv.gz", gzip.compress(TABLES[name], 1)).refused_or_counted

    @pytest.mark.parametrize(
        "content",
        [b"", b"text", b"\x1f\x8b", gzip.compress(b"a,b\n1,2\n" * 99)[:-9]],
        ids=["empty", "text", "its mark alone", "cut"],
    )
    def test_gzip_that_is_none_is_refused(self, attempt, content):
        assert attempt("t.csv.gz", content).refused

    def test_gzip_that_unpacks_a_thousandfold_is_refused(self, attempt):
        assert attempt("t.csv.gz", gzip.compress(b"1" * (2**23), 1)).refused


# --- arrays ---------------------------------------------------------------------------------------------------------


def npy(header: bytes, body: bytes = bytes(96), version: bytes = b"\1\0") -> bytes:
    header += b" " * (-(len(header) + 11) % 64) + b"\n"
    length = struct.pack("<H" if version[0] == 1 else "<I", len(header))
    return b"\x93NUMPY" + version + length + header + body


def described(descr: str = "'<f8'", order: str = "False", shape: str = "(4, 3)") -> bytes:
    return f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}".encode()


class Trap:
    def __reduce__(self):
        return (os.mkdir, ("sprung",))


def saved(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


SOUND_NPY = saved(np.random.default_rng(0).normal(size=(30, 4)))
ARRAYS = {
    "nothing": b"",
    "magic alone": b"\x93NUMPY",
    "version 9": npy(described(), version=b"\x09\0"),
    "header of gigabytes": b"\x93NUMPY\2\0" + struct.pack("<I", 2**32 - 1) + b"{",
    "negative shape": npy(described(shape="(-4, 3)")),
    "shape of words": npy(described(shape="('a',)")),
    "shape that overflows": npy(described(shape="(4611686018427387904, 4)")),
    "shape of a true value": npy(described(shape="(True, 3)")),
    "shape that is none": npy(described(shape="None")),
    "shape of terabytes": npy(described(shape="(1099511627776, 3)")),
    "shape of a hundred axes": npy(described(shape="(" + "1," * 100 + ")")),
    "shape of digits": npy(described(shape="(" + "9" * 5000 + ",)")),
    "objects": npy(described("'|O'")),
    "bytes without type": npy(described("'|V8'")),
    "records": npy(described("[('a', '<f4'), ('b', '<f4')]")),
    "records in records": npy(described("[('a', " * 30 + "'<f4'" + ")]" * 30)),
    "dates": npy(described("'<M8[s]'")),
    "complex": npy(described("'<c16'", shape="(2, 3)")),
    "words": saved(np.array(["a", "b", "c"])),
    "a type that is none": npy(described("'spam'")),
    "a type that is code": npy(described("__import__('os').mkdir('sprung')")),
    "code": npy(b"__import__('os').mkdir('sprung')"),
    "brackets": npy(b"(" * 9000),
    "no dictionary": npy(b"[1, 2, 3]"),
    "keys that are others": npy(b"{'descr': '<f8', 'shape': (4, 3), 'x': 1}"),
    "bytes that are no text": npy(b"\xff\xfe\x80" * 20),
    "body too short": npy(described(), bytes(95)),
    "not finite": saved(np.full((9, 2), np.nan)),
    "no values": saved(np.zeros((0, 3))),
    "a number": saved(np.array(3.0)),
    "pickled": saved(np.array([Trap()] * 4, dtype=object)),
    "a pickle": pickle.dumps(Trap()),
    "a zip": SOUND_ZIP,
}
IDX = {
    "nothing": b"",
    "half a header": struct.pack(">HBB", 0, 8, 3),
    "unknown type": struct.pack(">HBB3I", 0, 7, 3, 4, 2, 2) + bytes(16),
    "255 axes": struct.pack(">HBB", 0, 8, 255) + b"\xff" * 1020,
    "terabytes": struct.pack(">HBB3I", 0, 8, 3, 2**31, 2**10, 2**10),
    "no examples": struct.pack(">HBB3I", 0, 8, 3, 0, 2, 2),
    "no axes": struct.pack(">HBB", 0, 8, 0),
    "too short": struct.pack(">HBB3I", 0, 8, 3, 9, 4, 4) + bytes(143),
    "too long": struct.pack(">HBB3I", 0, 8, 3, 9, 4, 4) + bytes(145),
    "text": b"hello" * 99,
}


class TestArrays:
    @pytest.mark.parametrize("name", ARRAYS)
    def test_a_header_that_lies_is_refused(self, attempt, name):
        assert attempt("x.npy", ARRAYS[name]).refused

    @pytest.mark.parametrize("name", ARRAYS)
    def test_so_it_is_inside_an_archive(self, attempt, name):
        assert attempt("x.npz", zipped({"x.npy": ARRAYS[name]})).refused

    @pytest.mark.parametrize("name", IDX)
    @pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
    def test_an_idx_header_that_lies_is_refused(self, attempt, name, packed):
        assert attempt(f"x.idx{'.gz' * packed}", gzip.compress(IDX[name]) if packed else IDX[name]).refused

    @pytest.mark.parametrize("name", [name for name in ZIPS if not name.startswith("slip")])
    def test_an_archive_that_lies_is_refused(self, attempt, name):
        assert attempt("x.npz", ZIPS[name]).refused


# --- every reader, with mutations -----------------------------------------------------------------------------------


def stored(write: Callable[[io.BytesIO], object]) -> bytes:
    file = io.BytesIO()
    write(file)
    return file.getvalue()


def hdf5(file: io.BytesIO) -> None:
    with h5py.File(file, "w") as written:
        written["x"] = np.random.default_rng(0).normal(size=(30, 4))
        written.create_dataset("labels", data=np.arange(30) % 3, compression="gzip")


def arrow(file: io.BytesIO) -> None:
    with pyarrow.ipc.new_file(file, ROWS.schema) as writer:
        writer.write_table(ROWS)


ROWS = pyarrow.table({"a": np.arange(40) / 3, "b": np.arange(40), "label": ["x", "y"] * 20})
PICTURES = pyarrow.table({"image": [{"bytes": content} for content in GOOD.values()]})
SOUND = {
    **{f"a.{suffix}": encoded(9, form) for suffix, form in FORMATS.items()},
    "set.zip": SOUND_ZIP,
    "set.tar": SOUND_TAR,
    "set.tar.gz": gzip.compress(SOUND_TAR),
    "x.npy": SOUND_NPY,
    "x.npz": zipped({"x.npy": SOUND_NPY}),
    "x.idx": struct.pack(">HBB3I", 0, 8, 3, 9, 4, 4) + bytes(range(144)),
    "x.idx.gz": gzip.compress(struct.pack(">HBB3I", 0, 8, 3, 9, 4, 4) + bytes(range(144))),
    "x.h5": stored(hdf5),
    "t.csv": b"a,label,c\n" + b"".join(b"%d.5,%d,x%d\n" % (k, k % 3, k) for k in range(40)),
    "t.csv.gz": gzip.compress(b"".join(b"%d.5\t%d\n" % (k, k * k) for k in range(40))),
    "t.parquet": stored(lambda file: pyarrow.parquet.write_table(ROWS, file)),
    "p.parquet": stored(lambda file: pyarrow.parquet.write_table(PICTURES, file)),
    "t.arrow": stored(arrow),
    "metadata.csv": b"file_name,label\n" + b"".join(b"good-%d.png,%d\n" % (k, k % 2) for k in range(4)),
    "metadata.jsonl": b"".join(b'{"file_name": "good-%d.png", "label": %d}\n' % (k, k % 2) for k in range(4)),
}

SPECIAL = st.sampled_from([b"\0", b"\1", b'"', b",", b"\n", b"-", b"9", b"\x7f", b"\x80", b"\xff" * 4, bytes(8)])


@st.composite
def mutations(draw: st.DrawFn, content: bytes) -> bytes:
    """A sound file of which up to four parts are overwritten, left out, doubled, or brought elsewhere."""
    damaged = content
    for _ in range(draw(st.integers(1, 4))):
        a, b = sorted(draw(st.tuples(*[st.integers(0, len(damaged))] * 2)))
        c = draw(st.integers(0, len(damaged)))
        part = draw(SPECIAL | st.binary(min_size=1, max_size=8) | st.just(damaged[a:b][:4096]))
        over, in_between = damaged[:c] + part + damaged[c + len(part) :], damaged[:c] + part + damaged[c:]
        damaged = draw(st.sampled_from([over, in_between, damaged[:a] + damaged[b:]]))
    return damaged


@pytest.mark.parametrize("name", SOUND)
def test_a_mutation_is_read_or_refused_and_never_more(tmp_path, name):
    inside = name.startswith(("a.", "metadata"))
    path = tmp_path / "set" / name if inside else tmp_path / name
    if inside:
        beside_good("none.txt", b"")(tmp_path / "set")
    path.write_bytes(SOUND[name])
    assert not Tried(path.parent if inside else path, tmp_path).refused_or_counted

    @settings(max_examples=40, derandomize=True, database=None, deadline=None)
    @given(mutations(SOUND[name]))
    def harms_nothing(content: bytes) -> None:
        path.write_bytes(content)
        Tried(path.parent if inside else path, tmp_path)

    harms_nothing()


def test_the_corpus_is_at_least_two_hundred():
    counts = [len(BOMBS), 7 * len(FORMATS), 2 * len(NAMES), 9, len(ZIPS) + len(NAMES) + 15, 2 * len(TARS) + 28]
    counts += [2 * len(TABLES) + 5, 2 * len(ARRAYS) + 2 * len(IDX) + len(ZIPS)]
    assert sum(counts) >= 200
