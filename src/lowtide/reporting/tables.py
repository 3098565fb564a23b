"""The words and tables of a report, as HTML. Everything that comes from the user goes through ``cell`` or ``escape``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from ..units import format_bytes, format_count, format_duration
from .charts import label
from .history import History, number
from .memory_chart import by_group, measured_by_group

_NONE = "-"


def table(caption: str, header: Sequence[str], rows: Iterable[Sequence[str]], *, quiet: bool = False) -> str:
    """A table of text, whose first column names the rows; a quiet caption is for screen readers only."""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in header)
    body = "".join(
        f'<tr><th scope="row">{escape(row[0]).replace("_", "_<wbr>")}</th>'
        + "".join(f"<td>{escape(text)}</td>" for text in row[1:])
        + "</tr>"
        for row in rows
    )
    return f"<table><caption{' class=quiet' if quiet else ''}>{escape(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def key_figures(runs: Sequence[History]) -> str:
    """What a run came to, one column for each run."""
    columns = [_figures(run) for run in runs]
    names = [name for name in columns[0] if any(column.get(name, _NONE) != _NONE for column in columns)]
    rows = [[name, *(column.get(name, _NONE) for column in columns)] for name in names]
    return table("Key figures", ["", *(run.name for run in runs)], rows, quiet=True)


def _figures(run: History) -> dict[str, str]:
    smooth = [value for value in run.smooth_loss()[1] if value is not None]
    parameters, planned = number(run.facts.get("num_parameters")), number(run.facts.get("num_steps"))
    peak, predicted = run.peak_bytes, sum(by_group(run).values()) if run.predicted else None
    rates, lost = run.values("tokens_per_s"), run.values("lost_updates")
    how = (
        ", clip adaptive" if run.settings.get("clip") == "adaptive" else ""
    )  # which holds tensors to norms of their own
    norms = run.has("grad_norm") and run.clip_limit is not None
    return {
        "State": {"finished": "finished", "interrupted": "interrupted", "open": "no end yet", "empty": "no step yet"}[
            run.state
        ],
        "Model": str(run.settings.get("model", _NONE)),
        "Parameters": _NONE if parameters is None else format_count(parameters),
        "Steps": f"{run.num_steps}" if planned is None else f"{run.num_steps} of {planned:.0f}",
        "Time": _NONE if run.seconds is None else format_duration(run.seconds),
        "Tokens": format_count(sum(run.values("num_tokens"))),
        "Training loss": _change(smooth, ".4f"),
        "Held-out loss": _change(run.values("loss", "eval"), ".4f"),
        "Held-out perplexity": _change(run.values("perplexity", "eval"), ".2f"),
        "Accuracy (summed scores)": _change(run.values("accuracy_sum", "eval"), ".1%"),
        "Accuracy (scores per token)": _change(run.values("accuracy_per_token", "eval"), ".1%"),
        "Speed (median)": f"{format_count(sorted(rates)[len(rates) // 2])} tokens/s" if rates else _NONE,
        "Skipped steps": str(len(run.skipped)),
        "Clipped steps": f"{len(run.clipped())} (norm above {run.clip_limit:g}{how})" if norms else _NONE,
        "Updates lost in rounding (mean)": f"{sum(lost) / len(lost):.2%}" if lost else _NONE,
        "Peak memory, measured": _NONE if peak is None else format_bytes(peak),
        "Peak memory, predicted": _NONE if predicted is None else format_bytes(predicted),
    }


def _change(values: Sequence[float], form: str) -> str:
    if not values:
        return _NONE
    return f"{values[0]:{form}} → {values[-1]:{form}}" if len(values) > 1 else f"{values[0]:{form}}"


def memory_table(runs: Sequence[History]) -> str:
    """Bytes by kind as predicted and as measured at the fullest moment; empty where nothing was predicted."""
    shown = [run for run in runs if run.predicted]
    if not shown:
        return ""
    columns = [column for run in shown for column in (by_group(run), measured_by_group(run))]
    names = list(dict.fromkeys(name for column in columns for name in column))
    rows = [[name, *(format_bytes(column[name]) if name in column else _NONE for column in columns)] for name in names]
    rows.append(["together", *(format_bytes(sum(column.values())) if column else _NONE for column in columns)])
    titles = [label(what, run, runs) for run in shown for what in ("predicted", "measured")]
    return table("Memory by kind", ["", *titles], rows)


def held_out_table(runs: Sequence[History]) -> str:
    """Every evaluation; of many the first and the last ones."""
    rows = []
    for run in runs:
        shown = run.evals if len(run.evals) <= 40 else [*run.evals[:10], *run.evals[-30:]]
        for event in shown:
            loss, perplexity = number(event.get("loss")), number(event.get("perplexity"))
            accuracies = [number(event.get(name)) for name in ("accuracy_sum", "accuracy_per_token")]
            cells = [_NONE if loss is None else f"{loss:.4f}", _NONE if perplexity is None else f"{perplexity:.2f}"]
            cells += [_NONE if value is None else f"{value:.1%}" for value in accuracies]
            rows.append([f"{event['step']:.0f}" if len(runs) == 1 else f"{run.name}, {event['step']:.0f}", *cells])
    header = ["step", "loss", "perplexity", "summed scores", "scores per token"]
    if all(row[3:] == [_NONE, _NONE] for row in rows):
        rows, header = [row[:3] for row in rows], header[:3]
    return table("Evaluations", header, rows) if rows else ""


def settings_tables(runs: Sequence[History], defaults: Mapping[str, Any]) -> str:
    """Settings that differ between the runs, then those that differ from the default, then, folded, the others."""
    names = list(dict.fromkeys([*defaults, *(name for run in runs for name in run.settings)]))
    names = [name for name in names if any(name in run.settings for run in runs)]
    values = {name: [run.settings.get(name, defaults.get(name)) for run in runs] for name in names}
    header = ["setting", *(run.name for run in runs), "default"]
    between = [name for name in names if any(value != values[name][0] for value in values[name])]
    changed = [name for name in names if name not in between and _plain(values[name][0]) != _plain(defaults.get(name))]
    same = [name for name in names if name not in between and name not in changed]

    def rows(some: Sequence[str]) -> list[list[str]]:
        return [
            [name, *map(_value, values[name]), _value(defaults[name]) if name in defaults else _NONE] for name in some
        ]

    parts = []
    if len(runs) > 1:
        parts.append(
            table("Different in the two runs", header, rows(between))
            if between
            else "<p>Both runs have the same settings.</p>"
        )
    if changed:
        parts.append(table("Different from the default", header, rows(changed)))
    if same:
        parts.append(
            f"<details><summary>All others ({len(same)})</summary>{table('As the default', header, rows(same))}</details>"
        )
    return "".join(parts)


def versions_table(runs: Sequence[History]) -> str:
    """What the runs were made with, as far as it was recorded."""
    found = [run.facts.get("versions") for run in runs]
    known = [each if isinstance(each, dict) else {} for each in found]
    names = list(dict.fromkeys(name for each in known for name in each))
    rows = [[str(name), *(str(each.get(name, _NONE)) for each in known)] for name in names]
    rows.append(["trained on", *(str(run.facts.get("device", _NONE)) for run in runs)])
    return table("Versions and machine", ["", *(run.name for run in runs)], rows, quiet=True)


def notes(run: History) -> list[str]:
    """Sentences on what is out of the ordinary, as plain text."""
    found = []
    if run.state == "interrupted":
        found.append(f"The run was interrupted after step {run.num_steps}; it can go on with --resume.")
    if run.state == "open":
        found.append("No end is recorded: the run is still going on, or it was killed.")
    if run.state == "empty":
        found.append("No step has been recorded yet.")
    resumed = [int(event["step"]) for part in run.parts for event in part if event["event"] == "resume"]
    if resumed:
        found.append(f"The run was resumed {_times(len(resumed))}, after step {', '.join(map(str, resumed))}.")
    if run.num_taken_anew:
        found.append(
            f"{_count(run.num_taken_anew, 'step')} went back to a checkpoint and were taken anew; the last ones are shown."
        )
    if run.skipped:
        found.append(
            f"{_count(len(run.skipped), 'step')} updated nothing or only a part, because of a loss or gradient that was not finite or a spike."
        )
    if run.failed_saves:
        found.append(
            f"{_count(len(run.failed_saves), 'checkpoint')} could not be written: {run.failed_saves[-1]['error']}"
        )
    if run.num_unreadable:
        found.append(f"{_count(run.num_unreadable, 'line')} of the metrics could not be read and were left out.")
    if run.facts and not run.predicted:
        why = (
            "the planner does not know adapters"
            if number(run.settings.get("lora_rank"))
            else "an older version recorded none"
        )
        found.append(f"No memory was predicted for this run, so there is none beside the measured ({why}).")
    return found


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _value(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _times(number: int) -> str:
    return "once" if number == 1 else f"{number} times"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
