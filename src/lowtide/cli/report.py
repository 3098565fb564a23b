"""``lowtide report``: a run, or two side by side, as one HTML page."""

from __future__ import annotations

import argparse
import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ..training.config import ABOUT_RESUMING, TrainConfig
from ..training.events import parse_events

if TYPE_CHECKING:
    from ..reporting.history import History

_EPILOG = """\
examples:
  lowtide report runs/first                 # writes runs/first/report.html
  lowtide report runs/first runs/second     # both in one page, with the settings in which they differ
  lowtide report runs/first --output first.html

The page is one file that loads nothing from anywhere. A run that is still going on can be reported, too; lowtide train --live
shows a page that updates itself."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of this command."""
    parser.epilog = _EPILOG
    parser.add_argument("run_dir", metavar="RUN_DIR", help="the output directory of a run")
    parser.add_argument("other_run_dir", metavar="OTHER_RUN_DIR", nargs="?", help="of another, to compare with")
    parser.add_argument("--output", metavar="FILE", help="the page to write (default: RUN_DIR/report.html)")


def run(args: argparse.Namespace) -> int:
    """Write the page, and say where it is. Returns the exit code."""
    directories = [Path(args.run_dir), *([Path(args.other_run_dir)] if args.other_run_dir else [])]
    runs = [read_run(directory) for directory in directories]
    for each, name in zip(runs, names_of(directories), strict=True):
        each.name = name
    output = Path(args.output) if args.output else directories[0] / "report.html"
    _check_output(output)
    from ..reporting.page import page

    _write(output, page(runs, defaults()))
    print(f"The report is in {output}.")
    return 0


def read_run(directory: Path) -> History:
    """What a run has left in its output directory so far.

    Raises:
        FileNotFoundError, NotADirectoryError: there is no such directory, or no metrics in it.
        ValueError: what is there are not the metrics of a run.
    """
    from ..reporting.history import History

    if not directory.exists():
        raise FileNotFoundError(f"there is no directory {directory}")
    if not directory.is_dir():
        raise NotADirectoryError(f"{directory} is not a directory: name the output directory of a run")
    path = directory / "metrics.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"there is no metrics.jsonl in {directory}: it is not the output directory of a run")
    events, num_unreadable = parse_events(path.read_bytes())
    settings = read_settings(directory / "config.yaml")
    if not any(event["event"] in ("config", "train", "eval") for event in events) and (
        num_unreadable or settings is None
    ):
        raise ValueError(f"{path} does not hold the metrics of a run")
    return History(directory.name, settings, events, num_unreadable)


def defaults() -> dict[str, Any]:
    """Of the settings that make a run; None for those that have to be given."""
    fields = [field for field in dataclasses.fields(TrainConfig) if field.name not in ABOUT_RESUMING]
    return {field.name: None if field.default is dataclasses.MISSING else field.default for field in fields}


def names_of(directories: list[Path]) -> list[str]:
    """What to call the runs: as much of the end of the path as tells them apart."""
    whole = [directory.absolute().resolve() for directory in directories]
    for depth in range(1, max(len(path.parts) for path in whole) + 1):
        names = [str(Path(*path.parts[-depth:])) for path in whole]
        if len(set(names)) == len(names):
            return names
    return [f"{path.name} ({number})" for number, path in enumerate(whole, start=1)]


def read_settings(path: Path) -> dict[str, Any] | None:
    """The settings of a run, with the names as text; None if there are none that can be read."""
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return None
    return {str(name): value for name, value in found.items()} if isinstance(found, dict) else None


def _check_output(output: Path) -> None:
    """A report may be written anew; nothing else is overwritten."""
    from ..reporting.page import MARK

    if output.is_dir():
        raise IsADirectoryError(f"{output} is a directory: name a file for the report")
    if not output.parent.is_dir():
        raise FileNotFoundError(f"there is no directory {output.parent} for the report")
    if output.exists():
        with output.open("rb") as file:
            if file.read(len(MARK)) != MARK.encode():
                raise FileExistsError(
                    f"{output} exists and is not a report of lowtide; it is not overwritten: name another file"
                )


def _write(output: Path, text: str) -> None:
    temporary = output.with_name(f".{output.name}.tmp")
    temporary.write_text(text, encoding="utf-8", newline="\n")
    os.replace(temporary, output)
