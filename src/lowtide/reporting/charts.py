"""The charts of a report, as plain values for plotly, each with a sentence that says what is to be seen."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from html import escape
from typing import Any

from ..units import format_bytes, format_count
from .history import Curve, History, thin

# Of a first and a second run: dark enough on white, light enough on black.
COLORS = ("#1c8ea3", "#e8703a")
_HELD_OUT = ("#8a63d2", "#c2557f")
_WARNING = "#d9480f"


@dataclasses.dataclass(frozen=True)
class Chart:
    """One chart.

    Attributes:
        key: its name in the page.
        title: what it shows.
        text: what is to be seen, for those who cannot see it.
        traces: plotly's.
        layout: plotly's, without colours of text and ground, which the page adds.
        wide: over the whole width of the page.
    """

    key: str
    title: str
    text: str
    traces: list[dict[str, Any]]
    layout: dict[str, Any]
    wide: bool = False

    def to_dict(self) -> dict[str, Any]:
        """For the page's script."""
        return {"key": self.key, "traces": self.traces, "layout": self.layout}


def curve_charts(runs: Sequence[History]) -> list[Chart]:
    """Everything that is a curve over the steps; a chart without data is left out."""
    return [
        chart
        for chart in (
            _loss(runs),
            _perplexity(runs),
            *_accuracies(runs),
            _learning_rate(runs),
            _grad_norm(runs),
            _lost_updates(runs),
            _speed(runs),
        )
        if chart is not None
    ]


def line(curve: Curve, name: str, color: str, **more: Any) -> dict[str, Any]:
    """A trace of plotly."""
    steps, values = thin(curve)
    style = {"color": color, "width": 2, **more.pop("line", {})}
    return {"type": "scatter", "mode": "lines", "x": steps, "y": values, "name": escape(name), "line": style, **more}


def over_steps(y_title: str, **y_axis: Any) -> dict[str, Any]:
    """The layout of a chart over the steps of a run."""
    return {
        "xaxis": {"title": {"text": "step"}, "rangemode": "tozero"},
        "yaxis": {"title": {"text": y_title, "standoff": 10}, **y_axis},
    }


def label(text: str, run: History, runs: Sequence[History]) -> str:
    """The name of a curve: with the run's, if there are two."""
    return text if len(runs) == 1 else f"{text}, {run.name}"


def _loss(runs: Sequence[History]) -> Chart | None:
    traces: list[dict[str, Any]] = []
    texts = []
    for index, run in enumerate(runs):
        raw, smooth = run.curve("loss"), run.smooth_loss()
        if run.has("loss"):
            name = label("training", run, runs)
            traces.append(
                line(raw, f"{name}, each step", COLORS[index], opacity=0.5, line={"width": 1}, showlegend=False)
            )
            traces.append(line(smooth, name, COLORS[index], line={"width": 2.5}))
            first, last = next(v for v in smooth[1] if v is not None), [v for v in smooth[1] if v is not None][-1]
            texts.append(f"{label('training loss', run, runs)} from {_figure(first)} to {_figure(last)}")
        if run.has("loss", "eval"):
            traces.append(_points(run.curve("loss", "eval"), label("held out", run, runs), _HELD_OUT[index]))
            texts.append(f"{label('held-out loss', run, runs)} {_from_to(run.values('loss', 'eval'))}")
        traces += _skipped(run, runs, smooth)
    if not traces:
        return None
    return Chart("loss", "Loss", _sentence(texts), traces, over_steps("nats per trained token"), wide=True)


def _skipped(run: History, runs: Sequence[History], smooth: Curve) -> list[dict[str, Any]]:
    """A cross for every step that updated nothing, at the height of the mean loss."""
    if not run.skipped:
        return []
    height = dict(zip(*smooth, strict=True))
    known = [value for value in smooth[1] if value is not None] or [0.0]
    shown = run.skipped[-400:]
    reasons = [
        "loss spike" if e.get("spike") else "partly updated" if e.get("partial") else "not finite" for e in shown
    ]
    return [
        {
            "type": "scatter",
            "mode": "markers",
            "x": [event["step"] for event in shown],
            "y": [v if (v := height.get(event["step"])) is not None else known[0] for event in shown],
            "text": reasons,
            "hovertemplate": "step %{x}: %{text}<extra></extra>",
            "name": escape(label("skipped", run, runs)),
            "marker": {"symbol": "x", "size": 9, "color": _WARNING},
        }
    ]


def _perplexity(runs: Sequence[History]) -> Chart | None:
    traces: list[dict[str, Any]] = []
    texts = []
    for index, run in enumerate(runs):
        if run.has("loss"):
            steps, means = run.smooth_loss()
            values = [None if mean is None or mean > 50 else math.exp(mean) for mean in means]
            traces.append(line((steps, values), label("training", run, runs), COLORS[index], line={"width": 1.5}))
        if run.has("perplexity", "eval"):
            traces.append(_points(run.curve("perplexity", "eval"), label("held out", run, runs), _HELD_OUT[index]))
            texts.append(f"{label('held-out perplexity', run, runs)} {_from_to(run.values('perplexity', 'eval'))}")
    if not traces:
        return None
    text = _sentence(texts) or "The exponential of the mean training loss; nothing was held out."
    return Chart("perplexity", "Perplexity", text, traces, over_steps("perplexity", type="log", **_LOG))


def _accuracies(runs: Sequence[History]) -> list[Chart | None]:
    names = {"accuracy_sum": "summed scores", "accuracy_per_token": "scores per token"}
    traces: list[dict[str, Any]] = []
    texts = []
    for index, run in enumerate(runs):
        for (name, what), color in zip(names.items(), (COLORS[index], _HELD_OUT[index]), strict=True):
            if run.has(name, "eval"):
                traces.append(_points(run.curve(name, "eval"), label(what, run, runs), color))
                found = run.values(name, "eval")
                texts.append(f"{label(what, run, runs)}: from {found[0]:.1%} to {found[-1]:.1%}")
    layout = over_steps("right answers", tickformat=".0%", range=[0, 1.02])
    return [Chart("accuracy", "Accuracy on the task", _sentence(texts), traces, layout)] if traces else []


def _learning_rate(runs: Sequence[History]) -> Chart | None:
    def more(run: History, index: int) -> list[dict[str, Any]]:
        if not run.has("lora_lr"):
            return []
        return [line(run.curve("lora_lr"), label("adapters", run, runs), _HELD_OUT[index], line={"dash": "dot"})]

    layout = over_steps("learning rate", exponentformat="e", rangemode="tozero")
    return _simple(runs, "lr", "Learning rate", layout, lambda values: f"highest {max(values):.3g}", more)


def _grad_norm(runs: Sequence[History]) -> Chart | None:
    def more(run: History, index: int) -> list[dict[str, Any]]:
        limit = run.clip_limit
        if limit is None or not run.steps:
            return []
        ends = [float(run.steps[0]["step"]), float(run.steps[-1]["step"])]
        style = {"width": 1.2, "dash": "dash"}
        return [
            line((ends, [limit, limit]), label(f"clipped above {limit:g}", run, runs), _HELD_OUT[index], line=style)
        ]

    def text(values: list[float]) -> str:
        return f"median {_figure(sorted(values)[len(values) // 2])}, largest {_figure(max(values))}"

    layout = over_steps("norm before clipping", type="log", **_LOG)
    return _simple(runs, "grad_norm", "Gradient norm", layout, text, more)


def _lost_updates(runs: Sequence[History]) -> Chart | None:
    layout = over_steps("share of updates", tickformat=".1~%", rangemode="tozero")
    return _simple(
        runs, "lost_updates", "Updates lost in rounding", layout, lambda values: f"mean {sum(values) / len(values):.2%}"
    )


def _speed(runs: Sequence[History]) -> Chart | None:
    layout = over_steps("tokens/s", rangemode="tozero")

    def text(values: list[float]) -> str:
        return f"median {format_count(sorted(values)[len(values) // 2])} tokens a second"

    return _simple(runs, "tokens_per_s", "Speed", layout, text)


def _simple(
    runs: Sequence[History],
    name: str,
    title: str,
    layout: dict[str, Any],
    describe: Callable[[list[float]], str],
    more: Callable[[History, int], list[dict[str, Any]]] = lambda run, index: [],
) -> Chart | None:
    """One curve of each run, and what goes with it."""
    traces, texts = [], []
    for index, run in enumerate(runs):
        if run.has(name):
            traces += [line(run.curve(name), label(title.lower(), run, runs), COLORS[index]), *more(run, index)]
            texts.append(describe(run.values(name)) if len(runs) == 1 else f"{describe(run.values(name))} ({run.name})")
    return Chart(name, title, _sentence(texts), traces, layout) if traces else None


def memory_curve(runs: Sequence[History]) -> Chart | None:
    """Memory over the steps, and what the planner said."""
    traces: list[dict[str, Any]] = []
    texts = []
    for index, run in enumerate(runs):
        if not run.has("memory_bytes"):
            continue
        for name, what, style in (
            ("peak_memory_bytes", "peak so far", {"dash": "dot"}),
            ("memory_bytes", "in use between steps", {}),
        ):
            if run.has(name):
                steps, values = run.curve(name)
                scaled = [None if value is None else value / 2**30 for value in values]
                traces.append(line((steps, scaled), label(what, run, runs), COLORS[index], line=style))
        if run.predicted:
            total = (sum(run.predicted.values()) + run.program_bytes) / 2**30
            ends = [float(run.steps[0]["step"]), float(run.steps[-1]["step"])]
            traces.append(
                line(
                    (ends, [total] * 2),
                    label("predicted peak", run, runs),
                    _HELD_OUT[index],
                    line={"dash": "dash", "width": 1.5},
                )
            )
        if run.peak_bytes:
            texts.append(f"{label('peak', run, runs)} {format_bytes(run.peak_bytes)}")
    if not traces:
        return None
    return Chart(
        "memory", "Memory over time", _sentence(texts), traces, over_steps("GiB", rangemode="tozero"), wide=True
    )


_LOG = {"exponentformat": "none", "minor": {"showgrid": False}, "nticks": 6}


def _points(curve: Curve, name: str, color: str) -> dict[str, Any]:
    return line(curve, name, color) | {"mode": "lines+markers", "marker": {"size": 7, "color": color}}


def _from_to(values: Sequence[float]) -> str:
    if len(values) == 1:
        return _figure(values[0])
    lowest = min(values)
    end = f"from {_figure(values[0])} to {_figure(values[-1])}"
    return end if lowest == values[-1] or len(values) < 3 else f"{end}, lowest {_figure(lowest)}"


def _figure(value: float) -> str:
    return f"{value:.4g}"


def _sentence(texts: Sequence[str]) -> str:
    joined = "; ".join(texts)
    return f"{joined[:1].upper()}{joined[1:]}." if joined else ""
