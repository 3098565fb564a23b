"""The working set of one block: what its forward and its recompute-and-backward hold beyond inputs and weights.

Follows ``fused/block.py``: a forward pass without a graph, micro-batch by micro-batch; backward runs each micro-batch again with
one, and a hook on each parameter takes its gradient away at once, or adds it to the block's sums. Where weights are spread over
ranks all gradients of the block stay until its backward is over (``fused/sharded.py``).

Shape letters: B = batch, the first dimension of the block's first tensor.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..optim.base import SIXTEEN_BIT
from .attention import fused_attention
from .tracing import GRADIENTS, WORKING, Bytes, MemoryTrace

# Micro-batches beyond the third repeat the second: the first finds no sums, the last uses them up.
_TRACED_MICRO_BATCHES = 3

Transient = Callable[[Tensor], Bytes]  # temporaries of the update of a parameter


@dataclasses.dataclass(frozen=True)
class BlockCall:
    """A block and the arguments that a training step calls it with, on the meta device.

    Attributes:
        block: the decoder layer.
        args, kwargs: its arguments; tensors whose first dimension is B are split into micro-batches.
    """

    block: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def tensors(self) -> list[Tensor]:
        """All tensors among the arguments."""
        return [leaf for leaf in pytree.tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Tensor)]


@dataclasses.dataclass(frozen=True)
class WorkingSet:
    """Bytes by kind, at the largest moment of each pass, beyond the block's weights and whole-batch inputs.

    Attributes:
        forward: of the pass without a graph; the output of the whole batch is in it.
        backward: of the recompute and the backward; the gradient of the inputs is in it, that of the output is not.
        forward_heap, backward_heap: the most that came from the allocator's heap, see ``HEAP_BELOW``.
    """

    forward: Bytes
    backward: Bytes
    forward_heap: int = 0
    backward_heap: int = 0


def trace_block(
    call: BlockCall,
    *,
    micro_batch_size: int,
    update: Transient,
    applies: bool = True,
    gathered: bool = False,
    sums_dtype: torch.dtype | None = None,
    **options: Any,
) -> WorkingSet:
    """Run one block on the meta device and read its peaks.

    Args:
        call: the block and its arguments for the whole batch.
        micro_batch_size: samples that go through the block at a time.
        update: temporaries that updating a parameter needs.
        applies: False for a pass that only measures the norm of the gradients.
        gathered: the weights are those that FSDP2 has gathered: gradients stay, and nothing is updated here.
        sums_dtype: of gradients that are gathered, added up over several micro-batches; None for that of the weights.
        options: of :class:`MemoryTrace`.

    Raises:
        Exception: whatever the block raises where it cannot run on the meta device.
    """
    leaves, spec = pytree.tree_flatten((call.args, call.kwargs))
    with torch.device("meta"), fused_attention():
        forward, backward = (MemoryTrace(**options) for _ in range(2))
        for trace in (forward, backward):
            trace.ignore([*call.block.parameters(), *call.block.buffers(), *_tensors(leaves)])
        sums = _WholeGradients(backward, sums_dtype) if gathered else _GradientSums(backward, update, applies)
        _trace_forward(forward, call.block, leaves, spec, micro_batch_size)
        _trace_backward(backward, call.block, leaves, spec, micro_batch_size, sums)
    return WorkingSet(forward.peak, backward.peak, forward.heap_high, backward.heap_high)


def _trace_forward(trace: MemoryTrace, block: nn.Module, leaves: list[Any], spec: Any, size: int) -> None:
    batch = _batch_size(leaves)
    with torch.no_grad(), trace, trace.kind(WORKING):
        whole: list[Tensor] = []
        for start in range(0, batch, size)[:_TRACED_MICRO_BATCHES]:
            outputs = _tensors(pytree.tree_leaves(_run(block, leaves, spec, start, size)))
            if size >= batch:
                whole = outputs
            elif not whole:
                whole = [output.new_empty((batch, *output.shape[1:])) for output in outputs]
            del outputs


def _trace_backward(
    trace: MemoryTrace, block: nn.Module, leaves: list[Any], spec: Any, size: int, sums: _GradientSums | _WholeGradients
) -> None:
    batch = _batch_size(leaves)
    starts = range(0, batch, size)[:_TRACED_MICRO_BATCHES]
    handles = [param.register_post_accumulate_grad_hook(sums.on_grad) for param in block.parameters()]
    try:
        with torch.enable_grad(), trace, trace.kind(WORKING):
            input_grads: dict[int, Tensor] = {}
            for number, start in enumerate(starts):
                sums.accumulating = number < len(starts) - 1
                inputs = _micro_batch(leaves, batch, start, size)
                _backward_once(trace, block, spec, inputs)
                _gather(input_grads, inputs, leaves, size >= batch)
                del inputs
                sums.end_micro_batch()
    finally:
        for handle in handles:
            handle.remove()


class _GradientSums:
    """What the engine's hooks do: the gradient is used at once, or added to the sum over micro-batches."""

    def __init__(self, trace: MemoryTrace, update: Transient, applies: bool) -> None:
        self.trace, self.update, self.applies = trace, update, applies
        self.accumulating = False
        self.sums: dict[Tensor, Tensor] = {}

    @torch.no_grad()
    def on_grad(self, param: Tensor) -> None:
        grad, param.grad = param.grad, None
        assert grad is not None
        self.trace.retag(grad, GRADIENTS)
        if param in self.sums or self.accumulating:
            if param not in self.sums:
                with self.trace.kind(GRADIENTS):
                    self.sums[param] = grad.to(torch.float32) if grad.dtype in SIXTEEN_BIT else grad
            else:
                self.sums[param].add_(grad)
            if self.accumulating:
                return
            grad = self.sums.pop(param)
        if self.applies:
            self.trace.transient(self.update(param))

    def end_micro_batch(self) -> None:
        """Nothing is left to do."""


class _WholeGradients:
    """What FSDP2 and ``UnshardedSums`` do: all gradients stay, and are added up between micro-batches if in another dtype."""

    def __init__(self, trace: MemoryTrace, dtype: torch.dtype | None) -> None:
        self.trace, self.dtype = trace, dtype
        self.accumulating = False
        self.grads: dict[Tensor, Tensor] = {}
        self.sums: dict[Tensor, Tensor] = {}

    @torch.no_grad()
    def on_grad(self, param: Tensor) -> None:
        grad, param.grad = param.grad, None
        assert grad is not None
        self.trace.retag(grad, GRADIENTS)
        if param in self.grads:
            self.grads[param].add_(grad)
        else:
            self.grads[param] = grad

    @torch.no_grad()
    def end_micro_batch(self) -> None:
        """Behind a micro-batch that is not the last."""
        if not self.accumulating:
            return
        for param in list(self.grads) if self.dtype is not None else ():
            if self.grads[param].dtype == self.dtype:
                continue
            grad = self.grads.pop(param)
            if param in self.sums:
                self.sums[param].add_(grad)
            else:
                with self.trace.kind(GRADIENTS):
                    self.sums[param] = grad.to(self.dtype)


def _backward_once(trace: MemoryTrace, block: nn.Module, spec: Any, inputs: list[Any]) -> None:
    args, kwargs = pytree.tree_unflatten(inputs, spec)
    outputs = [
        leaf for leaf in pytree.tree_leaves(block(*args, **kwargs)) if isinstance(leaf, Tensor) and leaf.requires_grad
    ]
    del args, kwargs
    grads = [_uncounted_like(output) for output in outputs]
    trace.ignore(grads)  # they come from outside, where they are counted
    roots = tuple(outputs)
    del outputs
    torch.autograd.backward(roots, grads)


def _uncounted_like(tensor: Tensor) -> Tensor:
    with torch.utils._python_dispatch._disable_current_modes():
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


def _gather(grads: dict[int, Tensor], inputs: list[Any], leaves: list[Any], whole_batch: bool) -> None:
    for index, part in enumerate(inputs):
        if isinstance(part, Tensor) and part.grad is not None and index not in grads:
            grads[index] = part.grad if whole_batch else torch.zeros_like(leaves[index])


def _run(block: nn.Module, leaves: list[Any], spec: Any, start: int, size: int) -> Any:
    args, kwargs = pytree.tree_unflatten(_micro_batch(leaves, _batch_size(leaves), start, size), spec)
    return block(*args, **kwargs)


def _micro_batch(leaves: list[Any], batch: int, start: int, size: int) -> list[Any]:
    parts: list[Any] = []
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            split = leaf.dim() > 0 and leaf.shape[0] == batch and size < batch
            part = (leaf[start : start + size] if split else leaf).detach()
            parts.append(part.requires_grad_(leaf.requires_grad))
        else:
            parts.append(leaf)
    return parts


def _batch_size(leaves: list[Any]) -> int:
    return next((leaf.shape[0] for leaf in _tensors(leaves) if leaf.dim()), 1)


def _tensors(leaves: list[Any]) -> list[Tensor]:
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]
