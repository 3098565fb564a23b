"""One prediction against a real run; ``benchmarks/plan_check.py`` has many, of larger models."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SCRIPT = """
import json, sys
sys.path.insert(0, sys.argv[1])
import plan_check
plan_check.SHAPES["test"] = ("llama", 1024, 2816, 2, 16, 4, 16000, False)
plan_check.CONFIGURATIONS["test"] = ("test", 2, 64, None, "lomo", "float32", sys.argv[2], None)
plan_check.measure("test", 1)
print(json.dumps(sum(plan_check.predict("test").values())))
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux, whose peak resident set can be reset")
def test_the_prediction_is_near_the_measured_peak():
    command = [sys.executable, "-c", SCRIPT, str(BENCHMARKS), "device"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    measured, predicted = (json.loads(line) for line in done.stdout.splitlines()[-2:])
    # a small model, beside which what an allocator keeps varies more: the benchmark asks for 10 %
    assert predicted == pytest.approx(measured["measured"], rel=0.15)
