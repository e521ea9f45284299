"""Figures made of images, which keep every pixel exact: whole-number enlargement, no resampling."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from PIL import Image

from pipelines.grids import tile
from pipelines.plots.style import DPI, INK, MUTED, TEXT_SIZE, TITLE_SIZE, new_figure, write

Pixels = npt.NDArray[np.uint8]

_GAP = 2


def image_grid(
    images: Any, path: str | Path, *, columns: int | None = None, scale: int | None = None, gap: int = _GAP
) -> Path:
    """Uint8 `images` [n, C, H, W] (C 1 or 3) as one plain PNG, row by row, each pixel a square of `scale`.

    `columns` by default makes the grid about square, `scale` makes an image about 48 pixels tall; `gap` white
    pixels lie between images. Raises ValueError naming the argument.
    """
    pixels = _pixels(images, "images")
    columns = math.ceil(math.sqrt(len(pixels))) if columns is None else columns
    scale = _default_scale(pixels) if scale is None else scale
    for name, value, least in (("columns", columns, 1), ("scale", scale, 1), ("gap", gap, 0)):
        if value < least:
            raise ValueError(f"{name}: must be at least {least}, got {value!r}")
    canvas = tile(pixels, columns, scale, gap)
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(canvas[..., 0] if canvas.shape[2] == 1 else canvas).save(target, format="PNG")
    return target


def generated_beside_real(
    generated: Any, real: Any, path: str | Path, *, columns: int = 10, max_rows: int = 10
) -> Path:
    """Two grids of equal size side by side: generated images left, real ones right, uint8 [n, C, H, W].

    Shows the first `columns` × `max_rows` of each, and equally many of both. Raises ValueError naming the
    argument: empty, not uint8, or images of different shapes.
    """
    left, right = _pixels(generated, "generated"), _pixels(real, "real")
    if left.shape[1:] != right.shape[1:]:
        raise ValueError(
            f"real: must hold images of shape {list(left.shape[1:])}, got {list(right.shape[1:])}"
        )
    if columns < 1 or max_rows < 1:
        raise ValueError(f"columns, max_rows: must be at least 1, got {columns!r}, {max_rows!r}")
    count = min(len(left), len(right), columns * max_rows)
    scale = _default_scale(left)
    grids = [tile(part[:count], columns, scale, _GAP) for part in (left, right)]

    height, width = grids[0].shape[:2]
    margin, heading = 30, 54
    figure = new_figure(2 * width + 3 * margin, height + heading + margin)
    for index, (grid, title) in enumerate(zip(grids, ("Generated", "Real"), strict=True)):
        x = margin + index * (width + margin)
        _place(figure, grid, x, heading)
        _write_at(figure, x, heading - 14, title, size=TITLE_SIZE + 1, ha="left", va="bottom")
    return write(figure, path)


def trajectory_figure(
    frames: Sequence[tuple[int, Any, Any]], path: str | Path, *, max_frames: int = 10
) -> Path:
    """One image's way from noise to picture: x_t above, and below it the x̂_0 that the network saw in it.

    `frames` holds (t, x_t, pred_x_start) in the order of sampling, both uint8 [C, H, W]. More than `max_frames`
    are thinned evenly, first and last kept. Raises ValueError naming the argument: empty, not uint8, or shapes
    that differ.
    """
    if len(frames) == 0:
        raise ValueError("frames: needs at least 1 frame, got none")
    if max_frames < 2:
        raise ValueError(f"max_frames: must be at least 2, got {max_frames!r}")
    kept = np.unique(np.linspace(0, len(frames) - 1, min(max_frames, len(frames))).round().astype(int))
    shown = [frames[index] for index in kept]
    states = np.stack([_pixels(np.asarray(x_t)[None], "frames")[0] for _, x_t, _ in shown])
    predictions = np.stack([_pixels(np.asarray(x_start)[None], "frames")[0] for _, _, x_start in shown])
    if states.shape != predictions.shape:
        raise ValueError(
            f"frames: x_t and pred_x_start must have one shape, got {list(states.shape[1:])} "
            f"and {list(predictions.shape[1:])}"
        )

    scale = max(1, 112 // states.shape[2])
    gap, label, heading, margin = 10, 84, 48, 24
    strips = [tile(part, len(shown), scale, gap) for part in (states, predictions)]
    height, width = strips[0].shape[:2]
    figure = new_figure(label + width + margin, heading + 2 * height + gap + margin)
    for row, (strip, name) in enumerate(zip(strips, (r"$x_t$", r"$\hat{x}_0$"), strict=True)):
        y = heading + row * (height + gap)
        _place(figure, strip, label, y)
        _write_at(figure, label / 2, y + height / 2, name, size=TITLE_SIZE + 4, ha="center", va="center")
    pitch = states.shape[3] * scale + gap
    for column, (t, _, _) in enumerate(shown):
        x = label + column * pitch + (pitch - gap) / 2
        _write_at(figure, x, heading - 12, f"t = {t}", size=TEXT_SIZE, ha="center", va="bottom", color=MUTED)
    return write(figure, path)


def _pixels(images: Any, name: str) -> Pixels:
    array = np.asarray(images)
    if array.ndim != 4 or array.shape[1] not in (1, 3) or 0 in array.shape[2:]:
        raise ValueError(f"{name}: must have shape [n, 1 or 3, H, W], got {list(array.shape)}")
    if len(array) == 0:
        raise ValueError(f"{name}: needs at least 1 image, got none")
    if array.dtype != np.uint8:
        raise ValueError(f"{name}: must be uint8, got {array.dtype}")
    return array


def _default_scale(pixels: Pixels) -> int:
    return max(1, 48 // pixels.shape[2])


def _size(figure: Figure) -> tuple[int, int]:
    width, height = figure.get_size_inches()
    return round(width * DPI), round(height * DPI)


def _place(figure: Figure, canvas: Pixels, left: int, top: int) -> None:
    """Put `canvas` with its upper left corner at (left, top) pixels from the figure's upper left."""
    colour = canvas.repeat(3, axis=2) if canvas.shape[2] == 1 else canvas
    # The figure's origin is at the bottom.
    figure.figimage(colour, left, _size(figure)[1] - top - canvas.shape[0], origin="upper")


def _write_at(
    figure: Figure, x: float, y: float, text: str, *, size: float, ha: str, va: str, color: str = INK
) -> None:
    width, height = _size(figure)
    figure.text(x / width, 1 - y / height, text, fontsize=size, ha=ha, va=va, color=color)
