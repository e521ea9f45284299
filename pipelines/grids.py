"""Images laid out in one picture; without matplotlib, which a worker has no need of."""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]

_WHITE = 255


def tile(pixels: Pixels, columns: int, scale: int, gap: int) -> Pixels:
    """[n, C, H, W] → [height, width, C], row by row on white: each pixel a square of `scale`, `gap` between."""
    large = pixels.transpose(0, 2, 3, 1).repeat(scale, axis=1).repeat(scale, axis=2)
    count, height, width, channels = large.shape
    columns = min(columns, count)
    num_rows = -(-count // columns)
    size = (num_rows * (height + gap) - gap, columns * (width + gap) - gap, channels)
    canvas = np.full(size, _WHITE, dtype=np.uint8)
    for index, image in enumerate(large):
        top, left = (index // columns) * (height + gap), (index % columns) * (width + gap)
        canvas[top : top + height, left : left + width] = image
    return canvas


def grid_png(pixels: Pixels, columns: int = 8, scale: int = 4, gap: int = 2) -> bytes:
    """Images uint8 [n, 1 or 3, H, W] as the bytes of one PNG."""
    canvas = tile(pixels, columns, scale, gap)
    data = io.BytesIO()
    Image.fromarray(canvas[..., 0] if canvas.shape[2] == 1 else canvas).save(data, format="PNG")
    return data.getvalue()
