"""The planner's prediction of peak memory against the measured one, each configuration in a fresh process.

    python benchmarks/plan_check.py [--only NAME ...] [--threads 1]

Measured: the largest resident set of two training steps (three with adamw, whose moments appear in the first), less what the
process held after steps of a tiny model with everything imported. Building the model with random weights is not counted. Random
tokens, no padding. About ten minutes on one core.
"""

import argparse
import csv
import ctypes
import json
import subprocess
import sys
import tempfile
from pathlib import Path

MIB = 2**20
RESULTS = Path(__file__).parent / "results" / "plan_check.csv"

# family, hidden, mlp, layers, heads, key-value heads, vocabulary, tied
SHAPES = {
    "llama-1024": ("llama", 1024, 2816, 6, 16, 4, 32000, False),
    "llama-1024-tied": ("llama", 1024, 2816, 6, 16, 4, 50000, True),
    "llama-2048": ("llama", 2048, 5632, 4, 32, 4, 1000, False),
    "llama-512": ("llama", 512, 1408, 12, 8, 8, 50000, False),
    "qwen3-1024": ("qwen3", 1024, 3072, 6, 16, 8, 20000, True),
    "neox-1024": ("gpt_neox", 1024, 4096, 6, 16, 16, 10000, False),
    "mixtral-768": ("mixtral", 768, 1536, 4, 12, 4, 8000, False),
}

# name: shape, batch, sequence, micro-batch, optimizer, dtype, weights, clip_grad_norm
CONFIGURATIONS = {
    "lomo whole batch": ("llama-1024", 4, 256, None, "lomo", "float32", "device", None),
    "lomo long": ("llama-1024", 2, 1024, 1, "lomo", "float32", "device", None),
    "adalomo micro 2": ("llama-1024", 8, 128, 2, "adalomo", "float32", "device", None),
    "tied": ("llama-1024-tied", 4, 256, None, "adalomo", "float32", "device", None),
    "tied micro 1": ("llama-1024-tied", 2, 512, 1, "lomo", "float32", "device", None),
    "adamw": ("llama-512", 4, 256, None, "adamw", "float32", "device", None),
    "adamw micro 1": ("llama-2048", 2, 256, 1, "adamw", "float32", "device", None),
    "wide, small vocabulary": ("llama-2048", 16, 64, None, "lomo", "float32", "device", None),
    "wide, micro 2": ("llama-2048", 4, 256, 2, "adalomo", "float32", "device", None),
    "one sequence": ("llama-2048", 1, 1024, None, "lomo", "float32", "device", None),
    "narrow, deep": ("llama-512", 16, 256, None, "lomo", "float32", "device", None),
    "qwen3": ("qwen3-1024", 4, 256, 2, "lomo", "float32", "device", None),
    "qwen3 whole batch": ("qwen3-1024", 4, 512, None, "adalomo", "float32", "device", None),
    "neox": ("neox-1024", 4, 256, None, "lomo", "float32", "device", None),
    "neox micro 1": ("neox-1024", 2, 512, 1, "adalomo", "float32", "device", None),
    "mixture": ("mixtral-768", 8, 128, None, "adalomo", "float32", "device", None),
    "mixture micro 2": ("mixtral-768", 4, 256, 2, "lomo", "float32", "device", None),
    "exact clipping": ("llama-1024", 4, 256, 2, "lomo", "float32", "device", 1.0),
    "in host memory": ("llama-1024", 4, 256, None, "lomo", "float32", "cpu", None),
    "on disk": ("llama-1024", 4, 256, None, "lomo", "float32", "disk", None),
    "on disk, micro 2": ("llama-2048", 4, 256, 2, "adalomo", "float32", "disk", None),
    "on disk, tied": ("qwen3-1024", 4, 256, None, "lomo", "float32", "disk", None),
    "on disk, neox, clipped": ("neox-1024", 4, 256, 1, "lomo", "float32", "disk", 1.0),
    "bfloat16": ("llama-1024", 1, 64, None, "lomo", "bfloat16", "device", None),
    "bfloat16 micro 1": ("llama-1024", 2, 64, 1, "adalomo", "bfloat16", "device", None),
}  # fmt: skip


def make_config(shape: str):
    """The transformers config of a shape."""
    import transformers

    family, hidden, mlp, layers, heads, kv_heads, vocab, tied = SHAPES[shape]
    common = {
        "hidden_size": hidden, "intermediate_size": mlp, "num_hidden_layers": layers, "num_attention_heads": heads,
        "vocab_size": vocab, "tie_word_embeddings": tied, "use_cache": False,
    }  # fmt: skip
    if family == "gpt_neox":
        return transformers.GPTNeoXConfig(**common)
    common["num_key_value_heads"] = kv_heads
    if family == "qwen3":
        return transformers.Qwen3Config(**common, head_dim=hidden // heads)
    if family == "mixtral":
        return transformers.MixtralConfig(**common, num_local_experts=4, num_experts_per_tok=2)
    return transformers.LlamaConfig(**common)


def take_steps(config, dtype, optimizer, batch, seq, micro, weights, clip, steps):
    """Build, fuse and train with random tokens; the peak counts from the first step on."""
    import torch
    from transformers import AutoModelForCausalLM

    import lowtide

    model = AutoModelForCausalLM.from_config(config, dtype=dtype).train()
    rules = {"lomo": lowtide.Lomo, "adalomo": lowtide.AdaLomo}
    params = model.parameters()
    rule = rules[optimizer](params) if optimizer in rules else lowtide.PerParameter(torch.optim.AdamW, params, lr=1e-5)
    with tempfile.TemporaryDirectory(dir=Path(__file__).parent) as folder:
        home = folder if weights == "disk" else weights
        engine = lowtide.fuse(model, rule, micro_batch_size=micro, clip_grad_norm=clip, weights=home)
        ctypes.CDLL(None).malloc_trim(0)  # what building has left behind
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        for _ in range(steps):
            ids = torch.randint(config.vocab_size, (batch, seq))
            loss = model(input_ids=ids, labels=ids).loss
            engine.backward(loss)
            rule.step()
            rule.zero_grad()
        del loss
        peak = lowtide.planning.peak_resident_bytes()
        engine.remove()
    return peak


def measure(name: str, threads: int) -> None:
    """One configuration in this process; prints a line of JSON."""
    import torch

    from lowtide.planning import resident_bytes

    torch.set_num_threads(threads)
    shape, batch, seq, micro, optimizer, dtype, weights, clip = CONFIGURATIONS[name]
    dtype = getattr(torch, dtype)
    config, tiny = make_config(shape), make_config(shape)
    for small, value in (("hidden_size", 64), ("intermediate_size", 64), ("num_hidden_layers", 1), ("vocab_size", 64)):
        setattr(tiny, small, value)
    tiny.num_attention_heads, tiny.num_key_value_heads, tiny.head_dim = 4, 4, 16
    take_steps(tiny, dtype, optimizer, 2, 8, micro and 1, weights, clip, 2)
    baseline = resident_bytes()
    peak = take_steps(config, dtype, optimizer, batch, seq, micro, weights, clip, 3 if optimizer == "adamw" else 2)
    print(json.dumps({"measured": peak - baseline, "baseline": baseline}))


def predict(name: str) -> dict[str, int]:
    """The planner's bytes by kind."""
    import torch

    from lowtide.models.blocks import find_blocks
    from lowtide.planning import footprint

    shape, batch, seq, micro, optimizer, dtype, weights, clip = CONFIGURATIONS[name]
    return footprint(
        make_config(shape),
        find_blocks=find_blocks,
        dtype=getattr(torch, dtype),
        batch_size=batch,
        seq_len=seq,
        micro_batch_size=micro,
        optimizer=optimizer,
        exact_clipping=clip is not None,
        masked=False,
        homes="host" if weights == "cpu" else weights,
    ).device


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=CONFIGURATIONS, default=list(CONFIGURATIONS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--one", choices=CONFIGURATIONS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        measure(options.one, options.threads)
        return
    print(
        "| configuration | shape | batch x seq, micro | optimizer, dtype, home | predicted MiB | measured MiB | error |"
    )
    print("|---|---|---|---|---|---|---|")
    rows = []
    for name in options.only:
        command = [sys.executable, __file__, "--one", name, "--threads", str(options.threads)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            print(f"{name} did not finish: {done.stderr.strip().splitlines()[-1:]}")
            continue
        measured = json.loads(done.stdout.splitlines()[-1])["measured"]
        kinds = predict(name)
        predicted = sum(kinds.values())
        shape, batch, seq, micro, optimizer, dtype, weights, clip = CONFIGURATIONS[name]
        error = predicted / measured - 1
        rule = optimizer + (", clipped" if clip else "")
        print(
            f"| {name} | {shape} | {batch} x {seq}, {micro or 'all'} | {rule}, {dtype}, {weights} | {predicted / MIB:.0f} "
            f"| {measured / MIB:.0f} | {error:+.1%} |",
            flush=True,
        )
        rows.append([name, shape, batch, seq, micro, rule, dtype, weights, predicted, measured, f"{error:.4f}"])
    if len(rows) == len(CONFIGURATIONS):
        with RESULTS.open("w", newline="") as file:
            writer = csv.writer(file)
            head = "name,shape,batch_size,seq_len,micro_batch_size,optimizer,dtype,weights,predicted_bytes,measured_bytes,error"
            writer.writerow(head.split(","))
            writer.writerows(rows)


if __name__ == "__main__":
    main()
