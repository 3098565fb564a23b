"""Memory by kind as the planner predicted it, beside what was measured: Figure 2 of the LOMO paper for the user's own run."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from ..units import format_bytes
from .charts import Chart
from .history import History

PROGRAM, MEASURED = "Python and libraries", "measured above that"
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
    MEASURED: "#2f9e63",
}


def by_group(run: History) -> dict[str, float]:
    """Predicted bytes, the program itself first; groups of nothing are left out."""
    grouped = {name: sum(run.predicted.get(kind, 0.0) for kind in kinds) for name, kinds in GROUPS.items()}
    named = {kind for kinds in GROUPS.values() for kind in kinds}
    grouped[OTHER] = sum(value for kind, value in run.predicted.items() if kind not in named)
    everything = {PROGRAM: run.program_bytes, **grouped}
    return {name: value for name, value in everything.items() if value > 0}


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
            program = min(run.program_bytes, run.peak_bytes)
            measured = {PROGRAM: program, MEASURED: run.peak_bytes - program}
            bars.append((f"{who}measured", measured))
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
