"""What happens in a run, as a stream of events: plain dictionaries that go to a JSON Lines file and to whoever listens.

Every event has ``event``, ``step`` (steps taken so far) and ``time`` (seconds since the run began). The kinds:

    config  config (all fields), num_parameters, num_adapter_parameters (0 without LoRA), num_steps, steps_per_epoch, lr,
            device, data_* (counts of the data), clip_grad_norm (the limit in force; None for none), predicted_memory (bytes by kind on the
            device, in memory on a CPU, of the largest step, by the planner; None where it does not know), program_bytes (what the process
            held besides weights before the first step; 0 on a GPU, whose memory the program is not in), num_ranks (processes), versions
    train   loss (of the batch, before its update), lr, lora_lr (of the adapters, if the model's weights are trained, too), grad_norm (None where unknown), num_tokens, tokens_per_s,
            memory_bytes, peak_memory_bytes (the most so far, loading included), epoch, skipped (True: loss or gradient was not finite and nothing was updated), partial (True:
            the same, found when some parameters had been updated), loss_scale (None where the loss is not scaled),
            lost_updates (share of updates that left their 16-bit weight as it was; None where nothing was sampled), spike (True:
            skipped because its loss was far above those before it)
    memory  once, of the second step (see ``memory_trace.py``): num_tokens; lists of one length, at most 300 moments of it: seconds (since
            it began), where (in the step), total_bytes and, by kind, bytes; most_bytes (of each kind, at any moment)
    eval    loss, perplexity, num_tokens, memory_bytes; of a task accuracy_sum and accuracy_per_token (0 to 1), by scoring
    samples what the model says to some held-out prompts, before the first step and after the last: samples, a list of prompt (with its
            special tokens), expected (what the data says) and answer; seconds
    resume  checkpoint (its directory), num_batches (of the data, used so far); in the file everything behind the checkpoint's
            place is dropped first, so that every step is there once
    checkpoint  path, seconds, num_bytes, interrupted (it was written because the run was asked to stop), or error: it could not be
            written
    end     loss_before, loss_after, peak_memory_bytes, num_skipped, interrupted, wall_s
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from ..log import get_logger

_logger = get_logger(__name__)

# Bytes by which a file is known again; every event has its time in them.
_TAIL = 512

Event = dict[str, Any]
Listener = Callable[[Event], None]


class EventLog:
    """Writes every event as one line of JSON, at once, so that a crash leaves a readable file.

    The file is locked as long as it is open, where the operating system has locks: two runs never write into one. Lines that cannot be
    written (the disk is full) wait in memory for the next one, and training goes on.

    Args:
        path: file to write. It must not exist yet, unless ``existing`` says that it may.
        existing: go on with it, if it is there.

    Raises:
        FileExistsError: there is such a file; nothing is overwritten. Or another process writes to it.
    """

    def __init__(self, path: Path, existing: bool = False) -> None:
        self.path = path
        self._file = path.open("ab" if existing else "xb", buffering=0)
        self._waiting = b""
        self._told = False
        self._lock()

    def cut(self, position: int) -> None:
        """Keep the first so many bytes only: what follows them will be written anew."""
        if position < self._file.tell():
            self._file.truncate(position)
            self._file.seek(0, os.SEEK_END)

    def position(self) -> int:
        """Bytes of the file, which are on the disk when this returns.

        Raises:
            OSError: it could not be written, or not as a whole.
        """
        self._write()
        os.fsync(self._file.fileno())
        return self._file.tell()

    def _lock(self) -> None:
        try:
            import fcntl
        except ImportError:  # Windows
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise FileExistsError(f"another process trains into {self.path.parent}: wait for it, or stop it") from None
        except OSError:  # a file system without locks
            return

    def __call__(self, event: Event) -> None:
        """Append one event. Not a number and infinity become null, because JSON has neither."""
        self._waiting += (json.dumps(finite(event), ensure_ascii=False, allow_nan=False) + "\n").encode()
        try:
            self._write()
        except OSError as error:
            if not self._told:
                _logger.warning(
                    "%s cannot be written (%s): what belongs there waits in memory, and training goes on",
                    self.path,
                    error,
                )
            self._told = True

    def _write(self) -> None:
        """What waits. A write may take a part of it, where a disk has room for no more."""
        while self._waiting:
            written = self._file.write(self._waiting)
            self._waiting = self._waiting[written or 0 :]
        self._told = False

    def close(self) -> None:
        """Close the file, which is on the disk then, or a warning says that it is not; the log takes no more events."""
        if self._file.closed:
            return
        try:
            self.position()
        except OSError as error:
            _logger.warning("%s could not be written to its end: %s", self.path, error)
            whole = self.path.read_bytes().rfind(b"\n") + 1
            self._file.truncate(whole)  # or what another log appends would end a torn line
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_events(path: str | Path, kind: str | None = None) -> list[Event]:
    """The events in a file written by ``EventLog``, all of them or those of one kind, in order."""
    with Path(path).open(encoding="utf-8") as lines:
        events = [json.loads(line) for line in lines]
    return [event for event in events if kind is None or event["event"] == kind]


def parse_events(text: bytes) -> tuple[list[Event], int]:
    """What can be read of a file that is being written, or that was cut off: (events in order, number of other lines).

    A last line without its end does not count at all: it is still being written.
    """
    lines = text.split(b"\n")[:-1]
    events: list[Event] = []
    for line in lines:
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(found, dict) and isinstance(found.get("event"), str):
            events.append(found)
    return events, len(lines) - len(events)


class EventReader:
    """Follows a file that is being written, and reads each time what is new. A file that was cut is read anew.

    Attributes:
        events: what was read so far, in order.
        num_unreadable: other lines.
        version: another text whenever there is something new.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.events: list[Event] = []
        self.num_unreadable = 0
        self._position = 0
        self._tail = b""
        self._num_beginnings = 0

    def read(self) -> None:
        """Take in what is new. A file that is not there is empty."""
        try:
            with self.path.open("rb") as file:
                if file.seek(0, os.SEEK_END) < self._position or not self._goes_on(file):
                    self._begin()
                file.seek(self._position)
                text = file.read()
        except FileNotFoundError:
            return
        whole = text[: text.rfind(b"\n") + 1]
        events, others = parse_events(whole)
        self.events += events
        self.num_unreadable += others
        self._position += len(whole)
        self._tail = (self._tail + whole)[-_TAIL:]

    @property
    def version(self) -> str:
        """See the class."""
        return f"{self._num_beginnings}-{self._position}"

    def _begin(self) -> None:
        self.events = []
        self.num_unreadable = self._position = 0
        self._tail = b""
        self._num_beginnings += 1

    def _goes_on(self, file: IO[bytes]) -> bool:
        """What was read last is still there: the file was not cut and written on."""
        file.seek(self._position - len(self._tail))
        return file.read(len(self._tail)) == self._tail


def finite(value: Any) -> Any:
    """The same with None for numbers that JSON does not have, inside lists and dictionaries as well."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value
