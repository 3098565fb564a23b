"""Triton kernels: update and rounding of a 16-bit weight in one pass over it, instead of one pass for each operation.

On a GPU an update is bound by memory: the plain PyTorch twins in :mod:`lowtide.optim.rounding` and in the rules read and
write float32 temporaries several times, a kernel reads weight and gradient once and writes the weight once. The bits
agree with the twins, so a run may change over in the middle.

Triton is optional and imported on first use: ask :func:`wanted`, and take the twin if it says no.
"""

from .launch import adalomo_step, available, fits, lomo_step, round_into, wanted

__all__ = ["adalomo_step", "available", "fits", "lomo_step", "round_into", "wanted"]
