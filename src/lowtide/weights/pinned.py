"""Page-locked host memory of any size.

torch's own pinned allocator rounds every request up to a power of two: a decoder layer of LLaMA 65B (1.62 GB) would take 2.15 GB, and
all of them 172 GB of host memory instead of 130. Here ordinary memory, in huge pages where there are any, is registered with CUDA.
"""

from __future__ import annotations

import contextlib
import mmap
from typing import Any

import torch
from torch import Tensor

from ..log import get_logger

_logger = get_logger(__name__)
_HUGE_PAGE_BYTES = 2 * 1024**2


class _Registered(mmap.mmap):
    """Anonymous memory that is given back to CUDA's driver before it is unmapped."""

    address: int | None = None

    def __del__(self) -> None:
        if self.address is not None:
            with contextlib.suppress(Exception):  # at the end of the process CUDA may be gone already
                _cudart().cudaHostUnregister(self.address)


def pinned_buffer(num_bytes: int) -> Tensor:
    """Zeros in page-locked memory that begins at a page; uint8 [num_bytes].

    Where the driver does not register memory (a limit on locked memory, some containers), torch's allocator is asked instead.

    Raises:
        MemoryError: there is not so much host memory that could be locked.
    """
    if num_bytes == 0:
        return torch.empty(0, dtype=torch.uint8)
    size = -(-num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
    try:
        memory = _Registered(-1, size, **_private())
    except OSError as error:
        raise MemoryError(f"{num_bytes} bytes of host memory for weights: {error.strerror}") from None
    # A child made by fork (a worker that loads data) would get a copy of every locked page, so it gets none of them.
    advice = ["MADV_DONTFORK", "MADV_HUGEPAGE"] if size >= _HUGE_PAGE_BYTES else ["MADV_DONTFORK"]
    for name in advice:
        with contextlib.suppress(OSError, AttributeError):  # not on this kernel, not on this system
            memory.madvise(getattr(mmap, name))
    buffer = torch.frombuffer(memory, dtype=torch.uint8)
    buffer.zero_()  # makes the pages, with all threads; the driver would do it with one
    code = int(_cudart().cudaHostRegister(buffer.data_ptr(), size, 0))
    if code == 0:
        memory.address = buffer.data_ptr()
        return buffer[:num_bytes]
    del buffer, memory
    _clear_error()
    _warn_once(code)
    try:
        return torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=True)
    except RuntimeError as error:
        raise MemoryError(
            f"{num_bytes} bytes of host memory cannot be page-locked, which copies beside the computation need: {error}. Keep "
            "part of the weights on disk, or allow more locked memory (ulimit -l)."
        ) from None


def _private() -> dict[str, int]:
    """Huge pages are for private memory; Python's default is memory that is shared with forked processes."""
    flags = getattr(mmap, "MAP_PRIVATE", 0) | getattr(mmap, "MAP_ANONYMOUS", 0)
    return {"flags": flags} if flags else {}  # Windows has none


def _cudart() -> Any:
    return torch.cuda.cudart()


def _clear_error() -> None:
    """CUDA remembers the refusal, and whoever launches the next kernel would be told of it."""
    with contextlib.suppress(Exception):
        torch.zeros(1, device="cuda").add_(1)


_warned: set[int] = set()


def _warn_once(code: int) -> None:
    if code not in _warned:
        _warned.add(code)
        _logger.warning(
            "host memory could not be registered with CUDA (error %d): torch's pinned allocator is used, which rounds up to powers "
            "of two",
            code,
        )
