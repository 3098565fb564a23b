"""What comes of a training run."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from ..evaluation import LossResult


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    Attributes:
        num_steps: steps taken, skipped ones included.
        num_skipped: steps that updated nothing, because their loss or gradient norm was not finite, or a spike.
        loss_before: held-out score before the first step; None when nothing is evaluated.
        loss_after: held-out score after the last step; None when nothing is evaluated or the run was interrupted.
        peak_memory_bytes: largest resident set of the process so far, or most CUDA memory allocated in the run.
        output: the output directory.
        model_dir: the saved model, inside ``output``; of an interrupted run its checkpoint, which is a model, too.
        wall_s: seconds from the first evaluation to the saved model; those of all parts of a resumed run.
        interrupted: SIGINT (Ctrl-C) or SIGTERM ended the run early; a checkpoint was written.
        signal_number: that ended it.
        finished_before: the run that was to be resumed had come to its end, and nothing was done.
    """

    num_steps: int
    num_skipped: int
    loss_before: LossResult | None
    loss_after: LossResult | None
    peak_memory_bytes: int
    output: Path
    model_dir: Path
    wall_s: float
    interrupted: bool
    signal_number: int | None = None
    finished_before: bool = False
