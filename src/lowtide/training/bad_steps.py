"""What is done about steps that would harm the model: losses that are not finite, and sudden ones."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from .config import TrainConfig

_WINDOW = 20  # good steps whose average loss a spike is held against
MAX_ROLLBACKS = 3  # of a run: data that breaks the model again and again is not a matter of chance


class TooManyBadStepsError(RuntimeError):
    """So many steps in a row updated nothing that they will not pass by themselves."""


class RollBack(Exception):  # it asks for something and is caught
    """The run is to go back to its last checkpoint.

    Args:
        num_batches: of the data, bad ones included: the run goes on behind them.
        last_good_step: the step before the bad ones.
        why: what happened.
    """

    def __init__(self, num_batches: int, last_good_step: int, why: str) -> None:
        super().__init__(why)
        self.num_batches, self.last_good_step = num_batches, last_good_step


class SpikeGuard:
    """Tells losses that are far above those before them.

    Args:
        factor: a spike is more than so many times the average of the last 20 good steps; None to find none.
        recent: losses of the good steps before, in a run that is resumed.
    """

    def __init__(self, factor: float | None, recent: Sequence[float] = ()) -> None:
        self.factor = factor
        self.recent = deque(recent, maxlen=_WINDOW)

    def is_spike(self, loss: float) -> bool:
        """Of the step that is about to be taken. Without 20 good steps nothing is one."""
        if self.factor is None or len(self.recent) < _WINDOW:
            return False
        return loss > self.factor * sum(self.recent) / _WINDOW

    def took(self, loss: float) -> None:
        """A good step was taken."""
        if self.factor is not None:
            self.recent.append(loss)


def too_many(config: TrainConfig, step: int, num_bad: int, last_good: str | None) -> str:
    """What to say when ``max_bad_steps`` steps in a row were skipped."""
    spike = ", or the loss a spike," if config.spike_factor is not None else ""
    good = f"the last good checkpoint is {last_good}" if last_good else "no checkpoint was written before"
    return (
        f"the loss or the gradient was not finite{spike} in {num_bad} steps in a row, up to step {step}; training "
        f"stopped and no model was saved; {good}. Try a lower lr than {config.effective_lr:g}, or clip_grad_norm 1"
    )
