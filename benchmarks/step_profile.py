"""Where the time of a training step goes: phases of the step by kinds of operation, as a table.

    python benchmarks/step_profile.py                                 TinyLlama shape (1.1 B parameters), 8 x 128 tokens, about three minutes
    python benchmarks/step_profile.py --model smollm2 --method adalomo
    python benchmarks/step_profile.py --trace step.json.gz            also every operation, for https://ui.perfetto.dev
    PYTHONPATH=OTHER/src python benchmarks/step_profile.py            another version of lowtide, from a work tree of it

Random weights in bfloat16. The last step runs under torch's profiler; its self times are added up. A phase is the innermost of what is going on:
"forward" (without a graph), "recompute" (the block again, with one), "backward", "loss and head" (its forward pass, its backward pass and the slices of
the vocabulary matrix's gradient), "update" (hooks, norm, the rule itself). The kind "Python and C kernels" is what no operation of torch accounts for.
The profiler costs some per cent, which lie there and in the many small operations: the step before it, without, is reported beside. Rows are
appended to results/step_profile.csv.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import datetime
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.profiler import ProfilerActivity, profile, record_function

import lowtide
from lowtide.fused.call import Call
from lowtide.fused.slot import Slot
from lowtide.models import loss as head
from peers.rows import append, commit_of, device_name
from peers.shapes import SHAPES, build

RESULTS = Path(__file__).parent / "results" / "step_profile.csv"
FIELDS = (
    "date", "commit", "device", "threads", "torch", "model", "method", "batch_size", "seq_len", "step_s", "profiled_s", "phase", "kind", "self_s", "calls",
)  # fmt: skip
PHASES = ("forward", "recompute", "backward", "loss and head", "update", "between")
# Beginnings of names of operations; the first kind that has one takes it.
KINDS = {
    "products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::linear", "aten::matmul", "mkldnn"),
    "attention": ("aten::_scaled_dot_product", "aten::scaled_dot_product"),
    "copies and conversions": ("aten::copy_", "aten::_to_copy", "aten::to", "aten::clone", "aten::contiguous", "aten::cat"),
}  # fmt: skip
OTHER, REST = "elementwise, sums, lookups", "Python and C kernels"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(SHAPES), default="tinyllama")
    parser.add_argument("--method", choices=("lomo", "adalomo"), default="lomo")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--trace", type=Path, metavar="FILE", help="every operation, as JSON (.gz)")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.steps < 3:
        parser.error("--steps must be at least 3: one to warm up, one without the profiler, one with it")
    torch.set_num_threads(options.threads)
    seconds, profiled, found = measure(options)
    print(table(found, profiled))
    print(f"\nThe step took {profiled:.2f} s under the profiler, the one before it {seconds:.2f} s without.")
    write(options, seconds, profiled, found)


Found = dict[tuple[str, str], tuple[float, int]]  # seconds and calls of (phase, kind)


def measure(options: argparse.Namespace) -> tuple[float, float, Found]:
    """Seconds of the step before the profiled one, of the profiled one, and where those went."""
    model = build(SHAPES[options.model], "bfloat16")
    rule = {"lomo": lowtide.Lomo, "adalomo": lowtide.AdaLomo}[options.method]
    optimizer = rule(model.parameters(), lr=1e-3)
    engine = lowtide.fuse(model, optimizer)
    generator = torch.Generator().manual_seed(1)
    taken: list[float] = []
    shape = (options.batch_size, options.seq_len)
    batches = [torch.randint(SHAPES[options.model].vocab, shape, generator=generator) for _ in range(options.steps)]
    profiler = profile(activities=[ProfilerActivity.CPU])
    for number, ids in enumerate(batches):
        last = number == options.steps - 1
        with profiler if last else contextlib.nullcontext(), phases() if last else contextlib.nullcontext():
            start = time.perf_counter()
            loss = model(input_ids=ids, labels=ids).loss
            engine.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            taken.append(time.perf_counter() - start)
    if options.trace is not None:
        profiler.export_chrome_trace(str(options.trace))
    return taken[-2], taken[-1], added_up(profiler.events(), taken[-1])


@contextlib.contextmanager
def phases() -> Iterator[None]:
    """Have the engine's own functions name the phase that they are."""
    head_gradient = getattr(head, "_HeadGradient", head._LinearCrossEntropy)
    with contextlib.ExitStack() as stack:
        for owner, name, phase in (
            (Call, "run_all", "forward"), (Call, "forward", "recompute"), (lowtide.Engine, "backward", "backward"),
            (Slot, "apply", "update"), (Slot, "apply_slices", "update"), (Slot, "flush", "update"), (head_gradient, "_visit", "loss and head"),
        ):  # fmt: skip
            if hasattr(owner, name):  # older engines have no slices
                stack.enter_context(patch.object(owner, name, named(getattr(owner, name), phase)))
        for name in ("forward", "backward"):
            labelled = staticmethod(named(getattr(head._LinearCrossEntropy, name), "loss and head"))
            stack.enter_context(patch.object(head._LinearCrossEntropy, name, labelled))
        yield


def named(function: Callable[..., Any], phase: str) -> Callable[..., Any]:
    """The same, as a phase of the profile.

    Args:
        function: of the engine.
        phase: of ``PHASES``.
    """

    def run(*args: Any, **kwargs: Any) -> Any:
        inside_forward = phase == "recompute" and not torch.is_grad_enabled()
        with record_function(f"phase:{'forward' if inside_forward else phase}"):
            return function(*args, **kwargs)

    return run


def added_up(events: Any, seconds: float) -> Found:
    """Self times by phase and kind; what is left of ``seconds`` is Python between the phases."""
    found: dict[tuple[str, str], tuple[float, int]] = collections.defaultdict(lambda: (0.0, 0))
    for event in events:
        key = (phase_of(event), kind_of(event.name))
        before = found[key]
        found[key] = (before[0] + event.self_cpu_time_total / 1e6, before[1] + 1)
    missing = seconds - sum(each[0] for each in found.values())
    before = found["between", REST]
    found["between", REST] = (before[0] + max(0.0, missing), before[1])
    return dict(found)


def phase_of(event: Any) -> str:
    while event is not None:
        if event.name.startswith("phase:"):
            return event.name.removeprefix("phase:")
        event = event.cpu_parent
    return "between"


def kind_of(name: str) -> str:
    for kind, beginnings in KINDS.items():
        if name.startswith(beginnings):
            return kind
    return OTHER if name.startswith("aten::") else REST


def table(found: Found, seconds: float) -> str:
    """Seconds, and per cent of the step; Markdown.

    Args:
        found: see :func:`added_up`.
        seconds: of the step.
    """
    kinds = [*KINDS, OTHER, REST]
    lines = [f"| phase | {' | '.join(kinds)} | together | of the step |", "|---" * (len(kinds) + 3) + "|"]
    for phase in (*PHASES, "together"):
        own = [
            sum(found.get((each, kind), (0.0, 0))[0] for each in (PHASES if phase == "together" else (phase,)))
            for kind in kinds
        ]
        lines.append(
            f"| {phase} | {' | '.join(f'{each:.2f}' for each in own)} | {sum(own):.2f} | {sum(own) / seconds:.1%} |"
        )
    shares = [sum(found.get((phase, kind), (0.0, 0))[0] for phase in PHASES) / seconds for kind in kinds]
    lines.append(f"| of the step | {' | '.join(f'{share:.1%}' for share in shares)} | {sum(shares):.1%} | |")
    return "\n".join(lines)


def write(options: argparse.Namespace, seconds: float, profiled: float, found: Found) -> None:
    """A row for every phase and kind.

    Args:
        options: of the command line.
        seconds: of the step without the profiler.
        profiled: of the step with it.
        found: see :func:`added_up`.
    """
    settings = {
        "date": datetime.date.today().isoformat(), "commit": commit_of(Path(lowtide.__file__).parent), "device": device_name(), "threads": options.threads,
        "torch": torch.__version__, "model": options.model, "method": options.method, "batch_size": options.batch_size, "seq_len": options.seq_len,
        "step_s": round(seconds, 4), "profiled_s": round(profiled, 4),
    }  # fmt: skip
    for (phase, kind), (self_s, calls) in sorted(found.items()):
        append(
            options.results,
            {**settings, "phase": phase, "kind": kind, "self_s": round(self_s, 4), "calls": calls},
            FIELDS,
        )


if __name__ == "__main__":
    main()
