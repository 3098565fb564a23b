"""Block inputs in host memory: what recomputation keeps of a block may wait for the backward pass there.

They are copied out as the forward pass goes on and come back in the opposite order, each while the block after it is
computed. The host buffers are pinned where there is a GPU, and used again in every step.
"""

from __future__ import annotations

import contextlib
import weakref
from typing import Any

import torch
from torch import Tensor

from .lanes import Lane, Transfer, make_lane
from .layout import aligned_buffer

_MAX_LEAVING = 2  # tensors that wait on the device for their copy to end


class _Kept:
    """One tensor in host memory."""

    def __init__(self, buffer: Tensor, like: Tensor, copied: Transfer) -> None:
        self.buffer, self.shape, self.device, self.copied = buffer, like.shape, like.device, copied
        self.back: tuple[Tensor, Transfer] | None = None  # on its way to the device

    def __del__(self) -> None:
        if (
            self.back is not None
        ):  # nobody asked for it, in a pass that was broken off: its memory is not free before the copy ended
            with contextlib.suppress(Exception):
                self.back[1].wait()


class HostInputs:
    """Keeps tensors in host memory between the forward and the backward pass; ``pack`` and ``unpack`` are saved-tensor hooks.

    Args:
        device: where they are computed with.
        lanes: for copies to host memory and from it; None for the usual ones.
    """

    def __init__(self, device: torch.device, lanes: tuple[Lane, Lane] | None = None) -> None:
        self.device = device
        self._out, self._in = lanes or (make_lane(device, "inputs-out"), make_lane(device, "inputs-in"))
        self._pool: dict[tuple[int, torch.dtype], list[Tensor]] = {}
        self._leaving: list[tuple[Transfer, Tensor]] = []
        self._stack: list[weakref.ref[_Kept]] = []
        self.pool_bytes = 0

    def pack(self, tensor: Tensor) -> Any:
        """Begin to copy a tensor out. Masks and positions, which all blocks share, stay as they are."""
        if not tensor.requires_grad:
            return tensor
        source = tensor.detach().contiguous()
        key = (source.numel(), source.dtype)
        buffers = self._pool.setdefault(key, [])
        buffer = buffers.pop() if buffers else self._new_buffer(source)
        copied = self._out.submit(lambda: _copy(buffer, source.view(-1)), after=(self._out.marker(),))
        self._leaving.append((copied, source))
        while len(self._leaving) > _MAX_LEAVING:  # what is computed from here on may use its memory
            self._leaving.pop(0)[0].wait()
        kept = _Kept(buffer, source, copied)
        weakref.finalize(kept, buffers.append, buffer)
        self._stack = [ref for ref in self._stack if ref() is not None]
        self._stack.append(weakref.ref(kept))
        return kept

    def unpack(self, packed: Any) -> Tensor:
        """The tensor on the device again; the one before it starts on its way."""
        if isinstance(packed, Tensor):
            return packed
        value, transfer = packed.back or self._bring(packed)
        packed.back = None  # a second pass brings it again
        transfer.wait()
        for copied, _ in self._leaving:  # the forward pass is over: the last ones are in host memory
            copied.wait()
        self._leaving.clear()
        stack = [kept for ref in self._stack if (kept := ref()) is not None]
        position = next((index for index, kept in enumerate(stack) if kept is packed), 0)
        if position > 0 and stack[position - 1].back is None:
            stack[position - 1].back = self._bring(stack[position - 1])
        return value

    def _bring(self, kept: _Kept) -> tuple[Tensor, Transfer]:
        value = torch.empty(kept.shape, dtype=kept.buffer.dtype, device=kept.device)
        copy = self._in.submit(lambda: _copy(value.view(-1), kept.buffer), after=(kept.copied, self._in.marker()))
        return value, copy

    def _new_buffer(self, like: Tensor) -> Tensor:
        num_bytes = like.numel() * like.element_size()
        self.pool_bytes += num_bytes
        return aligned_buffer(num_bytes, torch.device("cpu"), self.device.type == "cuda").view(like.dtype)

    def close(self) -> None:
        """Wait for all copies and give the memory up."""
        self._out.close()
        self._in.close()
        self._pool, self._leaving, self._stack = {}, [], []


def _copy(target: Tensor, source: Tensor) -> None:
    target.copy_(source, non_blocking=True)
