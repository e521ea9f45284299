"""The one look of all figures: colours that colour-blind readers can tell apart (Okabe and Ito), few lines."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

Array = npt.NDArray[np.float64]

DPI = 150
BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
INK, MUTED, FAINT = "#262626", "#6B6B6B", "#E4E4E4"
TEXT_SIZE, TITLE_SIZE = 8.5, 10


def new_figure(width_px: int, height_px: int) -> Figure:
    """A figure whose PNG is exactly `width_px` × `height_px`."""
    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1, wspace=0.02)
    size = (width_px / DPI, height_px / DPI)
    figure = Figure(figsize=size, dpi=DPI, layout=layout, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def write(figure: Figure, path: str | Path) -> Path:
    """Write the PNG, making its folder; the same figure gives the same bytes (no program name or date inside)."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(
        target, format="png", dpi=DPI, facecolor=figure.get_facecolor(), metadata={"Software": None}
    )
    return target


def dress(axes: Any, *, title: str = "", x: str = "", y: str = "", grid: str = "both") -> None:
    """Titles, labels, ticks and a faint grid, alike in every figure; `grid` is "x", "y" or "both"."""
    axes.set_title(title, loc="left", fontsize=TITLE_SIZE, color=INK, pad=8)
    axes.set_xlabel(x, fontsize=TEXT_SIZE, color=MUTED)
    axes.set_ylabel(y, fontsize=TEXT_SIZE, color=MUTED)
    axes.tick_params(which="both", labelsize=TEXT_SIZE, colors=MUTED, length=0)
    axes.xaxis.get_offset_text().set(fontsize=TEXT_SIZE, color=MUTED)
    axes.yaxis.get_offset_text().set(fontsize=TEXT_SIZE, color=MUTED)
    axes.set_axisbelow(True)
    axes.grid(True, which="major", axis=grid, color=FAINT, linewidth=0.8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(FAINT)


def number(value: float) -> str:
    """Three significant digits, without an exponent where plain digits are as short: 12.3, 0.00123, 7.3e-06."""
    if not np.isfinite(value):
        return "not finite"
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:,.{max(0, 2 - int(np.floor(np.log10(abs(value) or 1))))}f}".replace("-", "−")
    return f"{value:.1e}".replace("-", "−")


def vector(values: Any, name: str, *, may_be_empty: bool = False) -> Array:
    """`values` as float64 [n]. Raises ValueError naming the argument for a wrong shape, or emptiness."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1:
        raise ValueError(f"{name}: must have shape [n], got {list(array.shape)}")
    if array.size == 0 and not may_be_empty:
        raise ValueError(f"{name}: needs at least 1 value, got none")
    return array


def same_length(reference: Array, reference_name: str, other: Array, other_name: str) -> None:
    if len(other) != len(reference):
        raise ValueError(
            f"{other_name}: must be as long as {reference_name} ({len(reference)}), got {len(other)}"
        )
