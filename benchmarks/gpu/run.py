"""Everything that needs a card, in one command. About nine minutes on an H100; docs/gpu.md says how to read the table.

    PYTHONPATH=src python benchmarks/gpu/run.py [--parts parity resident ...] [--results FILE] [--minutes 9] [--again] [--rehearse]

Needs no network and no weights: the models are LLaMA shapes filled with random numbers on the card. Each part runs in a process of
its own and writes its rows as it goes, so that a part that fails, or a run that is cut, leaves what was done. Started again
with the same results file it does what is missing. --rehearse runs the same code on a CPU with tiny sizes.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
# The processes of the parts find their modules in the same places; a plain checkout needs no installation.
PATHS = [str(HERE), str(HERE.parent), str(HERE.parents[1] / "src")]
sys.path[:0] = PATHS
os.environ["PYTHONPATH"] = os.pathsep.join([*PATHS, *filter(None, [os.environ.get("PYTHONPATH")])])

from suite.parts import PARTS  # noqa: E402
from suite.runner import Results, describe_machine, run_parts  # noqa: E402
from suite.table import console, markdown, one_line  # noqa: E402

RESULTS = HERE.parent / "results"


def main() -> int:
    """See the module; returns the exit status, 0 if every part ended well."""
    names = [part.name for part in PARTS]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="parts: " + "\n       ".join(f"{part.name}: {part.about} ({part.seconds:.0f} s)" for part in PARTS),
    )  # fmt: skip
    parser.add_argument("--parts", nargs="+", choices=names, default=names, metavar="PART", help="default: all")
    parser.add_argument("--results", type=Path, help="CSV file, added to; default: benchmarks/results/gpu.csv")
    parser.add_argument("--output", type=Path, help="folder for traces; default: beside the results")
    parser.add_argument(
        "--dir", type=Path, default=Path(tempfile.gettempdir()), help="where weights on disk may lie meanwhile"
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="a part that would begin later is left out")
    parser.add_argument(
        "--again", action="store_true", help="also parts that ran to their end at this commit on this device"
    )
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, with tiny sizes")
    options = parser.parse_args()
    if not options.rehearse and not _has_card():
        print("there is no CUDA device here; --rehearse runs the same code on the CPU with tiny sizes", file=sys.stderr)
        return 2
    if options.rehearse:
        os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports Triton
    path = options.results or RESULTS / ("gpu-rehearsal.csv" if options.rehearse else "gpu.csv")
    output = options.output or path.parent
    output.mkdir(parents=True, exist_ok=True)
    results = Results(path, describe_machine(options.rehearse))
    good = run_parts(
        [part for part in PARTS if part.name in options.parts], results, rehearse=options.rehearse, directory=options.dir, output=output,
        minutes=options.minutes, again=options.again, show=lambda row: print(one_line(row), flush=True),
    )  # fmt: skip
    rows = [row for row in results.latest() if row["device"] == results.common["device"]]
    path.with_suffix(".md").write_text(markdown(rows))
    console(rows)
    print(f"rows: {path}, table: {path.with_suffix('.md')}")
    return 0 if good else 1


def _has_card() -> bool:
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # asks without making a context in this process
    import torch

    return torch.cuda.is_available()


if __name__ == "__main__":
    sys.exit(main())
