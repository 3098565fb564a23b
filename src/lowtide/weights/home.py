"""The home of weights that stay on the device they are computed on."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache

from torch import nn

# Smaller blocks leave little behind, and giving memory back costs time.
TRIM_FROM_BYTES = 16 * 1024**2


class DeviceHome:
    """Weights are always at hand: there is nothing to move.

    On a CPU with glibc the memory that a large block's activations and gradients have left behind is given back to the
    system before and after it: the allocator keeps freed memory between live tensors, which on a model of 1.1 B parameters
    added a tenth to the peak (``benchmarks/memory_cpu.py``).
    """

    def __init__(self) -> None:
        self._trim = MemoryTrim()

    def fetch(self, block: nn.Module) -> None:
        """Nothing to move; what ran before the block gives its free memory back."""
        self._trim(block)

    def release(self, block: nn.Module) -> None:
        """Nothing to do: the next block's fetch gives the memory back."""

    def write_back(self, block: nn.Module) -> None:
        """Nothing to move; free memory goes back to the system."""
        self._trim(block)


class MemoryTrim:
    """Gives memory that the allocator keeps without use back to the system, around large blocks on a CPU."""

    def __init__(self) -> None:
        self._large: dict[nn.Module, bool] = {}

    def __call__(self, block: nn.Module) -> None:
        """Before or after a block."""
        large = self._large.get(block)
        if large is None:
            on_cpu = [param for param in block.parameters() if param.device.type == "cpu"]
            large = sum(param.numel() * param.element_size() for param in on_cpu) >= TRIM_FROM_BYTES
            self._large[block] = large
        # Not in evaluation: generating token by token would do it for every block and token.
        if large and block.training and (trim := malloc_trim()) is not None:
            trim(0)


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
