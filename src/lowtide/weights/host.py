"""The store in host memory: one flat buffer a block, pinned where there is a GPU so that copies run beside the computation."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .layout import BlockLayout, aligned_buffer


class HostStore:
    """Blocks in host memory. 2 bytes a parameter in bfloat16, and nothing else.

    Args:
        pinned: page-locked memory, which a GPU copies from and to by itself.
    """

    kind = "host"

    def __init__(self, pinned: bool = False) -> None:
        self.pinned = pinned
        self._layouts: list[BlockLayout] = []
        self._buffers: list[Tensor] = []

    @property
    def num_bytes(self) -> int:
        """Host memory that it takes."""
        return sum(buffer.numel() for buffer in self._buffers)

    def adopt(self, layouts: Sequence[BlockLayout], value_of: Callable[[str, Tensor], Tensor]) -> None:
        """Take in the initial values, block by block; each parameter then lives in the block's buffer.

        So the model is never there twice.
        """
        for layout in layouts:
            buffer = aligned_buffer(layout.num_bytes, torch.device("cpu"), self.pinned)
            values = (value_of(p.name, param) for p, param in zip(layout.pieces, layout.params, strict=True))
            layout.fill(buffer, values)
            self._layouts.append(layout)
            self._buffers.append(buffer)
            layout.point_at(buffer)  # and what they were is freed

    def reader(self, number: int, target: Tensor) -> Callable[[], None]:
        """See :class:`lowtide.weights.streamed.Store`."""
        source = self._buffers[number]
        return lambda: _copy(target, source)

    def writer(self, number: int, source: Tensor) -> Callable[[], None]:
        """See :class:`lowtide.weights.streamed.Store`."""
        target = self._buffers[number]
        return lambda: _copy(target, source)

    def tensors(self, number: int) -> list[Tensor]:
        """See :class:`lowtide.weights.streamed.Store`."""
        return [piece.view(self._buffers[number]) for piece in self._layouts[number].pieces]

    detach = load = tensors

    def stored(self, number: int) -> None:
        """Nothing is on a disk."""

    def flush(self) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """Nothing to do: the buffers live as long as the parameters that are views of them."""

    discard = close


def _copy(target: Tensor, source: Tensor) -> None:
    target.copy_(source, non_blocking=True)
