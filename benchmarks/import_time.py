"""How long ``import lowtide`` and the command line take to answer, beside a Python that does nothing. Under a minute.

    python benchmarks/import_time.py [--rounds 20]

Every round starts each program once, one after the other, in a fresh process whose files are in the page cache; the figure is the
median of the differences to the empty program of the same round. The commands are those that must not wait for torch.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
CALL = "from lowtide.cli import main; main({!r})"
PROGRAMS = {
    "nothing": "pass",
    "import lowtide": "import lowtide",
    "lowtide --help": CALL.format(["--help"]),
    "lowtide train --help": CALL.format(["train", "--help"]),
    "lowtide completion bash": CALL.format(["completion", "bash"]),
    "import torch": "import torch",
    "import lowtide and use it": "import lowtide; lowtide.fuse; lowtide.AdaLomo",
}
FIELDS = ["date", "commit", "machine", "python", "program", "rounds", "seconds", "above_nothing_s", "highest_above_s"]


def seconds(program: str) -> float:
    """Wall time of a fresh Python."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", program], stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - start


def measure(rounds: int) -> dict[str, list[float]]:
    """Seconds of every program in every round, the first of which (cold files) is left out."""
    times: dict[str, list[float]] = {name: [] for name in PROGRAMS}
    for _ in range(rounds + 1):
        for name, program in PROGRAMS.items():
            times[name].append(seconds(program))
    return {name: values[1:] for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--results", type=Path, default=HERE / "results" / "import_time.csv")
    options = parser.parse_args()
    times = measure(options.rounds)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True, check=False
    )
    new = not options.results.exists()
    with options.results.open("a", newline="") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(FIELDS)
        for name, values in times.items():
            above = [value - empty for value, empty in zip(values, times["nothing"], strict=True)]
            median, extra = statistics.median(values), statistics.median(above)
            print(f"{name:28} {median:6.3f} s, {extra:6.3f} s more than nothing (at most {max(above):.3f})")
            machine = f"{platform.machine()}, {os.cpu_count()} processors"
            row = [datetime.date.today(), commit.stdout.strip(), machine, platform.python_version(), name, len(values)]
            writer.writerow([*row, f"{median:.4f}", f"{extra:.4f}", f"{max(above):.4f}"])


if __name__ == "__main__":
    main()
