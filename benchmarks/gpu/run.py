"""Everything about homes that needs a card, in one command; each part prints and writes one row, so that a cut leaves what was done.

    python benchmarks/gpu/run.py [--parts parity speed large] [--dir DIRECTORY] [--cap-gib 24] [--minutes 8]

parity  ten steps of a small Llama on the card: weights in host memory, on disk, mixed, and block inputs in host memory end with the same
        bits as weights on the card
speed   TinyLlama shape, bfloat16, 8 x 1024: seconds of a step, weights on the card, in host memory and on disk, in turn
large   LLaMA 65B shape under a cap on device memory, as many of its 80 layers as host memory and disk hold (all of them with 131 GB);
        tokens/s, MFU, most device memory; beside the LOMO paper's 39 tokens/s on eight RTX 3090

Not run on a card by those who wrote it. Results go to benchmarks/results/gpu_homes.csv.
"""

import argparse
import csv
import datetime
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import lowtide
from bigger_than_memory import SHAPES, random_model

GIB = 1024**3
RESULTS = Path(__file__).parents[1] / "results" / "gpu_homes.csv"
FIELDS = (
    "date",
    "device",
    "torch",
    "transformers",
    "part",
    "case",
    "step_s",
    "tokens_per_s",
    "mfu",
    "device_bytes",
    "ok",
    "note",
)
# Dense bfloat16 FLOP/s from the makers' data sheets; MFU is left out for other cards.
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "4090": 165e12, "3090": 71e12}


def note(part: str, case: str, **found) -> None:
    """Print a row and append it to the results."""
    import transformers

    row = {
        "date": datetime.date.today(), "device": torch.cuda.get_device_name(), "torch": torch.__version__,
        "transformers": transformers.__version__, "part": part, "case": case, **found,
    }  # fmt: skip
    print(
        ", ".join(f"{name} {value}" for name, value in row.items() if name not in ("date", "torch", "transformers")),
        flush=True,
    )
    RESULTS.parent.mkdir(exist_ok=True)
    new = not RESULTS.exists()
    with RESULTS.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        if new:
            writer.writeheader()
        writer.writerow({field: row.get(field, "") for field in FIELDS})


def parity(options: argparse.Namespace) -> None:
    """The same bits whatever the home."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def run(dtype: torch.dtype, **where) -> list[torch.Tensor]:
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=256, intermediate_size=512, num_hidden_layers=6, num_attention_heads=8, vocab_size=1000, use_cache=False,
            tie_word_embeddings=False,
        )  # fmt: skip
        model = LlamaForCausalLM(config).to(dtype).to("cuda").train()
        optimizer = lowtide.Lomo(model.parameters(), lr=0.01)
        engine = lowtide.fuse(model, optimizer, clip_grad_norm=1.0, micro_batch_size=2, **where)
        generator = torch.Generator().manual_seed(0)
        for _ in range(10):
            ids = torch.randint(3, 1000, (4, 64), generator=generator).cuda()
            engine.backward(model(input_ids=ids, labels=ids).loss)
            optimizer.step()
        engine.remove()
        return [param.detach().cpu().clone() for param in model.parameters()]

    for dtype in (torch.float32, torch.bfloat16):
        expected = run(dtype)
        again = run(dtype)
        note("parity", f"{dtype} device, twice", ok=all(map(torch.equal, expected, again)))
        with tempfile.TemporaryDirectory(dir=options.dir) as folder:
            cases = {
                "host": {"weights": "cpu"},
                "disk": {"weights": Path(folder) / "disk"},
                "mix": {
                    "weights": {"": "cpu", "model.layers.0": "device", "model.layers.1": str(Path(folder) / "mix")}
                },
                "block inputs in host memory": {"block_inputs": "cpu"},
            }
            for name, where in cases.items():
                note("parity", f"{dtype} {name}", ok=all(map(torch.equal, expected, run(dtype, **where))))


def steps(model, batch: int, seq: int, **where):
    """Yields (seconds, engine) of each step."""
    optimizer = lowtide.Lomo(model.parameters(), lr=1e-3)
    engine = lowtide.fuse(model, optimizer, device="cuda", **where)
    while True:
        ids = torch.randint(3, 32000, (batch, seq), device="cuda")
        torch.cuda.synchronize()
        start = time.perf_counter()
        engine.backward(model(input_ids=ids, labels=ids).loss)
        optimizer.step()
        torch.cuda.synchronize()
        yield time.perf_counter() - start, engine


def speed(options: argparse.Namespace) -> None:
    """Steps of each home in turn, in one process."""
    batch, seq = 8, 1024
    with tempfile.TemporaryDirectory(dir=options.dir) as folder:
        homes = {
            "device": {"weights": "device"},
            "host": {"weights": "cpu"},
            "disk": {"weights": Path(folder) / "weights"},
        }
        runs = {name: steps(random_model("tiny", torch.bfloat16), batch, seq, **where) for name, where in homes.items()}
        times: dict[str, list[float]] = {name: [] for name in runs}
        for number in range(6):
            for name, run in runs.items():
                seconds, _ = next(run)
                if number:
                    times[name].append(seconds)
        for name, values in times.items():
            median = statistics.median(values)
            ratio = median / statistics.median(times["device"])
            note(
                "speed",
                name,
                step_s=f"{median:.3f}",
                tokens_per_s=f"{batch * seq / median:.0f}",
                note=f"{ratio:.3f} x device",
            )


def large(options: argparse.Namespace) -> None:
    """65B under a cap."""
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, options.cap_gib * GIB / total))
    layer = 2 * (4 * 8192**2 + 3 * 8192 * 22016)
    host = int(0.85 * psutil.virtual_memory().available) - 2 * 2 * 32000 * 8192
    disk = int(0.9 * shutil.disk_usage(options.dir).free)
    in_host = max(0, min(80, host // layer))
    on_disk = max(0, min(80 - in_host, disk // layer))
    SHAPES["large"] = {**SHAPES["65b"], "num_hidden_layers": in_host + on_disk}
    with tempfile.TemporaryDirectory(dir=options.dir) as folder:
        weights = {"": "cpu", **{f"model.layers.{in_host + n}": str(Path(folder) / "weights") for n in range(on_disk)}}
        model = random_model("large", torch.bfloat16)
        num_params = sum(param.numel() for param in model.parameters())
        end = time.perf_counter() + 60 * options.minutes
        peak_flops = next((flops for name, flops in PEAK_FLOPS.items() if name in torch.cuda.get_device_name()), None)
        batch, seq = options.batch_size, options.seq_len
        for number, (seconds, _) in enumerate(
            steps(model, batch, seq, weights=weights, block_inputs="cpu", micro_batch_size=1)
        ):
            tokens = batch * seq
            mfu = "" if peak_flops is None else f"{6 * num_params * tokens / seconds / peak_flops:.3f}"
            note(
                "large", f"65B, {in_host} layers in host memory, {on_disk} on disk, step {number + 1}", step_s=f"{seconds:.2f}",
                tokens_per_s=f"{tokens / seconds:.1f}", mfu=mfu, device_bytes=torch.cuda.max_memory_reserved(),
                note=f"{num_params / 1e9:.1f} B parameters, {batch} x {seq}; the paper: 39 tokens/s on 8 RTX 3090",
            )  # fmt: skip
            if time.perf_counter() > end:
                break


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--parts", nargs="+", choices=("parity", "speed", "large"), default=["parity", "speed", "large"]
    )
    parser.add_argument("--dir", default=tempfile.gettempdir())
    parser.add_argument("--cap-gib", type=float, default=24)
    parser.add_argument("--minutes", type=float, default=8, help="after which the large part takes no further step")
    parser.add_argument("--batch-size", type=int, default=32, help="of the large part")
    parser.add_argument("--seq-len", type=int, default=1024, help="of the large part")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("there is no CUDA device here: this script needs one")
    for part in options.parts:
        {"parity": parity, "speed": speed, "large": large}[part](options)


if __name__ == "__main__":
    main()
