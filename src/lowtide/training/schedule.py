"""Learning-rate schedules as pure functions ``step -> factor``, for ``torch.optim.lr_scheduler.LambdaLR``.

Steps count from 0. With w warm-up steps of T in all the factor is (k + 1) / (w + 1) while k < w, so that no step is
wasted on a rate of 0, and 1 at k = w. From there x = (k - w) / (T - w) runs from 0 towards 1, which it would reach at
k = T, a step that is not taken: 1 - x (linear), (1 + cos(pi x)) / 2 (cosine, arXiv 1608.03983 without restarts) or 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable


def linear(x: float) -> float:
    """1 at the start of the decay (x = 0), 0 at its end (x = 1)."""
    return 1 - x


def cosine(x: float) -> float:
    """Half a cosine wave from 1 (x = 0) to 0 (x = 1)."""
    return (1 + math.cos(math.pi * x)) / 2


def constant(x: float) -> float:
    """1 throughout."""
    return 1.0


_DECAYS = {"linear": linear, "cosine": cosine, "constant": constant}


def make_schedule(name: str, num_steps: int, warmup_ratio: float = 0.0) -> Callable[[int], float]:
    """The factor on the learning rate as a function of the step.

    Args:
        name: "linear", "cosine" or "constant": what follows the warm-up.
        num_steps: steps in all, at least 1. Beyond them the factor stays at its last value.
        warmup_ratio: share of the steps for the warm-up, 0 <= warmup_ratio < 1, rounded to whole steps.

    Raises:
        ValueError: an unknown name, or a number out of range.
    """
    if name not in _DECAYS:
        raise ValueError(f"schedule must be one of {', '.join(_DECAYS)}, got {name!r}")
    if num_steps < 1:
        raise ValueError(f"a schedule needs at least one step, got {num_steps}")
    if not 0 <= warmup_ratio < 1:
        raise ValueError(f"warmup_ratio must be at least 0 and less than 1, got {warmup_ratio}")
    # at least one step is left after the warm-up
    num_warmup = min(round(warmup_ratio * num_steps), num_steps - 1)
    decay = _DECAYS[name]

    def factor(step: int) -> float:
        if step < num_warmup:
            return (step + 1) / (num_warmup + 1)
        return decay(min(1.0, (step - num_warmup) / (num_steps - num_warmup)))

    return factor
