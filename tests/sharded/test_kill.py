"""The short form of ``kill_ranks.py``. In a process of its own, because ranks are forked from a server that it sets up."""

import subprocess
import sys
from pathlib import Path


def test_when_a_rank_dies_the_others_end_and_the_run_is_resumed():
    script = Path(__file__).with_name("kill_ranks.py")
    done = subprocess.run([sys.executable, script, "--kills", "2", "--seed", "3"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    assert "2 kills of one of 4 ranks" in done.stdout
