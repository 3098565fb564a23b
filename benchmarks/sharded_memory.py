"""Peak memory of one rank when a model is spread over several, on this machine's CPU (gloo).

    python benchmarks/sharded_memory.py                  4 ranks, a model of 0.6 B parameters in float32: about two minutes on two cores
    python benchmarks/sharded_memory.py --ranks 2 --dtype bfloat16

A model with random weights is saved once and loaded by every rank as ``lowtide train`` does it, straight into its rows. Reported is the peak
resident set of each rank from after its imports on (loading, and a few steps), beside (weights / ranks + one block twice + activations).
One block twice: a gathered buffer and the weights that are copied out of it, or gradients and what is sent of them. Activations are
those that the planner counts for one process with the same rows. Rows are appended to benchmarks/results/sharded_memory.csv.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import importlib.metadata
import multiprocessing
import os
import platform
import subprocess
import tempfile
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results" / "sharded_memory.csv"
FIELDS = (
    "date", "commit", "machine", "torch", "ranks", "dtype", "optimizer", "layers", "hidden", "vocab", "tokens_per_rank", "micro_batch_size",
    "rank", "weight_bytes", "unit_bytes", "activation_bytes", "bound_bytes", "loading_bytes", "peak_bytes", "ratio",
)  # fmt: skip


def make_config(options: argparse.Namespace) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=options.hidden,
        intermediate_size=options.hidden * 11 // 4,
        num_hidden_layers=options.layers,
        num_attention_heads=16,
        num_key_value_heads=16,
        vocab_size=options.vocab,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )


def save(folder: str, options: argparse.Namespace) -> None:
    """In a process of its own: it holds the whole model."""
    import torch
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(make_config(options)).to(getattr(torch, options.dtype))
    model.save_pretrained(folder)


def rank_main(rank: int, folder: str, options: argparse.Namespace, queue: Any) -> None:
    import torch

    os.environ.update(RANK=str(rank), WORLD_SIZE=str(options.ranks))
    torch.set_num_threads(1)
    import torch.distributed.fsdp
    from transformers.models.llama import modeling_llama  # noqa: F401

    import lowtide
    from lowtide.models import load_model
    from lowtide.planning import peak_resident_bytes, resident_bytes

    store = torch.distributed.FileStore(f"{folder}/store", options.ranks)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=options.ranks)
    _touch(lowtide)
    baseline = resident_bytes()
    model = lowtide.shard(load_model(folder, dtype=getattr(torch, options.dtype), lazy=True)).train()
    loaded = peak_resident_bytes() - baseline
    rule = lowtide.AdaLomo if options.optimizer == "adalomo" else lowtide.Lomo
    optimizer = rule(model.parameters(), lr=1e-3)
    engine = lowtide.fuse(model, optimizer, micro_batch_size=options.micro_batch_size)
    generator = torch.Generator().manual_seed(rank)
    for _ in range(options.steps):
        input_ids = torch.randint(options.vocab, (options.rows, options.length), generator=generator)
        engine.backward(model(input_ids=input_ids, labels=input_ids).loss)
        optimizer.step()
    queue.put((rank, baseline, loaded, peak_resident_bytes() - baseline))
    torch.distributed.barrier()


def _touch(lowtide: Any) -> None:
    """What is imported on first use belongs to the baseline."""
    from torch import nn
    from torch.distributed.tensor import DTensor  # noqa: F401

    model = lowtide.shard(nn.Sequential(nn.Linear(8, 8)))
    optimizer = lowtide.AdaLomo(model.parameters())
    engine = lowtide.fuse(model, optimizer)
    import torch

    engine.backward(model(torch.ones(2, 8)).square().mean())
    optimizer.step()
    engine.remove()


def one_process(options: argparse.Namespace) -> tuple[int, int, int]:
    """(weights, one decoder layer, activations of a rank's rows) in bytes: the last as the planner counts them for one process."""
    import torch

    from lowtide.models import find_blocks
    from lowtide.planning import StepShape

    shape = StepShape(
        make_config(options),
        find_blocks=find_blocks,
        dtype=getattr(torch, options.dtype),
        batch_size=options.rows,
        seq_len=options.length,
        optimizer=options.optimizer,
        masked=False,
    )
    kinds = shape.footprint(micro_batch_size=options.micro_batch_size).device
    counted = ("kept block inputs", "one block's working set", "logits", "temporaries of the update")
    largest = max(unit.num_bytes for unit in shape.units)
    return shape.weights_bytes, largest, sum(kinds.get(name, 0) for name in counted)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--optimizer", default="lomo", choices=("lomo", "adalomo"))
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--vocab", type=int, default=512, help="small: embedding and head are gathered, too")
    parser.add_argument("--rows", type=int, default=2, help="sequences on each rank")
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--micro-batch-size", type=int)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        saver = context.Process(target=save, args=(folder, options))
        saver.start()
        saver.join()
        queue = context.Queue()
        ranks = [
            context.Process(target=rank_main, args=(rank, folder, options, queue)) for rank in range(options.ranks)
        ]
        for process in ranks:
            process.start()
        found = sorted(queue.get(timeout=900) for _ in ranks)
        for process in ranks:
            process.join()
    weights, block, activation = one_process(options)
    bound = weights / options.ranks + 2 * block + activation
    for rank, baseline, loaded, peak in found:
        print(
            f"rank {rank}: {peak / 1e6:.0f} MB above {baseline / 1e6:.0f} MB of imports ({loaded / 1e6:.0f} MB while loading); weights "
            f"{weights / 1e6:.0f} MB, largest unit {block / 1e6:.0f} MB, activations {activation / 1e6:.0f} MB: {peak / bound:.2f} of the bound"
        )
        append(
            {
                **facts(),
                **{
                    name: getattr(options, name)
                    for name in ("ranks", "dtype", "optimizer", "layers", "hidden", "vocab")
                },
                "tokens_per_rank": options.rows * options.length,
                "micro_batch_size": options.micro_batch_size or "",
                "rank": rank,
                "weight_bytes": weights,
                "unit_bytes": block,
                "activation_bytes": activation,
                "bound_bytes": round(bound),
                "loading_bytes": loaded,
                "peak_bytes": peak,
                "ratio": round(peak / bound, 3),
            },
            options.results,
        )


def facts() -> dict[str, str]:
    """Of the machine and the code."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False, cwd=Path(__file__).parent
    )
    return {
        "date": datetime.date.today().isoformat(), "commit": commit.stdout.strip(), "machine": f"{platform.machine()}, {os.cpu_count()} processors",
        "torch": importlib.metadata.version("torch"),
    }  # fmt: skip


def append(row: dict[str, Any], results: Path) -> None:
    """To a CSV file."""
    new = not results.exists()
    with results.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        if new:
            writer.writeheader()
        writer.writerow(row)


if __name__ == "__main__":
    main()
