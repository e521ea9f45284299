"""Pixels as stored bytes, as PNG files, and as the numbers that the model sees.

An image has `levels` distinct values a channel (256 for ordinary 8-bit images, 17 for the digits). Level l
is stored as the byte round(l·255/(levels−1)), so that every viewer shows it rightly, and the model sees it as
−1 + 2·l/(levels−1): the data range of Ho et al. 2020, section 3.3, with bins of width 2/(levels−1).
"""

from __future__ import annotations

import io
import struct
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from pipelines.errors import one_line
from pipelines.png import PNG_SIGNATURE, PngEncoder, encode_pngs

JPEG_SIGNATURE = b"\xff\xd8\xff"
# PNG's colour types for which Pillow gives the modes L and RGB, with the number of channels of each
_CHANNELS_OF_COLOUR_TYPE = {0: 1, 2: 3}
_HEADER_BYTES = 33


def check_levels(levels: int) -> None:
    """Raise `ValueError` unless an image of 8 bits can have this many levels."""
    if not 2 <= levels <= 256:
        raise ValueError(f"levels: must be 2..256, got {levels!r}")


@lru_cache(maxsize=8)
def _byte_of_level(levels: int) -> NDArray[np.uint8]:
    check_levels(levels)
    return np.rint(np.arange(levels) * 255.0 / (levels - 1)).astype(np.uint8)


@lru_cache(maxsize=8)
def _level_of_byte(levels: int) -> NDArray[np.int64]:
    check_levels(levels)
    return np.rint(np.arange(256) * (levels - 1) / 255.0).astype(np.int64)


@lru_cache(maxsize=8)
def _value_of_byte(levels: int, device: torch.device) -> torch.Tensor:
    """Kept on its device, since a copy there waits for all that the device has to do."""
    values = (-1.0 + 2.0 * _level_of_byte(levels) / (levels - 1)).astype(np.float32)
    return torch.from_numpy(values).to(device)


def to_model(
    images: torch.Tensor | NDArray[np.uint8], levels: int = 256, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Stored bytes as the model sees them: byte → nearest level l → −1 + 2·l/(levels−1).

    `images` is uint8 of any shape; the result is float32 of that shape in [−1, 1], on the same device. Each
    value is the float32 nearest to the exact one (and is exact where levels−1 is a power of two). `out`, if
    given, is a float32 tensor of the same shape and device that takes the result.
    Raises `ValueError` on another dtype or on levels outside 2..256.
    """
    images = torch.as_tensor(images)
    if images.dtype != torch.uint8:
        raise ValueError(f"images: must be uint8, got {images.dtype}")
    if levels == 256 and images.device.type == "cpu":
        # (2·l − 255)/255, rounded once: the table's numbers, 10 times as fast as looking them up; CUDA would
        # multiply by a rounded 1/255
        wide = images.float() if out is None else out.copy_(images)
        return wide.mul_(2).sub_(255).div_(255)
    values = _value_of_byte(levels, images.device)[images.to(torch.int32)]
    return values if out is None else out.copy_(values)


def to_uint8(x: torch.Tensor, levels: int = 256) -> torch.Tensor:
    """The model's numbers as bytes to store: the nearest of the levels, l = round((x+1)·(levels−1)/2) clipped
    to 0..levels−1, then the byte round(l·255/(levels−1)).

    `x` is a floating tensor of any shape, meant to lie in [−1, 1]; the result is uint8 of that shape on the
    same device. `to_uint8(to_model(b, levels), levels) == b` for every byte b that is one of the levels.
    Raises `ValueError` if `x` is not floating or holds a NaN, which no byte can show.
    """
    if not x.is_floating_point():
        raise ValueError(f"x: must be floating, got {x.dtype}")
    if bool(torch.isnan(x).any()):
        raise ValueError("x: holds NaN, which is no pixel")
    # half precision has fewer steps in [-1, 1] than an 8-bit image has levels
    wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
    level = ((wide + 1.0) * ((levels - 1) / 2.0)).round().clamp(0, levels - 1).to(torch.int64)
    return torch.from_numpy(_byte_of_level(levels)).to(x.device)[level]


def quantise(pixels: NDArray[np.uint8], levels: int) -> NDArray[np.uint8]:
    """Each byte replaced by the byte of its nearest level; the identity for 256 levels."""
    if levels == 256:
        return pixels
    return _byte_of_level(levels)[_level_of_byte(levels)[pixels]]


def encode_png(image: NDArray[np.uint8] | torch.Tensor, encoder: PngEncoder = "pillow") -> bytes:
    """The PNG file of one image, uint8 `[C, H, W]`; of many, `pipelines.png.encode_pngs` is faster."""
    return encode_pngs(np.asarray(image)[None], encoder)[0]


def png_header(data: bytes) -> tuple[int, int, int, int]:
    """(height, width, bit depth, colour type) of a PNG, from its header; `ValueError` if it is none."""
    if len(data) < _HEADER_BYTES or not data.startswith(PNG_SIGNATURE) or data[12:16] != b"IHDR":
        raise ValueError(f"{len(data)} bytes that are no PNG image")
    width, height, depth, colour = struct.unpack(">IIBB", data[16:26])
    return height, width, depth, colour


def _png_shape(data: bytes) -> tuple[int, int, int]:
    height, width, depth, colour = png_header(data)
    if depth != 8 or colour not in _CHANNELS_OF_COLOUR_TYPE:
        raise ValueError(f"a PNG of bit depth {depth} and colour type {colour}, not 8-bit grey or RGB")
    return (_CHANNELS_OF_COLOUR_TYPE[colour], height, width)


def decode_png(data: bytes, shape: tuple[int, int, int]) -> NDArray[np.uint8]:
    """The pixels of a stored PNG as uint8 `[C, H, W]`, exactly Pillow's.

    Raises `ValueError` with the reason unless it is one still 8-bit grey or RGB image of just this shape. The
    header is compared first, so that a file that claims a huge size costs nothing.
    """
    found = _png_shape(data)
    if found != tuple(shape):
        raise ValueError(f"an image of shape {list(found)}, not {list(shape)}")
    pixels = _pixels(data, "PNG")
    return pixels[None] if len(shape) == 3 and shape[0] == 1 else pixels.transpose(2, 0, 1)


def _pixels(data: bytes, kind: str) -> NDArray[np.uint8]:
    try:
        with Image.open(io.BytesIO(data), formats=(kind,)) as picture:
            if getattr(picture, "is_animated", False):
                raise ValueError(f"an animated {kind}, not a still image")
            return np.asarray(picture)
    except (ValueError, MemoryError):
        raise
    except Exception as error:  # noqa: BLE001  Pillow raises half a dozen types on a broken file
        raise ValueError(f"a broken {kind} ({one_line(error, 120)})") from None


def decode_jpeg(data: bytes, shape: tuple[int, int, int]) -> NDArray[np.uint8]:
    """The pixels of a stored JPEG as uint8 `[C, H, W]`, exactly Pillow's.

    Raises `ValueError` with the reason unless it is one grey or RGB image of just this shape. The header is
    compared first, so that a file that claims a huge size costs nothing.
    """
    found = _jpeg_shape(data)
    if found != tuple(shape):
        raise ValueError(f"an image of shape {list(found)}, not {list(shape)}")
    pixels = _pixels(data, "JPEG")
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def _jpeg_shape(data: bytes) -> tuple[int, int, int]:
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as picture:
            mode, (width, height), frames = picture.mode, picture.size, getattr(picture, "n_frames", 1)
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001  Pillow raises half a dozen types on a broken file
        raise ValueError(f"a broken JPEG ({one_line(error, 120)})") from None
    if mode not in ("L", "RGB") or frames != 1:
        raise ValueError(f"a JPEG of mode {mode} with {frames} images, not one grey or RGB image")
    return (1 if mode == "L" else 3, height, width)


def stored_shape(data: bytes) -> tuple[int, int, int]:
    """The shape (C, H, W) that `decode_image` takes this file for, from its header; `ValueError` if none."""
    if data.startswith(JPEG_SIGNATURE):
        return _jpeg_shape(data)
    return _png_shape(data)


def decode_image(data: bytes, shape: tuple[int, int, int]) -> NDArray[np.uint8]:
    """The pixels of a stored image, told by its first bytes: `decode_jpeg` or `decode_png`."""
    return decode_jpeg(data, shape) if data.startswith(JPEG_SIGNATURE) else decode_png(data, shape)


def extension_of(data: bytes) -> str:
    """The extension of a stored image's member: "jpg" for a JPEG, else "png"."""
    return "jpg" if data.startswith(JPEG_SIGNATURE) else "png"
