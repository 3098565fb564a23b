"""Progress of the loading of data, for people: a bar on a terminal, and a line at the end if it took long."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from ..data.cache import TokenCache
from ..data.loading import LoadProgress, describe
from ..units import format_bytes

_PATIENCE_S = 2.0  # what takes less is not worth a line
_SHOWN_EVERY_S = 30.0  # where there is no terminal


class DataProgress:
    """Told by ``load_tokens`` how far it is.

    Args:
        cache: where the tokens go, to be named.
        console: where to write; default: standard output.
        shown: False to say nothing.
    """

    def __init__(self, cache: TokenCache | None, console: Console | None = None, *, shown: bool = True) -> None:
        self.cache = cache
        self.console = console or Console()
        self.shown = shown
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._hashing = False  # what the bar is about
        self._last = 0.0

    def __call__(self, progress: LoadProgress) -> None:
        """Show a report."""
        if not self.shown or progress.seconds < _PATIENCE_S:
            return
        if progress.done:
            self._close()
            self._say(describe(progress, self.cache))
        elif self.console.is_terminal:
            self._advance(progress)
        elif progress.seconds - self._last >= _SHOWN_EVERY_S:
            self._last = progress.seconds
            self._say(f"data: {_doing(progress)} {_line(progress)}" if progress.hashing else f"data: {_line(progress)}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def _advance(self, progress: LoadProgress) -> None:
        if self._hashing != progress.hashing:
            self._close()
        if self._bar is None:
            self._hashing = progress.hashing
            columns = (
                TextColumn(f"{_doing(progress)} the data"),
                BarColumn(bar_width=20),
                TextColumn("{task.fields[line]}"),
            )
            self._bar = Progress(*columns, TimeRemainingColumn(), console=self.console, transient=True)
            self._task = self._bar.add_task("data", total=progress.num_bytes or None, line="")
            self._bar.start()
        assert self._task is not None
        self._bar.update(self._task, completed=progress.num_read, line=_line(progress))

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _say(self, line: str) -> None:
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)


def _doing(progress: LoadProgress) -> str:
    return "hashing" if progress.hashing else "reading"


def _line(progress: LoadProgress) -> str:
    if not progress.num_bytes:
        return f"{progress.num_tokens:,} tokens"
    speed = format_bytes(round(progress.num_read / progress.seconds))
    done = f"{format_bytes(progress.num_read)} of {format_bytes(progress.num_bytes)}, {speed}/s"
    return done if progress.hashing else f"{done}, {progress.num_tokens:,} tokens"
