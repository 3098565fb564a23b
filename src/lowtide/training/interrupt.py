"""Ctrl-C or SIGTERM during training: the step that runs is finished and saved, instead of dying halfway through a step.

A fused update changes the weights during the backward, so a step that is cut short leaves half of the weights a step
ahead of the others.
"""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self


class StopAfterStep:
    """While it is entered, the first SIGINT (Ctrl-C) or SIGTERM only sets ``requested``; a second one raises KeyboardInterrupt.

    Outside the main thread, where Python allows no signal handler, it does nothing.

    Attributes:
        requested: it was asked to stop.
        signal_number: by this signal; None before.
        notice: said on standard error at once when it is asked, if there is one.
    """

    def __init__(self) -> None:
        self.requested = False
        self.signal_number: int | None = None
        self.notice: str | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._request)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self.signal_number is not None:  # not only asked by another process of the run
            raise KeyboardInterrupt
        self.requested, self.signal_number = True, number
        if self.notice is not None:
            os.write(2, f"\n{self.notice}\n".encode())  # nothing else is safe in a signal handler
