"""Gradients of a vocabulary matrix in slices: how they reach its slot, and what the engine does to them on the way to the rule.

The loss and the embedding do not return the gradient of the matrix to autograd; they hand the slot a :class:`SlicedGradient`. If it is the only
one, the matrix is updated at once. If there are more (tied embeddings, a loss that is computed twice), they wait for the end of the pass
and are made again there, slice by slice, and added up. With tied embeddings that is needed for few rows only: which tokens are in the batch is
known beforehand, so where the rule allows it the head's gradient updates all other rows at once, and theirs is held until the embedding's comes.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..optim.base import SIXTEEN_BIT
from ..optim.prepare import Prepare
from ..optim.sliced import Piece, SlicedGradient, rows_at_a_time

if TYPE_CHECKING:
    from .passes import BackwardPass
    from .slot import Slot

# Rows of a tied matrix are held for the embedding's gradient if they are at most one in so many.
_HELD_SHARE = 8


def can_be_held(num_touched: int, num_rows: int) -> bool:
    """Whether the batch touches so few rows of a tied matrix that their gradient is held, and the others are updated at once."""
    return _HELD_SHARE * num_touched <= num_rows


class Use:
    """One use of the matrix in a graph; the graph holds it.

    Args:
        step: number of the step.
        ids: the rows that an embedding has taken, int [...]; None for a head, which takes all.
    """

    done = False

    def __init__(self, step: int, ids: Tensor | None = None) -> None:
        self.step, self.ids = step, ids


class SliceIntake:
    """Takes the gradients of one matrix, and tells whether there will be several in a pass.

    Args:
        slot: the matrix.
    """

    def __init__(self, slot: Slot) -> None:
        self.slot = slot
        self.waiting: list[SlicedGradient] = []  # for the end of the pass
        self.held: HeldRows | None = None  # for the end of the pass; the other rows have had theirs
        self.num_edges = 0  # of the graph that is walked, to this matrix; 0 if nobody has looked
        self.observer: Callable[[Tensor], None] | None = None  # sees every slice that is made
        self._uses: weakref.WeakSet[Use] = weakref.WeakSet()

    def begin(self, weight: Tensor, ids: Tensor | None = None) -> Use:
        """In a forward pass with gradients: the matrix is used. Keep what is returned with the graph.

        Args:
            weight: the matrix.
            ids: see :class:`Use`.

        Raises:
            RuntimeError: it is another than when the model was fused.
        """
        if weight is not self.slot.param:
            raise RuntimeError(
                "the embedding or the head was replaced after fuse() (resize_token_embeddings?), so nothing would update it: fuse "
                "the model again"
            )
        if any(not use.done for use in self._uses):
            self.slot.shared = True  # several graphs, perhaps of one loss: complete at the end of the pass
        use = Use(self.slot.engine.step_number, ids)
        self._uses.add(use)
        return use

    def take(self, use: Use, gradient: SlicedGradient, sign: Tensor) -> bool:
        """In the backward pass: the gradient of one use. False if autograd has to return it as a whole, to somebody else.

        Args:
            use: from :meth:`begin`.
            gradient: whatever it holds must stay as it is until the end of the pass.
            sign: the gradient that came in, which shows whether all is finite.
        """
        slot, engine = self.slot, self.slot.engine
        gradient.use_weight(slot.param)  # where weights move, what autograd has saved is a place where they were
        if slot.handle is None or not torch.autograd._is_checkpoint_valid():  # type: ignore[attr-defined,unused-ignore]
            return False  # the engine was removed; or torch.autograd.grad
        if use.step != engine.step_number:
            raise RuntimeError(
                "this loss was computed before the last step(), with weights that have changed since: run the model again"
            )
        if not engine._open:
            engine.enter_backward(sign)
        use.done = True
        if not slot.shared and (slot.runner is None or engine._running is not slot.runner):
            slot.refuse_nested()
        if engine.skipping:
            return True
        if slot.shared or slot.total is not None:
            ids = self._rows_that_follow(use)
            if ids is None:
                self.waiting.append(gradient)
            else:
                self.held = HeldRows(gradient, ids)
                slot.apply_slices(self.held)
        else:
            slot.apply_slices(gradient)
        return True

    def _rows_that_follow(self, use: Use) -> Tensor | None:
        """The rows, int64 [n] and in order, for which more comes, if it is a head's gradient and an embedding's alone comes after it.

        None if the gradient has to wait as a whole. Nothing else in the graph may use the matrix, which is about to change.
        """
        slot, others = self.slot, [other for other in self._uses if other is not use]
        if slot.runner is not None or self.num_edges != 2:  # weights that move are written back once
            return None
        if use.ids is not None or len(others) != 1 or others[0].ids is None or self.waiting or slot.total is not None:
            return None
        return self._rows_to_hold(others[0].ids)

    def _rows_to_hold(self, taken: Tensor) -> Tensor | None:
        """The rows, int64 [n] and in order, that an embedding took; None if rule and clipping do not allow to leave them out."""
        slot, engine = self.slot, self.slot.engine
        if slot.optimizer.num_slice_walks != 1:
            return None
        group = slot.optimizer.param_groups[slot.group_index]
        by_value = engine.clip_grad_value is not None or engine.adaptive is not None or engine.loss_scale is not None
        if by_value or slot.optimizer.needs_all_rows(group):
            return None
        ids = torch.unique(taken).to(torch.int64)
        return ids if can_be_held(ids.shape[0], slot.param.shape[0]) else None

    def walk(self, gradient: SlicedGradient, all_rows: bool) -> Iterator[tuple[slice | Tensor, Tensor]]:
        """The slices of a gradient, one after the other."""
        for rows, grad in gradient.parts(all_rows):
            if self.observer is not None:
                self.observer(grad)
            yield rows, grad

    def take_waiting(self, total: Tensor | None) -> SlicedGradient | None:
        """What has waited, added up, with a whole gradient from elsewhere; None if nothing has.

        Of :class:`HeldRows` that are not complete the second walk follows: a head's and an embedding's gradient are always walked in
        the same two parts, so that norms are the same bits wherever the weights live.
        """
        waiting, self.waiting = self.waiting, []
        held, self.held = self.held, None
        if held is not None:
            if total is None and all(isinstance(part, TouchedRows) for part in waiting):
                held.complete(waiting)  # type: ignore[arg-type]
                return held
            waiting = [TouchedRows(held.ids, held.grad, self.slot.param.shape[0]), *waiting]
        if not waiting:
            return None
        if total is None and len(waiting) == 2 and isinstance(waiting[1], TouchedRows):
            ids = self._rows_to_hold(waiting[1].taken)
            if ids is not None and not isinstance(waiting[0], TouchedRows):
                return HeldRows(waiting[0], ids, [waiting[1]])
        return waiting[0] if len(waiting) == 1 and total is None else _Sum(self.slot.param, waiting, total)

    def close_step(self) -> None:
        """Forget what belongs to one step."""
        self._uses.clear()
        self.waiting, self.held, self.num_edges = [], None, 0
        if self.slot.runner is None:
            self.slot.shared = self.slot.always_shared


def count_edges(loss: Tensor, params: Collection[Tensor]) -> dict[Tensor, int]:
    """For each parameter the edges that lead to it in the graph of ``loss``: its uses, as far as autograd knows of them."""
    counts = dict.fromkeys(params, 0)
    todo = [loss.grad_fn] if loss.grad_fn is not None else []
    seen = set(todo)
    while todo:
        for follower, _ in todo.pop().next_functions:
            variable = getattr(follower, "variable", None)
            if variable is not None:
                if variable in counts:
                    counts[variable] += 1
            elif follower is not None and follower not in seen:
                seen.add(follower)
                todo.append(follower)
    return counts


class _Sum(SlicedGradient):
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


class PreparedPieces:
    """A gradient in slices as a rule walks over it: measured, clipped, and watched for what is not finite.

    Args:
        engine: of the pass.
        slot: the matrix.
        gradient: of it.
        again: see :class:`Pieces`.
    """

    def __init__(self, engine: BackwardPass, slot: Slot, gradient: SlicedGradient, again: bool = False) -> None:
        self.engine, self.slot, self.gradient, self.again = engine, slot, gradient, again
        self.broken = False
        optimizer = slot.optimizer
        group = optimizer.param_groups[slot.group_index]
        self._walks = optimizer.num_slice_walks
        self._all_rows = optimizer.needs_all_rows(group)
        self._known = engine._norm.is_known
        self._prepare: Prepare | None = engine._prepare
        on_host = slot.param.is_cpu and engine._reads_norms
        # Where a slice that is not finite, or the norm, decides about slices that come before it.
        measured_first = (
            engine.adaptive is not None or engine.loss_scale is not None or (self._walks > 1 and not on_host)
        )
        if measured_first and not self._known:
            self._prepare = engine.prepare_with(slot, norm_of_parts(slot, gradient))
            self._known, self.broken = True, engine.skipping

    def __iter__(self) -> Iterator[Piece]:
        engine = self.engine
        assert self.slot.intake is not None
        for rows, grad in self.slot.intake.walk(self.gradient, self._all_rows):
            prepare = self._prepare
            if not self._known:
                held = self.gradient
                if isinstance(held, HeldRows) and not held.is_complete:
                    prepare = engine.prepare_later(self.slot, grad, held.norms)
                else:
                    prepare = engine.prepare(self.slot, grad)
                if engine.skipping:
                    self.broken = True
                    return
            if self._known or self._walks == 1:
                self._note_update()
            yield Piece(rows, grad, prepare)
        if self._walks > 1:
            self._known = True  # all has been looked at

    def _note_update(self) -> None:
        if self.slot.step != self.engine._step:
            self.slot.step = self.engine._step
            self.engine._num_updated += 1


def norm_of_parts(slot: Slot, gradient: SlicedGradient) -> float | Tensor:
    """2-norm of the gradient as it will be applied: a number on a host, else zero-dimensional and not read."""
    engine, squares, norms = slot.engine, 0.0, []
    assert slot.intake is not None
    for _, grad in slot.intake.walk(gradient, all_rows=False):
        if engine.measuring:
            engine.clamp_measured(grad)
        norm = engine.part_norm(grad)
        if isinstance(norm, Tensor):
            norms.append(norm)
        else:
            squares += norm * norm
    return torch.linalg.vector_norm(torch.stack(norms)) if norms else math.sqrt(squares)
