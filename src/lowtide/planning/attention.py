"""A stand-in for ``scaled_dot_product_attention`` with the memory of a fused kernel.

On the meta device torch takes the path that writes all attention scores, which no device does in training when it has a
fused kernel. Such a kernel (FlashAttention, Dao et al. 2022, arXiv 2205.14135, and torch's own for the CPU) keeps queries, keys,
values, its output and one log-sum-exp a row, and its backward makes the three gradients.

Shape letters: B batch, h heads of the queries, k heads of keys and values, S positions, D width of a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor


class _FusedAttention(torch.autograd.Function):
    """query [B, h, S, D], key and value [B, k, S, D], mask [B or 1, 1 or h, S, S] or None -> [B, h, S, D]."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        batch, heads, length, _ = query.shape
        # the kernels write [B, S, h, D] and return a view, so that the heads can be joined without a copy
        output = query.new_empty((batch, length, heads, value.shape[-1])).transpose(1, 2)
        log_sum_exp = query.new_empty((batch, heads, length), dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, log_sum_exp, *(() if mask is None else (mask,)))
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value = ctx.saved_tensors[:3]
        made = (torch.empty_like(tensor.transpose(1, 2)).transpose(1, 2) for tensor in (query, key, value))
        return (*made, None)


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *args: Any, **kwargs: Any
) -> Tensor:
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.empty_like(attn_mask, dtype=query.dtype)  # torch hands its kernels numbers to add
    return _FusedAttention.apply(query, key, value, attn_mask)


@contextmanager
def fused_attention() -> Iterator[None]:
    """Inside, ``torch.nn.functional.scaled_dot_product_attention`` is the stand-in."""
    with patch("torch.nn.functional.scaled_dot_product_attention", _attention):
        yield
