"""Dynamic loss scaling: float16 gradients are kept from vanishing by multiplying the loss.

The scale is halved when a gradient overflows, and doubled after a number of good steps in a row, so that it recovers from
a bad batch (Micikevicius et al. 2018, arXiv 1710.03740). It is a number on the host: no process group is needed.
"""

from __future__ import annotations

from typing import Any


class LossScale:
    """What the loss is multiplied with before the backward pass; gradients are divided by it before anything else.

    Args:
        initial: the first scale; powers of two change no digit of a gradient.
        growth_factor: what it is multiplied with after ``growth_interval`` good steps in a row; 1 for a fixed scale.
        backoff_factor: what it is multiplied with when a gradient is not finite; 1 for a fixed scale.
        growth_interval: in steps.
        smallest: it does not fall below this; a gradient that overflows there does so by itself.
        largest: it does not grow above this.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        initial: float = 2.0**16,
        *,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        growth_interval: int = 200,
        smallest: float = 1.0,
        largest: float = 2.0**24,
    ) -> None:
        if not 0.0 < smallest <= initial <= largest < float("inf"):
            raise ValueError(
                f"the loss scale must lie between {smallest:g} and {largest:g} and be positive, got {initial}"
            )
        if growth_factor < 1.0 or not 0.0 < backoff_factor <= 1.0 or growth_interval < 1:
            raise ValueError(
                "growth_factor must be at least 1, backoff_factor in (0, 1] and growth_interval at least 1, got "
                f"{growth_factor}, {backoff_factor}, {growth_interval}"
            )
        self.scale, self.growth_factor, self.backoff_factor = float(initial), growth_factor, backoff_factor
        self.growth_interval, self.smallest, self.largest = growth_interval, smallest, largest
        self.num_good_steps = 0  # in a row

    @classmethod
    def fixed(cls, scale: float) -> LossScale:
        """A scale that never changes."""
        return cls(scale, growth_factor=1.0, backoff_factor=1.0, smallest=scale, largest=scale)

    def update(self, overflow: bool) -> None:
        """After a step: whether one of its gradients was not finite."""
        if overflow:
            self.scale, self.num_good_steps = max(self.scale * self.backoff_factor, self.smallest), 0
            return
        self.num_good_steps += 1
        if self.num_good_steps >= self.growth_interval:
            self.scale, self.num_good_steps = min(self.scale * self.growth_factor, self.largest), 0

    def state_dict(self) -> dict[str, Any]:
        """What a resume needs."""
        return {"scale": self.scale, "num_good_steps": self.num_good_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave."""
        self.scale, self.num_good_steps = float(state["scale"]), int(state["num_good_steps"])
