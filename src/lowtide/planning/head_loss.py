"""A stand-in for the head and its loss: it allocates what ``models/loss.py`` allocates, on the meta device, and computes nothing.

The planner stands below the floor of the models and cannot import the loss; a test holds the two against each other.

Shape letters: T = tokens that count, H = hidden size, V = vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .tracing import LOGITS, MemoryTrace

# As in models/loss.py: float32 logits alive at a time, and the narrowest slice of the vocabulary.
MAX_LOGITS = 2**22
MIN_SLICE = 1024


class HeadLoss(torch.autograd.Function):
    """hidden [T, H], weight [V, H] -> a float32 number; the slices are those of the real one."""

    @staticmethod
    def forward(ctx: Any, trace: MemoryTrace, hidden: Tensor, weight: Tensor) -> Tensor:
        tokens = hidden.shape[0]
        highest, total, target = (hidden.new_empty(tokens, dtype=torch.float32) for _ in range(3))
        width, height = slice_shape(tokens, weight.shape[0])
        with trace.kind(LOGITS):
            logits = _logits(hidden, weight, width, height)
            exponentials = logits.new_empty(height)
            del logits, exponentials
        ctx.save_for_backward(hidden, weight, highest)
        ctx.trace = trace
        return (highest - target).sum()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, _ = ctx.saved_tensors
        width, height = slice_shape(hidden.shape[0], weight.shape[0])
        grad_hidden = hidden.new_empty(hidden.shape, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        grad_weight = torch.empty_like(weight) if ctx.needs_input_grad[2] else None
        with ctx.trace.kind(LOGITS):
            several = height < hidden.shape[0]
            grad = _logits(hidden, weight, width, height).to(hidden.dtype)
            if grad_hidden is not None:
                product = hidden.new_empty((height, hidden.shape[1]))
                if hidden.dtype != torch.float32:
                    pass  # added to the float32 sum without a copy
                del product
            if grad_weight is not None:
                # the sum over slices of the tokens is float32, and beside it is the product of one slice
                part = hidden.new_empty((width, hidden.shape[1]), dtype=torch.float32 if several else hidden.dtype)
                product = hidden.new_empty((width, hidden.shape[1])) if several else part
                del part, product
            del grad
        return None, None if grad_hidden is None else grad_hidden.to(hidden.dtype), grad_weight


def slice_shape(num_tokens: int, vocab_size: int) -> tuple[int, int]:
    """(width, height) of the largest slice of logits: columns of the vocabulary, rows of tokens."""
    width = min(vocab_size, max(MIN_SLICE, MAX_LOGITS // max(1, num_tokens)))
    return width, max(1, min(num_tokens, MAX_LOGITS // width))


def _logits(hidden: Tensor, weight: Tensor, width: int, height: int) -> Tensor:
    """A slice of logits in float32, through the dtype of the hidden states."""
    if weight.dtype != hidden.dtype:
        weight = hidden.new_empty((width, hidden.shape[1]))
    return hidden.new_empty((height, width)).to(torch.float32)
