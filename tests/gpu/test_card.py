"""Parity on a card: ``pytest -m gpu``. The same checks are the first part of benchmarks/gpu/run.py."""

import subprocess
import sys
import time

import pytest
import torch
from suite.context import Context
from suite.parity import CHECKS
from suite_path import SUITE

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_parity(check, tmp_path):
    context = Context("parity", False, tmp_path, tmp_path, time.monotonic() + 600, lambda row: None)
    found = list(check(context))
    assert found and [(what, note) for what, holds, note in found if not holds] == []


def test_a_limit_on_device_memory_holds(tmp_path):
    """In a process of its own, because the limit stays."""
    code = f"""
import sys, time, pathlib, torch
sys.path.insert(0, {str(SUITE)!r})
from suite.context import Context, limit_device_memory
memory = limit_device_memory(Context("limit", False, pathlib.Path("."), pathlib.Path("."), time.monotonic() + 60, print), 2.0)
assert 0 < memory["usable"] < memory["cap"] == 2 * 2**30
fits = torch.empty(memory["usable"] // 2, dtype=torch.uint8, device="cuda")
try:
    torch.empty(memory["usable"], dtype=torch.uint8, device="cuda")
except torch.OutOfMemoryError:
    print("refused")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.stdout.strip() == "refused", done.stderr
