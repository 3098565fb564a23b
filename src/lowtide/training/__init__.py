"""The training run: its settings, its loop, and what it tells while it runs.

What needs torch is imported when it is first asked for, so that the command line can show its help at once.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .config import TrainConfig
from .events import Event, EventLog, Listener, read_events
from .schedule import make_schedule

if TYPE_CHECKING:
    from .measured import DryRun, dry_run
    from .progress import ConsoleProgress
    from .range_test import LrFinding, find_lr
    from .result import TrainResult
    from .setup import resolve_device
    from .trainer import train

_LATER = {
    "ConsoleProgress": "progress",
    "DryRun": "measured",
    "LrFinding": "range_test",
    "TrainResult": "result",
    "dry_run": "measured",
    "find_lr": "range_test",
    "resolve_device": "setup",
    "train": "trainer",
}

__all__ = [
    "ConsoleProgress",
    "DryRun",
    "Event",
    "EventLog",
    "Listener",
    "LrFinding",
    "TrainConfig",
    "TrainResult",
    "dry_run",
    "find_lr",
    "make_schedule",
    "read_events",
    "resolve_device",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_LATER[name]}", __name__), name)
