"""One picture of a plan: memory of each way to train, as stacked bars."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..planning import Method
from ..units import GIB
from .plot import _FAINT, _INK, _tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_PARTS = (
    ("weights", "weights", "#0b7285"),
    ("gradients", "gradients", "#e8590c"),
    ("state", "optimizer state", "#f08c00"),
    ("activations", "activations and everything else", "#adb5bd"),
)


def plot_plan(
    path: Path, *, title: str, subtitle: str, methods: Sequence[Method], limit_bytes: int | None = None, note: str = ""
) -> None:
    """Draw the picture and write it as a PNG.

    Args:
        path: file to write; it must not exist.
        title: the finding, in one line.
        subtitle: model and batch, in one line.
        methods: bars from top to bottom; the last one is the plan.
        limit_bytes: memory of the device, drawn as a line.
        note: small print below everything.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        FileExistsError: there is such a file.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 1.9 + 0.55 * len(methods)), dpi=150, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_axes((0.25, 0.21, 0.71, 0.56))
    _draw_bars(axes, methods)
    if limit_bytes is not None and limit_bytes / GIB < axes.get_xlim()[1]:
        axes.axvline(limit_bytes / GIB, color=_INK, linewidth=1.2, linestyle=(0, (4, 3)))
        axes.text(limit_bytes / GIB, -0.62, " may be used", fontsize=8.5, color=_INK, va="top")
    figure.text(0.03, 0.93, title, fontsize=14, fontweight="bold", color=_INK, va="center")
    figure.text(0.03, 0.855, subtitle, fontsize=10, color=_FAINT, va="center")
    figure.text(0.03, 0.03, note, fontsize=8, color=_FAINT, va="center")
    with path.open("xb") as file:
        canvas.print_png(file)


def _draw_bars(axes: Axes, methods: Sequence[Method]) -> None:
    positions = list(range(len(methods)))
    left = [0.0] * len(methods)
    for name, label, color in _PARTS:
        widths = [getattr(method, name) / GIB for method in methods]
        axes.barh(positions, widths, left=left, color=color, height=0.6, label=label)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    for position, end in zip(positions, left, strict=True):
        weight = "bold" if position == positions[-1] else "normal"
        axes.text(end + max(left) * 0.01, position, f"{end:.2f}", va="center", color=_INK, fontweight=weight)
    axes.set_yticks(positions, [method.name for method in methods])
    axes.set_ylim(len(methods) - 0.4, -0.9)
    axes.set_xlim(0, max(left) * 1.1)
    axes.set_xlabel("GiB on the device")
    _tidy(axes)
    axes.legend(loc="lower right", frameon=False, fontsize=9)
