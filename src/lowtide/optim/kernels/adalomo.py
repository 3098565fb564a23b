"""AdaLomo's update of a 16-bit weight (arXiv 2310.10195, algorithm 1) in one pass; its twin is :class:`lowtide.AdaLomo`.

Only the last of AdaLomo's passes over the gradient is here: the moments and the root mean squares are complete.

Shapes of arguments are examples: a weight [8, 512, 1024] of L = 8 matrices of M = 512 rows and N = 1024 columns, seen as
L*M = 4096 rows. A tile is [1, 1024] there; it is [256, 4] for a convolution [65536, 3, 3].
"""

from __future__ import annotations

import triton
import triton.language as tl

from .device import prepared, read, write


@triton.jit(do_not_specialize=["key", "start"])  # see lomo_kernel
def adalomo_kernel(
    param_ptr,  # bfloat16 or float16 [4096, 1024], read and written
    grad_ptr,  # bfloat16, float16 or float32 [4096, 1024]
    row_ptr,  # float32 [4096]; or None, then rows = num_rows = 1
    col_ptr,  # float32 [8, 1024]
    compensation_ptr,  # int16 or float16 [4096, 1024], read and written; None unless ROUNDING is "compensated"
    update_scale_ptr,  # float32 []
    decay_ptr,  # float32 [] or None
    coefficient_ptr,  # float32 [], NaN skips the step; or None, then the number below counts
    num_rows,  # 4096, of all matrices
    rows,  # 512, of one matrix
    cols,  # 1024
    inv_scale,  # float32 scalar, as are the next two
    clip_value,  # infinity for none
    coefficient,
    key,  # int32 scalar
    start,  # int scalar, see write()
    ROUNDING: tl.constexpr,  # "nearest", "stochastic" or "compensated"
    BLOCK_ROWS: tl.constexpr,  # 1
    BLOCK_COLS: tl.constexpr,  # 1024
):
    """One program updates one tile; tiles side by side in a row follow each other."""
    program = tl.program_id(0).to(tl.int64)
    tiles_in_row = (cols + BLOCK_COLS - 1) // BLOCK_COLS
    row_index = (program // tiles_in_row) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    col_index = (program % tiles_in_row) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)[None, :]
    row_mask = row_index < num_rows
    mask = row_mask & (col_index < cols)
    if coefficient_ptr is not None:
        # Compared as a block, because the interpreter takes the comparison of a scalar for a number.
        coefficient = tl.broadcast_to(tl.load(coefficient_ptr), [BLOCK_ROWS, BLOCK_COLS])
        mask = mask & (coefficient == coefficient)
    position = row_index * cols + col_index
    update = prepared(tl.load(grad_ptr + position, mask=mask), inv_scale, clip_value, coefficient)
    if row_ptr is not None:
        update = update * tl.load(row_ptr + row_index, mask=row_mask)
    update = update * tl.load(col_ptr + (row_index // rows) * cols + col_index, mask=mask)
    value = read(param_ptr, compensation_ptr, position, mask, ROUNDING)
    if decay_ptr is not None:
        value = value * tl.load(decay_ptr)
    value = value - update * tl.load(update_scale_ptr)
    write(param_ptr, compensation_ptr, position, mask, value, key, start, ROUNDING)
