"""What the demo found: on the terminal in plain words, in results.json, and as a picture."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import platform
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..reporting import MemoryBar, plot_run
from ..training import TrainConfig, read_events
from ..units import format_bytes, format_count, format_duration

if TYPE_CHECKING:
    from .demo_material import Material
    from .demo_score import Example, Score

_SHOWN_CHARACTERS = 160


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Everything that a demo run found.

    ``trained`` and the values of ``adamw`` (by dtype) are the results of ``demo_process``: ``peak_bytes`` and
    ``library_bytes``, or ``error``. ``examples`` are pairs, before and after. ``seconds`` are those of the phases.
    """

    directory: Path
    model: str
    packaged: bool
    material: Material
    config: TrainConfig
    num_parameters: int
    before: Score
    after: Score
    examples: list[tuple[Example, Example]]
    trained: dict[str, Any]
    adamw: dict[str, dict[str, Any]]
    seconds: dict[str, float]

    def share_of_adamw(self, dtype: str) -> float | None:
        """This run's peak memory as a share of AdamW's, or None where that was not measured."""
        peak = self.adamw.get(dtype, {}).get("peak_bytes")
        return self.trained["peak_bytes"] / peak if peak else None


def save_outcome(outcome: Outcome) -> None:
    """Write results.json and result.png into the output directory."""
    path = outcome.directory / "results.json"
    path.write_text(json.dumps(_figures(outcome), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    losses = [event["loss"] for event in _train_events(outcome)]
    plot_run(
        outcome.directory / "result.png",
        title=_finding(outcome),
        subtitle=f"All {format_count(outcome.num_parameters)} parameters of {outcome.model} in {outcome.config.dtype}, "
        f"fused backward with AdaLomo, {outcome.trained['num_steps']} steps of {outcome.config.batch_size} sequences",
        losses=[float("nan") if loss is None else loss for loss in losses],
        memory=_bars(outcome),
        note=_how_measured(outcome),
    )


def print_outcome(outcome: Outcome) -> None:
    """Say in plain words what happened and what to type next."""
    directory = outcome.directory
    for line in (
        "",
        _finding(outcome),
        "",
        *_example_lines(outcome),
        *_memory_lines(outcome),
        "",
        f"Saved in {directory}: model/, result.png, results.json, data/, training/ "
        f"({format_duration(sum(outcome.seconds.values()))} in all)",
        "",
        "Next:",
        *(f"  {command}" for command in _next_commands(outcome)),
    ):
        print(line, flush=True)


def _finding(outcome: Outcome) -> str:
    before, after = outcome.before, outcome.after
    if after.metric == "accuracy":
        text = f"From {before.value:.0%} to {after.value:.0%} right on held-out questions"
    else:
        text = f"Held-out perplexity from {before} to {after}"
    share = outcome.share_of_adamw(outcome.config.dtype)
    return text if share is None else f"{text}, in {share:.0%} of AdamW's memory"


def _example_lines(outcome: Outcome) -> list[str]:
    lines = ["Held-out examples:"]
    for before, after in outcome.examples:
        lines += [
            f"  {_one_line(before.prompt)}",
            f"    expected  {_one_line(before.expected)}",
            f"    before    {_one_line(before.answer) or '(nothing)'}",
            f"    after     {_one_line(after.answer) or '(nothing)'}",
            "",
        ]
    return lines


def _memory_lines(outcome: Outcome) -> list[str]:
    ours = f"lowtide, {outcome.config.dtype}"
    lines = ["Peak memory (resident set):", f"  {ours:<20} {format_bytes(outcome.trained['peak_bytes']):>9}"]
    for dtype, measured in outcome.adamw.items():
        name = f"AdamW, {dtype}"
        share = outcome.share_of_adamw(dtype)
        if share is None:
            lines.append(f"  {name:<20} {measured['error']}")
        else:
            lines.append(f"  {name:<20} {format_bytes(measured['peak_bytes']):>9}   {1 / share:.1f} times as much")
    return [*lines, f"  {_how_measured(outcome)}"]


def _how_measured(outcome: Outcome) -> str:
    libraries = format_bytes(outcome.trained["library_bytes"])
    each = f"Python and its libraries alone take {libraries} of it"
    if not outcome.adamw:
        return f"Of a process that only trained; {each}."
    return f"Each of a process of its own, with the same imports, model and batches; {each}."


def _next_commands(outcome: Outcome) -> list[str]:
    model = shlex.quote(str(outcome.directory / "model"))
    data = shlex.quote(str(outcome.material.train_file))
    record = outcome.material.held_out[-1]
    if record.messages is not None:
        ask = f"lowtide generate --model {model} --chat"
    else:
        prompt = record.prompt or outcome.examples[0][0].prompt
        ask = f"lowtide generate --model {model} --raw --prompt {shlex.quote(prompt)}"
    return [
        f"{ask}   # ask it something",
        f"lowtide train --model {model} --data {data} --output tuned   # go on, or name your own data",
        "lowtide demo --data FILE   # the same with your own text or JSONL",
    ]


def _bars(outcome: Outcome) -> list[MemoryBar]:
    measured = [(f"AdamW\n{dtype}", result, False) for dtype, result in outcome.adamw.items() if "peak_bytes" in result]
    return [
        MemoryBar(label, result["peak_bytes"], result["library_bytes"], ours)
        for label, result, ours in [(f"lowtide\n{outcome.config.dtype}", outcome.trained, True), *measured]
    ]


def _figures(outcome: Outcome) -> dict[str, Any]:
    material = outcome.material
    packages = ("lowtide", "torch", "transformers")
    return {
        "finding": _finding(outcome),
        "model": outcome.model,
        "model_note": "4-bit weights (GGUF Q4_1), dequantised" if outcome.packaged else None,
        "num_parameters": outcome.num_parameters,
        "data": {"title": material.title, "held_out": material.held_out_note, "num_train": material.num_train},
        "before": dataclasses.asdict(outcome.before),
        "after": dataclasses.asdict(outcome.after),
        "examples": [
            {"prompt": before.prompt, "expected": before.expected, "before": before.answer, "after": after.answer}
            for before, after in outcome.examples
        ],
        "memory": {"lowtide": outcome.trained, "adamw": outcome.adamw, "how": _how_measured(outcome)},
        "train_losses": [event["loss"] for event in _train_events(outcome)],
        "seconds": {phase: round(some, 1) for phase, some in outcome.seconds.items()},
        "settings": outcome.config.to_dict(),
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in packages},
        "machine": f"{platform.system()} {platform.machine()}",
    }


def _train_events(outcome: Outcome) -> list[dict[str, Any]]:
    return read_events(outcome.directory / "training" / "metrics.jsonl", "train")


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _SHOWN_CHARACTERS else line[: _SHOWN_CHARACTERS - 3] + "..."
