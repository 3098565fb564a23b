"""A training step as a row of moments, and the largest of them: what is alive outside the blocks, and what a block needs on top.

On a CPU the allocator's heap is followed through them as well, because its free memory stays resident until it is trimmed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from .block_trace import BlockCall, WorkingSet
from .tracing import ALLOCATOR, FRAGMENTATION, FRAGMENTATION_OF_KEPT, LEFT_BEHIND, Bytes, added


@dataclasses.dataclass(frozen=True)
class Moment:
    """A block begins: what is alive outside the blocks then, and what comes between this block and the next.

    Attributes:
        phase: "forward" or "backward" (of the pass that updates), or "measure" (the first pass of exact clipping).
        block: index of the block.
        live: bytes by kind; weights and optimizer state are not in it.
        heap: bytes of the allocator's heap that are in use.
        after: the largest moment from the end of the block to the beginning of the next one, bytes by kind.
        after_heap: bytes of the heap in use at its beginning, and the most until its end.
    """

    phase: str
    block: int
    live: Bytes
    heap: int
    after: Bytes
    after_heap: tuple[int, int]


@dataclasses.dataclass(frozen=True)
class StepTrace:
    """A traced step.

    Attributes:
        before: the largest moment before the first block; of the whole step where none is computed again.
        moments: one for each time a block begins.
        calls: how each block was called.
        kept_bytes: all block inputs together; one that several blocks share counts once.
        input_bytes: of the largest block input that is a block's own (hidden states).
        before_heap: the most bytes of the allocator's heap in use until the first block.
        keeps: activations of some blocks are kept: these run between the last block of the forward pass and the first of the backward pass.
    """

    before: Bytes
    moments: tuple[Moment, ...]
    calls: tuple[BlockCall, ...]
    kept_bytes: int
    input_bytes: int
    before_heap: int = 0
    keeps: bool = False

    def peak(
        self, working: Sequence[WorkingSet], measure: Sequence[WorkingSet] = (), trimmed: Sequence[bool] | None = None
    ) -> Bytes:
        """The largest moment of the step, by kind.

        Args:
            working: of each block.
            measure: of each block in the first pass of exact clipping, where no parameter is updated.
            trimmed: for each block, whether free memory is given back before it when there is much of it, as the
                device's home does for large blocks. None for all.
        """
        candidates, heap = [self.before], _Heap()
        if self.keeps and not self.moments:
            heap.grow(0, self.before_heap, fresh=True, kept=True)
            candidates.append(added(self.before, {ALLOCATOR: heap.top - self.before_heap}))
        for index, moment in enumerate(self.moments):
            inside = (measure if moment.phase == "measure" else working)[moment.block]
            forward = moment.phase == "forward"
            peak, most = (inside.forward, inside.forward_heap) if forward else (inside.backward, inside.backward_heap)
            trims = trimmed is None or trimmed[moment.block]
            if trims:
                heap.trim(moment.heap)
            # A block finds room in what one like it has left, but not in what another phase has: free memory lies in pieces
            # between others. Nor does the loss, which comes where forward turns to backward.
            first = index == 0 or self.moments[index - 1].phase != moment.phase
            heap.grow(moment.heap, most, fresh=first)
            if trims and not first and not forward:
                heap.top += round(LEFT_BEHIND * most)  # more than that is given back
            candidates.append(added(moment.live, peak, {ALLOCATOR: heap.top - moment.heap - most}))
            start, most = moment.after_heap
            last = index + 1 == len(self.moments) or self.moments[index + 1].phase != moment.phase
            if trims and forward and last:
                heap.trim(start)
            heap.grow(start, most - start, fresh=last, kept=last and forward and self.keeps)
            candidates.append(added(moment.after, {ALLOCATOR: heap.top - most}))
        return max(candidates, key=lambda candidate: sum(candidate.values()))


class _Heap:
    """How much of the allocator's heap is resident.

    Attributes:
        top: bytes.
    """

    def __init__(self) -> None:
        self.top = 0

    def trim(self, used: int) -> None:
        """Free memory goes back to the system."""
        self.top = used

    def grow(self, used: int, more: int, *, fresh: bool, kept: bool = False) -> None:
        """On top of what is in use, ``more`` bytes come and go.

        Args:
            used: bytes in use.
            more: bytes.
            fresh: they find no room in what is free.
            kept: many blocks' activations, which stay for long.
        """
        base = max(self.top, used) if fresh else used
        self.top = max(self.top, base + round((FRAGMENTATION_OF_KEPT if kept else FRAGMENTATION) * more))
