"""The host's side of the kernels: whether they can be used, and one function to launch each.

Nothing here imports Triton before it is needed. Nothing here waits for the device. Numbers are passed as float32, and
fused multiply-adds are off except where a kernel asks for one, because the bits must be those of the PyTorch twins.

Shape letters: L = product of all dimensions before the last two, M = rows, N = columns.
"""

from __future__ import annotations

import functools
import math
import os

import torch
from torch import Tensor

_PARAM_DTYPES = (torch.bfloat16, torch.float16)
_GRAD_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_COMPENSATION_DTYPE = {torch.bfloat16: torch.int16, torch.float16: torch.float16}

_BLOCK = 1024  # elements per program: 8 a thread with Triton's 4 warps, one 16-byte access of 16-bit numbers

_OPTIONS = {"enable_fp_fusion": False}


def available(device: torch.device) -> bool:
    """Whether the kernels run on ``device``: Triton can be imported, and it is a GPU that Triton compiles for.

    With ``TRITON_INTERPRET=1`` in the environment from the start they run everywhere, slowly: that is for tests.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        return _importable()
    return device.type == "cuda" and _importable() and _compiles_for(device)


def wanted(param: Tensor, grad: Tensor) -> bool:
    """Whether a rule should use the kernels for this pair: they run on its device, which is a GPU, and take it."""
    return param.device.type == "cuda" and available(param.device) and fits(param, grad)


def fits(param: Tensor, grad: Tensor) -> bool:
    """Whether the kernels take this pair: 16-bit contiguous parameter, contiguous gradient, same shape and device.

    Args:
        param: any tensor; subclasses (a ``DTensor``) do not fit.
        grad: its gradient, or the float32 value for :func:`round_into`.
    """
    return (
        param.dtype in _PARAM_DTYPES
        and grad.dtype in _GRAD_DTYPES
        and type(param) in (Tensor, torch.nn.Parameter)
        and type(grad) in (Tensor, torch.nn.Parameter)
        and param.shape == grad.shape
        and param.device == grad.device
        and param.is_contiguous()
        and grad.is_contiguous()
    )


def lomo_step(
    param: Tensor,
    grad: Tensor,
    *,
    lr: float,
    decay: float = 1.0,
    inv_scale: float = 1.0,
    clip_value: float | None = None,
    coefficient: float | Tensor = 1.0,
    rounding: str,
    key: int = 0,
    start: int = 0,
    compensation: Tensor | None = None,
) -> None:
    """One step of Lomo: ``p = p * decay - lr * coefficient * clamp(grad * inv_scale)``, in float32, rounded once.

    Args:
        param: bfloat16 or float16, any shape, contiguous; written in place.
        grad: bfloat16, float16 or float32, same shape, contiguous; left as it is.
        lr: learning rate.
        decay: what the weight is multiplied with first; 1.0 for no weight decay.
        inv_scale: reciprocal of the loss scale.
        clip_value: every element of the gradient is clamped to plus or minus this, or None.
        coefficient: factor from clipping by norm; a number, or a zero-dimensional float32 tensor on the same device, which
            the host does not read. NaN skips the step: nothing is written.
        rounding: ``"nearest"``, ``"stochastic"`` or ``"compensated"``.
        key: signed 32-bit key of the noise of this tensor and step, see :func:`lowtide.optim.rounding.mix_key`.
        start: place of the first element in the whole parameter, of which ``param`` may be a part.
        compensation: state of compensated rounding, same shape, contiguous, written in place; int16 for bfloat16 (lower half
            of the float32 number), float16 for float16, see :func:`lowtide.optim.rounding.compensation_like`.
    """
    check(param, grad, rounding, compensation)
    factor, factor_tensor = _coefficient(coefficient)
    if param.numel() == 0 or math.isnan(factor):
        return
    from .lomo import lomo_kernel

    torch.autograd.graph.increment_version(param)
    with torch.cuda.device_of(param):
        lomo_kernel[(_ceil_div(param.numel(), _BLOCK),)](
            param,
            grad,
            compensation,
            factor_tensor,
            param.numel(),
            float(lr),
            float(decay),
            float(inv_scale),
            math.inf if clip_value is None else float(clip_value),
            factor,
            key,
            start,
            ROUNDING=rounding,
            BLOCK=_BLOCK,
            **_OPTIONS,
        )


def adalomo_step(
    param: Tensor,
    grad: Tensor,
    row: Tensor | None,
    col: Tensor,
    update_scale: Tensor,
    decay: Tensor | None = None,
    *,
    inv_scale: float = 1.0,
    clip_value: float | None = None,
    coefficient: float | Tensor = 1.0,
    rounding: str,
    key: int = 0,
    start: int = 0,
    compensation: Tensor | None = None,
) -> None:
    """The last pass of AdaLomo: ``p = p * decay - update_scale * g * row * col``, in float32, rounded once.

    ``g`` is the gradient after ``inv_scale``, ``clip_value`` and ``coefficient``. All tensors are contiguous.

    Args:
        param: bfloat16 or float16 [L, M, N], or any shape if ``row`` is None; written in place.
        grad: bfloat16, float16 or float32, same shape; left as it is.
        row: float32 [L, M], ``rsqrt(R / mean(R))``; None for a parameter with a full second moment.
        col: float32 [L, N], ``rsqrt(C)``; or with ``row=None`` in the parameter's shape, ``rsqrt`` of its moment.
        update_scale: float32, zero-dimensional: learning rate over normalisation of the update.
        decay: float32, zero-dimensional: what the weight is multiplied with first; None for no weight decay.
        inv_scale: as in :func:`lomo_step`, and so are the rest.
    """
    check(param, grad, rounding, compensation)
    factor, factor_tensor = _coefficient(coefficient)
    if param.numel() == 0 or math.isnan(factor):
        return
    if row is None:  # one row as long as the parameter
        num_matrices, rows, cols = 1, 1, param.numel()
        assert col.shape == param.shape
    else:
        num_matrices, rows, cols = param.shape
        assert row.shape == (num_matrices, rows) and col.shape == (num_matrices, cols)
        assert row.dtype == torch.float32 and row.is_contiguous()
    assert col.dtype == torch.float32 and col.is_contiguous()
    assert update_scale.dtype == torch.float32 and (decay is None or decay.dtype == torch.float32)
    # A tile spans one row where rows are long, several where they are short (convolutions).
    block_cols = min(_BLOCK, _next_power_of_two(cols))
    block_rows = _BLOCK // block_cols
    num_programs = _ceil_div(num_matrices * rows, block_rows) * _ceil_div(cols, block_cols)
    from .adalomo import adalomo_kernel

    torch.autograd.graph.increment_version(param)
    with torch.cuda.device_of(param):
        adalomo_kernel[(num_programs,)](
            param,
            grad,
            row,
            col,
            compensation,
            update_scale,
            decay,
            factor_tensor,
            num_matrices * rows,
            rows,
            cols,
            float(inv_scale),
            math.inf if clip_value is None else float(clip_value),
            factor,
            key,
            start,
            ROUNDING=rounding,
            BLOCK_ROWS=block_rows,
            BLOCK_COLS=block_cols,
            **_OPTIONS,
        )


def round_into(
    param: Tensor, value: Tensor, *, rounding: str, key: int = 0, start: int = 0, compensation: Tensor | None = None
) -> None:
    """Write float32 values into a 16-bit parameter.

    Args:
        param: bfloat16 or float16, any shape, contiguous; written in place.
        value: float32, same shape, contiguous; left as it is.
        rounding: as in :func:`lomo_step`, and so are the rest.
    """
    check(param, value, rounding, compensation)
    assert value.dtype == torch.float32
    if param.numel() == 0:
        return
    from .copy import round_kernel

    torch.autograd.graph.increment_version(param)
    with torch.cuda.device_of(param):
        round_kernel[(_ceil_div(param.numel(), _BLOCK),)](
            param, value, compensation, param.numel(), key, start, ROUNDING=rounding, BLOCK=_BLOCK, **_OPTIONS
        )


@functools.cache
def _importable() -> bool:
    try:
        import triton  # noqa: F401
    except Exception:  # a broken installation fails in many ways, and the twins need none of it
        return False
    return True


@functools.cache
def _compiles_for(device: torch.device) -> bool:
    if not torch.cuda.is_available():
        return False
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (7, 0)


def check(param: Tensor, grad: Tensor, rounding: str, compensation: Tensor | None) -> None:
    """Arguments are what a kernel takes: it reads and writes memory by its address."""
    assert fits(param, grad), "ask fits() first"
    assert rounding in ("nearest", "stochastic", "compensated"), rounding
    if rounding == "compensated":
        assert compensation is not None and compensation.shape == param.shape and compensation.is_contiguous()
        assert compensation.dtype == _COMPENSATION_DTYPE[param.dtype]


def _coefficient(coefficient: float | Tensor) -> tuple[float, Tensor | None]:
    if isinstance(coefficient, Tensor):
        assert coefficient.dtype == torch.float32 and coefficient.dim() == 0
        return 1.0, coefficient
    return float(coefficient), None


def _ceil_div(numerator: int, denominator: int) -> int:
    return -(-numerator // denominator)


def _next_power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
