"""Rounding of float32 values into a 16-bit weight, for rules that computed them elsewhere (:class:`lowtide.PerParameter`).

Shapes of arguments are examples: a weight [4096, 1024] seen as [4194304], in 4096 blocks of 1024.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .device import write


@triton.jit(do_not_specialize=["key", "start"])  # see lomo_kernel
def round_kernel(
    param_ptr,  # bfloat16 or float16 [4194304], written
    value_ptr,  # float32 [4194304]
    compensation_ptr,  # int16 or float16 [4194304], written; None unless ROUNDING is "compensated"
    numel,  # 4194304
    key,  # int32 scalar
    start,  # int scalar, see write()
    ROUNDING: tl.constexpr,  # "nearest", "stochastic" or "compensated"
    BLOCK: tl.constexpr,  # 1024
):
    """One program rounds one block."""
    position = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = position < numel
    value = tl.load(value_ptr + position, mask=mask)
    write(param_ptr, compensation_ptr, position, mask, value, key, start, ROUNDING)
