"""What the fused update costs: steps that update and steps that drop every gradient, in turn in one process.

    python benchmarks/update_cost.py                       Lomo, TinyLlama shape (1.1 B parameters), 8 x 128 tokens, 2 processes of 6 pairs
    python benchmarks/update_cost.py --model smollm2 --method adalomo
    python benchmarks/update_cost.py --model tiny --threads 1 --processes 1 --pairs 2      a rehearsal, seconds

Processes of one program differ by some percent, by where memory lies and by the clock of the machine; two steps one after the other share both. The two
kinds of step are the same but for norm and update: forward, recompute, backward, the slices of the head. Which one of a pair comes first alternates, and
the first pair of a process is not counted. *Norm and update* are timed in the step as well, for parameters outside of the slices of the vocabulary (in the TinyLlama shape
88 % of them), so that the rest of the difference can be told from them; what is applied while it is made (AMX) is in the products' time and not told apart.

Random weights and tokens, bfloat16, recomputed activations. Rows, one a pair, are appended to results/update_cost.csv; a line at the end has the medians.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

from peers.methods import nothing_updated
from peers.rows import UPDATE_FIELDS, UPDATE_RESULTS, append, device_name, facts, read_all
from peers.shapes import SHAPES, build
from peers.summary import update_cost

METHODS = {"lomo": "Lomo", "adalomo": "AdaLomo"}


class Stopwatch:
    """Seconds spent inside of one function, added up."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def around(self, owner: Any, name: str) -> Any:
        """A patch that times a method.

        Args:
            owner: its class.
            name: of the method.
        """
        function = getattr(owner, name)

        def timed(*args: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args)
            finally:
                self.seconds += time.perf_counter() - start

        return patch.object(owner, name, timed)


def in_this_process(number: int, options: argparse.Namespace) -> None:
    """The pairs of one process.

    Args:
        number: of the process, for the rows.
        options: of the command line.
    """
    import torch

    import lowtide
    from lowtide.fused.slot import Slot

    torch.set_num_threads(options.threads)
    model = build(SHAPES[options.model], "bfloat16")
    optimizer = getattr(lowtide, METHODS[options.method])(model.parameters(), lr=1e-3)
    engine = lowtide.fuse(model, optimizer)
    generator = torch.Generator().manual_seed(number)
    watch = Stopwatch()

    @contextlib.contextmanager
    def updated() -> Iterator[None]:
        watch.seconds = 0.0
        with watch.around(Slot, "apply"):
            yield

    def step(ids: Any) -> tuple[float, int]:
        faults, start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.perf_counter()
        loss = model(input_ids=ids, labels=ids).loss
        engine.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        del loss
        return time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults

    common = {name: getattr(options, name) for name in ("model", "method", "batch_size", "seq_len", "threads")}
    common.update(facts("lowtide-lomo"), device=device_name(), process=number)
    for pair in range(options.pairs + 1):
        ids = torch.randint(SHAPES[options.model].vocab, (options.batch_size, options.seq_len), generator=generator)
        found = {}
        kinds = [("updated", updated), ("nothing", nothing_updated)]
        for name, kind in kinds if pair % 2 == 0 else reversed(kinds):
            with kind():
                found[f"{name}_s"], found[f"{name}_faults"] = step(ids)
        found["norm_and_update_s"] = watch.seconds
        if pair == 0:
            continue
        row = {**common, "pair": pair, **{name: round(value, 5) for name, value in found.items()}}
        append(options.results, {name: row[name] for name in UPDATE_FIELDS}, UPDATE_FIELDS)
        print(
            f"process {number}, pair {pair}: {found['updated_s']:.4g} s with updates ({watch.seconds:.3g} s norm and update), {found['nothing_s']:.4g} s without",
            flush=True,
        )


def summary(rows: list[dict[str, str]]) -> str:
    """The medians of pairs, as a line."""
    found = update_cost(rows)
    ratios, shares = found.ratios, found.shares
    return (
        f"A step with updates takes {statistics.median(ratios):.3f} of one without ({min(ratios):.3f} to {max(ratios):.3f} in {len(ratios)} pairs); norm and "
        f"update alone, timed inside, are {statistics.median(shares):.2%} of it ({min(shares):.2%} to {max(shares):.2%})."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(SHAPES), default="tinyllama")
    parser.add_argument("--method", choices=list(METHODS), default="lomo")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=6, help="of a process, besides the first")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--results", type=Path, default=UPDATE_RESULTS)
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one is not None:
        in_this_process(options.one, options)
        return
    if options.pairs < 1 or options.processes < 1:
        parser.error("--pairs and --processes must be at least 1")
    before = len(read_all(options.results))
    threads = {name: str(options.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    for number in range(1, options.processes + 1):
        command = [sys.executable, __file__, *sys.argv[1:], "--one", str(number)]
        subprocess.run(command, check=True, env={**os.environ, **threads})
    print(summary(read_all(options.results)[before:]))


if __name__ == "__main__":
    main()
