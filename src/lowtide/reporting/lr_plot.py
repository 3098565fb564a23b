"""One picture of a learning-rate range test: loss against learning rate on a logarithmic axis, the recommendation marked."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .plot import _FAINT, _INK, _OTHERS, _OURS, _tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# The axis ends at so many times the first loss; what lies above has diverged, and how far is of no interest.
_TOP = 1.4


def plot_lr_curve(
    path: Path,
    *,
    title: str,
    subtitle: str,
    rates: Sequence[float],
    losses: Sequence[float],
    smoothed: Sequence[float],
    loss_before: float,
    loss_label: str,
    recommended: float | None,
    lr_diverged: float | None,
    notes: Sequence[str] = (),
) -> None:
    """Draw the picture and write it as a PNG.

    Args:
        path: file to write; it must not exist.
        title: the finding, in one line.
        subtitle: what was tested, in one line.
        rates: learning rate of every step, rising.
        losses: loss after every step; may be not-a-number or infinite.
        smoothed: the same, smoothed.
        loss_before: loss before the first step, drawn as a level.
        loss_label: what the vertical axis shows.
        recommended: rate to mark, if any.
        lr_diverged: rate from which on the loss was lost, shaded, if that happened.
        notes: small print below everything.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        FileExistsError: there is such a file.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.2), dpi=150, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    small = "\n".join(line for note in notes for line in textwrap.wrap(note, 130))
    bottom = 0.22 if small else 0.12
    axes = figure.add_axes((0.085, bottom, 0.885, 0.81 - bottom))
    _draw_range(axes, rates, _TOP * loss_before, loss_before, lr_diverged)
    axes.plot(rates, losses, color=_OURS, alpha=0.35, linewidth=1, marker=".", markersize=4)
    axes.plot(rates, smoothed, color=_OURS, linewidth=2.4)
    axes.set_ylabel(loss_label)
    if recommended is not None:
        axes.axvline(recommended, color=_INK, linewidth=1.4)
        at = (recommended, 0.9 * _TOP * loss_before)
        axes.text(*at, f" {recommended:g}", color=_INK, fontsize=12, fontweight="bold", va="top")
    figure.text(0.03, 0.94, title, fontsize=14, fontweight="bold", color=_INK, va="center")
    figure.text(0.03, 0.88, subtitle, fontsize=10, color=_FAINT, va="center")
    figure.text(0.03, 0.1, small, fontsize=8, color=_FAINT, va="top")
    with path.open("xb") as file:
        canvas.print_png(file)


def _draw_range(axes: Axes, rates: Sequence[float], top: float, loss_before: float, lr_diverged: float | None) -> None:
    """The axes, the level of the loss before the first step, and the rates that are too high."""
    end = rates[-1] * 1.15
    axes.set_xscale("log")
    axes.set_xlim(rates[0] / 1.15, end)
    axes.set_ylim(0, top)
    axes.set_xlabel("learning rate of the step")
    _tidy(axes)
    axes.grid(axis="y", color="#f1f3f5", linewidth=1)
    axes.axhline(loss_before, color=_FAINT, linewidth=1, linestyle=(0, (4, 3)))
    axes.text(rates[0], loss_before + 0.02 * top, "before the first step", color=_FAINT, fontsize=9)
    if lr_diverged is not None:
        axes.axvspan(lr_diverged, end, color=_OTHERS, alpha=0.1, linewidth=0)
        axes.text(end, 0.03 * top, "diverged ", color=_OTHERS, fontsize=10, ha="right")
