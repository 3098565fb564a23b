"""The planner's time of a step beside everything that was measured or published, and what it predicts for common machines. Trains nothing.

    python benchmarks/scaling.py             print the tables
    python benchmarks/scaling.py --write     into docs/scaling.md, with its picture

The model is that of ``lowtide.planning``; here are only figures to compare with, machines and models. About a minute on one core.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from scaling_parts import measured, plot, predicted, published, tables

ROOT = Path(__file__).resolve().parents[1]
PAGE, PICTURE = ROOT / "docs" / "scaling.md", ROOT / "docs" / "images" / "scaling.svg"

# Parts of the page by name. Those that depend on rows that were measured change with these; the others only with the model.
MEASURED: dict[str, Callable[[], str]] = {
    "measured": measured.measured_tables,
    "few tokens": measured.few_tokens,
    "memory": measured.memory_errors,
}
STATIC: dict[str, Callable[[], str]] = {
    "example": predicted.example_table,
    "paper": published.paper_table,
    "others": published.others_table,
    "machines": predicted.machines_table,
    "predictions": predicted.predictions_table,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="into the page, and draw its picture")
    options = parser.parse_args()
    parts = {name: make() for name, make in {**STATIC, **MEASURED}.items()}
    if options.write:
        tables.write(PAGE, parts)
        plot.draw(PICTURE)
        return
    for name, text in parts.items():
        print(f"## {name}\n\n{text}\n")


if __name__ == "__main__":
    main()
