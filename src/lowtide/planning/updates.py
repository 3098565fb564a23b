"""What an optimizer holds: its state, and the temporaries of updating one parameter.

Formulas, because they are needed for every parameter of a large model; a test runs the real optimizers and counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from ..optim.base import SIXTEEN_BIT, compute_dtype
from ..optim.kernels import native
from ..optim.rounding import slice_numel
from .tracing import TEMPORARIES, Bytes

OPTIMIZERS = ("adalomo", "lomo", "adamw", "sgd")

# Tensors in the dtype that the rule computes in which are alive at once in an update, (float32 weights, 16-bit weights).
# adalomo: the gradient's square and the update; with 16-bit weights also the gradient and the value.
# adamw: the root of the second moment and the denominator made of it; with 16-bit weights also the value and the gradient.
# lomo, sgd: nothing; with 16-bit weights the value, and the gradient or the noise of the rounding.
_TEMPORARIES = {"adalomo": (2, 4), "lomo": (0, 2), "adamw": (2, 4), "sgd": (0, 2)}
# How often an update goes through (the gradient, the weight); the weight is written once more. The product's writing of the gradient is the product's.
# adalomo: moments, then the size of the update and of the weight, then the update.
_PASSES = {"adalomo": (3, 2), "lomo": (1, 1), "adamw": (1, 1), "sgd": (1, 1)}
# These work in slices; the others are torch's own classes, which see a whole parameter.
_SLICED = ("adalomo", "lomo")


def state_bytes(param: Tensor, optimizer: str, rounding: str | None) -> int:
    """Bytes of optimizer state that a parameter has after its first update.

    Args:
        param: any shape and floating dtype; may be on the meta device.
        optimizer: adalomo, lomo, adamw or sgd.
        rounding: as in :class:`lowtide.Lomo`.
    """
    _check(optimizer)
    itemsize = compute_dtype(param).itemsize
    compensated = param.dtype in SIXTEEN_BIT and rounding == "compensated"
    bytes_of_rounding = 2 * param.numel() if compensated else 0
    if optimizer == "adamw":
        return 2 * itemsize * param.numel() + torch.float32.itemsize + bytes_of_rounding  # and its count of steps
    if optimizer == "adalomo":
        if param.dim() < 2:
            return itemsize * param.numel() + bytes_of_rounding
        *matrices, rows, cols = param.shape
        return itemsize * torch.Size(matrices).numel() * (rows + cols) + bytes_of_rounding
    return bytes_of_rounding


def temporary_bytes(param: Tensor, optimizer: str, device: str) -> int:
    """Bytes that updating a parameter needs for a moment, beyond itself, its gradient and its state.

    Args:
        param: as for :func:`state_bytes`.
        optimizer: adalomo, lomo, adamw or sgd.
        device: "cpu", or "cuda" where slices are longer and 16-bit weights are written by a kernel without temporaries, as
            bfloat16 ones are on a CPU with a compiler.
    """
    _check(optimizer)
    sixteen_bit = param.dtype in SIXTEEN_BIT
    count = _TEMPORARIES[optimizer][sixteen_bit]
    in_kernels = device != "cpu" or (param.dtype == torch.bfloat16 and native.available())
    if in_kernels and sixteen_bit and optimizer in _SLICED:
        if device == "cpu" and optimizer == "adalomo" and param.dim() >= 2:
            *matrices, rows, cols = param.shape  # sums over rows and columns, the latter in blocks of rows first
            sums = rows + (1 + native.num_row_blocks(rows)) * cols
            return torch.Size(matrices).numel() * sums * torch.float32.itemsize
        count = 3 if optimizer == "adalomo" else 0  # the gradient, the weight and its square, for the root mean squares
    numel = min(param.numel(), slice_numel(torch.device(device))) if optimizer in _SLICED else param.numel()
    return count * numel * compute_dtype(param).itemsize


def update_traffic(param: Tensor, optimizer: str, rounding: str | None) -> int:
    """Bytes that updating a parameter reads and writes at least, if no temporary goes through memory.

    Args:
        param: as for :func:`state_bytes`.
        optimizer: adalomo, lomo, adamw or sgd.
        rounding: as for :func:`state_bytes`.
    """
    _check(optimizer)
    of_grad, of_weight = _PASSES[optimizer]
    state = 2 * state_bytes(param, optimizer, rounding)  # read, and written
    return (of_grad + of_weight + 1) * param.nbytes + state


def update_temporaries(optimizer: str, device: str) -> Callable[[Tensor], Bytes]:
    """A function from a parameter to the temporaries of its update, by kind, as the traces want it."""
    _check(optimizer)

    def of(param: Tensor) -> Bytes:
        return {TEMPORARIES: temporary_bytes(param, optimizer, device)}

    return of


def total_state_bytes(params: Iterable[Tensor], optimizer: str, rounding: str | None) -> int:
    """Bytes of optimizer state of several parameters."""
    return sum(state_bytes(param, optimizer, rounding) for param in params)


def _check(optimizer: str) -> None:
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, got {optimizer!r}")
