"""Peak memory and step time with weights in memory and on disk, up to models larger than the memory. Each run a fresh process.

    python benchmarks/bigger_than_memory.py [--cases tiny-ratio tiny-disk 7b-device 7b-disk 30b-disk] [--dir DIRECTORY]

Random weights in the shape of TinyLlama (1.1 B parameters), LLaMA 7B and 30B; Lomo, bfloat16 unless --dtype says otherwise. The
weights are made block by block and never stored but in the working copy, which needs 2 bytes a parameter under --dir (30B: 65 GB)
and is removed afterwards. The baseline is the resident set with everything imported and a tiny model trained for a step, the peak
what the process had at most after that. tiny-ratio alternates steps in memory and from disk in one process.
"""

import argparse
import csv
import datetime
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# TinyLlama (arXiv 2401.02385) and LLaMA (arXiv 2302.13971, table 2).
SHAPES = {
    "tiny": {
        "hidden_size": 2048, "num_hidden_layers": 22, "num_attention_heads": 32, "num_key_value_heads": 4,
        "intermediate_size": 5632,
    },
    "7b": {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 11008},
    "13b": {"hidden_size": 5120, "num_hidden_layers": 40, "num_attention_heads": 40, "intermediate_size": 13824},
    "30b": {"hidden_size": 6656, "num_hidden_layers": 60, "num_attention_heads": 52, "intermediate_size": 17920},
    "65b": {"hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64, "intermediate_size": 22016},
}  # fmt: skip
# name: shape, weights, sequences, tokens in each, steps, bound on the peak in GB and what it is measured above
CASES = {
    "tiny-ratio": ("tiny", "both", 4, 512, 3, None),
    "tiny-device": ("tiny", "device", 4, 512, 1, None),
    "tiny-disk": ("tiny", "disk", 4, 512, 1, 1.0),
    "7b-device": ("7b", "device", 1, 64, 2, 15.5),
    "7b-disk": ("7b", "disk", 1, 64, 2, 3.5),
    "30b-disk": ("30b", "disk", 1, 16, 1, 8.0),
}
GIB = 1024**3
FIELDS = (
    "date", "torch", "cpu", "case", "weights", "dtype", "optimizer", "tokens", "parameters", "baseline_bytes", "peak_bytes",
    "above_baseline_bytes", "bound_gb", "setup_s", "step_s", "read_bytes_per_step", "written_bytes_per_step", "loss",
)  # fmt: skip


def random_model(shape: str, dtype):
    """A Llama of this shape whose weights are made when they are asked for."""
    import torch
    from transformers import LlamaConfig

    from lowtide.models.lazy import skeleton

    config = LlamaConfig(
        vocab_size=32000, tie_word_embeddings=False, use_cache=False, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        max_position_embeddings=2048, **SHAPES[shape],
    )  # fmt: skip
    model = skeleton(config, dtype)
    shapes = {name: param.shape for name, param in model.named_parameters()}
    noise = torch.randn(2**22 + 1, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(dtype)

    def source(name: str) -> torch.Tensor:
        if len(shapes[name]) == 1:
            return torch.ones(shapes[name], dtype=dtype)
        value = torch.empty(shapes[name], dtype=dtype)
        flat = value.view(-1)
        for start in range(0, flat.numel(), noise.numel()):
            flat[start : start + noise.numel()] = noise[: flat.numel() - start]
        return value

    model.lowtide_source = source
    return model.train()


def train_steps(shape: str, weights: str, batch: int, seq: int, options: argparse.Namespace, where: Path):
    """Yields (seconds of a step, loss, engine) for ever."""
    import torch

    import lowtide

    model = random_model(shape, getattr(torch, options.dtype))
    rule = lowtide.Lomo if options.optimizer == "lomo" else lowtide.AdaLomo
    optimizer = rule(model.parameters(), lr=1e-3)
    engine = lowtide.fuse(model, optimizer, weights="device" if weights == "device" else where, device="cpu")
    generator = torch.Generator().manual_seed(0)
    while True:
        ids = torch.randint(3, 32000, (batch, seq), generator=generator)
        start = time.perf_counter()
        loss = model(input_ids=ids, labels=ids).loss
        engine.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        yield time.perf_counter() - start, loss.item(), engine


def warm_up(options: argparse.Namespace) -> int:
    """Import and touch everything; returns the resident set then, and begins to measure the peak anew."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import lowtide
    from lowtide.planning import resident_bytes

    torch.set_num_threads(options.threads)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=1000,
        use_cache=False,
    )
    model = LlamaForCausalLM(config).to(getattr(torch, options.dtype)).train()
    optimizer = lowtide.Lomo(model.parameters(), lr=1e-3)
    engine = lowtide.fuse(model, optimizer)
    ids = torch.randint(3, 1000, (2, 16))
    engine.backward(model(input_ids=ids, labels=ids).loss)
    optimizer.step()
    engine.remove()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    return resident_bytes()


def run_case(name: str, options: argparse.Namespace) -> dict:
    """One case, in this process."""
    from lowtide.planning import peak_resident_bytes

    shape, weights, batch, seq, steps, _ = CASES[name]
    batch, seq, steps = options.batch_size or batch, options.seq_len or seq, options.steps or steps
    baseline = warm_up(options)
    where = Path(tempfile.mkdtemp(dir=options.dir, prefix="lowtide-bench-"))
    try:
        start = time.perf_counter()
        if weights == "both":
            return ratio(shape, batch, seq, steps, options, where)
        runs = train_steps(shape, weights, batch, seq, options, where)
        first = next(runs)
        setup_s = time.perf_counter() - start - first[0]
        engine = first[2]
        store = engine.home.streamed[0].store if weights == "disk" else None
        at_first = (store.bytes_read, store.bytes_written) if store else (0, 0)
        rest = [next(runs) for _ in range(steps - 1)]
        taken = rest or [first]
        if store and not rest:  # the copy was written once, and a little was read ahead
            at_first = (0, sum(layout.num_bytes for layout in engine.home.streamed[0].layouts))
        if store:
            engine.home.streamed[0].synchronize()
        peak = peak_resident_bytes()
        num_params = sum(param.numel() for param in engine.model.parameters())
        moved = (store.bytes_read - at_first[0], store.bytes_written - at_first[1]) if store else (0, 0)
        return {
            "tokens": batch * seq, "parameters": num_params, "baseline_bytes": baseline, "peak_bytes": peak,
            "above_baseline_bytes": peak - baseline, "setup_s": round(setup_s, 1),
            "step_s": round(sum(each[0] for each in taken) / len(taken), 2), "loss": round(taken[-1][1], 4),
            "read_bytes_per_step": moved[0] // len(taken), "written_bytes_per_step": moved[1] // len(taken),
            "weights": weights,
        }  # fmt: skip
    finally:
        shutil.rmtree(where, ignore_errors=True)


def ratio(shape: str, batch: int, seq: int, steps: int, options: argparse.Namespace, where: Path) -> dict:
    """Steps in memory and from disk in turn; the first of each does not count."""
    import statistics

    runs = {weights: train_steps(shape, weights, batch, seq, options, where / "w") for weights in ("device", "disk")}
    times: dict[str, list[float]] = {weights: [] for weights in runs}
    for number in range(steps + 1):
        for weights, each in runs.items():
            seconds, loss, _ = next(each)
            print(f"  {weights}: {seconds:.1f} s, loss {loss:.4f}", file=sys.stderr, flush=True)
            if number:
                times[weights].append(seconds)
    medians = {weights: statistics.median(values) for weights, values in times.items()}
    ratios = [disk / device for disk, device in zip(times["disk"], times["device"], strict=True)]
    return {
        "tokens": batch * seq, "weights": "disk / device", "step_s": round(medians["disk"], 2),
        "device_step_s": round(medians["device"], 2), "ratio": round(statistics.median(ratios), 3),
        "ratios": [round(each, 3) for each in ratios],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=tuple(CASES), default=["tiny-disk", "7b-device", "7b-disk"])
    parser.add_argument("--dir", default=tempfile.gettempdir(), help="where the working copies are made")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--optimizer", default="lomo", choices=("lomo", "adalomo"))
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--seq-len", type=int)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(run_case(options.cases[0], options)))
        return
    import torch

    results = Path(__file__).parent / "results"
    for name in options.cases:
        free = shutil.disk_usage(options.dir).free
        print(f"{name} (free disk {free / 1e9:.0f} GB) ...", flush=True)
        command = [sys.executable, __file__, "--one", "--cases", name]
        for option in ("dir", "dtype", "optimizer", "batch_size", "seq_len", "steps", "threads"):
            if (value := getattr(options, option)) is not None:
                command += [f"--{option.replace('_', '-')}", str(value)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            print(f"  did not finish: exit {done.returncode}")
            continue
        found = json.loads(done.stdout.splitlines()[-1])
        start = {
            "date": datetime.date.today(), "torch": torch.__version__, "case": name, "dtype": options.dtype,
            "optimizer": options.optimizer, "cpu": torch.backends.cpu.get_cpu_capability(),
        }  # fmt: skip
        if "ratio" in found:
            print(
                f"  {found['tokens']} tokens: {found['device_step_s']} s in memory, {found['step_s']} s from disk, ratio "
                f"{found['ratio']} of {found['ratios']} (bound 1.3)"
            )
            write(results / "bigger_than_memory_ratio.csv", {**start, **found})
            continue
        bound = CASES[name][5]
        above = name.startswith("tiny")  # that bound is above the baseline, the others are on the whole process
        figure = found["above_baseline_bytes"] if above else found["peak_bytes"]
        print(
            f"  {found['parameters'] / 1e9:.2f} B parameters, {found['tokens']} tokens: peak {found['peak_bytes'] / 1e9:.2f} GB, "
            f"{found['above_baseline_bytes'] / 1e9:.2f} GB above the baseline; {figure / 1e9:.2f} against {bound} GB; "
            f"{found['step_s']} s a step; read {found['read_bytes_per_step'] / 1e9:.1f} GB, "
            f"written {found['written_bytes_per_step'] / 1e9:.1f} GB",
            flush=True,
        )
        row = {**start, **found, "bound_gb": bound}
        write(results / "bigger_than_memory.csv", {field: row.get(field, "") for field in FIELDS})


def write(path: Path, row: dict) -> None:
    """Append a row, with a header to a new file."""
    path.parent.mkdir(exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, row)
        if new:
            writer.writeheader()
        writer.writerow(row)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
