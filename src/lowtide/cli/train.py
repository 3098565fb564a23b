"""``lowtide train``: fine-tune every parameter of a model."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from ..training.choices import GROUPS
from ..training.config import TrainConfig
from ..units import format_bytes, format_count, format_duration
from .arguments import UsageError, add_dataclass_arguments, build_from_arguments
from .live import ANY_PORT, live_report, port
from .memory import advice_when_memory_lacks

if TYPE_CHECKING:
    from ..training import DryRun, Event, TrainResult

_EPILOG = """\
example:
  lowtide train --model HuggingFaceTB/SmolLM2-135M-Instruct --data train.jsonl --output tuned \\
                --optimizer adalomo --lr 1e-3 --max-steps 200 --batch-size 8 --micro-batch-size 2

The same as a file, `lowtide train --config run.yaml`, where flags given as well win over the file:
  model: HuggingFaceTB/SmolLM2-135M-Instruct
  data: [train.jsonl]
  output: tuned
  lr: 1.0e-3
  max_steps: 200

Interrupted (Ctrl-C), killed, or out of power? Checkpoints are written on the way with --save-every 15m (or a number of steps), and
`lowtide train --config tuned/config.yaml --resume` goes on from the last one, bit for bit.

Which learning rate? Add --find-lr to the same command: it tries some for a few minutes and says which to use.

What a run used is in OUTPUT/config.yaml, which --config takes again. Paths are relative to where you are."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags: one for each field of ``TrainConfig``, and ``--config``."""
    add_dataclass_arguments(parser, TrainConfig, GROUPS)
    parser.add_argument(
        "--find-lr",
        action="store_true",
        help="train nothing; try learning rates on this model and data with these settings, recommend one, and write the "
        "curve beside the output directory (OUTPUT.find-lr.png and .json)",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="train nothing; take two real steps with these settings, and show the memory that they took beside what the "
        "planner said. Nothing is kept",
    )
    parser.add_argument(
        "--live",
        nargs="?",
        type=port,
        const=ANY_PORT,
        metavar="PORT",
        help="show the report of the run as a page that updates itself, for this machine only (127.0.0.1), while it goes on; without "
        "PORT the first free one from 8765 on. Needs pip install 'lowtide[report]'",
    )
    parser.usage = "%(prog)s --model NAME --data FILE [FILE ...] --output DIR [--config FILE] [settings]"
    parser.epilog = _EPILOG


def run(args: argparse.Namespace) -> int:
    """Train, and say in plain words what will be and what has been done. Returns the exit code."""
    config = build_from_arguments(TrainConfig, args)
    config.validate()
    from ..training import train
    from .quiet import quiet_libraries

    quiet_libraries(tell_data=True)
    if args.live is not None and (args.dry_run or args.find_lr):
        raise UsageError("--live shows a training run, and --dry-run and --find-lr train nothing: leave it out")
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if several and (args.dry_run or args.find_lr or args.live is not None):
        raise UsageError("--dry-run, --find-lr and --live are for one process: start them without torchrun")
    if args.dry_run:
        from ..training import dry_run

        with advice_when_memory_lacks(config):
            found = dry_run(config)
        print(describe_dry_run(found), flush=True)
        return 0
    if args.find_lr:
        from .find_lr import run_find_lr

        with advice_when_memory_lacks(config):
            return run_find_lr(config, args)

    def on_event(event: Event) -> None:
        if event["event"] == "config":
            print(describe_plan(config, event), flush=True)

    live: AbstractContextManager[object] = (
        nullcontext() if args.live is None else live_report(Path(config.output), args.live)
    )
    with live, advice_when_memory_lacks(config):
        result = train(config, on_event=on_event)
    if os.environ.get("RANK", "0") == "0":
        print(describe_result(result), flush=True)
    return 128 + (result.signal_number or signal.SIGINT) if result.interrupted else 0


def describe_plan(config: TrainConfig, event: Event) -> str:
    """What the run will do, from its first event: a few lines for people."""
    steps, epochs = event["num_steps"], event["num_steps"] / event["steps_per_epoch"]
    micro = config.micro_batch_size or config.batch_size
    how = "all at once" if micro >= config.batch_size else f"through each layer {micro} at a time"
    tokens = format_count(config.batch_size * config.max_seq_len)
    return "\n".join(
        (
            f"{_what(config, event)} of {config.model} in {config.dtype} on {event['device']}{_ranks(event)}.",
            f"{_count(steps, 'step')} ({epochs:.2g} epochs) of {_count(config.batch_size, 'sequence')}{_too_many(config, event)}, at most "
            f"{tokens} tokens a step, "
            f"{how}.",
            f"Data: {_count(event['data_num_records'], 'record')}, {format_count(event['data_num_tokens'])} tokens"
            f"{_losses(event)}.",
            *_describe_homes(event),
            f"Optimizer: {_optimizers(config, event)}, {config.schedule} schedule.",
        )
    )


def _too_many(config: TrainConfig, event: Event) -> str:
    """A batch that the data does not fill."""
    records = event["data_num_records"]
    return f" (there are {records} records)" if config.batch_size > records else ""


def _ranks(event: Event) -> str:
    return f", {event['num_ranks']} processes" if event.get("num_ranks", 1) > 1 else ""


def describe_dry_run(found: DryRun) -> str:
    """A table of predicted beside measured memory, and the time of a step."""
    width = max(map(len, found.measured))
    lines = [f"{'':{width}}  {'predicted':>10}  {'measured':>10}"]
    for kind, measured in found.measured.items():
        lines.append(f"{kind:{width}}  {format_bytes(found.predicted[kind]):>10}  {format_bytes(measured):>10}")
    difference = found.predicted_peak / found.measured_peak - 1 if found.measured_peak else 0.0
    total = f"{format_bytes(found.predicted_peak):>10}  {format_bytes(found.measured_peak):>10}"
    lines.append(f"{'peak':{width}}  {total}  ({difference:+.1%})")
    if found.baseline:
        lines.append(f"The program itself takes {format_bytes(found.baseline)} more.")
    expected = "" if found.predicted_step_s is None else f", predicted {format_duration(found.predicted_step_s)}"
    homes = ", ".join(
        f"{count} on {home}" if home != "host" else f"{count} in host memory" for home, count in found.homes.items()
    )
    lines.append(f"A step took {format_duration(found.step_s)}{expected}. Blocks: {homes}.")
    return "\n".join(lines)


def describe_result(result: TrainResult) -> str:
    """What the run did: the score before and after, the memory, and what to type next."""
    lines = []
    if result.finished_before:
        return f"The run in {result.output} had come to its end, after {_count(result.num_steps, 'step')}: its model is in {result.model_dir}."
    if result.interrupted:
        by = "SIGTERM" if result.signal_number == signal.SIGTERM else "Ctrl-C"
        lines.append(f"Stopped by {by} after step {result.num_steps}, and saved as it was then. To go on:")
        lines.append(f"  lowtide train --config {shlex.quote(str(result.output / 'config.yaml'))} --resume")
    else:
        lines.append(f"Done: {_count(result.num_steps, 'step')} in {format_duration(result.wall_s)}.")
    if result.num_skipped:
        lines.append(
            f"{_count(result.num_skipped, 'step')} updated nothing, because their loss or gradient was not finite or their loss a spike."
        )
    before, after = result.loss_before, result.loss_after
    if before is not None and after is not None:
        lines.append(
            f"Held-out loss {before.loss:.4f} -> {after.loss:.4f}, "
            f"perplexity {before.perplexity:.2f} -> {after.perplexity:.2f} ({after.num_tokens} tokens)."
        )
    lines.append(f"Peak memory: {format_bytes(result.peak_memory_bytes)}.")
    if (result.output / "adapter").is_dir() and not result.interrupted:
        lines.append(f"The adapters alone are in {result.output / 'adapter'}; the model has them merged.")
    lines.append(f"The model is in {result.model_dir}. {'To try it as it is' if result.interrupted else 'Next'}:")
    lines.append(f"  lowtide generate --model {shlex.quote(str(result.model_dir))} --prompt 'Hello'")
    return "\n".join(lines)


def _describe_homes(event: Event) -> list[str]:
    """Where the planner put the weights, if it was asked."""
    plan = event.get("plan")
    if plan is None:
        return []
    counts: dict[str, int] = {}
    for _, home in plan["homes"]:
        counts[home] = counts.get(home, 0) + 1
    homes = ", ".join(f"{count} on {'the ' if home == 'device' else ''}{home}" for home, count in counts.items())
    time, kept = plan["time"], plan.get("keep_activations")
    keeps = f"activations of {kept} layers kept; " if kept else ""
    return [
        f"Plan: blocks {homes}; {plan['micro_batch_size']} sequences at a time; {keeps}{format_bytes(plan['totals']['device'])} of memory; "
        f"about {format_duration(time['step_s'])} a step, bound by {time['bottleneck']}."
    ]


def _what(config: TrainConfig, event: Event) -> str:
    """Which parameters are trained."""
    added = event["num_adapter_parameters"]
    own = format_count(event["num_parameters"] - added)
    if config.lora_only:
        return f"Training {format_count(added)} parameters of LoRA adapters (rank {config.lora_rank}) over the {own} frozen ones"
    with_adapters = (
        f" and {format_count(added)} of LoRA adapters (rank {config.lora_rank}) beside them" if added else ""
    )
    return f"Fine-tuning all {own} parameters{with_adapters}"


def _optimizers(config: TrainConfig, event: Event) -> str:
    base = f"{config.optimizer}, learning rate up to {event['lr']:g}"
    added = f"adamw for the adapters, learning rate up to {config.lora_lr:g}"
    return added if config.lora_only else f"{base}; {added}" if config.lora_rank else base


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _losses(event: Event) -> str:
    """What encoding cut off or left out, because silently lost data is the kind of surprise nobody finds."""
    notes = []
    if event["data_num_truncated"]:
        notes.append(f"{event['data_num_truncated']} truncated to max_seq_len")
    if event["data_num_dropped"]:
        notes.append(f"{event['data_num_dropped']} dropped")
    return f" ({', '.join(notes)})" if notes else ""
