"""Ctrl-C during training: the step that runs is finished and the model saved, instead of dying halfway through a step.

A fused update changes the weights during the backward, so a step that is cut short leaves half of the weights a step
ahead of the others.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self


class StopAfterStep:
    """While it is entered, the first Ctrl-C only sets ``requested``; a second one raises KeyboardInterrupt as usual.

    Outside the main thread, where Python allows no signal handler, it does nothing.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: Any = None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._request)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
