"""Figures of numbers over time or timestep: schedule, loss, bound, distances."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from pipelines.plots.style import (
    BLUE,
    GREEN,
    INK,
    MUTED,
    ORANGE,
    RED,
    TEXT_SIZE,
    Array,
    dress,
    new_figure,
    number,
    same_length,
    vector,
    write,
)

_TERM_COLOURS = {"reconstruction": ORANGE, "consistency": BLUE, "prior": GREEN}


def schedule_figure(
    betas: npt.ArrayLike, alphas_cumprod: npt.ArrayLike, log_snr: npt.ArrayLike, path: str | Path
) -> Path:
    """β_t, ᾱ_t and log-SNR ln(ᾱ_t/(1 − ᾱ_t)) over the timestep t = 0..T−1, three panels side by side.

    Raises ValueError naming the argument: empty, or lengths that differ.
    """
    beta = vector(betas, "betas")
    alpha_bar, snr = vector(alphas_cumprod, "alphas_cumprod"), vector(log_snr, "log_snr")
    same_length(beta, "betas", alpha_bar, "alphas_cumprod")
    same_length(beta, "betas", snr, "log_snr")
    t = np.arange(len(beta))

    figure = new_figure(1500, 480)
    left, middle, right = figure.subplots(1, 3)
    left.plot(t, beta, color=BLUE, linewidth=2)
    dress(left, title=r"Noise added per step, $\beta_t$", x="timestep t", y="variance")
    left.set_ylim(bottom=0)
    middle.fill_between(t, 0, alpha_bar, color=BLUE, alpha=0.12, linewidth=0)
    middle.plot(t, alpha_bar, color=BLUE, linewidth=2)
    dress(middle, title=r"Signal left, $\bar{\alpha}_t$", x="timestep t", y="share of variance")
    middle.set_ylim(0, 1.02)
    right.axhline(0, color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)))
    right.plot(t, snr, color=BLUE, linewidth=2)
    dress(right, title=r"log-SNR, $\ln\,\bar{\alpha}_t/(1-\bar{\alpha}_t)$", x="timestep t", y="nats")
    ends = f"{snr[0]:+.2f} at t = 0\n{snr[-1]:+.2f} at t = {len(snr) - 1}".replace("-", "−")
    right.text(
        0.97, 0.95, ends, transform=right.transAxes, ha="right", va="top", fontsize=TEXT_SIZE, color=MUTED
    )
    for axes in (left, middle, right):
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.margins(x=0.02)
    return write(figure, path)


def loss_figure(
    steps: npt.ArrayLike,
    losses: npt.ArrayLike,
    held_out: Sequence[tuple[float, float, float]],
    path: str | Path,
) -> Path:
    """The training loss L_simple (Eq. 14) over the step, and below it the held-out bound where it was measured.

    `held_out` holds (step, bits/dim, standard error), and may be empty: the loss is then alone. Losses that are
    not finite leave a gap. Raises ValueError naming the argument: empty `steps`, or lengths that differ.
    """
    step, loss = vector(steps, "steps"), vector(losses, "losses")
    same_length(step, "steps", loss, "losses")
    if any(len(row) != 3 for row in held_out):
        raise ValueError("held_out: must hold (step, bits/dim, standard error) in every row")
    bound = np.asarray(held_out, dtype=np.float64).reshape(-1, 3)
    bound = bound[np.isfinite(bound[:, :2]).all(axis=1)]

    figure = new_figure(1200, 750 if len(bound) else 480)
    rows = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2)) if len(bound) else [figure.subplots()]
    top = rows[0]
    drawable = np.where(np.isfinite(loss) & (loss > 0), loss, np.nan)
    reach = len(drawable) // 100
    top.plot(
        step,
        drawable,
        color=BLUE,
        alpha=0.3 if reach else 1,
        linewidth=0.8 if reach else 2,
        label="as logged",
    )
    if reach:
        label = f"mean of {2 * reach + 1} neighbours"
        top.plot(step, _running_mean(drawable, reach), color=BLUE, linewidth=2, label=label)
        _legend(top, loc="upper right")
    dress(top, title=r"Training loss $L_\mathrm{simple}$", y="mean squared error of ε")
    if np.isfinite(drawable).any():
        _log_scale(top.yaxis, np.nanmin(drawable), np.nanmax(drawable))
    if len(bound):
        bottom = rows[1]
        bottom.errorbar(
            bound[:, 0],
            bound[:, 1],
            yerr=np.nan_to_num(bound[:, 2]),
            color=RED,
            marker="o",
            markersize=4,
            linewidth=1.5,
            capsize=2.5,
        )
        dress(bottom, title="Held-out bound (bars: one standard error)", y="bits per dimension")
        bottom.yaxis.set_major_locator(MaxNLocator(5))
        last = bound[-1]
        bottom.annotate(
            number(last[1]),
            (last[0], last[1] + np.nan_to_num(last[2])),
            xytext=(0, 5),
            textcoords="offset points",
            ha="center",
            fontsize=TEXT_SIZE,
            color=RED,
        )
    rows[-1].set_xlabel("optimiser step", fontsize=TEXT_SIZE, color=MUTED)
    rows[-1].xaxis.set_major_locator(MaxNLocator(8, integer=True))
    rows[-1].margins(x=0.02)
    return write(figure, path)


def bound_figure(
    per_t: npt.ArrayLike,
    terms: Mapping[str, float],
    path: str | Path,
    stderr: Mapping[str, float] | None = None,
) -> Path:
    """The variational bound (Eq. 5) by timestep and by term, in bits per dimension.

    `per_t` [T] is each timestep's contribution, nan where no image drew it; t = 0 is the decoder's.
    `terms` holds "reconstruction", "consistency" and "prior"; `stderr` their standard errors where known.
    Raises ValueError naming the argument: empty, or a term missing.
    """
    values = vector(per_t, "per_t")
    missing = [name for name in _TERM_COLOURS if name not in terms]
    if missing:
        raise ValueError(f"terms: needs {', '.join(_TERM_COLOURS)}, lacks {', '.join(missing)}")

    figure = new_figure(1500, 540)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    t = np.arange(len(values))
    known = np.isfinite(values) & (values > 0)
    later = known & (t > 0)
    left.plot(
        t[later] + 1, values[later], ".", color=BLUE, alpha=0.5, markersize=5, markeredgewidth=0, zorder=3
    )
    centres, means = _geometric_bins(t[later] + 1, values[later])
    left.plot(centres, means, color=BLUE, linewidth=2, label="consistency, t ≥ 1")
    if known[0]:
        left.plot(t[:1] + 1, values[:1], "o", color=ORANGE, markersize=6, label="reconstruction, t = 0")
    dress(left, title="Bound by timestep", x="timestep t + 1 (log scale)", y="bits per dimension (log scale)")
    if known.any():
        _log_scale(left.yaxis, values[known].min(), values[known].max())
        _legend(left, loc="upper right")
    left.set_xscale("log")
    left.set_xlim(0.85, 1.15 * len(values))
    left.xaxis.set_major_locator(LogLocator(numticks=8))
    left.xaxis.set_minor_locator(NullLocator())
    left.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")

    sizes = [float(terms[name]) for name in _TERM_COLOURS]
    rows = np.arange(len(sizes))
    right.barh(rows, np.nan_to_num(sizes), color=list(_TERM_COLOURS.values()), height=0.55)
    for row, (name, size) in enumerate(zip(_TERM_COLOURS, sizes, strict=True)):
        error = f" ± {stderr[name]:.1g}" if stderr and name in stderr else ""
        right.annotate(
            number(size) + error,
            (max(0.0, float(np.nan_to_num(size))), row),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            fontsize=TEXT_SIZE,
            color=INK,
        )
    dress(right, title=f"Three terms, {number(sum(sizes))} in all", x="bits per dimension", grid="x")
    right.set_yticks(rows, list(_TERM_COLOURS), fontsize=TEXT_SIZE, color=INK)
    right.invert_yaxis()
    # Room for the figures written behind the bars.
    right.set_xlim(0, 1.35 * max(1e-12, float(np.nanmax(np.nan_to_num(sizes)))))
    right.xaxis.set_major_locator(MaxNLocator(5))
    return write(figure, path)


def distances_figure(rows: Sequence[Mapping[str, Any]], path: str | Path) -> Path:
    """Fréchet and kernel distance of several sets to the same real images, as bars on log axes.

    Each row holds "name" (what was compared, for example "samples"), "frechet" and "kernel"; "count", the images
    on each side, is optional. A kernel distance at or below zero (it is unbiased) has no bar, its value is
    written instead. Raises ValueError naming `rows`: empty, or a row that lacks a key.
    """
    if not rows:
        raise ValueError("rows: needs at least 1 row, got none")
    for index, row in enumerate(rows):
        missing = [key for key in ("name", "frechet", "kernel") if key not in row]
        if missing:
            raise ValueError(f"rows: row {index} lacks {', '.join(missing)}")
    names = [str(row["name"]) + (f"\n({row['count']:,} images)" if "count" in row else "") for row in rows]

    figure = new_figure(1500, 180 + 90 * max(2, len(rows)))
    panels = figure.subplots(1, 2, sharey=True)
    for axes, key, title in (
        (panels[0], "frechet", "Fréchet distance"),
        (panels[1], "kernel", "Kernel distance (unbiased MMD²)"),
    ):
        dress(axes, title=title, x="log scale, smaller is closer", grid="x")
        _log_bars(axes, np.array([float(row[key]) for row in rows]))
    panels[0].set_yticks(np.arange(len(rows)), names, fontsize=TEXT_SIZE, color=INK)
    panels[0].invert_yaxis()
    return write(figure, path)


def _log_bars(axes: Any, values: Array) -> None:
    positive = values[np.isfinite(values) & (values > 0)]
    low = 10 ** np.floor(np.log10(positive.min()) - 0.3) if positive.size else 1e-3
    high = positive.max() if positive.size else 1.0
    axes.set_xscale("log")
    # A value is written behind each bar: leave it a quarter of the axis.
    axes.set_xlim(low, high * (high / low) ** 0.33)
    axes.xaxis.set_major_locator(LogLocator(numticks=7))
    axes.xaxis.set_minor_locator(NullLocator())
    colours = [BLUE, GREEN, MUTED, ORANGE, RED]
    for row, value in enumerate(values):
        shown = bool(np.isfinite(value) and value > 0)
        if shown:
            axes.barh(row, value - low, left=low, color=colours[row % len(colours)], height=0.6)
        note = "" if shown or not np.isfinite(value) else "  (no difference seen)"
        axes.annotate(
            number(float(value)) + note,
            (value if shown else low, row),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            fontsize=TEXT_SIZE,
            color=INK if shown else MUTED,
        )


def _log_scale(axis: Any, low: float, high: float) -> None:
    """A log axis whose ticks are plain numbers when it spans little, powers of ten when it spans much."""
    if high / low < 3:
        axis.set_major_locator(MaxNLocator(6))
        return
    axis.axes.set_yscale("log")
    narrow = high / low < 30
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if narrow else (1.0,), numticks=12))
    axis.set_minor_locator(NullLocator())
    if narrow:
        axis.set_major_formatter(lambda value, _: f"{value:g}")


def _legend(axes: Any, **where: Any) -> None:
    axes.legend(fontsize=TEXT_SIZE, frameon=False, labelcolor=INK, handlelength=1.6, **where)


def _running_mean(values: Array, reach: int) -> Array:
    """Mean over each value and up to `reach` neighbours on either side, passing over nan."""
    known = np.isfinite(values)
    total = np.concatenate([[0.0], np.cumsum(np.where(known, values, 0.0))])
    count = np.concatenate([[0], np.cumsum(known)])
    place = np.arange(len(values))
    start, stop = np.maximum(0, place - reach), np.minimum(len(values), place + reach + 1)
    number_known = count[stop] - count[start]
    mean = (total[stop] - total[start]) / np.maximum(1, number_known)
    return np.where(number_known > 0, mean, np.nan)


def _geometric_bins(x: npt.NDArray[Any], y: Array) -> tuple[Array, Array]:
    """Means of x and of y in bins of equal width on a log axis, eight to the factor ten."""
    bins = np.floor(8 * np.log10(x)).astype(int)
    filled = np.unique(bins)
    return np.array([x[bins == b].mean() for b in filled]), np.array([y[bins == b].mean() for b in filled])
