"""What clipping and rounding cost: time of a step on the TinyLlama shape (1.1 B parameters), all ways paired in one process.

    python benchmarks/clip_cost.py [--what clipping rounding update] [--rounds 2] [--layers 22] [--dtype bfloat16] [--seq-len 128]

Batch 8 x 128 tokens, Lomo, random weights. In every round each way takes one step, in an order that changes from
round to round; the ratio is that to the unclipped step (to rounding to nearest) of the same round, and its median is reported.
``exact, all kept`` has room for all gradients between the passes (2.2 GB). Without bfloat16 instructions a bfloat16 step takes minutes: use float32 there, and
``update``, which times the updates of all parameters without a forward and a backward. About ten minutes on two cores for two rounds of
both.
"""

import argparse
import csv
import datetime
import statistics
import subprocess
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lowtide

ROOT = Path(__file__).parent
CLIPPING = {
    "none": {},
    "exact": {"clip_grad_norm": 1.0},
    "exact, all kept": {"clip_grad_norm": 1.0, "clip_memory_bytes": 1.01},
    "adaptive": {"clip_grad_norm": 1.0, "clip": "adaptive", "clip_warmup_steps": 1},
}
WHAT = ("clipping", "rounding", "update")
ROUNDING = ("nearest", "stochastic", "compensated")


def make_model(num_layers: int, dtype: torch.dtype) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=2048, num_hidden_layers=num_layers, num_attention_heads=32, num_key_value_heads=4,
        intermediate_size=5632, vocab_size=32000, tie_word_embeddings=False, use_cache=False,
    )  # fmt: skip
    torch.set_default_dtype(dtype)
    try:
        return LlamaForCausalLM(config).train()
    finally:
        torch.set_default_dtype(torch.float32)


def step_seconds(model: LlamaForCausalLM, rounding: str | None, options: dict) -> float:
    weights_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    if "clip_memory_bytes" in options:
        options = {**options, "clip_memory_bytes": int(options["clip_memory_bytes"] * weights_bytes)}
    optimizer = lowtide.Lomo(model.parameters(), lr=1e-4, rounding=rounding)
    engine = lowtide.fuse(model, optimizer, **options)
    if engine.adaptive is not None:
        engine.adaptive.num_warmup_steps = engine.adaptive.warmup_steps  # the steps after it are what is measured
    ids = torch.randint(model.config.vocab_size, (8, model.config.seq_len))
    start = time.perf_counter()
    engine.backward(model(input_ids=ids, labels=ids).loss)
    optimizer.step()
    seconds = time.perf_counter() - start
    engine.remove()
    return seconds


def compare(
    model: LlamaForCausalLM, ways: dict[str, tuple[str | None, dict]], rounds: int, options: argparse.Namespace
) -> None:
    """Print and record the median ratio of each way to the first."""
    first, names = next(iter(ways)), list(ways)
    step_seconds(model, *ways[first])  # caches warm up
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            seconds[name].append(step_seconds(model, *ways[name]))
            print(f"  round {number + 1}: {name:17} {seconds[name][-1]:.1f} s", flush=True)
    for name in names:
        ratios = [mine / base for mine, base in zip(seconds[name], seconds[first], strict=True)]
        median, ratio = statistics.median(seconds[name]), statistics.median(ratios)
        print(f"{name:17} {median:6.1f} s a step, {ratio:.3f}x {first} ({min(ratios):.3f} to {max(ratios):.3f})")
        record(name, first, median, ratio, ratios, options)


def compare_updates(model: LlamaForCausalLM, rounds: int, options: argparse.Namespace) -> None:
    """Time of the updates of all parameters alone, without forward and backward: the part of a step that rounding is in."""
    seconds: dict[str, list[float]] = {name: [] for name in ROUNDING}
    for number in range(rounds + 1):
        for name in ROUNDING:
            optimizer = lowtide.Lomo(model.parameters(), lr=1e-4, rounding=name)
            group, total = optimizer.param_groups[0], 0.0
            with torch.no_grad():
                for param in model.parameters():
                    grad = torch.randn_like(param)
                    optimizer.update_param(param, grad, group)  # makes the state
                    start = time.perf_counter()
                    optimizer.update_param(param, grad, group)
                    total += time.perf_counter() - start
            if number:
                seconds[name].append(total)
    numel = sum(param.numel() for param in model.parameters())
    for name in ROUNDING:
        ratios = [mine / base for mine, base in zip(seconds[name], seconds["nearest"], strict=True)]
        median = statistics.median(seconds[name])
        print(f"update, {name:11} {median:6.2f} s for all parameters, {median / numel * 1e9:.2f} ns each")
        record(f"update, {name}", "update, nearest", median, statistics.median(ratios), ratios, options)


def record(name: str, base: str, median: float, ratio: float, ratios: list[float], options: argparse.Namespace) -> None:
    path = ROOT / "results" / "clip_cost.csv"
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT
    ).stdout.strip()
    row = {
        "date": datetime.date.today(), "commit": commit, "device": options.device, "torch": torch.__version__,
        "layers": options.layers, "dtype": options.dtype, "seq_len": options.seq_len,
        "threads": options.threads, "rounds": len(ratios), "way": name, "step_s": f"{median:.2f}",
        "to": base, "ratio": f"{ratio:.3f}", "lowest": f"{min(ratios):.3f}", "highest": f"{max(ratios):.3f}",
    }  # fmt: skip
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(row))
        if new:
            writer.writeheader()
        writer.writerow(row)


def main(what: tuple[str, ...] = WHAT) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--what", nargs="+", choices=WHAT, default=what)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="float32: clipping only")
    parser.add_argument("--seq-len", type=int, default=128)
    options = parser.parse_args()
    options.device = f"{options.threads} CPU threads"
    torch.set_num_threads(options.threads)
    model = make_model(options.layers, getattr(torch, options.dtype))
    model.config.seq_len = options.seq_len
    if "clipping" in options.what:
        compare(model, {name: (None, more) for name, more in CLIPPING.items()}, options.rounds, options)
    if "rounding" in options.what:
        compare(model, {name: (name, {}) for name in ROUNDING}, options.rounds, options)
    if "update" in options.what:
        compare_updates(model, options.rounds, options)


if __name__ == "__main__":
    main()
