"""What giving free memory back to the system costs and saves: around every block, when it has become too much (as lowtide does it), or never.

    python benchmarks/memory_trim.py                      TinyLlama shape (1.1 B parameters), 8 x 128 tokens, about ten minutes
    python benchmarks/memory_trim.py --shape 0.4b

Random weights in bfloat16, Lomo, activations recomputed. Time: one process, the three ways in turn, step by step; medians of ratios to the
step before, the one that gives everything back. Memory: the largest resident set of a fresh process each, three steps, above what it held before the
model was made. Linux with glibc only. Rows are appended to results/memory_trim.csv.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

import lowtide
from lowtide.weights.home import MemoryTrim, malloc_trim
from peers.measure import memory
from peers.rows import append, commit_of, device_name
from peers.shapes import SHAPES, build

RESULTS = Path(__file__).parent / "results" / "memory_trim.csv"
FIELDS = (
    "date", "commit", "device", "threads", "torch", "model", "batch_size", "seq_len", "way", "steps", "step_s", "ratio", "lowest_ratio", "highest_ratio",
    "page_faults", "weights_bytes", "above_bytes",
)  # fmt: skip
WAYS = ("always", "seldom", "never")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="tinyllama")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--peak", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if malloc_trim() is None:
        parser.error("this C library has no malloc_trim")
    torch.set_num_threads(options.threads)
    if options.peak:
        with way(options.peak):
            print(json.dumps(peak(options)))
        return
    peaks = {name: in_a_process(name, options) for name in WAYS}
    seconds, faults = times(options)
    for name in WAYS:
        ratios = [own / every for own, every in zip(seconds[name], seconds["always"], strict=True)]
        row = {
            "date": datetime.date.today().isoformat(), "commit": commit_of(Path(lowtide.__file__).parent), "device": device_name(), "threads": options.threads,
            "torch": torch.__version__, "model": options.shape, "batch_size": options.batch_size, "seq_len": options.seq_len, "way": name,
            "steps": len(ratios), "step_s": round(statistics.median(seconds[name]), 3), "ratio": round(statistics.median(ratios), 4),
            "lowest_ratio": round(min(ratios), 4), "highest_ratio": round(max(ratios), 4), "page_faults": round(statistics.median(faults[name])),
            **peaks[name],
        }  # fmt: skip
        append(options.results, row, FIELDS)
        above = peaks[name]["above_bytes"] / peaks[name]["weights_bytes"]
        print(f"{name:7} {row['step_s']:7.2f} s a step, {row['ratio']:.3f} of always, {above:.3f} of the weights")


@contextlib.contextmanager
def way(name: str) -> Iterator[None]:
    """One way of giving memory back, for what runs inside."""

    def always(trim: Any, block: Any) -> None:
        trim.always(block)

    def never(trim: Any, block: Any) -> None:
        pass

    if name == "seldom":
        yield
        return
    other = always if name == "always" else never
    with contextlib.ExitStack() as stack:
        for moment in ("before", "after_forward", "after_backward"):
            stack.enter_context(patch.object(MemoryTrim, moment, other))
        yield


def trainer(options: argparse.Namespace) -> tuple[Any, Callable[[], None]]:
    """The model, and a function that takes a step."""
    model = build(SHAPES[options.shape], "bfloat16")
    optimizer = lowtide.Lomo(model.parameters(), lr=1e-3)
    engine = lowtide.fuse(model, optimizer)
    generator = torch.Generator().manual_seed(1)

    def step() -> None:
        ids = torch.randint(SHAPES[options.shape].vocab, (options.batch_size, options.seq_len), generator=generator)
        engine.backward(model(input_ids=ids, labels=ids).loss)
        optimizer.step()
        optimizer.zero_grad()

    return model, step


def peak(options: argparse.Namespace) -> dict[str, int]:
    """Bytes of weights, and resident bytes above what was there before."""
    import transformers.models.llama.modeling_llama  # noqa: F401

    before = memory("VmRSS")
    model, step = trainer(options)
    for _ in range(3):
        step()
    weights = sum(param.numel() * param.element_size() for param in model.parameters())
    return {"weights_bytes": weights, "above_bytes": memory("VmHWM") - before}


def in_a_process(name: str, options: argparse.Namespace) -> dict[str, int]:
    """The same, measured in a process of its own."""
    words = [sys.executable, __file__, "--peak", name]
    for key in ("shape", "batch_size", "seq_len", "threads"):
        words += [f"--{key.replace('_', '-')}", str(getattr(options, key))]
    ended = subprocess.run(words, capture_output=True, text=True, check=True)
    found: dict[str, int] = json.loads(ended.stdout.splitlines()[-1])
    return found


def times(options: argparse.Namespace) -> tuple[dict[str, list[float]], dict[str, list[int]]]:
    """Seconds and page faults of steps, each way in turn; a step that follows another way's is not counted."""
    _, step = trainer(options)
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    faults: dict[str, list[int]] = {name: [] for name in WAYS}
    step()
    for _ in range(options.rounds):
        for name in WAYS:
            with way(name):
                step()
                first, start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.perf_counter()
                step()
                seconds[name].append(time.perf_counter() - start)
                faults[name].append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - first)
    return seconds, faults


if __name__ == "__main__":
    main()
