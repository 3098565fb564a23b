"""One picture of a run: the training loss on the left, peak memory beside that of other optimizers on the right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..units import GIB

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_OURS, _OTHERS, _LIBRARIES, _INK, _FAINT = "#0b7285", "#e8590c", "#ced4da", "#212529", "#868e96"
# Steps that the smoothed curve averages over; single batches of a few sequences scatter widely.
_WINDOW = 10


@dataclass(frozen=True)
class MemoryBar:
    """The memory of one way to train.

    Attributes:
        label: what is written beside the bar; may have several lines.
        peak_bytes: the largest resident set of the process.
        library_bytes: the part of it that was there before the model was loaded: Python and its libraries.
        ours: drawn in the colour of this project, which sets it off from what it is compared with.
    """

    label: str
    peak_bytes: int
    library_bytes: int
    ours: bool = False


def plot_run(
    path: Path, *, title: str, subtitle: str, losses: Sequence[float], memory: Sequence[MemoryBar], note: str = ""
) -> None:
    """Draw the picture and write it as a PNG.

    Args:
        path: file to write.
        title: the finding, in one line.
        subtitle: what was done, in one line.
        losses: training loss of every step, in nats per counted token; not-a-number where a step was skipped.
        memory: bars from top to bottom; none leaves the right half out.
        note: small print below everything.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Without pyplot: that would keep the figure in a global list and look for a display.
    figure = Figure(figsize=(11, 4.9), dpi=150, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    left, right, top, bottom = 0.065, 0.97, 0.74, 0.195
    if memory:
        middle = 0.49
        _draw_loss(figure.add_axes((left, bottom, middle - left, top - bottom)), losses)
        _draw_memory(figure.add_axes((0.64, bottom, right - 0.64, top - bottom)), memory)
    else:
        _draw_loss(figure.add_axes((left, bottom, right - left, top - bottom)), losses)
    figure.text(left - 0.045, 0.93, title, fontsize=15, fontweight="bold", color=_INK, va="center")
    figure.text(left - 0.045, 0.868, subtitle, fontsize=10, color=_FAINT, va="center")
    figure.text(left - 0.045, 0.035, note, fontsize=8, color=_FAINT, va="center")
    canvas.print_png(path)


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Mean of each value and those before it, at most ``window`` of them; values that are not a number do not count."""
    means = []
    for end in range(1, len(values) + 1):
        some = [value for value in values[max(0, end - window) : end] if value == value]
        means.append(sum(some) / len(some) if some else float("nan"))
    return means


def _draw_loss(axes: Axes, losses: Sequence[float]) -> None:
    steps = range(1, len(losses) + 1)
    smooth = running_mean(losses, _WINDOW)
    axes.plot(steps, losses, color=_OURS, alpha=0.3, linewidth=1)
    axes.plot(steps, smooth, color=_OURS, linewidth=2.4)
    axes.set_title("Training loss", loc="left", fontsize=11, fontweight="bold", color=_INK, pad=10)
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per answer token)")
    axes.set_xlim(0, len(losses) * 1.02 + 0.5)
    axes.set_ylim(bottom=0)
    if losses and smooth[-1] == smooth[-1]:
        top = axes.get_ylim()[1]
        axes.annotate(
            f"mean of the last {min(_WINDOW, len(losses))} steps: {smooth[-1]:.2f}",
            (len(losses), smooth[-1]),
            (len(losses), min(smooth[-1] + 0.22 * top, 0.85 * top)),
            ha="right",
            fontsize=10,
            color=_OURS,
            arrowprops={"arrowstyle": "-", "color": _OURS, "linewidth": 0.8, "shrinkB": 3},
        )
    _tidy(axes)
    axes.grid(axis="y", color="#f1f3f5", linewidth=1)


def _draw_memory(axes: Axes, memory: Sequence[MemoryBar]) -> None:
    positions = list(range(len(memory)))[::-1]
    largest = max(bar.peak_bytes for bar in memory) / GIB
    for position, bar in zip(positions, memory, strict=True):
        libraries, peak = bar.library_bytes / GIB, bar.peak_bytes / GIB
        axes.barh(position, libraries, color=_LIBRARIES, height=0.58)
        axes.barh(position, peak - libraries, left=libraries, color=_OURS if bar.ours else _OTHERS, height=0.58)
        axes.text(
            peak + largest * 0.02,
            position,
            f"{peak:.2f} GiB",
            va="center",
            fontsize=10.5,
            fontweight="bold" if bar.ours else "normal",
            color=_OURS if bar.ours else _INK,
        )
    first = memory[0].library_bytes / GIB
    axes.text(
        first / 2, positions[0] + 0.36, "Python,\nlibraries", ha="center", va="bottom", fontsize=7.5, color=_FAINT
    )
    axes.set_yticks(positions, [bar.label for bar in memory], fontsize=10)
    axes.set_title("Peak memory, measured", loc="left", fontsize=11, fontweight="bold", color=_INK, pad=10)
    axes.set_xlabel("largest resident set of the process (GiB)")
    axes.set_xlim(0, largest * 1.22)
    axes.set_ylim(-0.55, len(memory) - 0.1)
    _tidy(axes)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0, colors=_INK)


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#adb5bd")
    axes.tick_params(colors="#495057", labelsize=9)
    axes.xaxis.label.set_color("#495057")
    axes.yaxis.label.set_color("#495057")
    axes.set_axisbelow(True)
