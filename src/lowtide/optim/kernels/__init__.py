"""Kernels: update and rounding of a 16-bit weight in one pass over it, instead of one pass for each operation.

An update is bound by memory: the plain PyTorch twins in :mod:`lowtide.optim.rounding` and in the rules read and write float32
temporaries several times, a kernel reads weight and gradient once and writes the weight once. The bits agree with the twins, so a
run may change over in the middle.

On a GPU they are Triton's (``launch.py``), on a CPU they are C (``native.py``). Both are optional: ask :func:`chosen`, and take the
twin if it gives None.
"""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from . import launch, native
from .launch import adalomo_step, available, fits, lomo_step, round_into, wanted

__all__ = ["adalomo_step", "available", "chosen", "fits", "lomo_step", "native", "round_into", "wanted"]


def chosen(param: Tensor, grad: Tensor) -> ModuleType | None:
    """What has ``lomo_step``, ``adalomo_step`` and ``round_into`` for this pair, see :mod:`.launch`; None: use PyTorch.

    Args:
        param: the parameter that is written.
        grad: its gradient, or the float32 value for ``round_into``.
    """
    if wanted(param, grad):
        return launch
    return native if native.takes(param) and native.takes_grad(grad) and fits(param, grad) else None
