"""Gradients that spare memory can keep from the first pass of two-pass clipping, so that the second need not make them again.

The two passes go from the last block to the first. If the spare memory holds the gradients of everything that comes at the
end of a pass, the second pass can stop where they begin. With blocks a whole second pass costs three quarters of a step; a
fraction f of the gradients kept brings that down to (1 - f) times as much, and with all of them there is no second pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch

from ..optim.base import SIXTEEN_BIT

if TYPE_CHECKING:
    from torch import Tensor

    from .slot import Slot


class KeptGradients:
    """Decides in the first pass when to begin keeping, and holds what is kept until the second.

    Args:
        slots: all of the model's.
        budget_bytes: memory that may be used.
    """

    def __init__(self, slots: Iterable[Slot], budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self._bytes = {slot: _grad_bytes(slot) for slot in slots}
        self._total = sum(self._bytes.values())
        self._grads: dict[Slot, Tensor] = {}
        self._remaining = self._total
        self.keeping = False

    @property
    def fits(self) -> bool:
        """All gradients can be kept: one pass is enough."""
        return self._total <= self.budget_bytes

    def begin(self) -> None:
        """A first pass begins."""
        self._grads, self._remaining, self.keeping = {}, self._total, self.fits

    def consider(self) -> None:
        """At a point where what comes later in this pass can be told from what has been: between blocks."""
        self.keeping = self.keeping or self._remaining <= self.budget_bytes

    def measured(self, slot: Slot, grad: Tensor) -> None:
        """A complete gradient, in the first pass."""
        self._remaining -= self._bytes[slot]
        if self.keeping:
            self._grads[slot] = grad

    def __contains__(self, slot: Slot) -> bool:
        return slot in self._grads

    def take_all(self) -> Iterator[tuple[Slot, Tensor]]:
        """All that is kept, one after the other; each is no longer kept here once it is handed out."""
        while self._grads:
            yield self._grads.popitem()

    def drop(self) -> None:
        """Forget everything."""
        self._grads, self.keeping = {}, False


def _grad_bytes(slot: Slot) -> int:
    # A sum over micro-batches, or over the places that use it, is in float32.
    in_micro_batches = slot.runner is not None and slot.runner.micro_batch_size is not None
    summed = (slot.always_shared and not slot.in_own_dtype) or in_micro_batches
    dtype = torch.float32 if summed and slot.param.dtype in SIXTEEN_BIT else slot.param.dtype
    return slot.param.numel() * dtype.itemsize
