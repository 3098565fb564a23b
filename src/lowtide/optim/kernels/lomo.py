"""Lomo's update of a 16-bit weight (arXiv 2306.09782, section 3.1) in one pass; its twin is :class:`lowtide.Lomo`.

Shapes of arguments are examples: a weight [4096, 1024] seen as [4194304], in 4096 blocks of 1024.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .device import prepared, read, write


# The key is another number every step: compiled for its divisibility, a kernel would be compiled again in mid-training.
@triton.jit(do_not_specialize=["key", "start"])
def lomo_kernel(
    param_ptr,  # bfloat16 or float16 [4194304], read and written
    grad_ptr,  # bfloat16, float16 or float32 [4194304]
    compensation_ptr,  # int16 or float16 [4194304], read and written; None unless ROUNDING is "compensated"
    coefficient_ptr,  # float32 [], NaN skips the step; or None, then the number below counts
    numel,  # 4194304
    lr,  # float32 scalar, as are the next four
    decay,
    inv_scale,
    clip_value,  # infinity for none
    coefficient,
    key,  # int32 scalar
    start,  # int scalar, see write()
    ROUNDING: tl.constexpr,  # "nearest", "stochastic" or "compensated"
    BLOCK: tl.constexpr,  # 1024
):
    """One program updates one block."""
    position = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = position < numel
    if coefficient_ptr is not None:
        # Compared as a block, because the interpreter takes the comparison of a scalar for a number.
        coefficient = tl.broadcast_to(tl.load(coefficient_ptr), [BLOCK])
        mask = mask & (coefficient == coefficient)
    grad = prepared(tl.load(grad_ptr + position, mask=mask), inv_scale, clip_value, coefficient)
    value = read(param_ptr, compensation_ptr, position, mask, ROUNDING) * decay
    # torch's ``add_(grad, alpha=-lr)`` is one fused multiply-add as well.
    write(param_ptr, compensation_ptr, position, mask, tl.fma(grad, -lr, value), key, start, ROUNDING)
