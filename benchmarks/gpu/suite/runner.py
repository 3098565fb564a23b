"""Runs the parts one after the other, each in a process of its own, and writes what they report as soon as they report it.

A part that raises, runs out of memory, is killed or takes too long is reported, and the rest still runs.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import datetime
import multiprocessing
import os
import subprocess
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from .context import FIELDS, Context

END = "(part)"  # the case of a part's last row, which says how it ended
# Imported once for all processes: this takes longer than some parts.
PRELOAD = (
    "torch",
    "transformers.models.llama.modeling_llama",
    "lowtide",
    "suite.parity",
    "suite.resident",
    "suite.streamed",
    "suite.overlap",
)
_DONE = ("ok", "skipped")
_GRACE_S = 10  # that a part may take longer than its time, which it looks at between steps


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of the suite.

    Attributes:
        name: on the command line.
        about: a line for the list of parts.
        run: does it; it may import what it likes, being called in a fresh process.
        seconds: that it may take on an H100.
        device_gib, host_gib: that it needs; less is reported as skipped.
    """

    name: str
    about: str
    run: Callable[[Context], None]
    seconds: float
    device_gib: float = 4
    host_gib: float = 4


class Results:
    """The CSV file, and what is in it already.

    Args:
        path: it is made, or added to.
        common: columns that all rows share.
    """

    def __init__(self, path: Path, common: dict[str, Any]) -> None:
        self.path, self.common = path, common
        self.rows: list[dict[str, str]] = []
        if path.exists():
            with path.open(newline="") as file:
                reader = csv.DictReader(file)
                if tuple(reader.fieldnames or ()) != FIELDS:
                    raise SystemExit(
                        f"{path} has other columns than this version of the suite writes: give --results another name"
                    )
                self.rows = list(reader)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="") as file:
            csv.writer(file).writerow(FIELDS)

    def add(self, row: dict[str, Any]) -> None:
        """Write a row and keep it; on the disk before the next one is taken."""
        unknown = set(row) - set(FIELDS)
        assert not unknown, f"no such columns: {unknown}"
        full = {field: str({**self.common, **row}.get(field, "")) for field in FIELDS}
        self.rows.append(full)
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, FIELDS).writerow(full)

    def finished(self, part: str) -> bool:
        """It ran to its end on this device, at this commit; whatever failed runs again."""
        same = [row for row in self.rows if row["part"] == part and row["case"] == END]
        return (
            bool(same)
            and same[-1]["status"] in _DONE
            and all(same[-1][name] == str(self.common[name]) for name in ("device", "commit"))
        )

    def latest(self) -> list[dict[str, str]]:
        """The last row of each part and case, in the order in which they first came."""
        return list({(row["part"], row["case"]): row for row in self.rows}.values())


def run_parts(
    parts: Sequence[Part], results: Results, *, rehearse: bool, directory: Path, output: Path, minutes: float, again: bool = False,
    show: Callable[[dict[str, Any]], None] = lambda row: None, preload: Iterable[str] = PRELOAD,
) -> bool:  # fmt: skip
    """Run what has not run yet.

    Args:
        minutes: for all of them; a part that would begin later is not begun.
        again: also parts that ran to their end.
        show: is given every row.
        preload: modules that are imported once for all processes.

    Returns:
        Whether every part ended well and none of its rows says "FAILED".
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    end, good = time.monotonic() + 60 * minutes, True
    for part in parts:
        if not again and results.finished(part.name):
            show({"part": part.name, "case": END, "status": "done before"})
            continue
        seen: list[dict[str, Any]] = []

        def take(row: dict[str, Any], seen: list[dict[str, Any]] = seen) -> None:
            seen.append(row)
            results.add(row)
            show(row)

        left = end - time.monotonic()
        if left < 0.4 * part.seconds and not rehearse:
            take(
                {
                    "part": part.name,
                    "case": END,
                    "status": "not run",
                    "note": f"needs {part.seconds:.0f} s, {max(0.0, left):.0f} s were left",
                }
            )
            good = False
            continue
        began = time.monotonic()
        status, note = _run(context, part, min(part.seconds, left), rehearse, directory, output, take)
        failed = sum(row["status"] == "FAILED" for row in seen)
        if status == "ok" and failed:
            status, note = "FAILED", f"{failed} of {len(seen)} checks"
        note = f"{note}; {time.monotonic() - began:.0f} s".removeprefix("; ")
        take({"part": part.name, "case": END, "status": status, "note": note})
        good = good and status in _DONE
    return good


def _run(
    context: Any, part: Part, seconds: float, rehearse: bool, directory: Path, output: Path, take: Callable[[dict[str, Any]], None]
) -> tuple[str, str]:  # fmt: skip
    """(status, remark) of one part in a process of its own."""
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(theirs, part, seconds, rehearse, directory, output), daemon=True)
    process.start()
    theirs.close()
    limit, ended = time.monotonic() + seconds + _GRACE_S, None
    with contextlib.suppress(EOFError):  # the process is gone
        while ended is None:
            if not ours.poll(max(0.0, limit - time.monotonic())):
                ended = ("timed out", f"after {seconds + _GRACE_S:.0f} s")
                break
            message = ours.recv()
            if isinstance(message, dict):
                take(message)
            else:
                ended = message
    if ended is not None and ended[0] == "timed out":
        process.kill()
    process.join(_GRACE_S)
    if process.is_alive():
        process.kill()
        process.join()
    ours.close()
    if ended is None:
        signal = -(process.exitcode or 0)
        return "killed", f"by signal {signal}" + (
            " (out of host memory?)" if signal == 9 else ""
        ) if signal > 0 else f"exit status {process.exitcode}"
    return ended


def _child(connection: Connection, part: Part, seconds: float, rehearse: bool, directory: Path, output: Path) -> None:
    import torch

    context = Context(part.name, rehearse, directory, output, time.monotonic() + seconds, connection.send)
    try:
        if rehearse:
            torch.set_num_threads(1)
        elif (why := _too_little(part)) is not None:
            connection.send(("skipped", why))
            return
        torch.manual_seed(0)
        part.run(context)
        connection.send(("ok", ""))
    except torch.OutOfMemoryError as error:
        connection.send(("out of memory", _one_line(error)))
    except MemoryError as error:
        connection.send(("does not fit", _one_line(error)))
    except BaseException as error:
        traceback.print_exc()
        connection.send(("failed", f"{type(error).__name__}: {_one_line(error)}"))


def _too_little(part: Part) -> str | None:
    import psutil
    import torch

    device, host = torch.cuda.get_device_properties(0).total_memory / 2**30, psutil.virtual_memory().total / 2**30
    if device < part.device_gib:
        return f"needs {part.device_gib:g} GiB of device memory, there are {device:.0f}"
    if host < part.host_gib:
        return f"needs {part.host_gib:g} GiB of host memory, there are {host:.0f}"
    return None


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def describe_machine(rehearse: bool) -> dict[str, Any]:
    """Columns that all rows share. Leaves the card alone: the processes of the parts are forked from one that has not touched it."""
    import torch
    import transformers

    device, driver = (f"rehearsal on {os.cpu_count()} processors", "") if rehearse else _card()
    return {
        "date": datetime.date.today().isoformat(), "commit": _commit(), "device": device, "driver": driver, "torch": torch.__version__,
        "transformers": transformers.__version__,
    }  # fmt: skip


def _card() -> tuple[str, str]:
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        lines = subprocess.run(query, capture_output=True, text=True, check=True, timeout=60).stdout.splitlines()
        name, driver = lines[0].rsplit(",", 1)
        return name.strip(), driver.strip()
    except (OSError, subprocess.SubprocessError, IndexError, ValueError):
        return "CUDA device", ""


def _commit() -> str:
    folder = Path(__file__).parent
    try:
        run = subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"],
            capture_output=True,
            text=True,
            check=True,
            cwd=folder,
            timeout=60,
        )
        return run.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
