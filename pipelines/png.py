"""Writing PNG files: Pillow's bytes faster than by Pillow, or fpng's, many times faster and larger.

Much of Pillow's time for small images goes into what surrounds its compressor (an image object, a dictionary of
options and a file for each) and into the choice of each line's filter, a byte at a time. Here the filters of many
images are chosen at once, zlib is asked as Pillow asks it, and the few bytes around the compressed ones are put
together by hand.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import struct
import zlib
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, features

from pipelines.errors import UserError
from pipelines.png_filters import filtered

PngEncoder = Literal["pillow", "fpng"]
ENCODERS: tuple[PngEncoder, ...] = get_args(PngEncoder)

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_COLOUR_TYPE = {1: 0, 3: 2}
_MODE = {1: "L", 3: "RGB"}
_IDAT_CRC = zlib.crc32(b"IDAT")
_END = b"\0\0\0\0IEND\xaeB`\x82"
# pixels that lie in one image together: they stay in a core's cache
_PIXELS_TOGETHER = 2**16
# Pillow adds up the bytes of a line in an int, which longer ones may overflow
_LONGEST_LINE = 2**24
# So much zlib may be shown at a time: as long as it need not move its window, which is twice as large, it gives the
# same bytes as for one line after the other.
_SHOWN_AT_ONCE = 2**15


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
    encode = _as_pillow() if channels * width < _LONGEST_LINE else _by_save
    at_once = max(_PIXELS_TOGETHER // (height * width), 1)
    files: list[bytes] = []
    for start in range(0, count, at_once):
        rows = _channels_last(images[start : start + at_once])
        files += encode(rows.reshape((-1, width) if channels == 1 else (-1, width, 3)), height)
    return files


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


# Gives the file of each image, of images of one height one below the other, uint8 `[N H, W]` or `[N H, W, 3]`.
_Way = Callable[[NDArray[np.uint8], int], list[bytes]]


@lru_cache(maxsize=1)
def _as_pillow() -> _Way:
    """The fastest way here to the bytes of `Image.save`."""
    # pixels and sizes in which every filter is the best one somewhere, and a stream that Pillow cuts into chunks
    draw = np.random.default_rng(0)
    slopes = np.add.outer(np.arange(2 * 41) ** 2 // 9, np.arange(37)).astype(np.uint8)
    tests = (
        (slopes, 41),
        (np.stack([slopes + draw.integers(0, k, slopes.shape, np.uint8) for k in (1, 3, 40)], axis=-1), 41),
        (draw.integers(0, 256, (150, 500), np.uint8), 150),
    )
    for way in (_by_zlib, _by_compressor):
        # what is no public part of Pillow may fail in any way
        with contextlib.suppress(Exception):
            if (way is not _by_zlib or _same_zlib()) and all(way(*test) == _by_save(*test) for test in tests):
                return way
    return _by_save


def _same_zlib() -> bool:
    """Whether Python's zlib is the one that Pillow compresses with, and not zlib-ng, whose answer may depend on how
    much it is shown at a time of any image.
    """
    return features.version("zlib") == zlib.ZLIB_RUNTIME_VERSION and "ng" not in zlib.ZLIB_RUNTIME_VERSION


def _by_save(stacked: NDArray[np.uint8], height: int) -> list[bytes]:
    files = []
    for top in range(0, len(stacked), height):
        with io.BytesIO() as file:
            Image.fromarray(stacked[top : top + height]).save(file, format="PNG")
            files.append(file.getvalue())
    return files


def _by_zlib(stacked: NDArray[np.uint8], height: int) -> list[bytes]:
    """By Python's zlib, if it is Pillow's, which is told what Pillow tells it."""
    lines = stacked.reshape(len(stacked), -1)
    stored = filtered(lines, height, lines.shape[1] // stacked.shape[1])
    shown = height if height * stored.shape[1] <= _SHOWN_AT_ONCE else 1
    at_most = _chunk_bytes(stacked)
    files = []
    for top in range(0, len(stored), height):
        compressor = zlib.compressobj(
            zlib.Z_DEFAULT_COMPRESSION,
            zlib.DEFLATED,
            zlib.MAX_WBITS,
            zlib.DEF_MEM_LEVEL + 1,
            zlib.Z_FILTERED,
        )
        parts = [
            compressor.compress(stored[line : line + shown].data) for line in range(top, top + height, shown)
        ]
        data = b"".join((*parts, compressor.flush()))
        files.append(_file(stacked, height, (data[at : at + at_most] for at in range(0, len(data), at_most))))
    return files


def _by_compressor(stacked: NDArray[np.uint8], height: int) -> list[bytes]:
    """By Pillow's compressor, which is no public part of it, and which is given its defaults."""
    width, mode = stacked.shape[1], _MODE[1 if stacked.ndim == 2 else 3]
    picture = Image.fromarray(stacked).im
    at_most = _chunk_bytes(stacked)

    def stream(top: int) -> Iterator[bytes]:
        compressor = Image.core.zip_encoder(  # type: ignore[attr-defined]
            mode, mode, False, -1, -1, b""
        )
        compressor.setimage(picture, (0, top, width, top + height))
        status = 0
        while status == 0:
            _, status, data = compressor.encode(at_most)
            yield data
        compressor.cleanup()
        if status < 0:
            raise OSError(f"Pillow's PNG compressor failed with status {status}")

    return [_file(stacked, height, stream(top)) for top in range(0, len(stacked), height)]


def _chunk_bytes(stacked: NDArray[np.uint8]) -> int:
    """As much as Pillow asks its compressor for at a time; each answer becomes a chunk."""
    return max(ImageFile.MAXBLOCK, 4 * stacked.shape[1])


def _file(stacked: NDArray[np.uint8], height: int, stream: Iterator[bytes]) -> bytes:
    """The PNG file of an image of these whose compressed lines come in these pieces."""
    parts = [_head(height, stacked.shape[1], 1 if stacked.ndim == 2 else 3)]
    for data in stream:
        parts += (len(data).to_bytes(4), b"IDAT", data, zlib.crc32(data, _IDAT_CRC).to_bytes(4))
    parts.append(_END)
    return b"".join(parts)


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
        rows = _channels_last(images[first : first + at_once]).data
        # fpng reads as many bytes as it is told, so the numbers have to be right
        files += (encode(pixels, width, height, 3) for (pixels,) in struct.iter_unpack(f"{size}s", rows))
    if not all(files):
        raise ValueError(f"fpng can't write an image of shape {list(images.shape[1:])}")
    return files


@lru_cache(maxsize=1)
def _fpng() -> Any:
    try:
        return importlib.import_module("fpng")
    except ImportError:
        raise UserError("fpng is not installed here: pip install 'ddpm-cluster[fpng]'") from None
