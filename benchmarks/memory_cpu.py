"""Peak resident memory of a training step on the TinyLlama shape (1.1 B parameters), each method in a fresh process.

    python benchmarks/memory_cpu.py [--methods lomo adalomo adamw-bf16 adamw-fp32] [--steps 2]

Batch 8 x 128 tokens, random weights. AdamW runs with checkpointing of transformers, so that only the method differs. The peak is
the process's own resident set, Python and libraries included. AdamW in float32 needs about 20 GB. A few minutes a method.
"""

import argparse
import csv
import datetime
import json
import platform
import subprocess
import sys
import time
from pathlib import Path

METHODS = ("lomo", "adalomo", "adamw-bf16", "adamw-fp32")


def run_one(method: str, steps: int, micro_batch_size: int | None, threads: int) -> None:
    """Train, and print one line of JSON."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import lowtide
    from lowtide.planning import peak_resident_bytes

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    dtype = torch.float32 if method == "adamw-fp32" else torch.bfloat16
    config = LlamaConfig(
        hidden_size=2048, num_hidden_layers=22, num_attention_heads=32, num_key_value_heads=4, intermediate_size=5632,
        vocab_size=32000, tie_word_embeddings=False, use_cache=False,
    )  # fmt: skip
    torch.set_default_dtype(dtype)
    model = LlamaForCausalLM(config).train()
    torch.set_default_dtype(torch.float32)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    engine = None
    if method.startswith("adamw"):
        model.gradient_checkpointing_enable()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    else:
        rule = lowtide.Lomo if method == "lomo" else lowtide.AdaLomo
        optimizer = rule(model.parameters(), lr=1e-3)
        engine = lowtide.fuse(model, optimizer, micro_batch_size=micro_batch_size)
    seconds = []
    for _ in range(steps):
        ids = torch.randint(config.vocab_size, (8, 128))
        start = time.perf_counter()
        loss = model(input_ids=ids, labels=ids).loss
        engine.backward(loss) if engine else loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
    peak = peak_resident_bytes()
    print(json.dumps({"weights_bytes": weights, "peak_bytes": peak, "step_s": seconds[-1], "loss": loss.item()}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--micro-batch-size", type=int, default=None)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--one", choices=METHODS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        run_one(options.one, options.steps, options.micro_batch_size, options.threads)
        return
    path = Path(__file__).parent / "results" / "memory_cpu.csv"
    path.parent.mkdir(exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(
                [
                    "date",
                    "machine",
                    "threads",
                    "method",
                    "micro_batch_size",
                    "weights_bytes",
                    "peak_bytes",
                    "ratio",
                    "step_s",
                ]
            )
        for method in options.methods:
            command = [sys.executable, __file__, "--one", method, "--steps", str(options.steps)]
            command += ["--threads", str(options.threads)]
            if options.micro_batch_size:
                command += ["--micro-batch-size", str(options.micro_batch_size)]
            result = subprocess.run(command, capture_output=True, text=True)
            if result.returncode:
                print(f"{method}: did not finish (exit {result.returncode}): {result.stderr.strip().splitlines()[-1:]}")
                continue
            found = json.loads(result.stdout.splitlines()[-1])
            ratio = found["peak_bytes"] / found["weights_bytes"]
            print(
                f"{method:11} {found['peak_bytes'] / 1e9:6.2f} GB peak, {ratio:.2f}x its weights, {found['step_s']:.1f} s a step"
            )
            row = [datetime.date.today(), platform.machine(), options.threads, method, options.micro_batch_size]
            writer.writerow(
                [*row, found["weights_bytes"], found["peak_bytes"], f"{ratio:.3f}", f"{found['step_s']:.1f}"]
            )
            file.flush()


if __name__ == "__main__":
    main()
