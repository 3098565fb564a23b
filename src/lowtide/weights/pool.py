"""The buffers on the device that weights from elsewhere visit: how large they must be, and which one takes the next block."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

import torch
from torch import Tensor

from .lanes import Transfer
from .layout import aligned_buffer

DEFAULT_NUM_SLOTS = 3  # the block in use, the one before it on its way out, the next on its way in


def slot_sizes(num_bytes: Sequence[int], uses: Sequence[int], num_slots: int = DEFAULT_NUM_SLOTS) -> list[int]:
    """Bytes of each slot, the largest first: blocks that are used one after another find room at the same time.

    One buffer as large as the largest block is enough where its neighbours are small: an embedding of a large vocabulary has one
    decoder layer beside it, never the head.

    Args:
        num_bytes: of each block, by its number.
        uses: numbers of the blocks in the order of the forward pass; tied weights occur twice.
        num_slots: the most that are made; fewer where there are fewer blocks.
    """
    width = min(num_slots, len(uses))
    windows = [set(uses[start : start + width]) for start in range(len(uses) - width + 1)]
    ordered = (sorted((num_bytes[number] for number in window), reverse=True) for window in windows)
    return [max(column) for column in zip_longest(*ordered, fillvalue=0)]


class Slot:
    """A buffer of the pool."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self.buffer: Tensor = aligned_buffer(num_bytes, device)
        self.block: int | None = None
        self.num_users = 0
        self.last_use = 0
        self.reading: Transfer | None = None
        self.writing: Transfer | None = None
        self.computed: Transfer | None = None  # the computation that used it last

    @property
    def num_bytes(self) -> int:
        """The largest block that fits."""
        return self.buffer.numel()

    @property
    def is_writing(self) -> bool:
        """What was computed in it is still on its way out."""
        return self.writing is not None and not self.writing.finished()

    def grow(self, num_bytes: int) -> None:
        """Make it larger, once nothing uses it. Its block is gone."""
        for transfer in (self.reading, self.writing, self.computed):
            if transfer is not None:
                transfer.synchronize()
        device, self.block = self.buffer.device, None
        self.reading = self.writing = self.computed = None
        del self.buffer
        self.buffer = aligned_buffer(num_bytes, device)


def choose(slots: Sequence[Slot], num_bytes: int, soon: int) -> Slot | None:
    """The slot that takes a block, or None if none is large enough.

    Best is one that no larger block needs soon; of these an empty one; then one that waits for no write; then the one used
    longest ago.

    Args:
        slots: that may be used.
        num_bytes: of the block.
        soon: bytes of the largest block among the next uses.
    """
    fitting = [slot for slot in slots if slot.num_bytes >= num_bytes]
    return min(
        fitting,
        key=lambda s: (num_bytes < soon <= s.num_bytes, s.block is not None, s.is_writing, s.last_use),
        default=None,
    )
