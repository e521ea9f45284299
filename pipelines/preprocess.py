"""How an image of any kind becomes the PNG or JPEG that a data set stores.

In this order: the EXIF orientation is applied; colours become L (ITU-R 601 grey) or RGB, colour profiles
being ignored; the largest centred square is cut out; it is resized with Pillow's LANCZOS filter, which
averages over the whole footprint of a pixel when it reduces; values go to the nearest of the levels. A PNG or
JPEG that none of this changes keeps its bytes; every other image is stored as PNG, which loses nothing.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from pipelines.errors import one_line
from pipelines.images import check_levels, decode_image, encode_png, png_header, quantise
from pipelines.png import PngEncoder

EXIF_ORIENTATION = 0x0112
_GREY_MODES = ("1", "L", "LA", "La")
_DEEP_MODES = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")
_TIFF_BITS_PER_SAMPLE = 258
# of `pipelines.sources.IMAGE_EXTENSIONS`; Pillow knows many more, one of which starts another program (EPS)
_FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "GIF", "TIFF", "PPM")


@dataclass(frozen=True)
class Preprocessing:
    """`image_size`: side of the square to make, or None to keep the images' own size. `channels`: 1 or 3.
    `png_encoder`: who writes the images that do not keep their bytes.
    """

    image_size: int | None
    channels: int
    levels: int = 256
    png_encoder: PngEncoder = "pillow"

    def __post_init__(self) -> None:
        if self.image_size is not None and self.image_size < 1:
            raise ValueError(f"image_size: must be at least 1, got {self.image_size!r}")
        if self.channels not in (1, 3):
            raise ValueError(f"channels: must be 1 (grey) or 3 (RGB), got {self.channels!r}")
        check_levels(self.levels)

    def describe(self) -> dict[str, Any]:
        """What a data set's record says about how its images were made."""
        return {
            "image_size": self.image_size,
            "channels": self.channels,
            "levels": self.levels,
            "crop": "none" if self.image_size is None else "centre square",
            "filter": "none" if self.image_size is None else "lanczos",
            # data sets from before there was a choice keep their identity
            **({} if self.png_encoder == "pillow" else {"png_encoder": self.png_encoder}),
        }

    def apply(self, image: bytes | NDArray[np.uint8]) -> tuple[bytes, tuple[int, int, int]]:
        """The PNG or JPEG to store for this image file or these pixels (uint8 `[1 or 3, H, W]`), and its shape
        (C, H, W).

        Raises `ValueError` with the reason where no right image can be made: no image, or of a kind that is not
        taken, cut short, animated, more than 8 bits a channel, transparent pixels, or more pixels than Pillow's
        limit.
        """
        if not isinstance(image, bytes):
            rows = image[0] if len(image) == 1 else image.transpose(1, 2, 0)
            picture = Image.fromarray(np.ascontiguousarray(rows))
            return self._encoded(self._pixels(self._resized(self._converted(picture))))
        with _refusing(), _open(image) as picture:
            file_format = picture.format
            upright = _upright(picture)
            plain = picture.mode == self._mode and "transparency" not in picture.info
            converted = self._converted(picture)
            resized = self._resized(converted)
        stored = self._pixels(resized)
        untouched = upright and plain and resized.size == converted.size
        # a file that shows other pixels than those on their levels shows it here
        if file_format in ("PNG", "JPEG") and untouched and _shows(image, stored):
            return image, stored.shape
        return self._encoded(stored)

    def _pixels(self, picture: Image.Image) -> NDArray[np.uint8]:
        array = np.asarray(picture)
        return quantise(array[None] if array.ndim == 2 else array.transpose(2, 0, 1), self.levels)

    def _encoded(self, stored: NDArray[np.uint8]) -> tuple[bytes, tuple[int, int, int]]:
        channels, height, width = stored.shape
        return encode_png(stored, self.png_encoder), (channels, height, width)

    @property
    def _mode(self) -> str:
        return "L" if self.channels == 1 else "RGB"

    def _converted(self, picture: Image.Image) -> Image.Image:
        upright = ImageOps.exif_transpose(picture)
        if "transparency" in upright.info or upright.mode.endswith(("A", "a")):
            with_alpha = upright.convert("RGBA")
            if np.asarray(with_alpha)[..., 3].min() < 255:
                raise Refused("it has transparent pixels: flatten it onto a background first")
            # not straight from the palette: its entry for "transparent" would be turned into a colour
            upright = with_alpha if upright.mode not in ("LA", "La") else with_alpha.convert("L")
        return upright if upright.mode == self._mode else upright.convert(self._mode)

    def _resized(self, picture: Image.Image) -> Image.Image:
        if self.image_size is None or picture.size == (self.image_size, self.image_size):
            return picture
        width, height = picture.size
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        square = picture.crop((left, top, left + side, top + side))
        if side == self.image_size:
            return square
        return square.resize((self.image_size, self.image_size), Image.Resampling.LANCZOS)


def inspect(image: bytes | NDArray[np.uint8]) -> int:
    """The channels that this image file, or these pixels, call for: 1 for a grey one, else 3. Raises `ValueError`
    like `apply`.
    """
    if not isinstance(image, bytes):
        return len(image)
    with _refusing(), _open(image, decode=False) as picture:
        return 1 if picture.mode in _GREY_MODES else 3


def check_plain(data: bytes) -> None:
    """Raise `ValueError` with the reason unless this file's pixels, as they are stored, are the whole image: not
    turned by EXIF, transparent, animated or of more than 8 bits a channel. A PNG is decoded, since its EXIF data
    may lie behind the pixels; of a JPEG only headers are read.
    """
    with _refusing(), _open(data, decode=False) as picture:
        if picture.format == "PNG":
            picture.load()
        if not _upright(picture):
            raise Refused("it is to be turned by its EXIF orientation")
        if "transparency" in picture.info:
            raise Refused("it has a transparent colour")


class Refused(ValueError):
    """Why an image is not taken, in words of this module."""


@contextmanager
def _refusing() -> Iterator[None]:
    """Around all that Pillow does with a file, which on a broken one raises half a dozen types, wherever it reads:
    at the header, the pixels, or the EXIF data. They come out as `Refused`.
    """
    try:
        yield
    except (Refused, MemoryError):
        # want of memory is no fault of the image
        raise
    except UnidentifiedImageError:
        known = f"{', '.join(_FORMATS[:-1])} or {_FORMATS[-1]}"
        raise Refused(f"not an image that Pillow can read as {known}") from None
    except Exception as error:  # noqa: BLE001  see above
        raise Refused(f"it cannot be decoded ({one_line(error, 120)})") from None


def _open(data: bytes, *, decode: bool = True) -> Image.Image:
    """The image in a file, refused with a reason where its 8-bit pixels would not be the whole of it."""
    if not data:
        raise Refused("it is empty (0 bytes)")
    picture = Image.open(io.BytesIO(data), formats=_FORMATS)
    pixels, limit = picture.width * picture.height, Image.MAX_IMAGE_PIXELS
    # Pillow itself only warns, up to twice its limit
    if limit is not None and pixels > limit:
        raise Refused(
            f"it has {pixels} pixels, which exceeds limit of {limit} pixels that Pillow sets against bombs"
        )
    # before the pixels are read, which forgets how they are stored
    deep = picture.mode in _DEEP_MODES or _bits_per_channel(picture, data) > 8
    # a camera's MPO is a JPEG with a preview behind it, and no animation
    frames = 1 if picture.format == "MPO" else getattr(picture, "n_frames", 1)
    if frames > 1:
        raise Refused(f"it is animated or has several pages ({frames} frames): give one still image a file")
    if deep:
        raise Refused("it has more than 8 bits a channel: convert it to 8 bits first")
    if decode:
        if picture.format == "PNG":
            # decoding alone does not look at the checksums
            with Image.open(io.BytesIO(data), formats=("PNG",)) as copy:
                copy.verify()
        picture.load()
    return picture


def _upright(picture: Image.Image) -> bool:
    """Whether the EXIF data leave the image as it is; `Refused` where they are broken and do not say."""
    try:
        return bool(picture.getexif().get(EXIF_ORIENTATION, 1) == 1)
    except Exception as error:  # noqa: BLE001  Pillow raises what its TIFF reader meets
        raise Refused(f"its EXIF data cannot be read ({one_line(error, 100)}): take them out") from None


def _bits_per_channel(picture: Image.Image, data: bytes) -> int:
    """Pillow reads 16-bit RGB as 8-bit without a word, so the file itself is asked."""
    if picture.format == "PNG":
        _, _, depth, _ = png_header(data)  # a ValueError where another chunk comes before the header
        return depth
    if picture.format == "TIFF":
        return max(picture.tag_v2.get(_TIFF_BITS_PER_SAMPLE, (8,)))  # type: ignore[attr-defined]
    if picture.format == "PPM":
        (tile,) = picture.tile  # type: ignore[attr-defined]
        # (rawmode, the largest value), or the rawmode alone where that is the usual
        largest = tile.args[1] if isinstance(tile.args, tuple) and tile.args[0] != "F" else 255
        return int(largest).bit_length()
    return 8


def _shows(data: bytes, pixels: NDArray[np.uint8]) -> bool:
    """Whether the decoder of data sets takes this file, and gives these pixels (uint8 `[C, H, W]`)."""
    try:
        return np.array_equal(decode_image(data, (pixels.shape[0], pixels.shape[1], pixels.shape[2])), pixels)
    except ValueError:
        return False
