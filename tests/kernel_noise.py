"""A kernel for tests: the noise at chosen positions, which no weight in a test is long enough to reach."""

import triton
import triton.language as tl

from lowtide.optim.kernels.device import noise16


@triton.jit(do_not_specialize=["key"])
def noise_kernel(
    position_ptr,  # int64 [64]
    noise_ptr,  # int16 [64], written
    key,  # int32 scalar
    BLOCK: tl.constexpr,  # 64
):
    index = tl.arange(0, BLOCK)
    noise = noise16(tl.load(position_ptr + index), key)
    tl.store(noise_ptr + index, noise.to(tl.int16))
