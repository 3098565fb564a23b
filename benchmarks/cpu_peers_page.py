"""docs/benchmarks.md and its pictures, from the rows of cpu_peers.py, steps_in_turn.py and update_cost.py. Seconds; needs matplotlib, none of the peers.

    python benchmarks/cpu_peers_page.py [--results benchmarks/results/cpu_peers.csv] [--page docs/benchmarks.md] [--plots docs/images]

Nothing on the page is typed by hand: what has no row is called not measured. Rows of the model "tiny" are rehearsals and left out.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from peers.page import write
from peers.rows import RESULTS, TURN_RESULTS, UPDATE_RESULTS, read, read_all

DOCS = Path(__file__).resolve().parents[1] / "docs"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--turns", type=Path, default=TURN_RESULTS)
    parser.add_argument("--updates", type=Path, default=UPDATE_RESULTS)
    parser.add_argument("--page", type=Path, default=DOCS / "benchmarks.md")
    parser.add_argument("--plots", type=Path, default=DOCS / "images")
    options = parser.parse_args()
    write(read(options.results), options.page, options.plots, read_all(options.turns), read_all(options.updates))


if __name__ == "__main__":
    main()
