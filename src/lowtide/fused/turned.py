"""Gradients of weights as products whose factors lie as the processor wants them.

The gradient of a linear layer's weight is ``grad_output.T @ input``: the left factor is read down its columns. Where matrices are multiplied by tiles
(Intel's AMX) torch does that at half the speed of a left factor that lies in rows, and turning it first costs a tenth of what that saves.
Elsewhere nothing is gained.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..optim.kernels import native

_FEWEST = 2**16  # elements of the left factor below which it is not turned


def transposed_product(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """``left.T @ right`` of two matrices, [T, O] and [T, I], in their dtype: [O, I].

    Args:
        out: where to put it; None for a new tensor.
    """
    turned = left.t()
    if _is_turned(left) and type(right) is Tensor and right.dtype == left.dtype:
        turned = native.transposed(left) if native.available() else turned.contiguous()
    return torch.mm(turned, right) if out is None else torch.mm(turned, right, out=out)


def _is_turned(left: Tensor) -> bool:
    return (
        left.dtype == torch.bfloat16
        and type(left) is Tensor
        and left.device.type == "cpu"
        and left.numel() >= _FEWEST
        and left.stride(1) == 1
        and multiplies_tiles()
    )


@functools.cache
def multiplies_tiles() -> bool:
    """Whether the processor has AMX."""
    ask = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return ask is not None and bool(ask())
