"""One image file: its size from the header, its pixels as 8-bit grey or RGB."""

from array import array
from collections.abc import Sequence
from functools import lru_cache
from io import BytesIO
from typing import BinaryIO, NamedTuple

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import ExifTags, Image

from ancestral.data.dataset import Fit, content_key
from ancestral.data.machine import available_memory
from ancestral.errors import DataError

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


class Header(NamedTuple):
    """What an image file says of itself: width and height of the upright image, and the mode of its pixels."""

    width: int
    height: int
    mode: str


_header_of = lru_cache(Header)  # most images of a set have the same, which is then kept and sent once


def measure(file: BinaryIO) -> Header:
    """The header alone."""
    return _header(_opened(file))


def decode(file: BinaryIO, *, width: int, height: int, fit: Fit = "crop") -> tuple[Header, NDArray[np.uint8]]:
    """The header; and the first frame, upright and opaque, at this size: (1, H, W) where it is grey, or (3, H, W)."""
    content = file.read()
    header, planes = _plain_jpeg(content, width, height) or _any(content, width, height, fit)
    first = planes[0].tobytes()
    grey = all(plane.tobytes() == first for plane in planes[1:])
    return header, planes[:1] if grey else planes


def _plain_jpeg(content: bytes, width: int, height: int) -> tuple[Header, NDArray[np.uint8]] | None:
    """What `_any` makes of a JPEG, in a fraction of the time; None of one that is damaged, turned or of another size.

    Most files of most sets are upright JPEGs, grey or in colour, of the size that is wanted. The decoder is the same as
    Pillow's, which of a small image takes most of its time for the header.
    """
    if not content.startswith(b"\xff\xd8") or b"Exif" in content:
        return None
    try:
        down, across, colours, _ = simplejpeg.decode_jpeg_header(content)
        if (across, down) != (width, height) or colours not in ("Gray", "YCbCr"):
            return None
        pixels = simplejpeg.decode_jpeg(content, "GRAY" if colours == "Gray" else "RGBX")
    except ValueError:  # Pillow says what is wrong, or bears with it
        return None
    if colours == "Gray":
        return _header_of(width, height, "L"), pixels.reshape(1, height, width)
    words = pixels.view("<u4")[..., 0]
    planes = np.empty((3, height, width), dtype=np.uint8)
    for channel, plane in enumerate(planes):  # twice as fast as to transpose bytes
        plane[:] = words >> 8 * channel
    return _header_of(width, height, "RGB"), planes


def _any(content: bytes, width: int, height: int, fit: Fit) -> tuple[Header, NDArray[np.uint8]]:
    """The header, and the pixels (C, H, W), of any image that Pillow reads."""
    image = _opened(BytesIO(content))
    header = _header(image)
    if image.size != (width, height):
        shrink = min(image.width / width, image.height / height)
        # Lets a JPEG leave out detail that the resize would throw away.
        image.draft(None, (round(GAP * image.width / shrink), round(GAP * image.height / shrink)))
    image.load()
    turn = UPRIGHT.get(_orientation(image))
    flat = _eight_bit(image if turn is None else image.transpose(turn))
    if flat.size != (width, height):
        flat = _fitted(flat, width, height, fit)
    pixels = np.asarray(flat).reshape(height, width, -1)
    return header, np.ascontiguousarray(pixels.transpose(2, 0, 1))


Entry = tuple[Header, int, NDArray[np.uint8]]
"""An image that was decoded: its header, the 64 bits of its content (0 where nobody needs them), its pixels."""


def coloured(entry: Entry) -> Entry:
    """The same in three channels, which of a grey image are equal."""
    header, key, image = entry
    if len(image) == 3:
        return entry
    image = np.repeat(image, 3, axis=0)
    return header, key and content_key(image), image


class Stack:
    """One array (N, C, H, W) of images as they come: C = 1 as long as every image is grey, 3 from then on.

    Args:
        where: they come from, as people read it.
    """

    target: tuple[int, int] | None = None
    """Width and height of what was decoded before: nothing was."""

    def __init__(self, where: str) -> None:
        self.where = where

    def begin(self, capacity: int, width: int, height: int) -> list[Header | str]:
        """Forget all images, make room for so many of this size, and say what there is already: nothing.

        Raises:
            DataError: if memory cannot hold them.
        """
        size, room = 3 * width * height * capacity, available_memory()
        if size > room:
            raise DataError(
                f"{self.where}: {capacity:,} images of {width}x{height} take {size / 2**30:.1f} GiB, and "
                f"{room / 2**30:.1f} GiB of memory are to be had: set ANCESTRAL_CACHE to a folder on a disk that can "
                "hold them, from where they are mapped into memory, or ask for a smaller size"
            )
        self.room: NDArray[np.uint8] = np.empty((capacity, 0, height, width), dtype=np.uint8)
        self.keys = array("Q")
        return []

    def add(self, entry: Entry | str) -> None:
        """Take the next image; nothing of one that cannot be read, and why."""
        if isinstance(entry, str):
            return
        count, channels = len(self.keys), self.room.shape[1]
        _, key, image = coloured(entry) if channels == 3 else entry
        if len(image) > channels:
            wider = np.empty((len(self.room), *image.shape), dtype=np.uint8)
            if count:
                wider[:count] = self.room[:count]
                self.keys = array(
                    "Q", (key and content_key(grey) for key, grey in zip(self.keys, wider[:count], strict=True))
                )
            self.room = wider
        self.room[count] = image
        self.keys.append(key)

    def finished(self) -> tuple[NDArray[np.uint8], Sequence[int]]:
        """All images, shape (N, C, H, W), and the 64 bits of the content of each."""
        return self.room[: len(self.keys)], self.keys


def _opened(file: BinaryIO) -> Image.Image:
    image = Image.open(file, formats=FORMATS)
    if image.width * image.height > MAX_PIXELS:
        raise Image.DecompressionBombError
    return image


def _header(image: Image.Image) -> Header:
    width, height = image.size if _orientation(image) < 5 else image.size[::-1]
    return _header_of(width, height, image.mode)


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
    if image.mode in ("L", "RGB"):
        return image
    return image.convert("L" if image.mode == "1" else "RGB")


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
