"""The home of weights that stay on the device they are computed on."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache

import psutil
from torch import nn

# Smaller blocks leave little behind, and giving memory back costs time.
TRIM_FROM_BYTES = 16 * 1024**2


class DeviceHome:
    """Weights are always at hand: there is nothing to move.

    On a CPU with glibc the memory that large blocks' activations and gradients have left behind is given back to the
    system where it has become too much: see :class:`MemoryTrim`.
    """

    def __init__(self) -> None:
        self._trim = MemoryTrim()

    def fetch(self, block: nn.Module) -> None:
        """Nothing to move; what ran before the block may have to give its free memory back."""
        self._trim.before(block)

    def release(self, block: nn.Module) -> None:
        """Nothing to move; behind the last block of a forward pass free memory is given back, as the loss finds no use for it."""
        self._trim.after_forward(block)

    def write_back(self, block: nn.Module) -> None:
        """Nothing to do: the next block's fetch gives the memory back."""
        self._trim.after_backward(block)


_SPARE = 1.25  # as many times what a block's backward leaves may lie about, and
_SPARE_OF_WEIGHTS = 0.25  # so many times its weights: see below


class MemoryTrim:
    """Gives memory that the allocator keeps without use back to the system, on a CPU, between large blocks.

    What a block has freed the next one needs again, and getting it back page by page costs time: giving all of it back around every block
    took a tenth of a step. But not everything finds room in what is free, so that the heap grows from block to block. So it is given back where
    forward turns to backward, which need pieces of other sizes, and whenever it is a quarter more than the first block there leaves, and a quarter of
    the block's weights, because the pieces are of the size of weights. Growth slows down
    after some blocks: giving back whatever is above what the first block leaves made two to four times as many page faults, and the highest was the same
    (by hand, ``docs/LOG.md``; ``benchmarks/memory_trim.py`` compares the ways). In the first forward pass, when that is not known, it is given back around every block.
    """

    def __init__(self) -> None:
        self._weights: dict[nn.Module, int] = {}  # bytes that are on a CPU
        self._previous: tuple[nn.Module, bool] | None = None  # the last block that ended, and whether in a forward pass
        self._last: nn.Module | None = None  # where forward turns to backward
        self._floor: int | None = None  # resident bytes after the last trim
        self._highest = 0  # of these, where forward turns to backward
        self._left: list[int] = []  # by one block's backward, the last two times

    def before(self, block: nn.Module) -> None:
        """A block begins."""
        if not self._is_wanted(block):
            return
        resident = resident_bytes()
        previous, in_forward = self._previous or (block, True)
        if previous is not block and not in_forward and self._floor is not None:
            self._left, self._floor = [*self._left[-1:], resident - self._floor], None
        if self._previous == (block, True):
            self._last = block
            self._give_back()
            self._highest, self._left = self._floor or 0, []  # what was left with another batch is no measure
        elif (
            not self._left
            or resident > self._highest + _SPARE * max(self._left) + _SPARE_OF_WEIGHTS * self._weights[block]
        ):
            self._give_back()

    def after_forward(self, block: nn.Module) -> None:
        """A block ends whose weights were only read."""
        self._previous = (block, True)
        if (self._last is None or block is self._last) and self._is_wanted(block):
            self._give_back()

    def after_backward(self, block: nn.Module) -> None:
        """A block ends whose weights were updated."""
        self._previous = (block, False)

    def always(self, block: nn.Module) -> None:
        """Give everything back, whatever has been before."""
        if self._is_wanted(block):
            self._give_back()

    def _is_wanted(self, block: nn.Module) -> bool:
        num_bytes = self._weights.get(block)
        if num_bytes is None:
            on_cpu = [param for param in block.parameters() if param.device.type == "cpu"]
            num_bytes = self._weights[block] = sum(param.numel() * param.element_size() for param in on_cpu)
        # Not in evaluation: generating token by token would do it for every block and token.
        return num_bytes >= TRIM_FROM_BYTES and block.training and malloc_trim() is not None

    def _give_back(self) -> None:
        trim = malloc_trim()
        assert trim is not None
        trim(0)
        self._floor = resident_bytes()


def resident_bytes() -> int:
    """The resident set of this process now: memory it holds in RAM, pages of mapped files included."""
    return int(psutil.Process().memory_info().rss)


# mallopt(3): free memory at the top of the heap goes back to the system from so many bytes on, and pieces of so many get a mapping of
# their own. The latter is the most that glibc takes, and what it climbs to by itself.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = (-1, 2**31 - 1), (-3, 32 * 1024**2)


def keep_free_memory() -> None:
    """Have glibc keep what is freed, for the next step: getting it anew, page by page, takes as long as computing it again.

    For the whole process, from now on. With other C libraries nothing happens.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    for option in (_MMAP_THRESHOLD, _TRIM_THRESHOLD):
        mallopt(*option)


@cache
def malloc_trim() -> Callable[[int], int] | None:
    """glibc's ``malloc_trim``, or None with other C libraries."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return None
