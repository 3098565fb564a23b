"""Collective calls of FSDP2 on a CPU (gloo), without the copies that gloo and FSDP2 would keep of a whole block.

gloo gathers into a buffer of its own and copies from there, and has another one when it scatters: here it does so for a slice at a time.
FSDP2 holds what it sends, and what it has gathered, until the next block, so that sending may go on meanwhile: on a CPU it is over when
the call returns, and the memory is given back as soon as it is not needed any more.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .home import TRIM_FROM_BYTES, malloc_trim

# Of one rank's part: gloo's buffer is that of all ranks.
_SLICE_BYTES = 1024**2


def use_slices(modules: Sequence[Any]) -> None:
    """Have modules that ``fully_shard`` was applied to gather and scatter in this way."""
    gather, scatter = _make()
    for module in modules:
        module.set_custom_all_gather(gather)
        module.set_custom_reduce_scatter(scatter)


def _empty(size: Sequence[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    found = torch.empty(size, dtype=dtype, device=device)
    if found.nbytes >= TRIM_FROM_BYTES and (trim := malloc_trim()) is not None:
        trim(0)  # weights and gradients of the block before
    return found


def _pieces(part: Tensor) -> Iterator[slice]:
    step = max(1, _SLICE_BYTES // part.element_size())
    return (slice(start, start + step) for start in range(0, part.numel(), step))


def _make() -> tuple[Any, Any]:
    from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather, ReduceScatter

    class Gather(AllGather):
        """All-gather. What was gathered before has been copied out by then."""

        _last: weakref.ref[Tensor] | None = None

        def allocate(self, size: Sequence[Any], *, dtype: torch.dtype, device: torch.device) -> Tensor:
            last = None if self._last is None else self._last()
            if last is not None:
                last.untyped_storage().resize_(0)
            found = _empty(size, dtype, device)
            self._last = weakref.ref(found)
            return found

        def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False) -> None:
            whole = output_tensor.view(-1, input_tensor.numel())
            for piece in _pieces(input_tensor):
                torch.distributed.all_gather([row[piece] for row in whole], input_tensor[piece], group=group)

    class Scatter(ReduceScatter):
        """Reduce-scatter, behind which the input is gone."""

        def allocate(self, size: Sequence[Any], *, dtype: torch.dtype, device: torch.device) -> Tensor:
            return _empty(size, dtype, device)

        def __call__(
            self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False
        ) -> None:
            whole = input_tensor.view(-1, output_tensor.numel())
            for piece in _pieces(output_tensor):
                rows = [row[piece] for row in whole]
                torch.distributed.reduce_scatter(output_tensor[piece], rows, op=op, group=group)
            input_tensor.untyped_storage().resize_(0)

    return Gather(), Scatter()
