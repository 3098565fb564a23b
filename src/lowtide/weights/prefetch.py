"""What a home needs to know before it is asked: which block is used next."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence

# How a block was left: only read, or updated.
RELEASED, UPDATED = "released", "updated"
Use = tuple[Hashable, str]  # which block, and how it was left


class Order:
    """Foretells uses of blocks from the last time that the same three uses followed each other.

    The uses of a step are always the same: forward from the first block to the last, backward again, twice with two-pass
    clipping. What came after the same block, with the same two uses before it that were left in the same way, comes again. The
    first time round the neighbour in the direction of travel is assumed.

    Args:
        blocks: all of them, in the order of the forward pass.
    """

    def __init__(self, blocks: Sequence[Hashable]) -> None:
        self._blocks = list(blocks)
        self._position = {block: number for number, block in enumerate(self._blocks)}
        self._seen: dict[tuple[Use, Use, Hashable], tuple[Use, Hashable]] = {}
        self._before: tuple[Use, Use] = ((None, UPDATED), (None, UPDATED))  # the two uses before the present one
        self._now: Use = (None, RELEASED)

    def used(self, block: Hashable) -> None:
        """A use begins."""
        if self._now[0] is not None:
            self._seen[(*self._before, self._now[0])] = (self._now, block)
            self._before = (self._before[1], self._now)
        self._now = (block, RELEASED)

    def left(self, how: str) -> None:
        """The present use is over."""
        self._now = (self._now[0], how)

    def ahead(self) -> Iterator[Hashable]:
        """The uses that will follow the present one, as far as can be told; endless while they can be."""
        (older, last), block = self._before, self._now[0]
        while block is not None:
            seen = self._seen.get((older, last, block))
            use, following = seen if seen is not None else ((block, RELEASED), self._neighbour(last[0], block))
            older, last, block = last, use, following
            if block is not None:
                yield block

    def _neighbour(self, last: Hashable, now: Hashable) -> Hashable:
        if now is None or now not in self._position:
            return None
        here, before = self._position[now], self._position.get(last, -1)
        step = -1 if before >= here else 1
        if here + step == len(self._blocks):
            return now  # the turning point: the backward pass begins with it
        return self._blocks[here + step] if here + step >= 0 else None
