"""Pictures: memory over time, and growth. Colours are those of Okabe and Ito; markers and labels say the same without them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .methods import METHODS
from .shapes import SHAPES
from .summary import Result, Row, results

STYLES = {
    "ours": ("#0072B2", "o", "lowtide"),
    "full": ("#D55E00", "s", "others, all parameters"),
    "part": ("#009E73", "^", "others, a part of the parameters"),
    "nothing": ("#555555", "x", "nothing updated"),
}
LINES = ("#0072B2", "#56B4E9", "#D55E00", "#E69F00", "#000000", "#009E73", "#CC79A7")
MARKERS = "osD^vP*"
AXES = {"parameters": "parameters, billions", "tokens": "tokens a step", "tensors": "parameter tensors"}
_PLACES = [
    (dx, dy)
    for far in (1, 2, 3, 5)
    for dx, dy in ((7, -3), (7, 6 * far), (7, -3 - 9 * far), (-7, -3), (-7, 6 * far), (-7, -3 - 9 * far))
]


def memory_time(found: Sequence[Result], model: str, path: Path) -> None:
    """One point a method: seconds a step, and GB above imports."""
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(9.5, 6))
    shown: set[str] = set()
    for each in found:
        kind = METHODS[each.method].kind
        color, marker, label = STYLES[kind]
        axes.scatter(each.step_s, each.above_bytes / 1e9, c=color, marker=marker, s=42, zorder=3, label=None if kind in shown else label)  # fmt: skip
        shown.add(kind)
    weights = 2 * found[0].parameters / 1e9
    axes.axhline(weights, color="#999999", linewidth=0.8, linestyle=":")
    axes.set_xlabel("median step, seconds")
    axes.set_ylabel("peak memory above imports, GB")
    axes.set_title(
        f"{model}: lower and further left is better; dotted: the weights in bfloat16", loc="left", fontsize=10
    )
    axes.set_xlim(0, max(each.step_s for each in found) * 1.3)
    axes.set_ylim(0, max(each.above_bytes for each in found) / 1e9 * 1.12)
    axes.legend(fontsize=8, frameon=False, loc="upper left")
    _tidy(axes)
    figure.tight_layout()
    _label(figure, axes, found)
    _save(plt, figure, path)


def _label(figure: Any, axes: Any, found: Sequence[Result]) -> None:
    """Names beside their points, at the first place where they cover no other name and no point."""
    figure.canvas.draw()
    spots = [axes.transData.transform((each.step_s, each.above_bytes / 1e9)) for each in found]
    taken = [axes.get_legend().get_window_extent()]
    for each in found:
        name, color = METHODS[each.method].title, STYLES[METHODS[each.method].kind][0]
        for dx, dy in _PLACES:
            text = axes.annotate(
                name, (each.step_s, each.above_bytes / 1e9), (dx, dy), textcoords="offset points", fontsize=7.5, color=color,
                ha="left" if dx > 0 else "right", arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.4} if abs(dy) > 12 else None,
            )  # fmt: skip
            box = text.get_window_extent()
            inside = box.x0 > axes.bbox.x0 and box.x1 < axes.bbox.x1 and axes.bbox.y0 < box.y0 and box.y1 < axes.bbox.y1
            if inside and not any(box.overlaps(other) for other in taken) and not any(box.contains(*p) for p in spots):
                break
            if (dx, dy) != _PLACES[-1]:
                text.remove()
        taken.append(box)


def growth(drawn: dict[str, list[Row]], path: Path) -> None:
    """Two rows of pictures, memory and time; a column for each thing that grows.

    Args:
        drawn: rows by a key of ``AXES``.
        path: the SVG file.
    """
    plt = _pyplot()
    figure, grid = plt.subplots(2, len(drawn), figsize=(4.2 * len(drawn) + 0.6, 6.4), squeeze=False)
    methods = [name for name, method in METHODS.items() if method.growth]
    for column, (name, rows) in enumerate(drawn.items()):
        for method, color, marker in zip(methods, LINES, MARKERS, strict=False):
            points = []
            for size in sizes(name, rows):
                own = [row for row in rows if row["method"] == method and size_of(name, row) == size]
                points += [(size, each.above_bytes / 1e9, each.step_s) for each in results(own)[0]]
            for axes, index in ((grid[0][column], 1), (grid[1][column], 2)):
                values = [point[index] for point in points]
                axes.plot([point[0] for point in points], values, color=color, marker=marker, markersize=5, linewidth=1.3, label=METHODS[method].title)  # fmt: skip
        for axes in (grid[0][column], grid[1][column]):
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.set_xlabel(AXES[name])
            _tidy(axes)
            axes.grid(color="#e9ecef", linewidth=0.8)
    grid[0][0].set_ylabel("peak memory above imports, GB")
    grid[1][0].set_ylabel("step, seconds")
    grid[0][0].legend(fontsize=7.5, frameon=False)
    figure.tight_layout()
    _save(plt, figure, path)


def size_of(name: str, row: Row) -> float:
    """What grows, of one row; from the configuration, so that rows of runs that failed have it, too."""
    shape = SHAPES[row["model"]]
    if name == "tokens":
        return int(row["batch_size"]) * int(row["seq_len"])
    return shape.num_parameters / 1e9 if name == "parameters" else shape.num_tensors


def sizes(name: str, rows: Sequence[Row]) -> list[float]:
    return sorted({size_of(name, row) for row in rows})


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"svg.hashsalt": "lowtide", "svg.fonttype": "none", "font.size": 9})
    return plt


def _save(plt: Any, figure: Any, path: Path) -> None:
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def _tidy(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
