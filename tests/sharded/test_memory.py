"""What a rank holds at most: its share, one decoder layer twice, and activations. The benchmark measures it, in fresh processes."""

import csv
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "sharded_memory.py"
LIMIT = 1.15


def test_a_rank_holds_its_share_and_one_layer_twice(tmp_path):
    results = tmp_path / "memory.csv"
    command = [sys.executable, SCRIPT, "--ranks", "4", "--layers", "8", "--steps", "1", "--results", results]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    with results.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4
    for row in rows:
        # The bound is less than half of the model, so a rank that held all of it, or three layers, would not pass.
        assert float(row["bound_bytes"]) < 0.6 * float(row["weight_bytes"])
        assert float(row["ratio"]) <= LIMIT, (row, done.stdout)
