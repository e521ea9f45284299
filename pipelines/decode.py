"""Decoding stored images fast: by libspng and libjpeg-turbo where they give Pillow's pixels, else by Pillow.

Pillow is the reference: it decides what is an image and what its pixels are. A file whose header is of the plain
kind goes to the fast library; whatever that one refuses, or what is of another kind (animation, transparency,
several pictures in a file), goes to Pillow, which gives the pixels or the reason why there are none.

simplejpeg and Pillow let other threads run while they decode, pyspng does not.
"""

from __future__ import annotations

import struct
import zlib
from functools import lru_cache

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from pyspng import _pyspng_c as spng

from pipelines.images import JPEG_SIGNATURE, decode_image
from pipelines.png import PNG_SIGNATURE

_PNG_END = b"\0\0\0\0IEND\xaeB`\x82"
_HEADER_BYTES = 33
_SPNG_FORMAT = {1: spng.SPNG_FMT_G8, 3: spng.SPNG_FMT_RGB8}
_PNG_COLOUR_TYPE = {1: 0, 3: 2}
# chunks that stand beside the pixels and change none of them; fdEC is fpng's mark of its own files
_HARMLESS = frozenset(
    (
        b"sRGB",
        b"gAMA",
        b"cHRM",
        b"pHYs",
        b"tEXt",
        b"zTXt",
        b"iTXt",
        b"tIME",
        b"iCCP",
        b"bKGD",
        b"eXIf",
        b"fdEC",
    )
)
_JPEG_SPACES = {1: {"Gray": "GRAY"}, 3: {"YCbCr": "RGB", "RGB": "RGB"}}
# the mark of a file that holds several pictures (MPO)
_MULTI_PICTURE = b"MPF\0"


def decode_into(data: bytes, out: NDArray[np.uint8]) -> None:
    """Write the pixels of a stored PNG or JPEG into `out`, uint8 `[H, W, C]`, contiguous; exactly Pillow's.

    Raises `ValueError` with the reason, as `decode_reference`; what stands in `out` is then undefined.
    """
    height, width, channels = out.shape
    if data.startswith(JPEG_SIGNATURE):
        if _fast_jpeg(data, out):
            return
    elif _plain_png(data, height, width, channels):
        try:
            out[...] = spng.spng_decode_image_bytes(data, _SPNG_FORMAT[channels])
        except (RuntimeError, ValueError):
            pass  # Pillow says why, or reads it all the same
        else:
            return
    out[...] = decode_reference(data, (channels, height, width)).transpose(1, 2, 0)


def decode(data: bytes, shape: tuple[int, int, int]) -> NDArray[np.uint8]:
    """The pixels of a stored PNG or JPEG as uint8 `[C, H, W]`; errors as in `decode_reference`."""
    channels, height, width = shape
    out = np.empty((height, width, channels), dtype=np.uint8)
    decode_into(data, out)
    return out.transpose(2, 0, 1)


def decode_reference(data: bytes, shape: tuple[int, int, int]) -> NDArray[np.uint8]:
    """As `decode`, by Pillow alone.

    Raises `ValueError` with the reason unless it is one still image, a PNG of 8-bit grey or RGB or a JPEG of grey
    or RGB, of just this shape. The header is compared first, so that a file that claims a huge size costs nothing.
    """
    return decode_image(data, shape)


def _fast_jpeg(data: bytes, out: NDArray[np.uint8]) -> bool:
    height, width, channels = out.shape
    if _MULTI_PICTURE in data:
        return False
    try:
        found_height, found_width, space, _ = simplejpeg.decode_jpeg_header(data)
        wanted = _JPEG_SPACES.get(channels, {}).get(space)
        if wanted is None or (found_height, found_width) != (height, width):
            return False
        simplejpeg.decode_jpeg(data, wanted, buffer=out)
    except ValueError:
        return False
    return True


def _plain_png(data: bytes, height: int, width: int, channels: int) -> bool:
    """Whether it is a still PNG of this size, 8 bits, grey or RGB, with nothing that could change its pixels."""
    return (
        channels in _PNG_COLOUR_TYPE
        and data.endswith(_PNG_END)
        and data[:_HEADER_BYTES] in _png_headers(height, width, _PNG_COLOUR_TYPE[channels])
        and _chunks_are_plain(data)
    )


@lru_cache(maxsize=8)
def _png_headers(height: int, width: int, colour: int) -> frozenset[bytes]:
    """How such a file begins up to the end of its first chunk: not interlaced, and interlaced."""
    chunks = (b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, way) for way in (0, 1))
    return frozenset(
        PNG_SIGNATURE + struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
        for chunk in chunks
    )


def _chunks_are_plain(data: bytes) -> bool:
    """Whether all its further chunks are whole and harmless: here libspng checks no CRC, nor zlib's checksum, and
    would give other pixels for a flipped bit.
    """
    start, last = _HEADER_BYTES, len(data) - len(_PNG_END)
    while start < last:
        end = start + 8 + int.from_bytes(data[start : start + 4])
        kind = data[start + 4 : start + 8]
        if end + 4 > last or not (kind == b"IDAT" or kind in _HARMLESS):
            return False
        if zlib.crc32(data[start + 4 : end]) != int.from_bytes(data[end : end + 4]):
            return False
        start = end + 4
    return start == last
