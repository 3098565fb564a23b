"""The gradients of a vocabulary matrix that are more than a head's: rows that were touched, rows that are held, and sums of several.

Shape letters: V = rows (vocabulary), H = columns, r = rows of a slice, u = different rows, n = rows that are held.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..optim.base import SIXTEEN_BIT
from ..optim.sliced import SlicedGradient, rows_at_a_time


class SumOfParts(SlicedGradient):
    """Several gradients of one matrix [V, H], and a whole one.

    Args:
        param: the matrix.
        parts: that are made in slices.
        total: a whole gradient, or None.
    """

    def __init__(self, param: Tensor, parts: Sequence[SlicedGradient], total: Tensor | None) -> None:
        self.num_rows, self._parts, self._total = param.shape[0], parts, total
        self.slice_rows = min(part.slice_rows for part in parts)

    def part(self, rows: slice) -> Tensor:
        found: Tensor | None = None if self._total is None else self._total[rows].clone()
        for part in sorted(self._parts, key=lambda each: isinstance(each, TouchedRows)):
            if found is None:
                found = part.part(rows)
            else:
                if found.dtype in SIXTEEN_BIT:
                    found = found.to(torch.float32)
                if isinstance(part, TouchedRows):
                    part.add_to(found, rows)
                else:
                    found += part.part(rows)
        assert found is not None
        return found


class TouchedRows(SlicedGradient):
    """The gradient of an embedding [V, H]: rows that the batch has touched, each the sum over its tokens.

    Args:
        ids: int64 [...], which row each token took.
        grad: [..., H], the gradient of what it took.
        num_rows: V.
        padding_idx: a row that gets no gradient, or None.
    """

    def __init__(self, ids: Tensor, grad: Tensor, num_rows: int, padding_idx: int | None = None) -> None:
        self.num_rows, self.taken = num_rows, ids
        self._grad = grad.reshape(-1, grad.shape[-1])
        self.slice_rows = rows_at_a_time(num_rows, self._grad.shape[1])
        self._ids, self._order = ids.reshape(-1).to(torch.int64).sort(stable=True)
        if padding_idx is not None:
            counts = self._ids != padding_idx
            self._ids, self._order = self._ids[counts], self._order[counts]

    def part(self, rows: slice) -> Tensor:
        dtype = torch.float32 if self._grad.dtype in SIXTEEN_BIT else self._grad.dtype
        found = torch.zeros(rows.stop - rows.start, self._grad.shape[1], dtype=dtype, device=self._grad.device)
        self.add_to(found, rows)
        return found

    def add_to(self, target: Tensor, rows: slice) -> None:
        """Add the gradient of some rows to ``target`` [r, H]."""
        first, last = torch.searchsorted(
            self._ids, torch.tensor([rows.start, rows.stop], device=self._ids.device)
        ).tolist()
        if first < last:
            local = self._ids[first:last] - rows.start
            touched, sums = self._sums(local, self._order[first:last], target.dtype)
            target.index_add_(0, touched, sums)  # each row once: in no order

    def add_to_rows(self, target: Tensor, rows: Tensor) -> None:
        """Add the gradient of some rows, int64 [r] and in order, to ``target`` [r, H]; all that were touched between them are among them."""
        ends = torch.stack([rows[0], rows[-1] + 1])
        first, last = torch.searchsorted(self._ids, ends).tolist()
        if first < last:
            local = torch.searchsorted(rows, self._ids[first:last])
            touched, sums = self._sums(local, self._order[first:last], target.dtype)
            target.index_add_(0, touched, sums)

    def parts(self, all_rows: bool = True) -> Iterator[tuple[slice | Tensor, Tensor]]:
        """See :class:`SlicedGradient`: only rows that were touched, unless all are asked for."""
        if all_rows:
            yield from super().parts()
            return
        dtype = torch.float32 if self._grad.dtype in SIXTEEN_BIT else self._grad.dtype
        start, count = 0, self._ids.shape[0]
        while start < count:
            stop = min(start + self.slice_rows, count)
            if stop < count:  # not in the middle of a row's tokens, unless they fill the slice: they belong together
                row = self._ids[stop]
                begins = int(torch.searchsorted(self._ids, row))
                stop = begins if begins > start else int(torch.searchsorted(self._ids, row, right=True))
            yield self._sums(self._ids[start:stop], self._order[start:stop], dtype)
            start = stop

    def _sums(self, ids: Tensor, order: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(The rows [u], their sums [u, H]) of tokens whose ids are sorted."""
        rows, number = torch.unique_consecutive(ids, return_inverse=True)
        tokens = self._grad.index_select(0, order).to(dtype)
        # Sums in a fixed order, on a GPU, too, where index_add_ has none.
        sums = torch.ops.aten.embedding_dense_backward(tokens, number, rows.shape[0], -1, False)
        return rows, sums


class HeldRows(SlicedGradient):
    """The gradient of a head [V, H], in two walks: first all rows but some, then these alone, with what has been added to them.

    Args:
        gradient: of the head.
        ids: int64 [n], the rows that are held, in order.
        parts: what is to be added, where it is known already.
    """

    def __init__(self, gradient: SlicedGradient, ids: Tensor, parts: Sequence[TouchedRows] = ()) -> None:
        self.ids, self.num_rows, self.slice_rows = ids, gradient.num_rows, gradient.slice_rows
        self.grad: Tensor = ids.new_zeros(0)  # [n, H], once the first walk has begun
        self._gradient: SlicedGradient | None = gradient  # until the first walk is over
        self._parts = parts
        self.is_complete = False
        self.norms: list[float | Tensor] = []  # of the first walk, which count when the second comes

    def part(self, rows: slice) -> Tensor:
        raise NotImplementedError("rows that are held come together: there is no way to all of them")

    def complete(self, parts: Sequence[TouchedRows] = ()) -> None:
        """Nothing more comes than these; the next walk is over the rows that were held."""
        self.is_complete, self._parts = True, [*self._parts, *parts]

    def parts(self, all_rows: bool = True) -> Iterator[tuple[slice | Tensor, Tensor]]:
        """See :class:`SlicedGradient`. Of rows that are held the first walk gives zeros."""
        yield from self._held() if self.is_complete else self._others()

    def _others(self) -> Iterator[tuple[slice, Tensor]]:
        gradient, self._gradient = self._gradient, None
        assert gradient is not None
        starts = torch.arange(0, self.num_rows + self.slice_rows, self.slice_rows, device=self.ids.device)
        places = torch.searchsorted(self.ids, starts).tolist()
        for number, (rows, grad) in enumerate(gradient.parts()):
            assert isinstance(rows, slice)
            if number == 0:
                self.grad = grad.new_empty(self.ids.shape[0], grad.shape[1])
            first, last = places[number], places[number + 1]
            if first < last:
                local = self.ids[first:last] - rows.start
                self.grad[first:last] = grad.index_select(0, local)
                grad.index_fill_(0, local, 0.0)
            yield rows, grad

    def _held(self) -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, self.ids.shape[0], self.slice_rows):
            rows, grad = self.ids[start : start + self.slice_rows], self.grad[start : start + self.slice_rows]
            found = grad.to(torch.float32) if grad.dtype in SIXTEEN_BIT else grad.clone()
            for part in self._parts:
                part.add_to_rows(found, rows)
            yield rows, found
