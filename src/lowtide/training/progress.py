"""Progress for people: a live bar on a terminal, a plain line every few steps anywhere else."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Column

from ..units import format_bytes, format_duration
from .events import Event

# Weight of the newest step in the running mean of the speed; about the last ten steps count.
_NEWEST = 0.2
_SILENCE_S = 30.0  # between two lines, at most, where steps take less
# Columns that the bar with the long line needs.
_WIDE = 125


class ConsoleProgress:
    """A listener for the events of a run that shows them: step, loss, lr, grad norm, tokens/s, memory, time left.

    Args:
        console: where to write; default: standard output.
        log_every: steps between two lines where the console is not a terminal; fewer if they take long.
    """

    def __init__(self, console: Console | None = None, log_every: int = 10) -> None:
        self.console = console or Console()
        self.log_every = log_every
        self._num_steps = 0
        self._tokens_per_s = 0.0
        self._first: tuple[int, float] | None = None  # step and time of the first one seen
        self._last_line_s = 0.0  # time of the step that was shown last where there is no terminal
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def __call__(self, event: Event) -> None:
        """Show one event."""
        kind = event["event"]
        if kind == "config":
            self._num_steps = event["num_steps"]
        elif kind == "train":
            self._show_step(event)
        elif kind == "eval":
            scores = [
                f"held-out loss {event['loss']:.4f}, perplexity {event['perplexity']:.2f} ({event['num_tokens']} tokens)"
            ]
            scores += [
                f"accuracy {event[name]:.1%} ({name.removeprefix('accuracy_').replace('_', ' ')})"
                for name in ("accuracy_sum", "accuracy_per_token")
                if name in event
            ]
            self._say(f"step {event['step']}: {', '.join(scores)}")
        elif kind == "checkpoint" and "path" in event:
            size, seconds = format_bytes(event["num_bytes"]), format_duration(event["seconds"])
            self._say(f"step {event['step']}: checkpoint {event['path']} ({size}, {seconds})")
        elif kind == "resume":
            self._say(f"going on from {event['checkpoint']}, step {event['step']}")
        elif kind == "end":
            self.close()

    def close(self) -> None:
        """Take the bar off the screen's live area; its last state stays visible."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _say(self, line: str) -> None:
        console = self._bar.console if self._bar is not None else self.console
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _show_step(self, event: Event) -> None:
        rate = event["tokens_per_s"]
        self._tokens_per_s += (rate - self._tokens_per_s) * (_NEWEST if self._tokens_per_s else 1)
        if self.console.is_terminal:
            self._advance(event)
        elif (
            event["step"] % self.log_every == 0
            or event["step"] == self._num_steps
            or self._first is None  # a sign of life
            or event["time"] - self._last_line_s >= _SILENCE_S
        ):
            self._last_line_s = event["time"]
            self._say(self._line(event))
        if self._first is None:
            self._first = (event["step"], event["time"])

    def _advance(self, event: Event) -> None:
        if self._bar is None:
            bar = (BarColumn(bar_width=20),) if self.console.width >= _WIDE else ()
            line = TextColumn("{task.fields[line]}", table_column=Column(no_wrap=True))
            self._bar = Progress(*bar, line, console=self.console, refresh_per_second=4)
            self._task = self._bar.add_task("train", total=self._num_steps, line="")
            self._bar.start()
        assert self._task is not None
        line_now = self._line(event) if self.console.width >= _WIDE else self._short_line(event)
        self._bar.update(self._task, completed=event["step"], line=line_now)

    def _line(self, event: Event) -> str:
        norm = "" if event["grad_norm"] is None else f"grad norm {event['grad_norm']:.3g}  "
        return (
            f"step {event['step']}/{self._num_steps}  loss {event['loss']:.4f}  lr {event['lr']:.2e}  {norm}"
            f"{self._tokens_per_s:.0f} tokens/s  {format_bytes(event['memory_bytes'])}  {self._time_left(event)} left"
        )

    def _short_line(self, event: Event) -> str:
        """The same in about 75 columns."""
        norm = "" if event["grad_norm"] is None else f"norm {event['grad_norm']:.2g} "
        return (
            f"{event['step']}/{self._num_steps} loss {event['loss']:.3f} lr {event['lr']:.1e} {norm}"
            f"{self._tokens_per_s:.0f} tok/s {format_bytes(event['memory_bytes'])} {self._time_left(event)} left"
        )

    def _time_left(self, event: Event) -> str:
        return format_duration(self._seconds_left(event))

    def _seconds_left(self, event: Event) -> float:
        """From the mean time of a step so far, without the first, which warms up caches, once there are others."""
        if self._first is None:
            return (self._num_steps - event["step"]) * event["num_tokens"] / max(event["tokens_per_s"], 1e-9)
        first_step, first_time = self._first
        per_step = (event["time"] - first_time) / max(1, event["step"] - first_step)
        return (self._num_steps - event["step"]) * per_step
