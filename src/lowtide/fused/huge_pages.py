"""Large pages for weights that a CPU computes with.

A step reads every weight three or four times, and with pages of 4 KiB a processor looks up a quarter of a million addresses a GB, each time; on a
virtual machine such a look-up goes through the tables of two systems. In pages of 2 MiB weights were read in two thirds of the time, and
the update of a product by tiles, which is spread over many rows, could not be told from none (``benchmarks/huge_pages.py``).

torch allocates small pages unless ``THP_MEM_ALLOC_ENABLE=1`` is in the environment before it is imported. So lowtide asks Linux (6.1 or newer) to
move what is there: the contents stay what they are, at the same addresses, and no more memory is taken.
"""

from __future__ import annotations

import ctypes
import errno
import os
import sys
import time
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from ..log import get_logger

_logger = get_logger(__name__)

_SYSTEM = Path("/sys/kernel/mm/transparent_hugepage")
_COLLAPSE, _HUGEPAGE = 25, 14  # advice to the system: move it now; move it when there is time
_GAP = 8192  # bytes between two tensors that an allocator needs for itself: a header, and the rest of a page
_WORTH_A_LINE = 4e9  # bytes, which take seconds
_AT_ONCE = 2**26  # bytes a call, so that Ctrl-C is heard in between


def use_huge_pages(tensors: Iterable[Tensor]) -> int:
    """Move the memory of these tensors into huge pages, as far as whole ones fit between its ends.

    Nothing happens, and nothing fails, on other systems than Linux, where its administrator switched huge pages off
    (``/sys/kernel/mm/transparent_hugepage/enabled`` says "never"), and with ``LOWTIDE_HUGE_PAGES=0`` in the environment. It took two to three seconds a
    GB on a virtual machine.

    Args:
        tensors: any; those on other devices and in page-locked memory stay as they are. Pages that were never written take memory now.

    Returns:
        bytes that are in huge pages now.
    """
    size = page_bytes()
    if size is None:
        return 0
    ranges = whole_pages(_places(tensors), size)
    total = sum(last - first for first, last in ranges)
    if total >= _WORTH_A_LINE:
        _logger.info("moving %.1f GB of weights and optimizer state into huge pages, once", total / 1e9)
    start, moved = time.perf_counter(), 0
    for first, last in ranges:
        for at in range(first, last, max(size, _AT_ONCE)):
            moved += _move(at, min(max(size, _AT_ONCE), last - at))
    _logger.debug(
        "%.2f of %.2f GB are in huge pages, after %.1f s", moved / 1e9, total / 1e9, time.perf_counter() - start
    )
    return moved


def whole_pages(places: Iterable[tuple[int, int]], size: int) -> list[tuple[int, int]]:
    """Ranges of whole pages.

    Args:
        places: (first address, address behind the last) of each tensor, in any order; they may overlap. Neighbours share a range.
        size: of a page, in bytes.

    Returns:
        the same for the ranges, in order.
    """
    joined: list[list[int]] = []
    for first, last in sorted(places):
        if joined and first - joined[-1][1] <= _GAP:
            joined[-1][1] = max(joined[-1][1], last)
        else:
            joined.append([first, last])
    aligned = ((-(-first // size) * size, last // size * size) for first, last in joined)
    return [(first, last) for first, last in aligned if first < last]


@cache
def page_bytes() -> int | None:
    """Size of a huge page; None: there are none, or nobody wants them."""
    if not sys.platform.startswith("linux") or os.environ.get("LOWTIDE_HUGE_PAGES", "1") == "0":
        return None
    try:
        if "[never]" in (_SYSTEM / "enabled").read_text():
            return None
        return int((_SYSTEM / "hpage_pmd_size").read_text())
    except (OSError, ValueError):
        return None


def _places(tensors: Iterable[Tensor]) -> Iterable[tuple[int, int]]:
    for tensor in tensors:
        if (
            type(tensor) not in (Tensor, torch.nn.Parameter)
            or tensor.device.type != "cpu"
            or tensor.layout != torch.strided
        ):
            continue
        storage = tensor.untyped_storage()
        if storage.nbytes() and not tensor.is_pinned():
            yield storage.data_ptr(), storage.data_ptr() + storage.nbytes()


def _move(first: int, num_bytes: int) -> int:
    """Bytes that were moved: all or none, as the system says."""
    libc = ctypes.CDLL(None, use_errno=True)
    arguments = ctypes.c_void_p(first), ctypes.c_size_t(num_bytes)
    if libc.madvise(*arguments, _COLLAPSE) == 0:
        return num_bytes
    if ctypes.get_errno() == errno.EINVAL:  # an older system, or memory of a file
        libc.madvise(*arguments, _HUGEPAGE)
    return 0
