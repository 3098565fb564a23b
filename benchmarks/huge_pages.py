"""What huge pages for weights bring on a CPU: two models that are the same but for their pages take their steps in turn in one process.

    python benchmarks/huge_pages.py                        TinyLlama shape (1.1 B parameters), 8 x 128 tokens, 5 turns; about five minutes
    python benchmarks/huge_pages.py --model smollm2 --turns 10
    python benchmarks/huge_pages.py --model tiny --threads 1 --turns 1      a rehearsal, seconds

Lomo, random weights and tokens, bfloat16, recomputed activations. A turn is a step of each model with updates and a step of each that drops every
gradient (as in update_cost.py), in a shuffled order, and the same tokens for all. Each model's weights are also read once, as for a norm, for milliseconds a GB.
Needs Linux 6.1 or newer with huge pages not switched off, and THP_MEM_ALLOC_ENABLE not set. A row of results/huge_pages.csv is one step; lines at the end have the medians.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

from peers.methods import nothing_updated
from peers.rows import append, device_name, facts
from peers.shapes import SHAPES, build

RESULTS = Path(__file__).parent / "results" / "huge_pages.csv"
FIELDS = (
    "date", "commit", "device", "threads", "torch", "transformers", "model", "batch_size", "seq_len", "pages", "updated", "turn", "place", "step_s",
    "forward_s", "read_ms_per_gb",
)  # fmt: skip


class Trained:
    """A fused model.

    Args:
        shape: key of ``SHAPES``.
        huge: move its weights into huge pages now.
    """

    def __init__(self, shape: str, huge: bool) -> None:
        import lowtide
        from lowtide.fused.huge_pages import use_huge_pages

        self.model = build(SHAPES[shape], "bfloat16")
        self.optimizer = lowtide.Lomo(self.model.parameters(), lr=1e-3)
        self.engine = lowtide.fuse(self.model, self.optimizer)
        weights = list(self.model.parameters())
        start = time.perf_counter()
        self.moved = use_huge_pages(weights) if huge else 0
        self.seconds = time.perf_counter() - start

    def step(self, ids: Any) -> tuple[float, float]:
        """Seconds of a step, and of its forward pass."""
        start = time.perf_counter()
        loss = self.model(input_ids=ids, labels=ids).loss
        forward = time.perf_counter() - start
        self.engine.backward(loss)
        self.optimizer.step()
        self.optimizer.zero_grad()
        del loss
        return time.perf_counter() - start, forward

    def read_ms_per_gb(self) -> float:
        """Of going over all weights once."""
        from lowtide.optim.kernels import native

        weights = [param.detach() for param in self.model.parameters()]
        start = time.perf_counter()
        for weight in weights:
            native.norm(weight)
        return (time.perf_counter() - start) * 1e3 / (sum(weight.nbytes for weight in weights) / 1e9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(SHAPES), default="tinyllama")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--turns", type=int, default=5, help="besides the first, which is not counted")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.turns < 1:
        parser.error("--turns must be at least 1")
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(options.threads)
    import torch

    from lowtide.fused import engine
    from lowtide.fused.huge_pages import page_bytes
    from lowtide.optim.kernels import native

    if page_bytes() is None or not native.available():
        sys.exit(
            "this needs Linux with huge pages that are not switched off (/sys/kernel/mm/transparent_hugepage), and a C compiler"
        )
    torch.set_num_threads(options.threads)
    common = {name: getattr(options, name) for name in ("model", "batch_size", "seq_len", "threads")}
    common.update(facts("lowtide-lomo"), device=device_name())
    generator = torch.Generator().manual_seed(1)
    found: dict[tuple[str, bool], list[float]] = {}
    with patch.object(engine, "use_huge_pages", lambda tensors: 0):  # the engine would move both
        models = {pages: Trained(options.model, pages == "huge") for pages in ("small", "huge")}
        huge = models["huge"]
        print(f"{huge.moved / 1e9:.2f} GB were moved into huge pages in {huge.seconds:.1f} s", flush=True)
        for turn in range(options.turns + 1):
            ids = torch.randint(SHAPES[options.model].vocab, (options.batch_size, options.seq_len), generator=generator)
            kinds = [(pages, updated) for pages in models for updated in (True, False)]
            for place, (pages, updated) in enumerate(random.Random(turn).sample(kinds, len(kinds)), 1):
                trained = models[pages]
                read = trained.read_ms_per_gb()
                with contextlib.nullcontext() if updated else nothing_updated():
                    step, forward = trained.step(ids)
                if not turn:
                    continue
                found.setdefault((pages, updated), []).append(step)
                row = {
                    **common, "pages": pages, "updated": updated, "turn": turn, "place": place, "step_s": round(step, 5),
                    "forward_s": round(forward, 5), "read_ms_per_gb": round(read, 2),
                }  # fmt: skip
                append(options.results, {name: row[name] for name in FIELDS}, FIELDS)
                what = "with updates" if updated else "without"
                print(
                    f"turn {turn}: {pages} pages, {what}: {step:.4g} s, weights are read at {read:.0f} ms/GB",
                    flush=True,
                )
    for updated, what in ((True, "with updates"), (False, "without")):
        ratios = [one / two for one, two in zip(found["huge", updated], found["small", updated], strict=True)]
        print(
            f"A step {what} takes {statistics.median(ratios):.3f} of one with small pages ({min(ratios):.3f} to {max(ratios):.3f})."
        )
    for pages in models:
        ratios = [one / two for one, two in zip(found[pages, True], found[pages, False], strict=True)]
        print(
            f"With {pages} pages a step with updates takes {statistics.median(ratios):.3f} of one without ({min(ratios):.3f} to {max(ratios):.3f})."
        )


if __name__ == "__main__":
    main()
