"""The short form of ``make torture``. In a process of its own, because runs are forked from it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_run_that_is_killed_again_and_again_ends_as_if_it_had_not_been():
    script = Path(__file__).with_name("torture.py")
    done = subprocess.run([sys.executable, script, "--kills", "12", "--seed", "1"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    assert "12 kills" in done.stdout and " 0 of them while saving" not in done.stdout
