"""16-bit matrix products on processors that have no instructions for them, which are most: computed in float32, slice by slice.

Without AVX-512 or AMX torch multiplies bfloat16 matrices at a fifth to a two-hundredth of its float32 speed
(``benchmarks/matmul16.py``). Inside :func:`fast_matmuls` the operands of each product are converted to float32, a bounded piece
at a time, and the result is rounded to 16 bits once, as the instructions would do it. The weights stay 16 bits wide.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_SIXTEEN_BIT = (torch.bfloat16, torch.float16)
# Float32 elements of an operand or a result alive at a time, 8 MiB: large enough that the product runs at nearly full speed.
SLICE_NUMEL = 2**21
_FEWEST_ROWS = 512  # of the operand that is held, so that the other one is not converted all too often

_aten = torch.ops.aten


def computes_16bit() -> bool:
    """Whether the CPU multiplies bfloat16 matrices at a useful speed. An x86 processor without AVX-512 does not."""
    if platform.machine().lower() not in ("x86_64", "amd64", "i386", "i686"):
        return True
    return torch.backends.cpu.get_cpu_capability().startswith(("AVX512", "AMX"))


def fast_matmuls(tensor: Tensor | None) -> AbstractContextManager[Any]:
    """Inside, products of 16-bit matrices run in float32, if ``tensor`` is where and what that is faster for.

    Args:
        tensor: one of the weights that are multiplied with; None for no change.
    """
    slow = tensor is not None and tensor.dtype in _SIXTEEN_BIT and tensor.device.type == "cpu" and not computes_16bit()
    return _Float32Products() if slow else nullcontext()


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` of two matrices, [M, K] and [K, N], in slices of float32 if they are 16-bit; the result in their dtype."""
    (num_rows, inner), num_columns = a.shape, b.shape[1]
    if a.dtype not in _SIXTEEN_BIT:
        return a @ b
    out = torch.empty(num_rows, num_columns, dtype=a.dtype)
    height, width = tile(num_rows, inner, num_columns)
    # A piece of the smaller operand is held while the other one passes.
    if num_rows <= num_columns:
        for rows in _pieces(num_rows, height):
            left = a[rows].float()
            for columns in _pieces(num_columns, width):
                out[rows, columns] = left @ b[:, columns].float()
    else:
        for columns in _pieces(num_columns, width):
            right = b[:, columns].float()
            for rows in _pieces(num_rows, height):
                out[rows, columns] = a[rows].float() @ right
    return out


def tile(num_rows: int, inner: int, num_columns: int) -> tuple[int, int]:
    """Rows and columns of the result of a product of [num_rows, inner] and [inner, num_columns] that are computed at a time."""
    short, long = sorted((num_rows, num_columns))
    held = min(short, max(_FEWEST_ROWS, SLICE_NUMEL // max(1, inner)))
    passing = min(long, max(1, SLICE_NUMEL // max(1, inner, held)))
    return (held, passing) if num_rows <= num_columns else (passing, held)


def _pieces(count: int, size: int) -> Iterator[slice]:
    return (slice(start, start + size) for start in range(0, count, max(1, size)))


def _mm(a: Tensor, b: Tensor) -> Tensor:
    return matmul(a, b)


def _addmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    # Rounded once more than in one instruction's sum, as the product is rounded before the bias is added.
    out = matmul(a, b)
    return torch.add(out if alpha == 1 else out * alpha, bias, alpha=beta)


def _in_float32(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function on float32 copies; outputs that it gives in the dtype of its inputs are rounded to 16 bits."""

    def run(*args: Any, **kwargs: Any) -> Any:
        narrow = next(arg.dtype for arg in args if isinstance(arg, Tensor) and arg.dtype in _SIXTEEN_BIT)
        wide = [arg.float() if isinstance(arg, Tensor) and arg.dtype in _SIXTEEN_BIT else arg for arg in args]
        mask = kwargs.get("attn_mask")
        if mask is not None and mask.dtype in _SIXTEEN_BIT:
            kwargs = {**kwargs, "attn_mask": mask.float()}
        found = function(*wide, **kwargs)
        if isinstance(found, Tensor):
            return found.to(narrow)
        # Attention also gives the log-sum-exp of its weights, [B, heads, S], which is float32 in any case.
        return tuple(each.to(narrow) if each.dim() == 4 else each for each in found)

    return run


def _sample_by_sample(function: Callable[..., Any]) -> Callable[..., Any]:
    """Attention in float32, one sample after the other, so that only its float32 copies are alive."""
    wide = _in_float32(function)

    def run(*args: Any, **kwargs: Any) -> Any:
        batch_size = args[0].shape[0]
        if batch_size < 2:
            return wide(*args, **kwargs)
        parts: list[tuple[Tensor, ...]] = []
        for index in range(batch_size):
            part_args = [arg[index : index + 1] if isinstance(arg, Tensor) else arg for arg in args]
            mask = kwargs.get("attn_mask")
            options = kwargs
            if mask is not None and mask.dim() == 4 and mask.shape[0] == batch_size:
                options = {**kwargs, "attn_mask": mask[index : index + 1]}
            parts.append(wide(*part_args, **options))
        return tuple(torch.cat(pieces) for pieces in zip(*parts, strict=True))

    return run


_REPLACED: dict[Any, Callable[..., Any]] = {
    _aten.mm.default: _mm,
    _aten.addmm.default: _addmm,
    _aten.bmm.default: _in_float32(_aten.bmm.default),
    _aten.baddbmm.default: _in_float32(_aten.baddbmm.default),
}
for _name in ("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention_for_cpu_backward"):
    if hasattr(_aten, _name):
        _REPLACED[getattr(_aten, _name).default] = _sample_by_sample(getattr(_aten, _name).default)


class _Float32Products(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        replacement = _REPLACED.get(func)
        if replacement is not None and any(isinstance(a, Tensor) and a.dtype in _SIXTEEN_BIT for a in args):
            return replacement(*args, **kwargs)
        return func(*args, **kwargs)
