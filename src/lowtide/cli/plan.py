"""``lowtide plan``: whether a model fits, where its weights should live, and how long a step takes."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..training.choices import DEFAULT_CLIP_GRAD_NORM, DTYPES, OPTIMIZERS, ROUNDINGS
from ..units import format_count
from .arguments import UsageError
from .plan_ranks import RankAnswer, add_rank_arguments, check_ranks, plan_ranks
from .quantities import at_least, flops, positive, rate, size

if TYPE_CHECKING:
    from ..planning import Limits, Method, Plan, Speeds, StepShape

_EPILOG = """\
examples:
  lowtide plan --model ./my-model --max-seq-len 1024 --batch-size 8
  lowtide plan --model ./my-model --max-seq-len 512 --batch-size 8 --device cuda --device-memory 24GiB --host-memory 64GiB
  lowtide plan --model ./my-model --max-seq-len 512 --batch-size 8 --disk 500GB --steps 1000 --json plan.json --plot plan.png
  lowtide plan --model ./my-model --max-seq-len 512 --batch-size 8 --device cuda --device-memory 24GiB --ranks 8

Limits that are not given are what this machine has free; the disk is used only where --disk allows it. Speeds that are not
given are measured in a second or two, or assumed where they cannot be, and the answer says which."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of this command."""
    parser.epilog = _EPILOG
    step = parser.add_argument_group("the training step")
    step.add_argument(
        "--model", required=True, help="a Hugging Face directory, a name on its hub, a .gguf file or a config.json"
    )
    step.add_argument(
        "--max-seq-len",
        "--seq-len",
        type=at_least(2),
        default=512,
        metavar="N",
        help="tokens in a sequence (default: 512)",
    )
    step.add_argument("--batch-size", type=at_least(1), default=8, metavar="N", help="sequences in a step (default: 8)")
    step.add_argument(
        "--micro-batch-size",
        type=at_least(1),
        metavar="N",
        help="sequences that go through a layer at once (default: choose)",
    )
    step.add_argument(
        "--keep-activations",
        type=at_least(0),
        metavar="N",
        help="layers whose activations are kept instead of being computed again, which is faster and takes memory; 0 for none "
        "(default: as many as there is room for)",
    )
    step.add_argument("--optimizer", choices=OPTIMIZERS, default="adalomo", help="(default: adalomo)")
    step.add_argument(
        "--dtype", choices=DTYPES[:3], default="bfloat16", help="of weights and computation (default: bfloat16)"
    )
    step.add_argument("--rounding", choices=ROUNDINGS, help="of updated 16-bit weights (default: stochastic)")
    step.add_argument(
        "--clip-grad-norm",
        type=positive("a number above 0, or 0 for no limit", zero=True),
        metavar="X",
        help="exact clipping, which walks the graph twice; 0 for none (default: as in lowtide train)",
    )
    step.add_argument(
        "--no-mask", action="store_true", help="sequences are neither padded nor packed, so there is no attention mask"
    )
    step.add_argument("--trust-remote-code", action="store_true", help="run the Python code that comes with the model")
    room = parser.add_argument_group("the machine")
    room.add_argument(
        "--device",
        default="auto",
        metavar="NAME",
        help="auto, cpu or cuda, which may be one that is not here (default: auto)",
    )
    room.add_argument(
        "--weights", choices=("auto", "device", "cpu", "disk"), default="auto", help="where they live (default: choose)"
    )
    for flag, text in (
        ("--device-memory", "memory of the device"),
        ("--host-memory", "host memory; with --device cpu the same as --device-memory"),
        ("--disk", "disk for a working copy of the weights; none unless given"),
    ):
        room.add_argument(flag, type=size, metavar="SIZE", help=f"{text}, as 24GiB or 500GB")
    room.add_argument(
        "--directory", default=".", metavar="DIR", help="on the disk whose speed is measured (default: the present one)"
    )
    room.add_argument("--flops", type=flops, metavar="X", help="floating-point operations a second, as 35T")
    for flag, text in (
        ("--pcie", "between host memory and device, each way"),
        ("--disk-read", "from the disk"),
        ("--disk-write", "to the disk"),
        ("--memory-bandwidth", "between the device and its own memory"),
    ):
        room.add_argument(flag, type=rate, metavar="RATE", help=f"bytes a second {text}, as 12GB/s")
    room.add_argument("--no-measure", action="store_true", help="assume every speed that is not given")
    add_rank_arguments(parser)
    answer = parser.add_argument_group("the answer")
    answer.add_argument("--steps", type=at_least(1), metavar="N", help="of the run, for what it writes to the disk")
    answer.add_argument("--json", metavar="FILE", help="write it as JSON, too; - for JSON alone on standard output")
    answer.add_argument("--plot", metavar="FILE", help="draw the memory of each method into a new PNG file")


def run(args: argparse.Namespace) -> int:
    """Plan, and show it. Returns the exit code."""
    if args.rounding in ("stochastic", "compensated") and args.dtype == "float32":
        raise UsageError(
            f"--rounding {args.rounding} is for 16-bit weights and means nothing for float32: leave it out"
        )
    if args.micro_batch_size is not None and args.micro_batch_size > args.batch_size:
        raise UsageError(f"--micro-batch-size must not be larger than --batch-size ({args.batch_size})")
    check_ranks(args)
    for file in (args.plot, None if args.json == "-" else args.json):
        if file is not None and Path(file).exists():
            raise FileExistsError(f"{file} exists, and nothing is overwritten: name a new file")
    from .quiet import quiet_libraries

    quiet_libraries()
    from ..planning import as_method, compare, make_plan

    shape, device = _shape(args)
    limits, speeds = _limits(args, device), _speeds(args, shape, device)
    plan: Plan | None
    if args.ranks is None:
        options = {
            "weights": {"cpu": "host"}.get(args.weights, args.weights),
            "micro_batch_size": args.micro_batch_size,
            "keep_activations": args.keep_activations,
        }
        plan, ranks = make_plan(shape, limits=limits, speeds=speeds, **options), None
    else:
        plan, ranks = plan_ranks(args, shape, limits, speeds)
    methods = compare(shape)
    if plan is not None:
        methods = (*methods, as_method(f"lowtide {args.optimizer}, this plan", plan.footprint))
    if ranks is not None:
        methods = (*methods, as_method(f"lowtide {args.optimizer}, each of {args.ranks}", ranks.footprint))
    _answer(args, shape, plan, methods, limits, ranks)
    return 0


def _answer(
    args: argparse.Namespace,
    shape: StepShape,
    plan: Plan | None,
    methods: tuple[Method, ...],
    limits: Limits,
    ranks: RankAnswer | None,
) -> None:
    title = (
        f"{args.model}: {format_count(shape.num_parameters)} parameters in {args.dtype}, {args.batch_size} sequences of "
        f"{args.max_seq_len} tokens, {args.optimizer}{', exact clipping' if shape.exact_clipping else ''}, {shape.device}"
    )
    if args.json is not None:
        text = json.dumps(_as_dict(args, shape, plan, methods, ranks), indent=1, allow_nan=False)
        if args.json == "-":
            print(text)
        else:
            with Path(args.json).open("x", encoding="utf-8") as file:
                file.write(text + "\n")
    if args.json != "-":
        from rich.console import Console

        from ..reporting.plan_table import methods_report, plan_report

        on_cpu = shape.device == "cpu"
        if plan is not None:
            report = plan_report(plan, methods, title=title, on_cpu=on_cpu, num_steps=args.steps)
        else:
            report = methods_report(methods, title=title)
        # as wide as a table needs where nobody looks at a terminal
        console = Console(width=None if sys.stdout.isatty() else 110, highlight=False)
        console.print(report)
        if ranks is not None:
            from ..reporting.ranks_table import ranks_report

            console.print(ranks_report(**ranks.shown(), limits=limits, on_cpu=on_cpu))
    if args.plot is not None:
        from ..reporting.plan_plot import plot_plan

        plot_plan(
            Path(args.plot),
            title=f"{methods[-1].total / 2**30:.1f} GiB on the device, {methods[0].total / 2**30:.1f} with AdamW",
            subtitle=title,
            methods=methods,
            limit_bytes=limits.device,
            note="Counted from the model's config, not measured. Activations with checkpointing; a plan may keep more, where there is room.",
        )


def _as_dict(
    args: argparse.Namespace, shape: StepShape, plan: Plan | None, methods: tuple[Method, ...], ranks: RankAnswer | None
) -> dict[str, Any]:
    return {
        "model": args.model,
        "num_parameters": shape.num_parameters,
        "batch_size": args.batch_size,
        "max_seq_len": args.max_seq_len,
        "optimizer": args.optimizer,
        "dtype": args.dtype,
        "rounding": args.rounding,
        "exact_clipping": shape.exact_clipping,
        "device": shape.device,
        "plan": None if plan is None else plan.to_dict(),
        "methods": [{**dataclasses.asdict(method), "total": method.total} for method in methods],
        "steps": args.steps,
        "disk_bytes_written": None if args.steps is None or plan is None else plan.disk_bytes_written(args.steps),
        "ranks": None if ranks is None else ranks.to_dict(),
    }


def _shape(args: argparse.Namespace) -> tuple[StepShape, str]:
    """The step, and the torch device or "cuda" for one that is not here."""
    from ..models import find_blocks, load_config, parse_dtype
    from ..planning import StepShape
    from ..training import resolve_device

    # a GPU that is not here can be planned for
    kind = args.device.partition(":")[0]
    if kind not in ("auto", "cpu", "cuda"):
        raise UsageError(f"--device must be auto, cpu, cuda or cuda:N, got {args.device}")
    device = args.device if kind == "cuda" else resolve_device(args.device)
    clip = DEFAULT_CLIP_GRAD_NORM.get(args.optimizer, 0.0) if args.clip_grad_norm is None else args.clip_grad_norm
    shape = StepShape(
        load_config(args.model, trust_remote_code=args.trust_remote_code),
        find_blocks=find_blocks,
        dtype=parse_dtype(args.dtype),
        batch_size=args.batch_size,
        seq_len=args.max_seq_len,
        optimizer=args.optimizer,
        rounding=args.rounding,
        exact_clipping=clip > 0,
        masked=not args.no_mask,
        device=device,
        trust_remote_code=args.trust_remote_code,
    )
    return shape, device


def _limits(args: argparse.Namespace, device: str) -> Limits:
    import torch

    from ..planning import Limits, available_host_bytes, device_available_bytes

    host = available_host_bytes() if args.host_memory is None else args.host_memory
    if device == "cpu":
        given = [size for size in (args.device_memory, args.host_memory) if size is not None]
        memory = min(given) if given else host
    elif args.device_memory is not None:
        memory = args.device_memory
    elif torch.cuda.is_available():
        memory = device_available_bytes(device)
    else:
        raise UsageError("there is no GPU here: say how much memory the one to plan for has, as --device-memory 24GiB")
    disk = args.disk
    if disk is None:
        disk = shutil.disk_usage(args.directory).free if args.weights == "disk" else 0
    return Limits(device=memory, host=host, disk=disk)


def _speeds(args: argparse.Namespace, shape: StepShape, device: str) -> Speeds:
    from ..planning import find_speeds

    directory = Path(args.directory)
    if not directory.is_dir():
        raise NotADirectoryError(f"--directory {args.directory} is not a directory")
    given = {
        "flops": args.flops,
        "to_device": args.pcie,
        "from_device": args.pcie,
        "disk_read": args.disk_read,
        "disk_write": args.disk_write,
        "memory": args.memory_bandwidth,
    }
    uses_disk = args.disk is not None or args.weights == "disk"
    return find_speeds(
        dtype=shape.dtype,
        device=device,
        directory=directory if uses_disk else None,
        given=given,
        measure=not args.no_measure,
    )
