"""Writing PNG files: Pillow's bytes without most of Pillow's overhead, or fpng's, many times faster and larger.

The overhead is in what surrounds Pillow's compressor: an image object, a dictionary of options and a file for each
small image. Here many images lie in one, of which its compressor is shown a piece at a time, and the few bytes
around the compressed ones are put together by hand.
"""

from __future__ import annotations

import importlib
import io
import struct
import zlib
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, features

from pipelines.errors import UserError

PngEncoder = Literal["pillow", "fpng"]
ENCODERS: tuple[PngEncoder, ...] = get_args(PngEncoder)

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_COLOUR_TYPE = {1: 0, 3: 2}
_MODE = {1: "L", 3: "RGB"}
_IDAT_CRC = zlib.crc32(b"IDAT")
_END = b"\0\0\0\0IEND\xaeB`\x82"
# what Pillow is built with: one compresses, the others unpack sources
_LIBRARIES = {
    "zlib-ng": "zlib_ng",
    "zlib": "zlib",
    "libjpeg-turbo": "libjpeg_turbo",
    "libwebp": "webp",
    "libtiff": "libtiff",
}
# pixels that lie in one image together: they stay in a core's cache
_PIXELS_TOGETHER = 2**16


def encode_pngs(images: NDArray[np.uint8], encoder: PngEncoder = "pillow") -> list[bytes]:
    """The PNG file of each image, uint8 `[N, C, H, W]` with C = 1 (grey) or 3 (RGB), of one pixel or more.

    "pillow" gives the bytes of Pillow's `Image.save` (another Pillow or zlib may compress otherwise), "fpng" those
    of fpng, for RGB alone. The same pixels give the same bytes on one installation.
    Raises `ValueError` on other images, `UserError` where fpng is not installed.
    """
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1] not in _MODE or 0 in images.shape[1:]:
        raise ValueError(f"image: must be uint8 [1 or 3, H, W], got {images.dtype} {list(images.shape[1:])}")
    if encoder == "fpng":
        return _by_fpng(images)
    count, channels, height, width = images.shape
    save = _by_compressor if _compressor_is_known() else _by_save
    at_once = max(_PIXELS_TOGETHER // (height * width), 1)
    files: list[bytes] = []
    for start in range(0, count, at_once):
        rows = _channels_last(images[start : start + at_once])
        files += save(rows.reshape((-1, width) if channels == 1 else (-1, width, 3)), height)
    return files


@lru_cache(maxsize=2)
def libraries(encoder: PngEncoder = "pillow") -> str:
    """The libraries, with their versions, that decide beside pixels and settings which bytes an image becomes."""
    parts = [f"Pillow {version('Pillow')}"]
    for name, feature in _LIBRARIES.items():
        parts.append(f"{name} {features.version(feature) or 'none'}")
    parts.append(f"PyArrow {version('pyarrow')}")
    if encoder == "fpng":
        try:
            parts.append(f"fpng {version('fpng')}")
        except PackageNotFoundError:
            parts.append("no fpng")
    return ", ".join(parts)


def _channels_last(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """`[N, H, W, C]`, contiguous."""
    count, channels, height, width = images.shape
    there = images.transpose(0, 2, 3, 1)
    if there.flags.c_contiguous:
        return there
    rows = np.empty((count, height, width, channels), np.uint8)
    # channel by channel, which is three times as fast as a transposed copy
    for channel in range(channels):
        rows[..., channel] = images[:, channel]
    return rows


def check_encoder(encoder: PngEncoder, channels: int, field: str) -> None:
    """Raise `UserError` naming the setting unless this encoder is there and writes images of so many channels."""
    if encoder == "pillow":
        return
    if channels != 3:
        raise UserError(f"{field}: must be pillow for grey images, got {encoder}, which writes RGB alone")
    try:
        _fpng()
    except UserError as error:
        raise UserError(f"{field}: {error}") from None


def _by_save(stacked: NDArray[np.uint8], height: int) -> list[bytes]:
    """As Pillow itself does it, images of this height one below the other."""
    files = []
    for top in range(0, len(stacked), height):
        with io.BytesIO() as file:
            Image.fromarray(stacked[top : top + height]).save(file, format="PNG")
            files.append(file.getvalue())
    return files


def _by_compressor(stacked: NDArray[np.uint8], height: int) -> list[bytes]:
    """The same bytes from Pillow's compressor, which is given its defaults."""
    width, channels = stacked.shape[1], 1 if stacked.ndim == 2 else 3
    mode, head = _MODE[channels], _head(height, width, channels)
    picture = Image.fromarray(stacked).im
    # as much as Pillow asks for at a time, since each answer becomes a chunk
    at_most = max(ImageFile.MAXBLOCK, 4 * width)
    files = []
    for top in range(0, len(stacked), height):
        compressor = Image.core.zip_encoder(  # type: ignore[attr-defined]
            mode, mode, False, -1, -1, b""
        )
        compressor.setimage(picture, (0, top, width, top + height))
        parts, status = [head], 0
        while status == 0:
            _, status, data = compressor.encode(at_most)
            parts += (
                len(data).to_bytes(4),
                b"IDAT",
                data,
                zlib.crc32(data, _IDAT_CRC).to_bytes(4),
            )
        compressor.cleanup()
        if status < 0:
            raise OSError(f"Pillow's PNG compressor failed with status {status}")
        parts.append(_END)
        files.append(b"".join(parts))
    return files


@lru_cache(maxsize=1)
def _compressor_is_known() -> bool:
    """Whether this Pillow's compressor, which is no public part of it, still does what `Image.save` does."""
    pattern = (np.arange(2 * 41 * 3 * 37) ** 2 % 251).astype(np.uint8)
    try:
        return all(
            _by_compressor(stacked, 41) == _by_save(stacked, 41)
            for stacked in (pattern.reshape(82, 111), pattern.reshape(82, 37, 3))
        )
    except (AttributeError, TypeError, ValueError, OSError):
        return False


@lru_cache(maxsize=8)
def _head(height: int, width: int, channels: int) -> bytes:
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, _COLOUR_TYPE[channels], 0, 0, 0)
    return PNG_SIGNATURE + struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))


def _by_fpng(images: NDArray[np.uint8]) -> list[bytes]:
    _, channels, height, width = images.shape
    if channels != 3:
        raise ValueError("a grey image, and fpng writes RGB alone")
    encode = _fpng().from_bytes
    size, at_once = 3 * width * height, max(_PIXELS_TOGETHER // (height * width), 1)
    files: list[bytes] = []
    for first in range(0, len(images), at_once):
        data = _channels_last(images[first : first + at_once]).tobytes()
        # fpng reads as many bytes as it is told, so the numbers have to be right
        files += (encode(data[start : start + size], width, height, 3) for start in range(0, len(data), size))
    if not all(files):
        raise ValueError(f"fpng can't write an image of shape {list(images.shape[1:])}")
    return files


@lru_cache(maxsize=1)
def _fpng() -> Any:
    try:
        return importlib.import_module("fpng")
    except ImportError:
        raise UserError("fpng is not installed here: pip install 'ddpm-cluster[fpng]'") from None
