"""The GPU suite is not a package that is installed: its modules are found beside its script."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from suite_path import SUITE

sys.path[:0] = [str(SUITE), str(SUITE.parent)]
# Processes of the parts are forked from one that is started with the environment of this one.
PATHS = [str(SUITE), str(SUITE.parent), str(SUITE.parents[1] / "src"), str(Path(__file__).parent)]
os.environ["PYTHONPATH"] = os.pathsep.join([*PATHS, *filter(None, [os.environ.get("PYTHONPATH")])])
