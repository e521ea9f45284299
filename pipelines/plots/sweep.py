"""The picture of a sweep over noise schedules: what was tried, and what each trial reached."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from pipelines.plots.style import BLUE, INK, MUTED, RED, TEXT_SIZE, Array, dress, new_figure, write

_STATUSES = ("completed", "stopped", "failed")
_REQUIRED = ("num_timesteps", "beta_start", "beta_end", "bits_per_dim", "status", "step")


def sweep_figure(trials: Sequence[Mapping[str, Any]], path: str | Path, *, max_trials: int = 30) -> Path:
    """Trials ranked on held-out bits per dimension, best on top: T, the β range, the result.

    Each trial holds "num_timesteps", "beta_start", "beta_end", "bits_per_dim" (nan when it reached none),
    "status" ("completed", "stopped" early or "failed") and "step", the last optimiser step; "stderr" of the
    result, and "log_snr_start" and "log_snr_end" at t = 0 and T − 1, are optional. Early-stopped trials are
    hollow; failed ones come last. Shows the first `max_trials` in rank. Raises ValueError naming `trials`:
    empty, a key missing, an unknown status.
    """
    ranked = _ranked(trials)
    shown = ranked[:max_trials]
    num_rows = len(shown)
    with_snr = all("log_snr_start" in trial and "log_snr_end" in trial for trial in shown)

    figure = new_figure(1700 if with_snr else 1500, 190 + 54 * max(4, num_rows))
    ratios = (1.0, 1.6, 1.6, 3.0) if with_snr else (1.0, 1.8, 3.2)
    panels = figure.subplots(1, len(ratios), sharey=True, width_ratios=ratios)
    best = 0 if _usable(shown[0]) else None
    colours = [RED if row == best else BLUE for row in range(num_rows)]

    _timesteps_panel(panels[0], shown, colours)
    _range_panel(panels[1], shown, colours, ("beta_start", "beta_end"), log=True)
    dress(panels[1], title=r"$\beta_1$ to $\beta_T$", x="variance added per step", grid="x")
    if with_snr:
        _range_panel(panels[2], shown, colours, ("log_snr_end", "log_snr_start"), log=False)
        dress(panels[2], title="log-SNR, last to first step", x="nats", grid="x")
    _result_panel(panels[-1], shown, colours, best)

    for axes in panels:
        if best is not None:
            axes.axhspan(best - 0.5, best + 0.5, color=RED, alpha=0.08, linewidth=0)
        axes.spines["left"].set_visible(False)
    labels = [f"{rank}" for rank in range(1, num_rows + 1)]
    panels[0].set_yticks(range(num_rows), labels, fontsize=TEXT_SIZE, color=MUTED)
    panels[0].set_ylabel(
        "rank" if num_rows == len(ranked) else f"rank, best {num_rows} of {len(ranked)}",
        fontsize=TEXT_SIZE,
        color=MUTED,
    )
    panels[0].set_ylim(max(num_rows, 4) - 0.4, -0.6)
    return write(figure, path)


def _ranked(trials: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    if not trials:
        raise ValueError("trials: needs at least 1 trial, got none")
    for index, trial in enumerate(trials):
        missing = [key for key in _REQUIRED if key not in trial]
        if missing:
            raise ValueError(f"trials: trial {index} lacks {', '.join(missing)}")
        if trial["status"] not in _STATUSES:
            raise ValueError(
                f"trials: trial {index} has status {trial['status']!r}, must be one of {', '.join(_STATUSES)}"
            )
        for key in ("beta_start", "beta_end"):
            if not float(trial[key]) > 0:
                raise ValueError(f"trials: trial {index} has {key} {trial[key]!r}, must be above 0")
    return sorted(trials, key=_rank)


def _rank(trial: Mapping[str, Any]) -> tuple[int, float]:
    return (0, float(trial["bits_per_dim"])) if _usable(trial) else (1, 0.0)


def _usable(trial: Mapping[str, Any]) -> bool:
    return trial["status"] != "failed" and bool(np.isfinite(float(trial["bits_per_dim"])))


def _timesteps_panel(axes: Any, shown: Sequence[Mapping[str, Any]], colours: Sequence[str]) -> None:
    for row, trial in enumerate(shown):
        axes.text(
            0.5,
            row,
            f"{int(trial['num_timesteps']):,}",
            transform=axes.get_yaxis_transform(),
            ha="center",
            va="center",
            fontsize=TEXT_SIZE + 1,
            color=colours[row],
        )
    dress(axes, title="Timesteps T", grid="x")
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)


def _range_panel(
    axes: Any, shown: Sequence[Mapping[str, Any]], colours: Sequence[str], keys: tuple[str, str], *, log: bool
) -> None:
    ends = np.array([[float(trial[key]) for key in keys] for trial in shown])
    for row, (low, high) in enumerate(ends):
        axes.plot([low, high], [row, row], color=colours[row], linewidth=2.5, solid_capstyle="round")
        axes.plot([low, high], [row, row], "|", color=colours[row], markersize=9, markeredgewidth=2)
    if log:
        axes.set_xscale("log")
        axes.set_xlim(ends.min() / 1.6, ends.max() * 1.6)
        axes.xaxis.set_major_locator(LogLocator(numticks=7))
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        axes.margins(x=0.08)
        axes.xaxis.set_major_locator(MaxNLocator(5))


def _result_panel(
    axes: Any, shown: Sequence[Mapping[str, Any]], colours: Sequence[str], best: int | None
) -> None:
    dress(axes, title="Held-out bound (bars: one standard error)", x="bits per dimension", grid="x")
    values = np.array([float(trial["bits_per_dim"]) for trial in shown])
    errors = np.array([float(trial.get("stderr") or 0.0) for trial in shown])
    _result_limits(axes, values, np.nan_to_num(errors))
    for row, trial in enumerate(shown):
        hollow = trial["status"] != "completed"
        if np.isfinite(values[row]):
            axes.errorbar(
                values[row],
                row,
                xerr=np.nan_to_num(errors[row]),
                color=colours[row],
                marker="o",
                markersize=7,
                markerfacecolor="white" if hollow else colours[row],
                capsize=3,
                linewidth=1.5,
            )
        axes.annotate(
            _note(trial, row == best),
            (values[row] + np.nan_to_num(errors[row]), row) if np.isfinite(values[row]) else (0, row),
            xycoords="data" if np.isfinite(values[row]) else axes.get_yaxis_transform(),
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
            fontsize=TEXT_SIZE,
            color=MUTED if hollow else INK,
        )


def _result_limits(axes: Any, values: Array, errors: Array) -> None:
    known = np.isfinite(values)
    if not known.any():
        axes.set_xticks([])
        return
    low, high = (values - errors)[known].min(), (values + errors)[known].max()
    if low > 0 and high / low > 6:
        axes.set_xscale("log")
        # Room behind the points for what is written there.
        axes.set_xlim(low / 1.15, high * (high / low) ** 0.85)
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=8))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        return
    span = max(high - low, 0.02 * abs(high), 1e-6)
    axes.set_xlim(low - 0.06 * span, high + 0.85 * span)
    axes.xaxis.set_major_locator(MaxNLocator(6))


def _note(trial: Mapping[str, Any], best: bool) -> str:
    value = f"{float(trial['bits_per_dim']):.3f}" + (", best" if best else "")
    if trial["status"] == "failed":
        return f"failed at step {int(trial['step']):,}"
    if trial["status"] == "stopped":
        return f"{value}, stopped at step {int(trial['step']):,}"
    return value
