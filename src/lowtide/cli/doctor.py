"""``lowtide doctor``: what this machine has, and what that allows."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..units import format_bytes, format_count, format_duration
from .quantities import at_least

if TYPE_CHECKING:
    from rich.table import Table

    from ..planning.speeds import Speeds
    from ..reporting.doctor import Machine, Size

_EPILOG = """\
examples:
  lowtide doctor
  lowtide doctor --directory /mnt/nvme --max-seq-len 2048
  lowtide doctor --json - > machine.json

Nothing is trained: memory is counted and step times are worked out from the speeds of the machine, which are measured in a
second or two. `lowtide plan` says more about one model. The exit code is 1 if a package that is needed is too old."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of this command."""
    parser.epilog = _EPILOG
    parser.add_argument(
        "--directory",
        default=".",
        metavar="DIR",
        help="on the disk where weights would be, if they do not fit in memory (default: the present one)",
    )
    parser.add_argument(
        "--batch-size", type=at_least(1), default=8, metavar="N", help="sequences in a step (default: 8)"
    )
    parser.add_argument(
        "--max-seq-len", type=at_least(2), default=512, metavar="N", help="tokens in a sequence (default: 512)"
    )
    parser.add_argument("--no-measure", action="store_true", help="assume the speeds")
    parser.add_argument("--json", metavar="FILE", help="write it as JSON, too; - for JSON alone on standard output")


def run(args: argparse.Namespace) -> int:
    """Look, and tell. Returns the exit code."""
    directory = Path(args.directory)
    if not directory.is_dir():
        raise NotADirectoryError(f"--directory {args.directory} is not a directory")
    if args.json not in (None, "-") and Path(args.json).exists():
        raise FileExistsError(f"{args.json} exists, and nothing is overwritten: name a new file")
    from .quiet import quiet_libraries

    quiet_libraries()
    from ..reporting.doctor import look_at_machine, machine_speeds, possible_sizes

    machine = look_at_machine(directory)
    if args.json != "-":
        print("\n".join(describe_machine(machine)), flush=True)
    speeds = machine_speeds(machine, measure=not args.no_measure)
    sizes = list(possible_sizes(machine, speeds, batch_size=args.batch_size, seq_len=args.max_seq_len))
    if args.json != "-":
        from rich.console import Console

        print("\n".join(["", *describe_speeds(machine, speeds), ""]))
        table = sizes_table(machine, sizes, args.batch_size, args.max_seq_len)
        Console(width=None if sys.stdout.isatty() else 110, highlight=False).print(table)
    if args.json is not None:
        text = json.dumps(_as_dict(machine, speeds, sizes), indent=1)
        if args.json == "-":
            print(text)
        else:
            with Path(args.json).open("x", encoding="utf-8") as file:
                file.write(text + "\n")
    return 1 if machine.too_old else 0


def describe_machine(machine: Machine) -> list[str]:
    """Lines for people."""
    from ..reporting.doctor import OPTIONAL

    rows = {"software": ", ".join(f"{name} {version}" for name, version in machine.versions.items())}
    for name, least in machine.too_old.items():
        rows[f"  {name}"] = f"too old: at least {least} is needed, pip install -U {name}"
    for name, version in machine.optional.items():
        purpose, extra = OPTIONAL[name]
        rows[f"  {name}"] = version or f"not installed; for {purpose}: pip install 'lowtide[{extra}]'"
    bfloat16 = (
        "multiplies bfloat16" if machine.bfloat16 else "has no instructions for bfloat16: there float32 is faster"
    )
    rows["processor"] = f"{machine.processor}, {machine.num_processors} usable, {bfloat16}"
    rows["memory"] = (
        f"{format_bytes(machine.host_bytes)}, {format_bytes(machine.host_free_bytes)} free for this process"
    )
    if not machine.gpus:
        rows["GPU"] = "none that torch can use"
    for number, gpu in enumerate(machine.gpus):
        free = f"{format_bytes(gpu.total_bytes)}, {format_bytes(gpu.free_bytes)} free"
        rows[f"GPU {number}"] = f"{gpu.name}, {free}, capability {gpu.capability}"
    rows["disk"] = f"{format_bytes(machine.disk_free_bytes)} free in {machine.directory}"
    width = max(map(len, rows))
    return [f"{name:{width}}  {text}" for name, text in rows.items()]


def describe_speeds(machine: Machine, speeds: Speeds) -> list[str]:
    """A line on each speed, and where it comes from."""
    rows = {"products": ("flops", f"{speeds.flops / 1e12:.2f} TFLOP/s in bfloat16")}
    if machine.gpus:
        both = f"{format_bytes(speeds.to_device)}/s to the GPU, {format_bytes(speeds.from_device)}/s back"
        rows["bus"] = ("to_device", both)
    disk = f"{format_bytes(speeds.disk_read)}/s read, {format_bytes(speeds.disk_write)}/s written"
    rows["disk"] = ("disk_read", disk)
    width = max(map(len, rows))
    return [f"{name:{width}}  {text} ({speeds.sources[key]})" for name, (key, text) in rows.items()]


def sizes_table(machine: Machine, sizes: list[Size], batch_size: int, seq_len: int) -> Table:
    """Which sizes could be trained, where their weights would live, and how long a step would take."""
    from rich.table import Table

    title = f"All parameters, adalomo, bfloat16, {batch_size} sequences of {seq_len} tokens: predicted, not measured"
    table = Table(title=title, title_justify="left")
    for name in ("size", "parameters", "weights", "memory", "on disk", "a step", "tokens/s"):
        table.add_column(name, justify="left" if name in ("size", "weights") else "right")
    for size in sizes:
        table.add_row(size.name, format_count(size.num_parameters), *_cells(machine, size))
    return table


def _cells(machine: Machine, size: Size) -> list[str]:
    if size.plan is None:
        return ["does not fit", "", "", "", ""]
    plan, totals = size.plan, size.plan.footprint.totals()
    words = {"device": "on the GPU" if machine.gpus else "in memory", "host": "in host memory", "disk": "on disk"}
    places = ", ".join(words[home] for home in words if plan.count(home))
    memory = format_bytes(totals["device"])
    if machine.gpus and totals["host"]:
        memory += f" + {format_bytes(totals['host'])} host"
    on_disk = format_bytes(plan.copy_bytes) if plan.count("disk") else "-"
    seconds = plan.time.step_s
    return [places, memory, on_disk, format_duration(seconds), f"{plan.tokens / seconds:,.0f}"]


def _as_dict(machine: Machine, speeds: Speeds, sizes: list[Size]) -> dict[str, Any]:
    return {
        "machine": dataclasses.asdict(machine),
        "speeds": {**dataclasses.asdict(speeds), "sources": dict(speeds.sources)},
        "sizes": [
            {"name": each.name, "num_parameters": each.num_parameters, "plan": None if each.plan is None else each.plan.to_dict()}
            for each in sizes
        ],
    }  # fmt: skip
