"""AdaLomo for a vocabulary matrix whose gradient is made slice by slice: three walks over the slices, for the moments, for the size
of the update, and for the update itself. The arithmetic is that of ``adalomo.py``.

Shape letters: V = rows of the matrix, N = columns, r = rows of a slice.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import kernels
from .base import prepared
from .prepare import Prepare
from .rounding import slice_numel
from .sliced import Pieces
from .squares import sum_of_squares, sums_by_row_and_column, weighted_sums_by_row
from .writing import Writer


class FactoredSlices:
    """One update of one matrix.

    Args:
        param: [V, N], contiguous.
        pieces: its gradient; rows that are left out have none.
        row: float32 [V], the moment of each row; changed in place.
        col: float32 [N], the moment of each column; changed in place.
    """

    def __init__(self, param: Tensor, pieces: Pieces, row: Tensor, col: Tensor) -> None:
        self.param, self.pieces, self.row, self.col = param, pieces, row, col
        self.row_mean = row  # replaced in update_moments

    def update_moments(self, beta: float, eps: float) -> bool:
        """False if the gradient is not finite: then nothing has changed."""
        squares = torch.full_like(self.row, eps)
        col_sum, num_rows = torch.zeros_like(self.col), 0
        for rows, grad, prepare in self.pieces:
            assert isinstance(grad, Tensor)
            by_row, by_column = sums_by_row_and_column(grad.unsqueeze(0), self.row.dtype, prepare, eps)
            squares[rows] = by_row[0].div_(grad.shape[1])
            col_sum += by_column[0]
            num_rows += grad.shape[0]
        if self.pieces.broken:
            return False
        total = self.param.shape[0]
        self.row.mul_(beta).add_(squares, alpha=1.0 - beta)
        self.row_mean = self.row.mean()
        self.col.mul_(beta).add_(col_sum.add_(eps * (total - num_rows)), alpha=(1.0 - beta) / total)
        return True

    def sums_of_squares(self) -> tuple[Tensor, Tensor]:
        """(of the update, of the parameter)."""
        update_sum = torch.zeros((), dtype=self.row.dtype, device=self.row.device)
        reciprocal = self.col.reciprocal().unsqueeze(0)
        for rows, grad, prepare in self.pieces:
            assert isinstance(grad, Tensor)
            by_row = weighted_sums_by_row(grad.unsqueeze(0), reciprocal, prepare)[0]
            update_sum += by_row.mul_(self.row_mean).div_(self.row[rows]).sum()
        return update_sum, sum_of_squares(self.param.unsqueeze(0), self.row.dtype)

    def apply(self, update_scale: Tensor, decay: Tensor | None, writer: Writer | None) -> None:
        """Change the rows; ``writer`` for a 16-bit matrix."""
        row, col = (self.row / self.row_mean).rsqrt_(), self.col.rsqrt()
        for rows, grad, prepare in self.pieces:
            assert isinstance(grad, Tensor)
            target = self.param[rows]  # a view of a slice, a copy of single rows
            of_rows = None if writer is None else writer.of_rows(rows, self.param.shape[1])
            _apply(target, grad, prepare, row[rows], col, update_scale, decay, of_rows)
            if isinstance(rows, Tensor):
                self.param[rows] = target
                if of_rows is not None:
                    of_rows.put_back()


def _apply(
    param: Tensor,
    grad: Tensor,
    prepare: Prepare | None,
    row: Tensor,
    col: Tensor,
    update_scale: Tensor,
    decay: Tensor | None,
    writer: Writer | None,
) -> None:
    fast = kernels.chosen(param, grad) if writer is not None and writer.takes_kernels else None
    if writer is not None and fast is not None:
        options = {} if prepare is None else prepare.kernel_options
        matrix = param.unsqueeze(0)
        fast.adalomo_step(
            matrix,
            grad.unsqueeze(0),
            row.unsqueeze(0),
            col.unsqueeze(0),
            update_scale,
            decay,
            **options,
            **writer.kernel_options(matrix),
        )
        return
    step = max(1, slice_numel(param.device) // param.shape[1])
    for start in range(0, param.shape[0], step):
        part = param[start : start + step]
        update = prepared(grad[start : start + step], row.dtype, prepare) * row[start : start + step].unsqueeze(1)
        value = part if writer is None else writer.read(part, start * param.shape[1])
        if decay is not None:
            value.mul_(decay)
        value.sub_(update.mul_(col).mul_(update_scale))
        if writer is not None:
            writer.write(part, value, start * param.shape[1])
