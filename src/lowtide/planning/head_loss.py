"""A stand-in for the head and its loss: it allocates what ``models/loss.py`` allocates, on the meta device, and computes nothing.

The planner stands below the floor of the models and cannot import the loss; a test holds the two against each other.

Shape letters: T = tokens that count, H = hidden size, V = vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..optim.base import SIXTEEN_BIT
from ..optim.sliced import rows_at_a_time
from .tracing import GRADIENTS, LOGITS, MemoryTrace

# As in models/loss.py: float32 logits alive at a time, the narrowest slice of the vocabulary, and bytes of logits that are kept.
MAX_LOGITS = 2**22
MIN_SLICE = 1024
MAX_KEPT_BYTES = 2**27


class HeadLoss(torch.autograd.Function):
    """hidden [T, H], weight [V, H] -> a float32 number; slices and lifetimes are those of the real one.

    With ``in_slices`` the weight's gradient is handed out slice by slice (``optim/sliced.py``), now or later. In its loops a slice of logits lives until
    the next one has been made, and so does a slice of the weight's gradient.
    """

    @staticmethod
    def forward(ctx: Any, trace: MemoryTrace, hidden: Tensor, weight: Tensor, in_slices: bool = False) -> Tensor:
        ctx.trace, ctx.in_slices = trace, in_slices
        highest, total, target = (hidden.new_empty(hidden.shape[0], dtype=torch.float32) for _ in range(3))
        with trace.kind(LOGITS):
            num_tokens, widths = hidden.shape[0], kept_widths(hidden.shape[0], weight, hidden.element_size())
            ctx.kept = [hidden.new_empty((num_tokens, width)) for width in widths]
            # Slices that are kept as they are made need no room of their own while they become float32.
            all_kept = sum(widths) == weight.shape[0] and hidden.dtype in SIXTEEN_BIT
            for height, width in _first_slices(num_tokens, weight):
                made = all_kept and height == num_tokens
                logits = _logits(ctx.trace, hidden, weight, height, width, ctx.kept[0] if made else None)
            del logits
        ctx.save_for_backward(hidden, weight, highest)
        return (highest + total - target).sum()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, _ = ctx.saved_tensors
        need_hidden, need_weight = ctx.needs_input_grad[1:3]
        grad_hidden = hidden.new_empty(hidden.shape, dtype=torch.float32) if need_hidden else None
        with ctx.trace.kind(GRADIENTS):
            grad_weight = torch.empty_like(weight) if need_weight and not ctx.in_slices else None
        found = product = None
        width, height = slice_shape(hidden.shape[0], weight)
        kept, ctx.kept = ctx.kept, []
        with ctx.trace.kind(LOGITS):  # a slice of the vocabulary is done before the next one begins
            for start in range(0, hidden.shape[0], height):
                count = min(height, hidden.shape[0] - start)
                if not kept:
                    logits = _logits(ctx.trace, hidden, weight, count, width)
                elif hidden.dtype in SIXTEEN_BIT:
                    logits = hidden.new_empty((count, width), dtype=torch.float32)
                else:
                    logits = kept[0][start : start + count]
                grad = logits.to(hidden.dtype)
                del logits
                if need_hidden:
                    hidden.new_empty((count, hidden.shape[1]))
                    if hidden.dtype in SIXTEEN_BIT:
                        ctx.trace.product(count, width, hidden.shape[1])
                if need_weight:
                    product = hidden.new_empty((width, hidden.shape[1]))
                    if hidden.dtype in SIXTEEN_BIT:
                        ctx.trace.product(width, count, hidden.shape[1])
                    if found is None:  # a sum over slices of the tokens is float32
                        found = product if count == hidden.shape[0] else product.to(torch.float32)
            del grad, found, product
        return None, None if grad_hidden is None else grad_hidden.to(hidden.dtype), grad_weight, None


def _first_slices(num_tokens: int, weight: Tensor) -> list[tuple[int, int]]:
    """(rows, columns) of the logits' slices in the order they are made, until they repeat."""
    width, height = slice_shape(num_tokens, weight)
    rows = [min(height, num_tokens - start) for start in range(0, num_tokens, height)]
    again = rows if width < weight.shape[0] else []
    return [(count, width) for count in [*rows, *again]]


def slice_shape(num_tokens: int, weight: Tensor) -> tuple[int, int]:
    """(width, height) of the largest slice of logits: columns of the vocabulary, and rows of tokens."""
    width = min(rows_at_a_time(*weight.shape), max(MIN_SLICE, MAX_LOGITS // max(1, num_tokens)))
    return width, max(1, min(num_tokens, MAX_LOGITS // width))


def kept_widths(num_tokens: int, weight: Tensor, element_bytes: int) -> list[int]:
    """Columns of each slice of logits, for all tokens, that waits for the backward pass."""
    width, _ = slice_shape(num_tokens, weight)
    room, widths = MAX_KEPT_BYTES, []
    for start in range(0, weight.shape[0], width):
        columns = min(width, weight.shape[0] - start)
        if num_tokens * columns * element_bytes <= room:
            room -= num_tokens * columns * element_bytes
            widths.append(columns)
    return widths


def kept_share(num_tokens: int, weight: Tensor, element_bytes: int) -> float:
    """Part of the logits that the backward pass does not make again, 0 to 1."""
    return sum(kept_widths(num_tokens, weight, element_bytes)) / weight.shape[0]


def _logits(
    trace: MemoryTrace, hidden: Tensor, weight: Tensor, height: int, width: int, product: Tensor | None = None
) -> Tensor:
    """A slice of logits in float32, through the dtype of the hidden states, which may be there already."""
    if weight.dtype != hidden.dtype:
        weight = hidden.new_empty((width, hidden.shape[1]))
    if hidden.dtype in SIXTEEN_BIT:
        trace.product(height, hidden.shape[1], width)
    if product is None:
        product = hidden.new_empty((height, width))
    return product.to(torch.float32)
