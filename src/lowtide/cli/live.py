"""``lowtide train --live``: the page of ``lowtide report`` beside the run that it is about."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ..training.events import EventReader
from .report import defaults, read_settings

if TYPE_CHECKING:
    from ..reporting.history import History
    from ..reporting.live import LiveReport

ANY_PORT = 0


def port(text: str) -> int:
    """The value of ``--live``."""
    if not (text.isascii() and text.isdigit()) or not 1 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"expected a port from 1 to 65535, or none, got {text!r}")
    return int(text)


def live_report(output: Path, number: int) -> LiveReport:
    """Serve the page of the run in a directory, which need not be there yet, and say where.

    Args:
        output: of the run.
        number: the port, or ``ANY_PORT``.

    Raises:
        ModuleNotFoundError: plotly is not installed.
        ValueError: the port is not free.
    """
    from ..reporting.history import History
    from ..reporting.live import LiveReport

    output = output.expanduser().absolute()
    reader = EventReader(output / "metrics.jsonl")

    def run() -> History:
        return History(output.name, read_settings(output / "config.yaml"), reader.events, reader.num_unreadable)

    def source() -> tuple[str, Callable[[], History]]:
        reader.read()
        return reader.version, run

    live = LiveReport(source, defaults(), None if number == ANY_PORT else number)
    print(f"Live report: {live.url}", flush=True)
    return live
