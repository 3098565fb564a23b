"""How a run begins, anew or resumed: what is in its directory, which checkpoint it goes on from, and that all its processes think so."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TypeVar

from ..evaluation import LossResult
from ..log import get_logger
from ..ranks import Ranks
from .bad_steps import RollBack
from .checkpoint import FOLDER, Checkpoint, list_checkpoints, newest_checkpoint, read_unchecked, set_aside
from .config import TrainConfig
from .events import EventLog, read_events
from .result import TrainResult
from .resume import changed_settings, check_settings, clean_up, find_checkpoint, read_settings
from .setup import check_output
from .together import on_all, on_first, started_again

_logger = get_logger(__name__)
T = TypeVar("T")


def begin(
    config: TrainConfig, output: Path, ranks: Ranks, stack: ExitStack
) -> tuple[TrainConfig, EventLog | None, Checkpoint | None, TrainResult | None]:
    """(settings, the log of a run that is resumed, the checkpoint to go on from, what came of a run that is at its end)."""
    log: EventLog | None = None
    finished: TrainResult | None = None
    again = on_first(ranks, lambda: started_again(output, ranks))
    again = bool(ranks.broadcast(again))
    if again and (config.resume is None or ranks.broadcast(bool(list_checkpoints(output / FOLDER)))):
        config = dataclasses.replace(config, resume="auto")

    def look() -> Checkpoint | None:
        nonlocal log, finished
        resumed = config.resume is not None
        check_output(config.output, resumed=resumed)
        if not resumed:
            return None
        if (output / "metrics.jsonl").exists():  # locked before anything there is touched
            log = stack.enter_context(EventLog(output / "metrics.jsonl", existing=True))
        clean_up(config, output)
        finished = _finished(config, output)
        checkpoint = None if finished else find_checkpoint(config, output, ours=again)
        if checkpoint is not None:
            check_settings(config, checkpoint)
        return checkpoint

    checkpoint = same_checkpoint(ranks, look)
    if ranks.broadcast(finished is not None):
        finished = on_all(ranks, lambda: finished or _seen_by_all(_finished(config, output), output))
    return config, log, checkpoint, finished


def same_checkpoint(ranks: Ranks, find: Callable[[], Checkpoint | None]) -> Checkpoint | None:
    """The checkpoint that the first rank finds, on every rank."""
    found = on_first(ranks, find)
    if ranks.size == 1:
        return found
    path = ranks.broadcast(None if found is None else str(found.path))
    if path is None:
        return None
    return on_all(ranks, lambda: found or _seen_by_all(read_unchecked(Path(path)), Path(path)))


def _seen_by_all(found: T | None, path: Path) -> T:
    if found is None:
        raise FileNotFoundError(
            f"{path} is not the same for all processes: it must be on a file system that all machines see"
        )
    return found


def before_bad_steps(asked: RollBack, output: Path) -> Checkpoint | None:
    """The newest checkpoint with a good step behind it. If the first step after one was bad, its weights may be the reason."""
    found = newest_checkpoint(output / FOLDER)
    if found is not None and found.step >= asked.last_good_step:
        _logger.warning(
            "no step after %s was good: it is kept as %s", found.path, set_aside(found.path, "suspect").name
        )
        found = newest_checkpoint(output / FOLDER)
    return found


def _finished(config: TrainConfig, output: Path) -> TrainResult | None:
    """What came of the run in the output directory, if it has come to its end and no setting asks for more."""
    if config.resume not in ("latest", "auto") or not (output / "model").is_dir():
        return None
    saved = read_settings(output)
    if saved is None or changed_settings(config, saved):
        return None
    try:
        events = read_events(output / "metrics.jsonl")
    except (OSError, ValueError):  # cut off by a power failure
        return None
    if not events:
        return None
    evaluations = [
        LossResult(e["loss"], e["perplexity"] or math.inf, e["num_tokens"]) for e in events if e["event"] == "eval"
    ]
    last = events[-1]
    return TrainResult(
        num_steps=last["step"],
        num_skipped=last.get("num_skipped", 0),
        loss_before=evaluations[0] if evaluations else None,
        loss_after=evaluations[-1] if evaluations else None,
        peak_memory_bytes=last.get("peak_memory_bytes", 0),
        output=output,
        model_dir=output / "model",
        wall_s=last["time"],
        interrupted=False,
        finished_before=True,
    )
