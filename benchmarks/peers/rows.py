"""The CSV file: its columns, and which runs it has already."""

from __future__ import annotations

import csv
import datetime
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .methods import METHODS

RESULTS = Path(__file__).resolve().parents[1] / "results" / "cpu_peers.csv"
FIELDS = (
    "date", "commit", "device", "threads", "torch", "transformers", "peer", "model", "method", "num_parameters", "num_tensors", "batch_size",
    "seq_len", "steps", "weights_bytes", "baseline_bytes", "peak_bytes", "first_step_s", "step_s", "tokens_per_s", "loss", "round", "status",
)  # fmt: skip
TURN_RESULTS = RESULTS.with_name("steps_in_turn.csv")
TURN_FIELDS = (
    "date", "commit", "device", "threads", "torch", "transformers", "peer", "model", "method", "batch_size", "seq_len", "round", "turn", "place",
    "seconds", "user_s", "system_s", "minor_faults",
)  # fmt: skip
UPDATE_RESULTS = RESULTS.with_name("update_cost.csv")
UPDATE_FIELDS = (
    "date", "commit", "device", "threads", "torch", "transformers", "model", "method", "batch_size", "seq_len", "process", "pair", "updated_s", "nothing_s",
    "norm_and_update_s", "updated_faults", "nothing_faults",
)  # fmt: skip
# Rows that agree in these, and in their round, are the same run.
SETTINGS = ("device", "threads", "model", "method", "batch_size", "seq_len", "steps")


def read_all(path: Path) -> list[dict[str, str]]:
    """All rows; none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def read(path: Path) -> list[dict[str, str]]:
    """The rows of cpu_peers.py; of the same run the last one."""
    return list({tuple(row[name] for name in (*SETTINGS, "round")): row for row in read_all(path)}.values())


def has(rows: list[dict[str, str]], settings: Mapping[str, Any], number: int) -> bool:
    """Whether a round is there, or a row that says that the method cannot do it."""
    same = [row for row in rows if all(row[name] == str(settings[name]) for name in SETTINGS)]
    return any(row["round"] == str(number) or row["status"] != "ok" for row in same)


def append(path: Path, row: Mapping[str, Any], fields: Sequence[str] = FIELDS) -> None:
    """One row more, below a header of these columns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, fields)
        if new:
            writer.writeheader()
        writer.writerow(row)


def facts(method: str) -> dict[str, str]:
    """Of the code and the versions."""
    package = METHODS[method].package
    return {
        "date": datetime.date.today().isoformat(), "commit": commit_of(Path(__file__).parent), "torch": version("torch"),
        "transformers": version("transformers"), "peer": f"{package} {version(package)}" if package else "",
    }  # fmt: skip


def commit_of(folder: Path) -> str:
    """Of the work tree that a folder is in; empty without one."""
    found = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=folder, capture_output=True, text=True, check=False
    )
    return found.stdout.strip()


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def device_name() -> str:
    """The processor's model, how many there are, and whether it multiplies bfloat16."""
    name, flags = platform.machine(), ""
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else ():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            name = value.strip()
        elif key.strip() == "flags":
            flags = next((each for each in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if each in value.split()), "")
    return ", ".join(filter(None, (name, f"{os.cpu_count()} processors", flags)))
