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
# Where the number of a point may stand, in points from it, nearest first.
_PLACES = [(dx, dy) for far in range(8, 60, 5) for dx in (far, -far, 0) for dy in (0, far, -far) if dx or dy]


def memory_time(found: Sequence[Result], model: str, path: Path) -> None:
    """One numbered point a method: seconds a step, and GB above imports; the numbers are explained at the side."""
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(10, 6))
    for each in found:
        color, marker, _ = STYLES[METHODS[each.method].kind]
        axes.scatter(each.step_s, each.above_bytes / 1e9, c=color, marker=marker, s=42, zorder=3)
    axes.axhline(2 * found[0].parameters / 1e9, color="#999999", linewidth=0.8, linestyle=":")
    axes.set_xlabel("median step, seconds")
    axes.set_ylabel("peak memory above imports, GB")
    axes.set_title(
        f"{model}: lower and further left is better; dotted: the weights in bfloat16", loc="left", fontsize=10
    )
    axes.set_xlim(0, max(each.step_s for each in found) * 1.1)
    axes.set_ylim(0, max(each.above_bytes for each in found) / 1e9 * 1.1)
    _tidy(axes)
    figure.subplots_adjust(left=0.07, right=0.66, top=0.93, bottom=0.09)
    _explain(axes, found)
    _number(figure, axes, found)
    _save(plt, figure, path)


def _explain(axes: Any, found: Sequence[Result]) -> None:
    """The numbers and the markers, as lines of text at the right."""
    height = 1.0
    for kind, (color, marker, label) in STYLES.items():
        own = [(number, each) for number, each in enumerate(found, 1) if METHODS[each.method].kind == kind]
        if not own:
            continue
        axes.scatter(1.04, height - 0.012, c=color, marker=marker, s=42, transform=axes.transAxes, clip_on=False)
        axes.text(
            1.065, height, label, transform=axes.transAxes, va="top", fontsize=8.5, fontweight="bold", color=color
        )
        for number, each in own:
            height -= 0.034
            axes.text(1.065, height, f"{number}  {METHODS[each.method].title}", transform=axes.transAxes, va="top", fontsize=8)  # fmt: skip
        height -= 0.05


def _number(figure: Any, axes: Any, found: Sequence[Result]) -> None:
    """Numbers beside their points, at the first place where they cover no other number and no point."""
    from matplotlib.transforms import Bbox

    figure.canvas.draw()
    dot = figure.dpi / 72  # pixels of a point
    spots = [axes.transData.transform((each.step_s, each.above_bytes / 1e9)) for each in found]
    taken = [Bbox.from_bounds(x - 4 * dot, y - 4 * dot, 8 * dot, 8 * dot) for x, y in spots]
    for number, (each, (x, y)) in enumerate(zip(found, spots, strict=True), 1):
        width = 5.5 * len(str(number)) * dot
        for place in _PLACES:
            left, bottom = x + place[0] * dot - width / 2, y + (place[1] - 4) * dot
            box = Bbox.from_bounds(left, bottom, width, 8 * dot)
            inside = axes.bbox.y0 < box.y0 and box.y1 < axes.bbox.y1 and axes.bbox.x0 < box.x0
            if inside and not any(box.overlaps(other) for other in taken):
                break
        taken.append(box)
        color = STYLES[METHODS[each.method].kind][0]
        axes.annotate(
            str(number), (each.step_s, each.above_bytes / 1e9), place, textcoords="offset points", fontsize=8, color=color, ha="center",
            va="center", arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.5} if max(map(abs, place)) > 12 else None,
        )  # fmt: skip


def growth(drawn: dict[str, list[Row]], path: Path) -> None:
    """Two rows of pictures, memory and time; a column for each thing that grows.

    Args:
        drawn: rows by a key of ``AXES``.
        path: the SVG file.
    """
    plt = _pyplot()
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

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
            axes.set_xticks(
                sizes(name, rows), [f"{size:.2g}" if size < 100 else f"{size:.0f}" for size in sizes(name, rows)]
            )
            axes.xaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
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
