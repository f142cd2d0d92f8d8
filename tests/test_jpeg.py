"""JPEGs are read as Pillow reads them, pixel for pixel, and those that most sets are made of without asking it."""

import itertools
from io import BytesIO

import numpy as np
import pytest
from PIL import ExifTags, Image

from ancestral.data.pixels import FORMATS, decode


def smooth(seed: int, width: int, height: int) -> Image.Image:
    """Colours that vary slowly, with some noise."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (3, 3, 3), dtype=np.uint8)).resize((width, height))
    noisy = np.asarray(coarse) + rng.normal(0, 6, (height, width, 1))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def packed(image: Image.Image, **options) -> bytes:
    file = BytesIO()
    image.save(file, "JPEG", **options)
    return file.getvalue()


def expected(content: bytes) -> np.ndarray:
    """What Pillow makes of it, (C, H, W), one channel where all are equal."""
    pixels = np.asarray(Image.open(BytesIO(content), formats=FORMATS).convert("RGB")).transpose(2, 0, 1)
    return pixels[:1] if (pixels == pixels[:1]).all() else pixels


def ours(content: bytes, width: int, height: int) -> np.ndarray:
    return decode(BytesIO(content), width=width, height=height)[1]


PLAIN = [
    (mode, size, {"quality": quality, "subsampling": subsampling, "progressive": progressive, "optimize": progressive})
    for mode, size, quality, subsampling, progressive in itertools.product(
        ("RGB", "L"), ((32, 32), (1, 1), (7, 13), (17, 8), (70, 33)), (1, 50, 95, 100), (0, 1, 2), (False, True)
    )
    if mode == "RGB" or subsampling == 0
]


@pytest.mark.parametrize(("mode", "size", "options"), PLAIN, ids=str)
def test_an_upright_jpeg_of_the_size_that_is_wanted_needs_no_pillow(mode, size, options, monkeypatch):
    content = packed(smooth(0, *size).convert(mode), **options)
    read = expected(content)
    monkeypatch.delattr(Image, "open")
    header, pixels = decode(BytesIO(content), width=size[0], height=size[1])
    assert header == (*size, mode)
    assert np.array_equal(pixels, read)


@pytest.mark.parametrize("blocks", [1, 3])
def test_restart_markers_are_read(blocks):
    content = packed(smooth(1, 64, 48), restart_marker_blocks=blocks)
    assert np.array_equal(ours(content, 64, 48), expected(content))


@pytest.mark.parametrize("mode", ["CMYK", "RGB"])
def test_other_colours_are_read(mode):
    """Inks, and red, green and blue that are stored as such."""
    content = packed(smooth(2, 24, 16).convert(mode), keep_rgb=True)
    assert np.array_equal(ours(content, 24, 16), expected(content))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_jpeg_is_turned_upright(orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    content = packed(smooth(3, 24, 24), exif=exif)
    upright = expected(content)
    if orientation > 4:
        upright = upright.transpose(0, 2, 1)
    flips = {2: (2,), 3: (1, 2), 4: (1,), 6: (2,), 7: (1, 2), 8: (1,)}.get(orientation, ())
    assert np.array_equal(ours(content, 24, 24), np.flip(upright, flips))


def attempt(read, *arguments) -> np.ndarray | None:
    """Pixels, or None where that is refused."""
    try:
        return read(*arguments)
    except Exception:  # a damaged file can raise nearly anything
        return None


def alike(content: bytes) -> bool:
    """Whether a file of 16x16 is refused by both, or read alike; and whether Pillow reads it."""
    read = attempt(expected, content)
    mine = attempt(ours, content, 16, 16)
    if read is None:
        assert mine is None
        return False
    if read.shape[1:] == (16, 16):
        assert mine is not None
        assert np.array_equal(mine, read)
    return True


@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"subsampling": 0}, {"restart_marker_blocks": 1}], ids=str
)
@pytest.mark.filterwarnings("ignore")
def test_a_damaged_jpeg_is_refused_or_read_as_pillow_does(options):
    """Cut short at every place, and with a byte changed at every place, twice."""
    content = packed(smooth(4, 16, 16), **options)
    rng = np.random.default_rng(0)
    cut = [alike(content[:stop]) for stop in range(len(content))]
    changed = []
    for place, _ in itertools.product(range(len(content)), range(2)):
        other = bytearray(content)
        other[place] ^= int(rng.integers(1, 256))
        changed.append(alike(bytes(other)))
    assert not all(cut)
    assert 0.1 < np.mean(changed) < 1  # most damage within the pixels is read by both
