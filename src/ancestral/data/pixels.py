"""One image file: its size from the header, its pixels as 8-bit grey or RGB."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image

from ancestral.data.dataset import Fit

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
MAX_PIXELS = 2**26  # of one image, before it is decoded: 8192 x 8192
GAP = 3  # reduce in whole steps to no less than this many times the target, then Lanczos


def measure(file: BinaryIO) -> tuple[int, int, str]:
    """Width and height of the upright image and the mode of its pixels, from the header alone."""
    with _opened(file) as image:
        if _orientation(image) >= 5:
            return image.height, image.width, image.mode
        return image.width, image.height, image.mode


def decode(file: BinaryIO, *, width: int, height: int, fit: Fit = "crop") -> NDArray[np.uint8]:
    """The first frame, upright and opaque, at this size: (H, W) where it is grey, (H, W, 3) otherwise."""
    with _opened(file) as image:
        shrink = min(image.width / width, image.height / height)
        # Lets a JPEG leave out detail that the resize would throw away.
        image.draft(None, (round(GAP * image.width / shrink), round(GAP * image.height / shrink)))
        image.load()
        turn = UPRIGHT.get(_orientation(image))
        flat = _eight_bit(image if turn is None else image.transpose(turn))
    if flat.size != (width, height):
        flat = _fitted(flat, width, height, fit)
    pixels = np.asarray(flat)
    if pixels.ndim == 3 and (pixels == pixels[..., :1]).all():
        return pixels[..., 0].copy()
    return pixels


class Stack:
    """One array (N, C, H, W) of images as they come: C = 1 as long as every image is grey, 3 from then on.

    Args:
        capacity: images that will come, at most.
    """

    def __init__(self, capacity: int, width: int, height: int) -> None:
        self.room: NDArray[np.uint8] = np.empty((capacity, 0, height, width), dtype=np.uint8)
        self.count = 0

    def add(self, image: NDArray[np.uint8]) -> None:
        """Take the next image, (H, W) or (H, W, 3)."""
        channels = 3 if image.ndim == 3 else 1
        if channels > self.room.shape[1]:
            wider = np.empty((len(self.room), channels, *self.room.shape[2:]), dtype=np.uint8)
            if self.count:
                wider[: self.count] = self.room[: self.count]
            self.room = wider
        self.room[self.count] = image.transpose(2, 0, 1) if channels == 3 else image
        self.count += 1

    @property
    def x(self) -> NDArray[np.uint8]:
        """The images so far."""
        return self.room[: self.count]


@contextmanager
def _opened(file: BinaryIO) -> Iterator[Image.Image]:
    with Image.open(file, formats=FORMATS) as image:
        if image.width * image.height > MAX_PIXELS:
            raise Image.DecompressionBombError
        yield image


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8, that is still to be undone."""
    if "exif" not in image.info:  # as in a TIFF, which Pillow turns by itself
        return 1
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # a damaged EXIF block says nothing about the pixels
        return 1


def _eight_bit(image: Image.Image) -> Image.Image:
    """The image as 8-bit grey or RGB: 16-bit grey divided by 257 and rounded, transparency over white."""
    if image.mode == "F":
        raise ValueError("floating-point pixels: give such images as an .npy array")
    if image.mode.startswith("I"):
        wide = np.asarray(image).astype(np.int32)
        if wide.min() < 0 or wide.max() > 65535:
            raise ValueError("32-bit pixels: give such images as an .npy array")
        return Image.fromarray(((wide + 128) // 257).astype(np.uint8))
    if image.has_transparency_data:
        opaque = Image.new("RGBA", image.size, "white")
        opaque.alpha_composite(image.convert("RGBA"))
        return opaque.convert("RGB")
    return image.convert("L" if image.mode in ("1", "L") else "RGB")


def _fitted(image: Image.Image, width: int, height: int, fit: Fit) -> Image.Image:
    """The image at the target's size: what `Fit` says."""
    if fit == "pad":
        shrink = max(image.width / width, image.height / height)
        whole = _resized(image, max(1, round(image.width / shrink)), max(1, round(image.height / shrink)))
        canvas = Image.new(image.mode, (width, height))
        canvas.paste(whole, ((width - whole.width) // 2, (height - whole.height) // 2))
        return canvas
    if fit == "crop":
        shrink = min(image.width / width, image.height / height)
        across, down = round(width * shrink), round(height * shrink)
        left, top = (image.width - across) // 2, (image.height - down) // 2
        image = image.crop((left, top, left + across, top + down))
    return _resized(image, width, height)


def _resized(image: Image.Image, width: int, height: int) -> Image.Image:
    return image.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=GAP)
