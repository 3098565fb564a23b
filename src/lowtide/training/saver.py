"""Writes the checkpoints of a run when they are due, and sees to it that a failed one costs nothing but itself."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..log import get_logger
from .adapters import write_checkpoint_model
from .bad_steps import SpikeGuard
from .checkpoint import FOLDER, in_file_order, keep_newest, list_checkpoints, write_checkpoint
from .events import EventLog
from .resume import state_of
from .setup import with_own_cache
from .together import OtherRankError, on_first, written_by_first

if TYPE_CHECKING:
    from torch import Tensor

    from ..evaluation import LossResult
    from ..weights.layout import Part
    from .run import Run

_logger = get_logger(__name__)


class Saver:
    """Checkpoints of one run.

    Args:
        run: between two steps whenever a method is called.
        output: directory of the run.
        log: its events, on the first rank; where it stands is part of a checkpoint.
        guard: its recent losses are part of a checkpoint.
    """

    def __init__(self, run: Run, output: Path, log: EventLog | None, guard: SpikeGuard) -> None:
        self.run, self.folder, self.log, self.guard = run, output / FOLDER, log, guard
        self.loss_before: LossResult | None = None
        self._last_time = time.monotonic()

    def newest(self) -> Path | None:
        """The last checkpoint of this run, or of the one that it goes on with."""
        return next(iter(list_checkpoints(self.folder)), None)

    def is_due(self) -> bool:
        """After the step just taken. After the last one the model itself is saved."""
        step, config = self.run.report.num_steps, self.run.config
        # In the middle of bad steps nobody knows whether the weights are good, and good checkpoints would be pushed out.
        if step >= self.run.num_steps or self.run.report.num_skipped_in_a_row:
            return False
        if config.save_steps is not None:
            return step % config.save_steps == 0
        return config.save_seconds is not None and time.monotonic() - self._last_time >= config.save_seconds

    def save_or_go_on(self) -> None:
        """Write a checkpoint, or go on without if it cannot be written and the settings say so.

        Raises:
            OSError: it cannot be written, and the settings say stop.
        """
        try:
            self.save()
        except OSError as error:
            self._last_time = time.monotonic()
            if self.run.config.on_save_error == "stop":
                further = "free some room and go on with --resume" if self.newest() else "free some room"
                raise OSError(f"{error}; training stopped, {further}") from error
            _logger.warning("%s; training goes on", error)

    def save(self, interrupted: bool = False) -> Path:
        """Write a checkpoint now, if this step has none yet, and delete those that are too many.

        Raises:
            OSError: the disk is full or failed; the message names the last whole checkpoint, which is untouched like all others.
        """
        try:
            return self._save(interrupted)
        except OSError as error:
            whole = f"the last whole one is {newest}" if (newest := self.newest()) else "there is none before it"
            message = f"the checkpoint of step {self.run.report.num_steps} could not be written: {error}; {whole}"
            self.run.report.checkpoint(error=message)
            raise OSError(message) from error

    def _save(self, interrupted: bool) -> Path:
        run, start = self.run, time.perf_counter()
        target = self.folder / f"step-{run.report.num_steps:08}"
        if self._wrote == target:
            return target
        loss_before = None if self.loss_before is None else dataclasses.asdict(self.loss_before)
        tensors, state = state_of(
            run,
            metrics_bytes=self._log_position(),
            loss_before=loss_before,
            recent_losses=list(self.guard.recent),
            owes_evaluation=interrupted and run.evaluation_is_due(),  # who interrupts does not want to wait for it
        )
        tensors = in_file_order(tensors)

        def write(parts: Sequence[Part], tensor_of: Callable[[str], Tensor]) -> None:
            write_checkpoint(
                self.folder,
                run.report.num_steps,
                lambda directory: write_checkpoint_model(run, directory, list(parts)),
                tensors,
                state,
                tensor_of,
            )

        with with_own_cache(run.model):
            written_by_first(run.ranks, run.engine.parts_of_model(), tensors, write)
        self._last_time, self._wrote = time.monotonic(), target
        if run.ranks.is_first:
            if not run.report.num_skipped_in_a_row:  # or a doubtful one would push out the last good one
                keep_newest(self.folder, run.config.keep_checkpoints)
            num_bytes = sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
            seconds = time.perf_counter() - start
            run.report.checkpoint(path=str(target), seconds=seconds, num_bytes=num_bytes, interrupted=interrupted)
        return target

    def _log_position(self) -> int:
        """Where the log stands; all ranks know if it cannot be written, so that none waits for a checkpoint that will not be."""
        try:
            return on_first(self.run.ranks, lambda: self.log.position() if self.log else 0) or 0
        except OtherRankError as failed:
            raise OSError(str(failed)) from failed

    _wrote: Path | None = None
