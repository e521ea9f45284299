"""Decoding stored images fast: by ISA-L, libspng and libjpeg-turbo where they give Pillow's pixels, else by Pillow.

Pillow is the reference: it decides what is an image and what its pixels are. A file whose header is of the plain
kind goes to the fast libraries; whatever they refuse, or what is of another kind (interlacing, animation,
transparency, several pictures in a file), goes to Pillow, which gives the pixels or the reason why there are none.

Nearly all the time of a PNG is zlib's. So ISA-L takes the compressed lines apart, at twice zlib's speed and with
their checksum, and libspng gets a PNG of the same lines stored as they are, of which it undoes the filters.

simplejpeg and Pillow let other threads run while they decode, pyspng does not.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np
import simplejpeg
from isal import isal_zlib
from numpy.typing import NDArray
from pyspng import _pyspng_c as spng

from pipelines.images import JPEG_SIGNATURE, decode_image
from pipelines.png import PNG_SIGNATURE

_PNG_END = b"\0\0\0\0IEND\xaeB`\x82"
_HEADER_BYTES = 33
_CRC_OF_IDAT = zlib.crc32(b"IDAT")
# the most that a stored block of zlib holds
_STORED_BYTES = 0xFFFF
_SPNG_FORMAT = {1: spng.SPNG_FMT_G8, 3: spng.SPNG_FMT_RGB8}
_PNG_COLOUR_TYPE = {1: 0, 3: 2}
# chunks that stand beside the pixels and change none of them (fdEC is fpng's mark of its files), with the length at
# which Pillow can read them, where it reads them; what it unpacks (iCCP, zTXt, iTXt) may be more than it takes, and
# is left to it
_HARMLESS = {
    b"sRGB": 1,
    b"gAMA": 4,
    b"cHRM": 32,
    b"pHYs": 9,
    b"tEXt": None,
    b"eXIf": None,
    b"tIME": None,
    b"bKGD": None,
    b"fdEC": None,
}
_JPEG_SPACES = {1: {"Gray": "GRAY"}, 3: {"YCbCr": "RGB", "RGB": "RGB"}}
_START_OF_SCAN, _APP2 = 0xDA, 0xE2
# the mark of a file that holds several pictures (MPO)
_MULTI_PICTURE = b"MPF\0"


def decode_many(files: Mapping[int, bytes], out: NDArray[np.uint8]) -> list[tuple[int, str]]:
    """Write the pixels of stored PNGs or JPEGs into `out`, uint8 `[n, H, W, C]`, each into its place; exactly
    Pillow's. Several small PNGs have their filters undone at once.

    Returns the places of the files that cannot be had, each with the reason as in `decode_reference`; what stands
    in `out` there is undefined.
    """
    height, width, channels = shape = out.shape[1:]
    at_once = max(1, _STORED_BYTES // ((height + 1) * (1 + width * channels)))
    named = list(files.items())
    bad = []
    for first in range(0, len(named), at_once):
        group = named[first : first + at_once]
        slow, places, lines = [], [], []
        for place, data in group:
            if found := _png_lines(data, shape):
                places.append(place)
                lines.append(found)
            else:
                slow.append((place, data))
        if lines:
            try:
                _put(_pixels(lines, shape), out, places)
            except (RuntimeError, ValueError):
                slow = group
        for place, data in slow:
            try:
                decode_into(data, out[place])
            except ValueError as error:
                bad.append((place, str(error)))
    return bad


def _put(pixels: NDArray[np.uint8], out: NDArray[np.uint8], places: Sequence[int]) -> None:
    first, last = places[0], places[-1]
    if last - first == len(places) - 1 and (len(places) == 1 or places == list(range(first, last + 1))):
        out[first : last + 1] = pixels
    else:
        out[places] = pixels


def decode_into(data: bytes, out: NDArray[np.uint8]) -> None:
    """Write the pixels of a stored PNG or JPEG into `out`, uint8 `[H, W, C]`, contiguous; exactly Pillow's.

    Raises `ValueError` with the reason, as `decode_reference`; what stands in `out` is then undefined.
    """
    height, width, channels = out.shape
    fast = _fast_jpeg if data.startswith(JPEG_SIGNATURE) else _fast_png
    if not fast(data, out):
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
    if not _one_picture(data):
        return False
    try:
        found_height, found_width, space, _ = simplejpeg.decode_jpeg_header(data)
        wanted = _JPEG_SPACES.get(channels, {}).get(space)
        if wanted is None or (found_height, found_width) != (height, width):
            return False
        simplejpeg.decode_jpeg(data, wanted, buffer=out)
    except (ValueError, KeyError):
        # KeyError: a kind of subsampling that simplejpeg does not know
        return False
    return True


def _one_picture(data: bytes) -> bool:
    """Whether no segment before a JPEG's first scan says that the file holds several pictures."""
    start = len(JPEG_SIGNATURE) - 1
    while data[start : start + 1] == b"\xff" and start + 4 <= len(data):
        kind = data[start + 1]
        if kind == _START_OF_SCAN:
            return True
        if kind == _APP2 and data[start + 4 : start + 8] == _MULTI_PICTURE:
            return False
        start += 2 + int.from_bytes(data[start + 2 : start + 4])
    return False  # not how a JPEG is built: Pillow's to judge


def _fast_png(data: bytes, out: NDArray[np.uint8]) -> bool:
    lines = _png_lines(data, out.shape)
    if not lines:
        return False
    try:
        out[...] = _pixels([lines], out.shape)[0]
    except (RuntimeError, ValueError):
        return False
    return True


def _png_lines(data: bytes, shape: tuple[int, ...]) -> bytes:
    """The lines of a still PNG of this shape, `(H, W, C)`, 8 bits, grey or RGB, not interlaced, each beginning
    with its filter; empty of any other file.
    """
    header, num_bytes = _plain(shape)
    if not (header and data.startswith(header) and data.endswith(_PNG_END)):
        return b""
    inflate = isal_zlib.decompressobj()
    try:
        # one byte more than there should be, so that a file that holds more is seen and is not unpacked
        lines = inflate.decompress(_one_chunk(data) or _compressed(data), num_bytes + 1)
    except isal_zlib.error:  # type: ignore[misc]  # its stub takes the type for an instance
        return b""
    return lines if len(lines) == num_bytes and inflate.eof and not inflate.unused_data else b""


def _pixels(lines: Sequence[bytes], shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """Undo the filters of n images' lines: uint8 `[n, H, W, C]`. Raises `RuntimeError` on an unknown filter.

    They become one PNG, one image below the other, and a line of zeros below each: a filter takes what lies above
    an image for zero.
    """
    height, width, channels = shape
    rows = len(lines) * (height + 1)
    empty = bytes(1 + width * channels)
    blocks = _before_blocks(rows, width, channels)
    pieces: list[bytes] = []
    if len(blocks) == 1:
        # nearly always, and then nothing is copied twice
        pieces += blocks
        for image in lines:
            pieces += (image, empty)
    else:
        stored = empty.join((*lines, b""))
        for number, before in enumerate(blocks):
            pieces += (before, stored[number * _STORED_BYTES : (number + 1) * _STORED_BYTES])
    # the checksums of zlib and of the chunk are zero: libspng, as pyspng builds it, looks at neither
    data = b"".join((*pieces, bytes(8), _PNG_END))
    pixels = spng.spng_decode_image_bytes(data, _SPNG_FORMAT[channels])
    return pixels.reshape(len(lines), height + 1, width, channels)[:, :height]


@lru_cache(maxsize=64)
def _before_blocks(height: int, width: int, channels: int) -> tuple[bytes, ...]:
    """What stands before each of the stored blocks of such a PNG's lines."""
    num_bytes = height * (1 + width * channels)
    sizes = [min(_STORED_BYTES, num_bytes - first) for first in range(0, num_bytes, _STORED_BYTES)]
    blocks = [
        struct.pack("<BHH", number == len(sizes), size, size ^ 0xFFFF) for number, size in enumerate(sizes, 1)
    ]
    chunk = struct.pack(">I", 2 + 5 * len(blocks) + num_bytes + 4) + b"IDAT\x78\x01"
    return (_png_header(height, width, channels) + chunk + blocks[0], *blocks[1:])


@lru_cache(maxsize=64)
def _plain(shape: tuple[int, ...]) -> tuple[bytes, int]:
    """How a plain PNG of this shape begins, empty where there is none, and how many bytes its lines are."""
    height, width, channels = shape
    header = _png_header(height, width, channels) if channels in _PNG_COLOUR_TYPE else b""
    return header, height * (1 + width * channels)


@lru_cache(maxsize=64)
def _png_header(height: int, width: int, channels: int) -> bytes:
    """A still PNG of this size, 8 bits, grey or RGB, not interlaced, from its first byte to the end of its first
    chunk.
    """
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, _PNG_COLOUR_TYPE[channels], 0, 0, 0)
    return PNG_SIGNATURE + struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))


def _one_chunk(data: bytes) -> bytes:
    """What `_compressed` gives of the plainest file, which has one IDAT chunk between its first and its last; else
    empty.
    """
    if data[_HEADER_BYTES + 4 : _HEADER_BYTES + 8] != b"IDAT":
        return b""
    found = data[_HEADER_BYTES + 8 : -len(_PNG_END) - 4]
    if int.from_bytes(data[_HEADER_BYTES : _HEADER_BYTES + 4]) != len(found):
        return b""
    crc = data[-len(_PNG_END) - 4 : -len(_PNG_END)]
    return found if isal_zlib.crc32(found, _CRC_OF_IDAT) == int.from_bytes(crc) else b""


def _compressed(data: bytes) -> bytes:
    """The compressed lines of a PNG, from its IDAT chunks; empty unless all its chunks after the first are whole,
    none could change its pixels, and its IDAT chunks follow each other.
    """
    start, last = _HEADER_BYTES, len(data) - len(_PNG_END)
    parts: list[bytes] = []
    ended = 0
    while start < last:
        end = start + 8 + int.from_bytes(data[start : start + 4])
        kind = data[start + 4 : start + 8]
        if end + 4 > last or not (kind == b"IDAT" or _HARMLESS.get(kind, -1) in (None, end - start - 8)):
            return b""
        if isal_zlib.crc32(data[start + 4 : end]) != int.from_bytes(data[end : end + 4]):
            return b""
        if kind == b"IDAT":
            if parts and ended != start:
                return b""
            parts.append(data[start + 8 : end])
            ended = end + 4
        start = end + 4
    return b"".join(parts) if start == last else b""
