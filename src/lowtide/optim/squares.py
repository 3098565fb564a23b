"""Sums of squares of a gradient that is seen as matrices, for rules whose moments are factored over rows and columns.

On a CPU one kernel makes each of them where there is a compiler, see :mod:`.kernels.native`; else PyTorch does, in slices. Sums are cut
differently there, so the last bits differ.

Shape letters: L = matrices, M = rows, N = columns.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .base import prepared
from .kernels import native
from .prepare import Prepare
from .rounding import slice_numel


def sums_by_row_and_column(
    grad: Tensor, dtype: torch.dtype, prepare: Prepare | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Sums of ``g^2 + eps``.

    Args:
        grad: [L, M, N]; it is not changed.
        dtype: what is computed in.
        prepare: what is done to the gradient first.
        eps: added to every square.

    Returns:
        over each row [L, M], and over each column [L, N], in ``dtype``.
    """
    if _by_kernel(grad, dtype, prepare):
        return native.sums_by_row_and_column(grad, eps, **({} if prepare is None else prepare.kernel_options))
    by_row = torch.empty(grad.shape[:2], dtype=dtype, device=grad.device)
    by_column = torch.zeros(grad.shape[0], grad.shape[2], dtype=dtype, device=grad.device)
    for where, part in _slices(grad, dtype, prepare):
        squared = part.square().add_(eps)
        by_row[where] = squared.sum(dim=2)
        by_column[where[0]] += squared.sum(dim=1)
    return by_row, by_column


def weighted_sums_by_row(grad: Tensor, weights: Tensor, prepare: Prepare | None) -> Tensor:
    """Sums of ``g^2 * weight of the column`` over each row.

    Args:
        grad: [L, M, N]; it is not changed.
        weights: [L, N], in the dtype that is computed in.
        prepare: what is done to the gradient first.

    Returns:
        [L, M], in the dtype of ``weights``.
    """
    if _by_kernel(grad, weights.dtype, prepare):
        return native.weighted_sums_by_row(grad, weights, **({} if prepare is None else prepare.kernel_options))
    by_row = torch.empty(grad.shape[:2], dtype=weights.dtype, device=grad.device)
    for where, part in _slices(grad, weights.dtype, prepare):
        by_row[where] = part.square().matmul(weights[where[0]].unsqueeze(-1)).squeeze(-1)
    return by_row


def sum_of_squares(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """Of all elements: a tensor without dimensions, in ``dtype``.

    Args:
        matrices: [L, M, N].
        dtype: what is computed in.
    """
    if dtype == torch.float32 and native.takes(matrices):
        return torch.tensor(native.sum_of_squares(matrices), dtype=dtype, device="cpu")
    total = torch.zeros((), dtype=dtype, device=matrices.device)
    for _, part in _slices(matrices, dtype, None):
        total += part.square().sum()
    return total


def slices_of(shape: torch.Size, device: torch.device) -> Iterator[tuple[slice, slice]]:
    """(matrices, rows) of slices in the order of the flattened tensor [L, M, N]: several whole matrices where they are small
    (experts, convolutions), else rows of one."""
    count, rows, cols = shape
    numel = slice_numel(device)
    num_rows = max(1, min(rows, numel // max(1, cols)))
    num_matrices = max(1, numel // max(1, num_rows * cols)) if num_rows >= rows else 1
    for matrix in range(0, count, num_matrices):
        for row in range(0, rows, num_rows):
            yield slice(matrix, matrix + num_matrices), slice(row, row + num_rows)


def _slices(grad: Tensor, dtype: torch.dtype, prepare: Prepare | None) -> Iterator[tuple[tuple[slice, slice], Tensor]]:
    for where in slices_of(grad.shape, grad.device):
        yield where, prepared(grad[where], dtype, prepare)


def _by_kernel(grad: Tensor, dtype: torch.dtype, prepare: Prepare | None) -> bool:
    # A coefficient that is not finite makes zeros of the gradient, which is the twin's business.
    return (
        dtype == torch.float32
        and native.takes_squares(grad)
        and (prepare is None or math.isfinite(prepare.coefficient))
    )
