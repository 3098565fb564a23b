"""The gradient of a linear layer's weight by lowtide's own tiles (AMX), applied while it is made, beside torch's product, norm and update one after the other.

    python benchmarks/tiled_product.py                   shapes of SmolLM2, TinyLlama and LLaMA-7B, 64 to 2048 tokens; about two minutes

Needs a processor with AMX and a C compiler. The ways take turns, 15 times each, in one process; every update goes to another matrix of at least 1 GB of them,
as in a model, so that none is in the cache. Rows with the medians are appended to results/tiled_product.csv, in milliseconds:
*torch*: the product alone, of a transposed factor (``fused/turned.py``); *separate*: with norm and stochastic Lomo update after it; *applied*: ours, product, norm and
update at once; *made*: ours, written to memory with its norm, no update. *differing* is the share of the gradient's elements that are not torch's bits.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from lowtide.fused.turned import transposed_product
from lowtide.optim.kernels import native, product
from peers.rows import append, commit_of, device_name

RESULTS = Path(__file__).parent / "results" / "tiled_product.csv"
FIELDS = (
    "date", "commit", "device", "threads", "torch_version", "tokens", "rows", "cols", "turns",
    "torch_ms", "separate_ms", "applied_ms", "made_ms", "differing",
)  # fmt: skip
SHAPES = [  # tokens, output and input features
    (1024, 5632, 2048), (1024, 2048, 5632), (1024, 2048, 2048), (1024, 256, 2048),
    (1024, 1536, 576), (1024, 576, 1536), (1024, 576, 576), (1024, 192, 576),
    (64, 5632, 2048), (256, 5632, 2048), (2048, 5632, 2048), (512, 11008, 4096),
]  # fmt: skip


def measured(tokens: int, rows: int, cols: int, turns: int) -> dict[str, float]:
    """Medians in milliseconds.

    Args:
        tokens: rows of both factors.
        rows: columns of the left one.
        cols: columns of the right one.
        turns: of each way; one more is not counted.
    """
    torch.manual_seed(0)
    left, right = torch.randn(tokens, rows).bfloat16() * 0.01, torch.randn(tokens, cols).bfloat16()
    count = min(200, max(2, round(1e9 / (rows * cols * 2)) + 1))
    weights = [torch.randn(rows, cols).bfloat16() for _ in range(count)]
    grad, own = torch.empty(2, rows, cols, dtype=torch.bfloat16)
    memory = torch.empty(2**28, dtype=torch.uint8)
    number = 0
    update = {"lr": 1e-3, "rounding": "stochastic", "key": 3}

    def unmade() -> product.TiledProduct:
        found = product.TiledProduct.of(left, right, lambda num_bytes: memory[:num_bytes])
        assert found is not None
        return found

    def weight() -> torch.Tensor:
        nonlocal number
        number += 1
        return weights[number % count]

    def alone() -> None:
        transposed_product(left, right, out=grad)

    def separate() -> None:
        alone()
        native.norm(grad)
        native.lomo_step(weight(), grad, **update)

    ways: dict[str, Callable[[], object]] = {
        "torch_ms": alone,
        "separate_ms": separate,
        "applied_ms": lambda: unmade().lomo_step(weight(), **update),
        "made_ms": lambda: unmade().into(own),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(turns + 1):
        for name, run in ways.items():
            start = time.perf_counter()
            run()
            if turn:
                times[name].append(time.perf_counter() - start)
    found = {name: round(statistics.median(seconds) * 1e3, 3) for name, seconds in times.items()}
    return {**found, "differing": round((grad != own).float().mean().item(), 6)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    if not product.allowed():
        sys.exit("this needs a processor with AMX, a C compiler, and LOWTIDE_NATIVE not 0")
    torch.set_num_threads(options.threads)
    common = {
        "date": datetime.date.today().isoformat(), "commit": commit_of(Path(__file__).parent), "device": device_name(),
        "threads": options.threads, "torch_version": torch.__version__, "turns": options.turns,
    }  # fmt: skip
    for tokens, rows, cols in SHAPES:
        found = measured(tokens, rows, cols, options.turns)
        append(options.results, {**common, "tokens": tokens, "rows": rows, "cols": cols, **found}, FIELDS)
        print(
            f"{tokens} tokens, {rows} x {cols}: torch {found['torch_ms']:.2f} ms, with norm and update {found['separate_ms']:.2f}; "
            f"applied while made {found['applied_ms']:.2f}, only made {found['made_ms']:.2f}; {found['differing']:.3%} of the elements differ",
            flush=True,
        )


if __name__ == "__main__":
    main()
