"""Gradients of a vocabulary matrix in slices: how they reach its slot, and what the engine does to them on the way to the rule.

The loss and the embedding do not return the gradient of the matrix to autograd; they hand the slot a :class:`SlicedGradient`. If it is the only
one, the matrix is updated at once. If there are more (tied embeddings, a loss that is computed twice), they wait for the end of the pass
and are made again there, slice by slice, and added up. With tied embeddings that is needed for few rows only: which tokens are in the batch is
known beforehand, so where the rule allows it the head's gradient updates all other rows at once, and theirs is held until the embedding's comes.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..optim.kernels import native
from ..optim.prepare import Prepare
from ..optim.sliced import Piece, SlicedGradient
from .rows import HeldRows, SumOfParts, TouchedRows

if TYPE_CHECKING:
    from ..optim.kernels.product import TiledProduct
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
        return waiting[0] if len(waiting) == 1 and total is None else SumOfParts(self.slot.param, waiting, total)

    def close_step(self) -> None:
        """Forget what belongs to one step."""
        self._uses.clear()
        self.waiting, self.held, self.num_edges = [], None, 0
        if self.slot.runner is None:
            self.slot.shared = self.slot.always_shared


def count_edges(loss: Tensor, params: Collection[Tensor]) -> dict[Tensor, int]:
    """For each parameter the edges that lead to it in the graph of ``loss``: its uses, as far as autograd knows of them."""
    return walk_graph([loss], params)[0]


def walk_graph(outputs: Iterable[Tensor], params: Collection[Tensor]) -> tuple[dict[Tensor, int], set[Any]]:
    """For each parameter the edges that lead to it in the graph of ``outputs``, and all nodes of that graph."""
    counts = dict.fromkeys(params, 0)
    seen = {output.grad_fn for output in outputs if output.grad_fn is not None}
    todo: list[Any] = list(seen)
    while todo:
        for follower, _ in todo.pop().next_functions:
            if follower is None:
                continue
            if follower.name().endswith("AccumulateGrad"):
                if follower.variable in counts:
                    counts[follower.variable] += 1
            elif follower not in seen:
                seen.add(follower)
                todo.append(follower)
    return counts, seen


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
        for rows, grad in self._walk():
            prepare = self._prepare
            if not isinstance(grad, Tensor):
                self._note_update()
                yield Piece(rows, grad, prepare)
                if not self._known:
                    engine.take_norms([grad.made_norm * engine._inv_scale])
                continue
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

    def _walk(self) -> Iterator[tuple[slice | Tensor, Tensor | TiledProduct]]:
        engine, slot = self.engine, self.slot
        assert slot.intake is not None
        is_number = self._prepare is None or self._prepare.factor is not None
        unmade = is_number and slot.optimizer.takes_products and engine.prepares_unseen and slot.intake.observer is None
        if unmade and native.takes(slot.param):
            return self.gradient.unmade_parts(self._all_rows, engine.room.scratch)
        return slot.intake.walk(self.gradient, self._all_rows)

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
