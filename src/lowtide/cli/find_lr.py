"""``lowtide train --find-lr``: recommend a learning rate for a run, in plain words, with its curve beside the output."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import math
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from ..training.config import TrainConfig
from ..units import format_count
from .arguments import flag_of

if TYPE_CHECKING:
    from ..training import Event, LrFinding


def run_find_lr(config: TrainConfig, args: argparse.Namespace) -> int:
    """Test learning rates, say what was found, and write it down. Returns the exit code: 1 without a recommendation."""
    from ..training import find_lr
    from ..training.range_test import default_range

    lowest, highest = default_range(config)

    def on_event(event: Event) -> None:
        if event["event"] == "config":
            print(
                f"Trying learning rates from {lowest:g} to {highest:g} with {config.optimizer}, on {config.model} "
                f"({format_count(event['num_parameters'])} parameters, {config.dtype}, {event['device']}).\n"
                f"{event['num_steps']} steps, fewer if the loss diverges earlier. The trained weights are thrown away.",
                flush=True,
            )

    finding = find_lr(config, on_event=on_event)
    print(describe_finding(finding), flush=True)
    picture, numbers = free_files(config.output)
    numbers.parent.mkdir(parents=True, exist_ok=True)
    with numbers.open("x", encoding="utf-8") as file:
        json.dump(finding.to_dict(), file, indent=1, ensure_ascii=False, allow_nan=False)
    print(f"The numbers are in {numbers}.")
    if importlib.util.find_spec("matplotlib") is None:
        print("There is no picture, because matplotlib is not installed: pip install matplotlib")
    else:
        draw(finding, picture)
        print(f"The curve is in {picture}.")
    if finding.recommended is None:
        return 1
    print(f"Next:\n  {next_command(args, finding.recommended)}", flush=True)
    return 0


def describe_finding(finding: LrFinding) -> str:
    """What was found, for people."""
    if finding.recommended is None:
        return "\n".join(["No learning rate can be recommended.", *map(_sentence, finding.warnings)])
    lines = [f"Recommended learning rate: {finding.recommended:g}"]
    lowest = min(point.smoothed for point in finding.points if math.isfinite(point.smoothed))
    story = (
        f"The loss of {finding.num_watched} {_kind(finding)} sequences fell from {finding.loss_before:.3g} to about "
        f"{lowest:.3g} at a rate of {finding.lr_lowest:.2g}"
    )
    if finding.lr_diverged is not None:
        story += f", and diverged from {finding.lr_diverged:.2g} on"
    lines.append(f"{story}.")
    if finding.warnings:
        lines.append("Take it as a first guess only:")
        lines += [f"  {_sentence(warning)}" for warning in finding.warnings]
    return "\n".join(lines)


def next_command(args: argparse.Namespace, lr: float) -> str:
    """The command that was typed, with the rate instead of ``--find-lr``."""
    words = ["lowtide", "train"]
    if getattr(args, "config", None):
        words += ["--config", args.config]
    for field in dataclasses.fields(TrainConfig):
        value = getattr(args, field.name, None)
        if field.name == "lr" or not hasattr(args, field.name):
            continue
        flag = flag_of(field.name)
        if isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-", 1))
        else:
            words += [flag, *map(str, value if isinstance(value, list) else [value])]
    return shlex.join([*words, "--lr", f"{lr:g}"])


def free_files(output: str) -> tuple[Path, Path]:
    """(picture, numbers) beside the output directory, numbered so that neither exists yet."""
    path = Path(output).expanduser()
    base = path if path.name not in ("", "..") else path.resolve()
    number, suffix = 1, ""
    while True:
        files = [base.with_name(f"{base.name}.find-lr{suffix}.{kind}") for kind in ("png", "json")]
        if not any(file.exists() or file.is_symlink() for file in files):
            return files[0], files[1]
        number += 1
        suffix = f"-{number}"


def draw(finding: LrFinding, path: Path) -> None:
    """The picture of the curve. Needs matplotlib."""
    from ..reporting import plot_lr_curve

    config = finding.config
    settings = [config.optimizer, config.dtype, f"batch of {config.batch_size}"]
    if config.effective_clip_grad_norm is not None:
        settings.append(f"clip_grad_norm {config.effective_clip_grad_norm:g}")
    found = "No rate to recommend" if finding.recommended is None else f"Recommended: {finding.recommended:g}"
    plot_lr_curve(
        path,
        title=f"Learning rate for {Path(config.model).name}. {found}",
        subtitle=", ".join(settings),
        rates=[point.lr for point in finding.points],
        losses=[point.loss for point in finding.points],
        smoothed=[point.smoothed for point in finding.points],
        loss_before=finding.loss_before,
        loss_label=f"loss of {finding.num_watched} {_kind(finding)} sequences (nats per token)",
        recommended=finding.recommended,
        lr_diverged=finding.lr_diverged,
        notes=[_sentence(warning) for warning in finding.warnings],
    )


def _kind(finding: LrFinding) -> str:
    return "held-out" if finding.held_out else "training"


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."
