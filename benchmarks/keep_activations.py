"""What it brings to keep activations instead of computing them again, and what it takes: seconds of a step and peak memory, beside what the planner says.

    python benchmarks/keep_activations.py                                   SmolLM2's shape, 8 x 128 tokens; about four minutes on two cores
    python benchmarks/keep_activations.py --model tinyllama --rounds 1      about six minutes

Random weights in bfloat16, Lomo; no layer, half of them and all of them, each in a fresh process, in turn. Peaks are resident sets above that of the process before the
model exists. The ratio is to the process of the same round that keeps none. Rows are appended to results/keep_activations.csv.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import lowtide
from lowtide.models import find_blocks
from lowtide.planning import StepShape
from lowtide.planning.timing import step_flops
from peers.measure import memory
from peers.methods import Clock, loss_of
from peers.rows import append, commit_of, device_name
from peers.shapes import SHAPES, build

RESULTS = Path(__file__).parent / "results" / "keep_activations.csv"
FIELDS = (
    "date", "commit", "device", "threads", "torch", "model", "batch_size", "seq_len", "num_layers", "kept", "round", "predicted_bytes", "peak_bytes", "flops", "step_s",
    "ratio",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(SHAPES), default="smollm2")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--steps", type=int, default=4, help="the first is not counted")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.one is not None:
        print(json.dumps(train(options, options.one)))
        return
    layers = SHAPES[options.model].layers
    ratios: dict[int, list[float]] = {}
    for number in range(options.rounds):
        first = None
        for kept in (0, layers // 2, layers):
            found = child(options, kept)
            first = first or found["step_s"]
            ratios.setdefault(kept, []).append(found["step_s"] / first)
            append(options.results, row(options, kept, number, found, found["step_s"] / first), FIELDS)
            print(
                f"{kept} of {layers} layers kept: {found['step_s']:.2f} s a step, {found['peak_bytes'] / 1e6:.0f} MB, "
                f"predicted {found['predicted_bytes'] / 1e6:.0f}",
                flush=True,
            )
    for kept, of_rounds in ratios.items():
        print(f"{kept} of {layers} layers kept: {statistics.median(of_rounds):.3f} of the time with none (median)")


def child(options: argparse.Namespace, kept: int) -> dict[str, Any]:
    """What a fresh process finds."""
    command = [sys.executable, __file__, "--one", str(kept)]
    for name in ("model", "batch_size", "seq_len", "steps", "threads"):
        command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(ended.stdout.splitlines()[-1])


def train(options: argparse.Namespace, kept: int) -> dict[str, Any]:
    """Peak and seconds; the prediction is made when they are known."""
    from transformers.models.llama import modeling_llama  # noqa: F401

    before = memory("VmRSS")
    model = build(SHAPES[options.model], "bfloat16")
    optimizer = lowtide.Lomo(model.parameters(), lr=1e-3)
    engine = lowtide.fuse(model, optimizer, keep_activations=kept)
    generator = torch.Generator().manual_seed(1)
    clock = Clock()

    def step(ids: torch.Tensor) -> torch.Tensor:
        loss = loss_of(model, ids)
        engine.backward(loss)
        optimizer.step()
        return loss

    shape = (options.batch_size, options.seq_len)
    clock.run(
        [torch.randint(SHAPES[options.model].vocab, shape, generator=generator) for _ in range(options.steps)], step
    )
    peak = memory("VmHWM") - before
    planned = StepShape(
        model.config, find_blocks=find_blocks, dtype=torch.bfloat16, batch_size=options.batch_size, seq_len=options.seq_len, optimizer="lomo",
        masked=False,
    ).keeping(kept)  # fmt: skip
    return {
        "step_s": statistics.median(clock.seconds[1:]), "peak_bytes": peak,
        "predicted_bytes": planned.footprint().totals()["device"], "flops": step_flops(planned),
    }  # fmt: skip


def row(options: argparse.Namespace, kept: int, number: int, found: dict[str, Any], ratio: float) -> dict[str, Any]:
    """Of the CSV file.

    Args:
        options: of the command line.
        kept: layers whose activations are kept.
        number: of the round.
        found: by the process.
        ratio: to the process that keeps none.
    """
    return {
        "date": datetime.date.today().isoformat(), "commit": commit_of(Path(__file__).parent), "device": device_name(), "threads": options.threads,
        "torch": torch.__version__, "model": options.model, "batch_size": options.batch_size, "seq_len": options.seq_len,
        "num_layers": SHAPES[options.model].layers, "kept": kept, "round": number, **found, "step_s": round(found["step_s"], 4),
        "ratio": round(ratio, 4),
    }  # fmt: skip


if __name__ == "__main__":
    main()
