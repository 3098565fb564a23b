"""The same kernels for bfloat16 weights on a CPU: a small C file, compiled when it is first needed, if there is a compiler.

In PyTorch an update is a dozen passes over float32 slices, about 2.4 ns an element on two cores; in one pass it is bound by memory.
The compiled file lies in lowtide's cache. Without a compiler, or with ``LOWTIDE_NATIVE=0`` in the environment, the PyTorch twins do
the same: the bits are theirs, except that norms and AdaLomo's sums of squares are added up in another order.

torch.compile does this, too, but needs the same compiler, and importing it costs a quarter of a GiB.
"""

from __future__ import annotations

import ctypes
import functools
import math
import os
import shutil
import subprocess
from typing import Any

import torch
from torch import Tensor

from ...log import get_logger
from . import launch
from .compiled import compiled

_logger = get_logger(__name__)

ROUNDING = {"nearest": 0, "stochastic": 1, "compensated": 2}
_ONE_THREAD = 2**16  # elements below which it does not pay to wake other threads

_POINTER, _SIZE, _FLOAT, _INT, _UINT32 = (
    ctypes.c_void_p,
    ctypes.c_ssize_t,
    ctypes.c_float,
    ctypes.c_int,
    ctypes.c_uint32,
)
_PREPARE = [_FLOAT] * 3
_HOW = [_UINT32, _UINT32, _INT]  # key, start, rounding
_SIGNATURES: dict[str, list[Any]] = {
    "lomo_step": [_POINTER, _POINTER, _POINTER, _SIZE, _FLOAT, _FLOAT, *_PREPARE, *_HOW, _INT, _INT, _INT],
    "lomo_rows": [*[_POINTER] * 4, _SIZE, _SIZE, _FLOAT, _FLOAT, *_PREPARE, *_HOW, _INT, _INT, _INT],
    "adalomo_step": [*[_POINTER] * 3, *[_SIZE] * 3, _POINTER, _POINTER, _FLOAT, _FLOAT, *_PREPARE, *_HOW, _INT, _INT, _INT],
    "round_into": [_POINTER, _POINTER, _POINTER, _SIZE, *_HOW, _INT],
    "sums_of_squares": [_POINTER, _SIZE, _POINTER, _INT],
    "row_and_column_sums": [_POINTER, *[_SIZE] * 3, _FLOAT, *_PREPARE, _POINTER, _POINTER, _INT, _INT, _INT],
    "weighted_row_sums": [_POINTER, *[_SIZE] * 3, _POINTER, *_PREPARE, _POINTER, _INT, _INT, _INT],
    "transpose": [_POINTER, _SIZE, _POINTER, _SIZE, _SIZE, _INT],
    "tiles_allowed": [],
}  # fmt: skip
# Of product.h, where the processor can do that.
_SIGNATURES_OF_TILES: dict[str, list[Any]] = {
    "product_room": [_SIZE],
    "product_blocks": [_SIZE] * 3,
    "product_begin": [_POINTER, _SIZE, _POINTER, *[_SIZE] * 4, _POINTER, _POINTER, _INT],
    "product_end": [_POINTER, _SIZE, _POINTER, *[_SIZE] * 3, *[_POINTER] * 3, _FLOAT, _FLOAT, *_HOW, _POINTER, _POINTER, _INT],
}  # fmt: skip
_RESULTS = {"tiles_allowed": _INT, "product_room": _SIZE, "product_blocks": _SIZE}


def available() -> bool:
    """Whether the kernels are there; the first call compiles them."""
    return _library() is not None


def takes(tensor: Tensor) -> bool:
    """Whether these kernels work on such a weight or gradient: bfloat16, contiguous, on a CPU, and they are :func:`available`."""
    return tensor.dtype == torch.bfloat16 and takes_squares(tensor)


def takes_grad(grad: Tensor) -> bool:
    """Whether they take such a gradient or value beside a weight that they take: not float16."""
    return grad.dtype in (torch.bfloat16, torch.float32)


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
    rows: Tensor | None = None,
) -> None:
    """As :func:`lowtide.optim.kernels.launch.lomo_step`, for a bfloat16 parameter on a CPU, or for some rows of one.

    Args:
        rows: int64 [r] and in order, each once: ``grad`` is [r, H], of these rows of ``param`` [V, H], and their noise is that of an update of all.
    """
    if rows is None:
        launch.check(param, grad, rounding, compensation)
    else:
        launch.check(param, param, rounding, compensation)
        _check_rows(param, grad, rows)
    factor = float(coefficient)
    if grad.numel() == 0 or math.isnan(factor):
        return
    torch.autograd.graph.increment_version(param)
    which = [param.numel()] if rows is None else [rows.data_ptr(), *grad.shape]
    call(
        "lomo_step" if rows is None else "lomo_rows", param.data_ptr(), grad.data_ptr(), pointer(compensation), *which, lr, decay,
        *_prepare(inv_scale, clip_value, factor), *_how(rounding, key, start), *_kind(grad, inv_scale, clip_value, factor),
        _num_threads(grad),
    )  # fmt: skip


def _check_rows(param: Tensor, grad: Tensor, rows: Tensor) -> None:
    assert rows.device == grad.device == param.device and takes_grad(grad)
    assert rows.dtype == torch.int64 and rows.is_contiguous() and grad.is_contiguous()
    assert grad.shape == (rows.numel(), param.shape[1])
    if rows.numel() and not 0 <= int(rows[0]) <= int(rows[-1]) < param.shape[0]:
        raise IndexError(f"rows {int(rows[0])} to {int(rows[-1])} of a matrix that has {param.shape[0]}")


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
    """As :func:`lowtide.optim.kernels.launch.adalomo_step`, for a bfloat16 parameter on a CPU."""
    launch.check(param, grad, rounding, compensation)
    factor = float(coefficient)
    if param.numel() == 0 or math.isnan(factor):
        return
    torch.autograd.graph.increment_version(param)
    if row is None:  # one row as long as the parameter
        num_rows, of_matrix, cols = 1, 1, param.numel()
    else:
        (matrices, of_matrix, cols), row = param.shape, row.contiguous()
        num_rows = matrices * of_matrix
        assert row.numel() == num_rows and row.dtype == torch.float32
    col = col.contiguous()
    assert col.numel() == num_rows // of_matrix * cols and col.dtype == torch.float32
    call(
        "adalomo_step", param.data_ptr(), grad.data_ptr(), pointer(compensation), num_rows, of_matrix, cols, pointer(row),
        col.data_ptr(), float(update_scale), 1.0 if decay is None else float(decay), *_prepare(inv_scale, clip_value, factor),
        *_how(rounding, key, start), *_kind(grad, inv_scale, clip_value, factor), _num_threads(param),
    )  # fmt: skip


def round_into(
    param: Tensor, value: Tensor, *, rounding: str, key: int = 0, start: int = 0, compensation: Tensor | None = None
) -> None:
    """As :func:`lowtide.optim.kernels.launch.round_into`, for a bfloat16 parameter on a CPU."""
    launch.check(param, value, rounding, compensation)
    assert value.dtype == torch.float32
    torch.autograd.graph.increment_version(param)
    how = _how(rounding, key, start)
    call(
        "round_into",
        param.data_ptr(),
        value.data_ptr(),
        pointer(compensation),
        param.numel(),
        *how,
        _num_threads(param),
    )


def norm(grad: Tensor) -> float:
    """The 2-norm of a tensor, see :func:`sum_of_squares`."""
    return math.sqrt(sum_of_squares(grad))


def sum_of_squares(tensor: Tensor) -> float:
    """Of a contiguous bfloat16 tensor on a CPU; partial sums are float32, and the same for any number of threads."""
    sums = torch.empty(-(-tensor.numel() // _chunk_numel()), dtype=torch.float64, device="cpu")
    call("sums_of_squares", tensor.data_ptr(), tensor.numel(), sums.data_ptr(), _num_threads(tensor))
    return sums.sum().item()


def takes_squares(grad: Tensor) -> bool:
    """Whether the two functions below take such a gradient: bfloat16 or float32, contiguous, on a CPU, and they are :func:`available`."""
    plain = type(grad) in (Tensor, torch.nn.Parameter) and grad.device.type == "cpu"
    return plain and takes_grad(grad) and grad.is_contiguous() and available()


def sums_by_row_and_column(grad: Tensor, eps: float, **prepare: Any) -> tuple[Tensor, Tensor]:
    """As :func:`lowtide.optim.squares.sums_by_row_and_column`, in float32: the same for any number of threads."""
    before, after = _around_sums(grad, **prepare)
    matrices, rows, cols = grad.shape
    by_row = grad.new_empty(matrices, rows, dtype=torch.float32)
    partial = grad.new_empty(matrices, num_row_blocks(rows), cols, dtype=torch.float32)
    call(
        "row_and_column_sums", grad.data_ptr(), *grad.shape, eps, *before, by_row.data_ptr(), partial.data_ptr(), *after
    )
    return by_row, partial.sum(dim=1)


def num_row_blocks(rows: int) -> int:
    """Into how many blocks of rows :func:`sums_by_row_and_column` cuts a matrix."""
    return -(-rows // _rows_of_block())


def weighted_sums_by_row(grad: Tensor, weights: Tensor, **prepare: Any) -> Tensor:
    """As :func:`lowtide.optim.squares.weighted_sums_by_row`, in float32: the same for any number of threads."""
    before, after = _around_sums(grad, **prepare)
    weights, by_row = weights.contiguous(), grad.new_empty(grad.shape[:2], dtype=torch.float32)
    assert weights.shape == (grad.shape[0], grad.shape[2]) and weights.dtype == torch.float32 and weights.is_cpu
    call("weighted_row_sums", grad.data_ptr(), *grad.shape, weights.data_ptr(), *before, by_row.data_ptr(), *after)
    return by_row


def _around_sums(
    grad: Tensor, inv_scale: float = 1.0, clip_value: float | None = None, coefficient: float | Tensor = 1.0
) -> tuple[tuple[float, ...], tuple[int, ...]]:
    """Arguments before and behind the results; those that come in are as for :func:`lomo_step`."""
    assert takes_squares(grad), "ask takes_squares() first"
    factor = float(coefficient)
    kind = _kind(grad, inv_scale, clip_value, factor)
    return _prepare(inv_scale, clip_value, factor), (*kind, _num_threads(grad))


def transposed(matrix: Tensor) -> Tensor:
    """A contiguous transpose of a matrix of 16-bit numbers on a CPU: [M, N] with neighbours in a row side by side, as [N, M]."""
    assert matrix.dim() == 2 and matrix.element_size() == 2 and matrix.stride(1) == 1
    out = matrix.new_empty(matrix.shape[1], matrix.shape[0])
    if out.numel():
        call("transpose", matrix.data_ptr(), matrix.stride(0), out.data_ptr(), *matrix.shape, _num_threads(matrix))
    return out


def _prepare(inv_scale: float, clip_value: float | None, factor: float) -> tuple[float, float, float]:
    return inv_scale, math.inf if clip_value is None else clip_value, factor


def _how(rounding: str, key: int, start: int) -> tuple[int, int, int]:
    return key & 0xFFFFFFFF, start & 0xFFFFFFFF, ROUNDING[rounding]


def _kind(grad: Tensor, inv_scale: float, clip_value: float | None, factor: float) -> tuple[bool, bool]:
    return grad.dtype == torch.float32, not (inv_scale == factor == 1.0 and clip_value is None)


def pointer(tensor: Tensor | None) -> int | None:
    """What C gets."""
    return None if tensor is None else tensor.data_ptr()


def _num_threads(tensor: Tensor) -> int:
    return 1 if tensor.numel() < _ONE_THREAD else torch.get_num_threads()


def call(name: str, *arguments: Any) -> Any:
    """Call a function of the compiled file; ask :func:`available` first."""
    library = _library()
    assert library is not None, "ask available() first"
    return getattr(library, name)(*arguments)


@functools.cache
def _chunk_numel() -> int:
    library = _library()
    assert library is not None
    return int(library.chunk_numel())


@functools.cache
def _rows_of_block() -> int:
    library = _library()
    assert library is not None
    return int(library.rows_of_block())


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The compiled file, or None: then a line of the log says why."""
    if os.environ.get("LOWTIDE_NATIVE", "1") == "0":
        return None
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None or os.name != "posix":
        _logger.info("no C compiler was found: updates of bfloat16 weights on the CPU run in PyTorch, which is slower")
        return None
    try:
        try:
            library = ctypes.CDLL(str(compiled(compiler)))
        except OSError:  # damaged, or made on another system: once more
            library = ctypes.CDLL(str(compiled(compiler, anew=True)))
        _declare(library, _SIGNATURES)
        if hasattr(library, "product_end"):
            _declare(library, _SIGNATURES_OF_TILES)
    except (
        OSError,
        AttributeError,
        subprocess.SubprocessError,
    ) as error:  # a compiler of any kind and state: the twins need none
        _logger.info(
            "the CPU kernels could not be made with %s (%s): updates run in PyTorch, which is slower", compiler, error
        )
        return None
    return library


def _declare(library: ctypes.CDLL, signatures: dict[str, list[Any]]) -> None:
    for name, arguments in signatures.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, _RESULTS.get(name)
