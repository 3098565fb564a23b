"""Memory by kind as the planner predicted it, beside what was measured: Figure 2 of the LOMO paper for the user's own run.

Measured is one step, moment by moment; the bar beside the prediction is its fullest moment.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from ..units import format_bytes, format_count
from .charts import Chart, label, line
from .history import History

PROGRAM, MEASURED = "Python and libraries", "measured above that"
REST, ELSEWHERE = "other activations, temporaries, allocator", "more in other steps, or while loading"
# The kinds of the planner (``planning.KINDS``, which would import torch) in the groups of the paper's figure, in the order of the stack.
GROUPS = {
    "weights": ("weights", "pools", "gathered weights"),
    "gradients": ("gradients",),
    "optimizer state": ("optimizer state",),
    "activations": ("kept block inputs", "one block's working set", "logits"),
    "temporaries of the update": ("temporaries of the update",),
    "buffers of the link": ("buffers of the link",),
    "free in the allocator": ("free in the allocator",),
}
OTHER = "other"
_COLORS = {
    PROGRAM: "#8b949e",
    "weights": "#1c8ea3",
    "gradients": "#e8703a",
    "optimizer state": "#d6a419",
    "activations": "#8a63d2",
    "temporaries of the update": "#c2557f",
    "buffers of the link": "#4f6fb5",
    "free in the allocator": "#b7a99a",
    OTHER: "#6f8f5f",
    REST: "#a78bdc",
    ELSEWHERE: "#57ab8a",
    MEASURED: "#2f9e63",
}


def by_group(run: History) -> dict[str, float]:
    """Predicted bytes, the program itself first; groups of nothing are left out."""
    grouped = {name: sum(run.predicted.get(kind, 0.0) for kind in kinds) for name, kinds in GROUPS.items()}
    named = {kind for kinds in GROUPS.values() for kind in kinds}
    grouped[OTHER] = sum(value for kind, value in run.predicted.items() if kind not in named)
    everything = {PROGRAM: run.program_bytes, **grouped}
    return {name: value for name, value in everything.items() if value > 0}


def moments_by_group(run: History) -> dict[str, list[float]]:
    """Bytes at every moment of the step that was followed, in the same groups; they add up to the total."""
    found = run.memory_of_step
    if found is None:
        return {}
    program = [min(run.program_bytes, total) for total in found.total]
    left = [total - own for total, own in zip(found.total, program, strict=True)]
    stack = {PROGRAM: program}
    for name, kinds in GROUPS.items():
        counted = [column for kind, column in found.by_kind.items() if kind in kinds]
        if counted:
            # What was counted can be more than what the system says is resident: pages of a file that were not read yet.
            stack[name] = [min(sum(each), most) for *each, most in zip(*counted, left, strict=True)]
            left = [most - used for most, used in zip(left, stack[name], strict=True)]
    stack[REST] = left
    return {name: values for name, values in stack.items() if any(values)}


def measured_by_group(run: History) -> dict[str, float]:
    """Of the run's peak: the fullest moment of the step that was followed by group, and what the peak was above it."""
    if not run.peak_bytes:
        return {}
    found = run.memory_of_step
    if found is None:
        program = min(run.program_bytes, run.peak_bytes)
        return {PROGRAM: program, MEASURED: run.peak_bytes - program}
    parts = {name: values[found.fullest] for name, values in moments_by_group(run).items()}
    parts[ELSEWHERE] = max(0.0, run.peak_bytes - found.total[found.fullest])
    return {name: value for name, value in parts.items() if value > 0}


def memory_in_step(run: History, runs: Sequence[History]) -> Chart | None:
    """Every moment of one step, stacked by group; None where none was followed."""
    found = run.memory_of_step
    if found is None:
        return None
    groups = moments_by_group(run)
    traces: list[dict[str, Any]] = [
        {
            "type": "scatter",
            "mode": "lines",
            "stackgroup": "memory",
            "name": escape(name),
            "x": found.seconds,
            "y": [value / 2**30 for value in groups[name]],
            "text": [
                f"{format_bytes(value)}, {escape(where)}"
                for value, where in zip(groups[name], found.where, strict=True)
            ],
            "hovertemplate": "%{fullData.name}: %{text}<extra></extra>",
            "line": {"width": 0.5, "color": color, "shape": "hv"},
            "fillcolor": color,
        }
        for name, color in _COLORS.items()
        if name in groups
    ]
    top, text = found.fullest, ""
    if run.predicted:
        total = sum(by_group(run).values())
        ends = [found.seconds[0], found.seconds[-1]]
        traces.append(
            line((ends, [total / 2**30] * 2), "predicted peak", "#c2557f", line={"dash": "dash", "width": 1.5})
        )
        text = f" The prediction, {format_bytes(total)}, is for the largest step that the settings allow."
    tokens = "" if found.num_tokens is None else f" ({format_count(found.num_tokens)} tokens)"
    return Chart(
        "memory-in-step" if len(runs) == 1 else f"memory-in-step-{runs.index(run)}",
        label("Memory inside of a step", run, runs),
        f"Step {found.step}{tokens}: {format_bytes(found.total[top])} at the fullest moment ({found.where[top]}); gradients never take "
        f"more than {format_bytes(found.most.get('gradients', 0.0))}.{text}",
        traces,
        {
            "xaxis": {"title": {"text": "seconds since the step began"}, "rangemode": "tozero"},
            "yaxis": {"title": {"text": "GiB", "standoff": 10}, "rangemode": "tozero"},
            "hovermode": "x unified",
        },
        wide=True,
    )


def memory_by_kind(runs: Sequence[History]) -> Chart | None:
    """Two bars for each run whose prediction was recorded; None if there is no such run."""
    bars: list[tuple[str, dict[str, float]]] = []
    texts = []
    for run in runs:
        if not run.predicted:
            continue
        predicted, who = by_group(run), "" if len(runs) == 1 else f"{run.name}: "
        bars.append((f"{who}predicted", predicted))
        total = sum(predicted.values())
        text = f"{who and 'in '}{who}predicted {format_bytes(total)}"
        if run.peak_bytes:
            bars.append((f"{who}measured", measured_by_group(run)))
            text += f", measured {format_bytes(run.peak_bytes)} ({total / run.peak_bytes - 1:+.1%})"
        texts.append(text)
    if not bars:
        return None
    joined = "; ".join(texts)
    return Chart(
        "memory-by-kind",
        "Memory by kind, predicted and measured",
        f"{joined[:1].upper()}{joined[1:]}. The prediction is for the largest step that the settings allow.",
        _traces(bars),
        {
            "barmode": "stack",
            "height": 150 + 62 * len(bars),
            "xaxis": {"title": {"text": "GiB at the fullest moment"}, "rangemode": "tozero"},
            "yaxis": {"autorange": "reversed", "automargin": True},
        },
        wide=True,
    )


def _traces(bars: Sequence[tuple[str, dict[str, float]]]) -> list[dict[str, Any]]:
    return [
        {
            "type": "bar",
            "orientation": "h",
            "name": escape(name),
            "y": [escape(where) for where, _ in bars],
            "x": [parts.get(name, 0.0) / 2**30 for _, parts in bars],
            "text": [format_bytes(parts[name]) if name in parts else "" for _, parts in bars],
            "textposition": "none",
            "hovertemplate": "%{fullData.name}: %{text}<extra></extra>",
            "marker": {"color": color},
            "width": 0.6,
        }
        for name, color in _COLORS.items()
        if any(parts.get(name) for _, parts in bars)
    ]
