"""Compiles every kernel for a card without having one; a program of its own, because the interpreter must be off.

Prints one line for each: kernel, dtype, rounding, number of fused multiply-adds.
"""

import re
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lowtide.optim.kernels.adalomo import adalomo_kernel
from lowtide.optim.kernels.copy import round_kernel
from lowtide.optim.kernels.lomo import lomo_kernel

SIXTEEN_BIT = {"bf16": "i16", "fp16": "bf16"}  # dtype of the weight: dtype of its compensation
BLOCKS = {"BLOCK": 1024, "BLOCK_ROWS": 4, "BLOCK_COLS": 256}
COUNTS = {"numel": "i64", "num_rows": "i32", "rows": "i32", "cols": "i32", "key": "i32", "start": "i64"}


def compiled(kernel, dtype, rounding):
    given = {"ROUNDING": rounding, **BLOCKS}
    if rounding != "compensated":
        given["compensation_ptr"] = None
    pointers = {"param_ptr": f"*{dtype}", "grad_ptr": f"*{dtype}", "compensation_ptr": f"*{SIXTEEN_BIT[dtype]}"}
    signature, constants = {}, {}
    for name in kernel.arg_names:
        if name in given:
            signature[name], constants[name] = "constexpr", given[name]
        elif name.endswith("_ptr"):
            signature[name] = pointers.get(name, "*fp32")
        else:
            signature[name] = COUNTS.get(name, "fp32")
    target = GPUTarget("cuda", 80, 32)
    return triton.compile(ASTSource(kernel, signature, constants), target=target, options={"enable_fp_fusion": False})


def main():
    for kernel in (round_kernel, lomo_kernel, adalomo_kernel):
        for dtype in SIXTEEN_BIT:
            for rounding in ("nearest", "stochastic", "compensated"):
                assembly = compiled(kernel, dtype, rounding).asm["ptx"]
                print(kernel.__name__, dtype, rounding, len(re.findall(r"\bfma\.rn\.f32", assembly)))


if __name__ == "__main__":
    sys.exit(main())
