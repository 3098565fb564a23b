"""Work of the demo that is done in a process of its own, so that its peak memory is its own as well.

``run_process(task, settings)`` starts ``python -m lowtide.cli.demo_process``; the settings go to it as JSON on
standard input, its result comes back in a temporary file. Every task imports the same libraries, loads the same model
in the same way and meets the same batches. The tasks:

    train   ``lowtide.training.train`` with a TrainConfig
    adamw   what one would write without lowtide: plain forward and backward, all gradients kept, ``torch.optim.AdamW``
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .memory import lacks_memory


class ProcessFailed(RuntimeError):
    """The process ended without a result; ``killed`` says that it was killed, which is how lack of memory shows."""

    def __init__(self, message: str, killed: bool = False) -> None:
        super().__init__(message)
        self.killed = killed


def run_process(task: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Run a task in a fresh Python process, whose standard output and error are ours.

    Args:
        task: a key of ``TASKS``.
        settings: what the task takes, in JSON's types.

    Returns:
        The task's result.

    SIGTERM ends both processes.

    Raises:
        ProcessFailed: the task failed; the message is its error.
    """
    with tempfile.TemporaryDirectory(prefix="lowtide-") as folder:
        result_file = Path(folder, "result.json")
        # -P: a file in the current directory (a user's own gguf.py) must not be taken for a module.
        command = [sys.executable, "-P", "-m", "lowtide.cli.demo_process", task, str(result_file)]
        returncode = _run(command, json.dumps(settings))
        if result_file.exists():
            result: dict[str, Any] = json.loads(result_file.read_text(encoding="utf-8"))
            if "error" in result:
                raise ProcessFailed(result["error"], killed=result["out_of_memory"])
            return result
    killed = returncode == -getattr(signal, "SIGKILL", 9)
    reason = "was killed, which is what happens when memory runs out" if killed else f"ended with {returncode}"
    raise ProcessFailed(f"the process for {task!r} {reason}", killed=killed)


def _run(command: list[str], text: str) -> int:
    """Run ``command`` with ``text`` as its standard input, and never leave it behind; returns its exit status."""
    with _told_to_end() as listen:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, text=True)
        try:
            listen()
            process.communicate(text)
        except BaseException:
            process.kill()
            process.wait()
            raise
    return process.returncode


@contextmanager
def _told_to_end() -> Iterator[Callable[[], None]]:
    """SIGTERM becomes a ``SystemExit``, at the call of what this gives or after it.

    Not before: an exception while ``Popen`` starts a process leaves nobody who knows of that process.
    """
    if threading.current_thread() is not threading.main_thread():  # only there are signals handled
        yield lambda: None
        return
    told: list[int] = []
    listening = False

    def end(number: int, frame: Any) -> None:
        told.append(number)
        if listening:
            raise SystemExit(128 + number)

    def listen() -> None:
        nonlocal listening
        listening = True
        if told:
            raise SystemExit(128 + told[0])

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield listen
    finally:
        signal.signal(signal.SIGTERM, before)


def own_peak_bytes() -> int:
    """The largest resident set of this process since it began to run its own program.

    ``getrusage`` will not do on Linux: its maximum survives ``exec``, so it would count that of the process which
    started this one (kernel: ``setmax_mm_hiwater_rss`` in ``exec_mmap``). ``VmHWM`` begins anew.
    """
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        from ..planning.hardware import peak_resident_bytes

        return peak_resident_bytes()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def train_task(settings: dict[str, Any]) -> dict[str, Any]:
    """Fine-tune. ``settings``: the fields of a ``TrainConfig``."""
    from ..planning import resident_bytes
    from ..training import TrainConfig, train

    library_bytes = resident_bytes()
    result = train(TrainConfig(**settings))
    return {
        "peak_bytes": own_peak_bytes(),
        "library_bytes": library_bytes,
        "num_steps": result.num_steps,
        "model_dir": str(result.model_dir),
        "num_skipped": result.num_skipped,
        "interrupted": result.interrupted,
        "wall_s": result.wall_s,
    }


def adamw_task(settings: dict[str, Any]) -> dict[str, Any]:
    """Take the first ``num_steps`` steps of the same run with AdamW.

    ``settings``: ``config`` (fields of a ``TrainConfig``, with the dtype to measure) and ``num_steps``.
    """
    import itertools

    import torch

    from ..models import load_model, load_tokenizer, parse_dtype
    from ..planning import resident_bytes
    from ..training import TrainConfig
    from ..training.data import load_data

    library_bytes = resident_bytes()
    config = TrainConfig(**settings["config"])
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    batches = load_data(config, load_tokenizer(config.model)).train
    model = load_model(config.model, dtype=parse_dtype(config.dtype)).train()
    model.config.use_cache = False
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5)
    losses = []
    for batch in itertools.islice(batches.epoch(0), settings["num_steps"]):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return {"peak_bytes": own_peak_bytes(), "library_bytes": library_bytes, "losses": losses}


TASKS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {"train": train_task, "adamw": adamw_task}


def main(task: str, result_file: Path) -> int:
    """The entry of the process: settings from standard input, the result or the error to ``result_file``."""
    from .quiet import quiet_libraries

    settings = json.load(sys.stdin)
    quiet_libraries()
    # The same for every task, whatever it needs, so that the libraries take the same share of each peak.
    for name in ("torch", "transformers", "lowtide.training.trainer"):
        importlib.import_module(name)
    try:
        result = TASKS[task](settings)
    except KeyboardInterrupt:
        return 130
    except Exception as error:  # whatever it is, the process that waits for the result has to say it
        if os.environ.get("LOWTIDE_DEBUG", "0") not in ("", "0"):
            raise
        result = {"error": str(error) or type(error).__name__, "out_of_memory": lacks_memory(error)}
    result_file.write_text(json.dumps(result), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2])))
