"""The home of weights that visit the device: a fixed pool of buffers there, filled ahead of the computation.

Every block is one flat buffer (``layout.py``). ``fetch`` makes its parameters views of a slot of the pool; ``release`` and
``write_back`` end that. The next block is read into another slot meanwhile, and an updated one written out from its own.
Nothing is allocated in the loop (as long as blocks are used in the expected order), and a block that is still in the pool from its last use is not read again.

What must wait for what, for every slot:

    read into it      after the computation that last used it, the write from it, and the last write of the block that is read
    use of it         after the read into it, and (as it may be updated) the write from it
    write from it     after the computation that updated it
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from .home import MemoryTrim
from .lanes import Lane, Transfer, make_lane
from .layout import BlockLayout, Part
from .pool import DEFAULT_NUM_SLOTS, Slot, choose, slot_sizes
from .prefetch import RELEASED, UPDATED, Order


class Store(Protocol):
    """Where the bytes of the blocks are while they are not on the device. Blocks go by their number."""

    kind: str  # "host" or "disk"

    def adopt(self, layouts: Sequence[BlockLayout], value_of: Callable[[str, Tensor], Tensor]) -> None:
        """Take in the initial values; ``value_of`` gives them by parameter name and parameter."""

    def reader(self, number: int, target: Tensor) -> Callable[[], None]:
        """What copies a block into a slot, to be run in a lane."""

    def writer(self, number: int, source: Tensor) -> Callable[[], None]:
        """What copies a slot to the block's place, to be run in a lane."""

    def tensors(self, number: int) -> list[Tensor]:
        """The values of a block's pieces where they are, without a copy; to be read only."""

    def load(self, number: int) -> list[Tensor]:
        """The same in host memory, not mapped; to be read only, and dropped before the next step."""

    def stored(self, number: int) -> tuple[Path, int, int] | None:
        """Where a block lies on the disk: file, place and number of bytes, in whole pages."""

    def detach(self, number: int) -> list[Tensor]:
        """The same, to be kept and changed by an ordinary model."""

    def flush(self) -> None:
        """Everything is written: make it last."""

    def close(self) -> None:
        """No block will be read or written again."""

    def discard(self) -> None:
        """Remove what is not needed any more."""


class StreamedHome:
    """Weights live in a store and visit the device.

    Args:
        layouts: of the blocks that are streamed, in the order of the forward pass.
        members: for every module that the engine calls a block, the number of its layout; in the order of the forward pass.
        store: where their bytes are.
        device: where they are computed on.
        lanes: for reading and for writing; None for the usual ones.
        num_slots: buffers of the pool, where there are so many blocks.
    """

    def __init__(
        self,
        layouts: Sequence[BlockLayout],
        members: dict[nn.Module, int],
        store: Store,
        device: torch.device,
        lanes: tuple[Lane, Lane] | None = None,
        num_slots: int = DEFAULT_NUM_SLOTS,
    ) -> None:
        self.layouts, self.members, self.store, self.device = list(layouts), members, store, device
        waits = store.kind == "disk"
        self._read_lane, self._write_lane = lanes or (
            make_lane(device, "read", blocks_host=waits),
            make_lane(device, "write", blocks_host=waits),
        )
        self._order = Order(range(len(self.layouts)))
        sizes = slot_sizes([layout.num_bytes for layout in self.layouts], list(members.values()), num_slots)
        self._slots = [Slot(size, device) for size in sizes]
        self._written: dict[int, Transfer] = {}  # the last write of each block
        self._trains = [any(param.requires_grad for param in layout.params) for layout in self.layouts]
        self._clock, self._trim = 0, MemoryTrim()
        self.num_reads = self.num_hits = 0
        for layout in self.layouts:
            layout.point_away(device)

    # What the engine asks for ---------------------------------------------------------------------------------------

    def fetch(self, block: nn.Module) -> None:
        """Make the block's parameters usable on the device, and begin to read the block that is used next."""
        self._trim.always(block)
        number = self.members[block]
        slot = self._slot_of(number)
        if slot is not None and slot.num_users:  # within another use of the same weights
            slot.num_users += 1
            return
        if slot is None:
            slot = self._start_reading(number)
        else:
            self.num_hits += 1
        for transfer in (slot.reading, slot.writing):
            if transfer is not None:
                transfer.wait()
        slot.reading = slot.writing = None
        self._clock += 1
        slot.last_use, slot.num_users = self._clock, 1
        self.layouts[number].point_at(slot.buffer)
        self._order.used(number)
        self._prefetch()

    def release(self, block: nn.Module) -> None:
        """The block's parameters were only read, and are away now."""
        self._leave(self.members[block], RELEASED)
        self._trim.always(block)

    def write_back(self, block: nn.Module) -> None:
        """The block's parameters were updated: write them out. They are away now."""
        number = self.members[block]
        self._leave(number, UPDATED if self._trains[number] else RELEASED)
        self._trim.always(block)

    # The pool -------------------------------------------------------------------------------------------------------

    def _leave(self, number: int, how: str) -> None:
        slot = self._slot_of(number)
        assert slot is not None and slot.num_users, "a block was left that had not been fetched"
        if how == UPDATED:
            slot.writing = self._written[number] = self._write_lane.submit(
                self.store.writer(number, slot.buffer[: self.layouts[number].num_bytes]),
                after=(self._write_lane.marker(),),
            )
        slot.num_users -= 1
        if slot.num_users:
            return
        slot.computed = self._read_lane.marker()
        self.layouts[number].point_away(self.device)
        self._order.left(how)

    def _slot_of(self, number: int) -> Slot | None:
        return next((slot for slot in self._slots if slot.block == number), None)

    def _start_reading(self, number: int) -> Slot:
        """Read a block that is needed now."""
        free = [slot for slot in self._slots if not slot.num_users]
        if not free:
            raise RuntimeError(
                f"{len(self._slots)} blocks are in use at once, which is all that the pool on the device holds: a block is called "
                "within another one"
            )
        slot = self._choose(free, number)
        if slot is None:  # the order of uses is not the usual one
            slot = max(free, key=lambda s: s.num_bytes)
            slot.grow(self.layouts[number].num_bytes)
            slot.computed = self._read_lane.marker()  # its memory may be what computation before this has used
        self._read_into(slot, number)
        return slot

    def _prefetch(self) -> None:
        """Read the first block ahead that is not in the pool, unless all slots are used before it."""
        keep: list[int] = []
        for number in islice(self._ahead(), 2 * len(self._slots)):
            if self._slot_of(number) is None:
                free = [slot for slot in self._slots if not slot.num_users and slot.block not in keep]
                if (slot := self._choose(free, number)) is not None:
                    self._read_into(slot, number)
                return
            keep.append(number)

    def _choose(self, free: Sequence[Slot], number: int) -> Slot | None:
        ahead = islice(self._ahead(), len(self._slots) - 1)
        soon = max((self.layouts[each].num_bytes for each in ahead), default=0)
        return choose(free, self.layouts[number].num_bytes, soon)

    def _ahead(self) -> Iterator[int]:
        for number in self._order.ahead():
            assert isinstance(number, int)
            yield number

    def _read_into(self, slot: Slot, number: int) -> None:
        slot.reading = self._read_lane.submit(
            self.store.reader(number, slot.buffer[: self.layouts[number].num_bytes]),
            after=(slot.computed, slot.writing, self._written.get(number)),
        )
        slot.block, slot.writing, slot.computed = number, None, None
        self.num_reads += 1

    # Before and after -----------------------------------------------------------------------------------------------

    def synchronize(self) -> None:
        """Wait until everything is written out.

        Raises:
            OSError: a write failed.
        """
        for transfer in self._written.values():
            transfer.synchronize()

    def tensors(self) -> dict[str, Tensor]:
        """All streamed parameters by name, where they live; to be read only, before the next step."""
        self.synchronize()
        return {
            piece.name: value
            for number, layout in enumerate(self.layouts)
            for piece, value in zip(layout.pieces, self.store.tensors(number), strict=True)
        }

    def parts(self) -> list[Part]:
        """All streamed parameters, block by block, in host memory when they are asked for; see :meth:`tensors`."""
        self.synchronize()

        def load(number: int) -> dict[str, Tensor]:
            return dict(zip(names[number], self.store.load(number), strict=True))

        names = [tuple(piece.name for piece in layout.pieces) for layout in self.layouts]
        return [Part(names[number], partial(load, number), self.store.stored(number)) for number in range(len(names))]

    def close(self, whole: bool = True) -> None:
        """Give the parameters values that an ordinary model can work with, in host memory or mapped from the disk.

        Args:
            whole: no step was broken off, so that the weights are all of the same step.

        Raises:
            OSError: a write failed; the parameters have what is there all the same.
        """
        try:
            self.synchronize()
            if whole:
                self.store.flush()
        finally:
            for lane in (self._read_lane, self._write_lane):
                lane.close()
            for number, layout in enumerate(self.layouts):
                for param, value in zip(layout.params, self.store.detach(number), strict=True):
                    param.data = value
            self.store.close()
            self._slots = []
