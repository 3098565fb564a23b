"""A directory that holds the working copy of a model's weights: who uses it, and whether it can be trusted.

Weights on disk are overwritten in place, block by block. So from the first write until it is closed in good order such a copy is
a mixture of two steps, and after a crash nobody can tell which block is of which. A small file says so:

    lowtide-working-copy.json   {"status": "in use" | "complete", "pid": ..., "host": ..., "started": ...}

"in use" with no living process means torn. The file is locked by the process that uses the copy.
"""

from __future__ import annotations

import datetime
import json
import os
import socket
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..log import get_logger
from .direct_io import flush_directory

_logger = get_logger(__name__)

MARKER = "lowtide-working-copy.json"
IN_USE, COMPLETE = "in use", "complete"


class TornWorkingCopyError(RuntimeError):
    """The process that used this working copy ended in the middle: its weights are a mixture of two steps."""


class WorkingCopy:
    """Takes a new or empty directory for a working copy.

    Args:
        directory: new or empty; directories above it are made.

    Raises:
        TornWorkingCopyError: it holds a working copy that was left in the middle of a run.
        FileExistsError: it holds something else, or another process uses it.
        OSError: it cannot be made or written.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        try:
            self.made = not directory.exists()
            directory.mkdir(parents=True, exist_ok=True)
        except FileExistsError as error:
            raise FileExistsError(f"{directory} is a file; weights need a directory") from error
        except OSError as error:
            raise type(error)(
                error.errno, f"no directory for weights can be made at {directory}: {error.strerror}"
            ) from error
        _refuse_used(directory)
        self._lock: int | None = None
        try:
            self._lock = os.open(directory / MARKER, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        except OSError as error:
            raise type(error)(error.errno, f"{directory} cannot be written: {error.strerror}") from error
        _lock(self._lock)
        self.mark(IN_USE)

    def mark(self, status: str, **facts: Any) -> None:
        """Write the status down, for good."""
        assert self._lock is not None
        started = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        text = json.dumps(
            {"status": status, "pid": os.getpid(), "host": socket.gethostname(), "time": started, **facts}
        )
        os.pwrite(self._lock, text.ljust(512).encode() + b"\n", 0)  # one sector: written whole or not at all
        os.fsync(self._lock)
        flush_directory(self.directory)

    def close(self) -> None:
        """Give up the lock; the status stays."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def discard(self) -> None:
        """Remove the copy: nothing in it was of use yet, or it is not needed any more."""
        self.close()
        for path in [*self.directory.glob("*.safetensors"), self.directory / MARKER]:
            path.unlink(missing_ok=True)
        if self.made and not any(self.directory.iterdir()):
            self.directory.rmdir()


def make_way(directory: Path) -> None:
    """Let a run that is resumed from a checkpoint have the directory of its working copy again.

    A copy whose run ended in the middle is worth nothing and is removed, if no process uses it. One that ended in good order is
    kept under another name. Anything else is left alone.
    """
    marker = directory / MARKER
    if not marker.is_file() or _is_locked(marker):
        return
    try:
        facts = json.loads(marker.read_text())
    except ValueError:  # the crash came while it was written
        facts = {}
    if facts.get("status") == COMPLETE:
        kept = next(p for n in range(10**6) if not (p := directory.with_name(f"{directory.name}.kept-{n}")).exists())
        directory.rename(kept)
        _logger.warning("the working copy of an earlier run in %s is kept as %s", directory, kept)
        return
    for path in [*directory.glob("block-*.safetensors"), marker]:
        path.unlink(missing_ok=True)
    with suppress(OSError):  # it holds something else
        directory.rmdir()
    _logger.info("the torn working copy in %s was removed", directory)


def _refuse_used(directory: Path) -> None:
    marker = directory / MARKER
    if not marker.exists():
        if any(directory.iterdir()):
            raise FileExistsError(
                f"{directory} is not empty, and nothing in it will be overwritten; name a new or empty directory for the weights"
            )
        return
    try:
        facts = json.loads(marker.read_text())
    except ValueError:  # the crash came while it was written
        facts = {}
    who = f"process {facts.get('pid', '?')} on {facts.get('host', '?')}, {facts.get('time', '?')}"
    if _is_locked(marker):
        raise FileExistsError(f"{directory} is used by another run ({who}); name another directory for the weights")
    if facts.get("status") == COMPLETE:
        raise FileExistsError(
            f"{directory} holds the weights of an earlier run that ended in good order ({who}); name another directory, or "
            "delete this one if its model was saved"
        )
    raise TornWorkingCopyError(
        f"{directory} holds a working copy that is torn: its run ({who}) ended in the middle, so its weights are a mixture of two "
        "steps and are not used. The model it was made from is untouched: delete this directory, and start from there or from "
        "a checkpoint"
    )


def _lock(descriptor: int) -> None:
    try:
        import fcntl
    except ImportError:  # Windows: no lock, the status alone must do
        return
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _is_locked(marker: Path) -> bool:
    try:
        import fcntl
    except ImportError:
        return False
    with marker.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
    return False
