"""A slot: one trainable parameter of a fused model, with its hook and the gradient it accumulates over micro-batches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..optim import FusibleOptimizer
from ..optim.base import SIXTEEN_BIT
from ..optim.shards import is_sharded
from ..optim.sliced import SlicedGradient
from .clipping import vector_norm
from .linear import LinearLayers
from .rows import HeldRows
from .slices import PreparedPieces, SliceIntake, norm_of_parts

if TYPE_CHECKING:
    from ..optim.kernels.product import TiledProduct
    from .block import BlockRunner
    from .engine import Engine

# Looked up once: the hook runs for every parameter in every step.
_current_graph_task_id = torch._C._current_graph_task_id


class Slot:
    """One trainable parameter: its optimizer, its hook, and the gradient it accumulates over micro-batches."""

    __slots__ = (
        "always_shared",
        "engine",
        "group_index",
        "handle",
        "in_own_dtype",
        "intake",
        "optimizer",
        "param",
        "runner",
        "shared",
        "simple",
        "step",
        "total",
    )

    def __init__(self, engine: Engine, param: Tensor, optimizer: FusibleOptimizer, group_index: int) -> None:
        self.engine, self.param, self.optimizer, self.group_index = engine, param, optimizer, group_index
        self.shared = self.always_shared = False
        self.in_own_dtype = False  # few parts are added, as autograd would: the sum needs not be in float32
        self.total: Tensor | None = None  # of the micro-batches so far; float32 for 16-bit parameters
        self.step = -1
        self.runner: BlockRunner | None = None  # of the block it belongs to
        self.simple = False  # outside of blocks, used in one place, and its norm is read without waiting or rounding
        self.handle: Any = None
        self.intake: SliceIntake | None = None  # of gradients in slices

    def attach(self) -> None:
        self.handle = self.param.register_post_accumulate_grad_hook(self.on_grad)

    def detach(self) -> None:
        if self.handle is not None:
            self.handle.remove()
            self.handle = None

    def on_grad(self, param: Tensor) -> None:
        """The hook: ``param.grad`` has just been written."""
        engine = self.engine
        grad = param.grad
        # What follows does this in one piece, for models of thousands of small tensors: the same as the rest of this method
        # and `apply` where nothing is to be done but the update. Whatever is out of the ordinary goes the long way.
        if (
            engine._plain
            and self.simple
            and grad is not None
            and self.step != engine._step
            and engine._graph_task == _current_graph_task_id()
        ):
            norm = vector_norm(grad).item()
            if norm < math.inf:  # and not NaN
                param.grad = None
                engine._norm.sum_squares += norm * norm
                self.step = engine._step
                engine._num_updated += 1
                self.optimizer.update_param(param, grad, self.optimizer.param_groups[self.group_index])
                return
        if grad is None:  # a kept block sent nothing back
            return
        if not engine._open:
            try:
                engine.enter_backward(grad)
            except RuntimeError:
                param.grad = None  # or the next pass would add to it
                raise
        in_its_block = engine._running is not None and engine._running is self.runner
        if not (in_its_block or self.shared):
            self.refuse_nested()
        param.grad = None
        if engine._skip or (engine._kept is not None and self in engine._kept):
            return
        if self.shared or (in_its_block and engine._accumulating):
            self._accumulate(grad)
        elif self.total is not None:
            self._accumulate(grad)
            self.flush()
        else:
            self.apply(grad)

    @property
    def takes_borrowed(self) -> bool:
        """In the backward pass of its block: whether a gradient may come to :meth:`take_borrowed` in the place of autograd's."""
        engine = self.engine
        in_its_block = engine._running is not None and engine._running is self.runner
        if not in_its_block or self.handle is None or self.shared:
            return False
        if not torch.autograd._is_checkpoint_valid():  # type: ignore[attr-defined,unused-ignore]
            return False  # torch.autograd.grad
        return engine._kept is None and not self.optimizer.may_keep_gradients

    def take_borrowed(self, grad: Tensor) -> None:
        """What :meth:`on_grad` does, for a 16-bit gradient whose memory is used for the next one after that."""
        if self.engine._skip:
            return
        if self.engine._accumulating:
            self._accumulate(grad)  # a float32 copy
        elif self.total is not None:
            self._accumulate(grad)
            self.flush()
        else:
            self.apply(grad)

    def take_product(self, product: TiledProduct) -> bool:
        """The same for a gradient that has not been made yet; False: make it, and give it to :meth:`take_borrowed`.

        Args:
            product: the complete gradient, unless there are others to be added.
        """
        engine = self.engine
        if engine._skip or engine._accumulating or self.total is not None or not engine.prepares_unseen:
            return False
        if engine._measuring:
            engine.measured_parts(self, product.norm() * engine._inv_scale)
            return True
        self.refuse_second()
        group = self.optimizer.param_groups[self.group_index]
        norm = self.optimizer.update_by_product(self.param, product, group, engine._prepare)
        if norm is None:
            return False
        engine.take_norms([norm * engine._inv_scale])
        self.step = engine._step
        engine._num_updated += 1
        return True

    def _accumulate(self, grad: Tensor) -> None:
        if self.total is None:
            self.total = grad.to(torch.float32) if grad.dtype in SIXTEEN_BIT and not self.in_own_dtype else grad
        else:
            self.total.add_(grad)

    @property
    def pending(self) -> bool:
        """A gradient is there that has not been used."""
        return self.total is not None or self.waits_in_slices

    @property
    def waits_in_slices(self) -> bool:
        """A gradient waits that has not been made yet."""
        return self.intake is not None and bool(self.intake.waiting or self.intake.held)

    def flush(self) -> None:
        """Use the accumulated gradient, if there is one."""
        held = None if self.intake is None else self.intake.held
        if self.intake is not None and (gradient := self.intake.take_waiting(self.total)) is not None:
            self.total = None
            if held is not None:
                self.engine.take_norms(held.norms)
            self.apply_slices(gradient, again=held is not None)
            if isinstance(gradient, HeldRows) and held is None:
                gradient.complete()
                self.engine.take_norms(gradient.norms)
                self.apply_slices(gradient, again=True)
        elif self.total is not None:
            grad, self.total = self.total, None
            self.apply(grad)

    def drop(self) -> None:
        """Forget the accumulated gradient."""
        self.total = self.param.grad = None
        if self.intake is not None:
            self.intake.waiting, self.intake.held = [], None

    def apply(self, grad: Tensor) -> None:
        """The gradient is complete: measure it, and update unless this is the measuring pass."""
        engine = self.engine
        if engine._skip:
            return
        if engine._measuring:
            engine.measure(self, grad)
            return
        self.refuse_second()
        prepare = engine.prepare(self, grad)
        if engine._skip:
            return
        self.step = engine._step
        engine._num_updated += 1
        self.optimizer.update_param(self.param, grad, self.optimizer.param_groups[self.group_index], prepare)

    def apply_slices(self, gradient: SlicedGradient, again: bool = False) -> None:
        """The same for a gradient that is made slice by slice.

        Args:
            gradient: all of it, or all but some rows.
            again: of the rows that were left out then.
        """
        engine = self.engine
        if engine._skip:
            return
        if engine._measuring:
            norm = norm_of_parts(self, gradient)
            if isinstance(gradient, HeldRows) and not gradient.is_complete:
                gradient.norms.append(norm)
            else:
                engine.measured_parts(self, norm)
            return
        if not again:
            self.refuse_second()
        pieces = PreparedPieces(engine, self, gradient, again)
        if not pieces.broken:
            self.optimizer.update_slices(self.param, pieces, self.optimizer.param_groups[self.group_index])

    def refuse_second(self) -> None:
        """A parameter is updated once in a step.

        Raises:
            RuntimeError: it has been updated in this one.
        """
        if self.step == self.engine._step:
            raise RuntimeError(
                "a parameter got a second gradient in one backward pass, after its update. Either the loss uses weights of a "
                "block directly (a regulariser): use fuse(..., blocks=[]), or vocabulary_slices=False if they are the head's or the embedding's. Or its module is used several times under "
                "reentrant checkpointing: use use_reentrant=False."
            )

    def refuse_nested(self) -> None:
        """Outside of its block a gradient must come from the pass that the engine has seen begin.

        Raises:
            RuntimeError: it comes from another.
        """
        if self.engine._graph_task in (None, _current_graph_task_id()):
            return
        self.param.grad = None
        raise RuntimeError(
            "a gradient arrived from a nested backward pass: reentrant checkpointing does not work with a fused "
            "backward (shared modules would be updated with part of their gradient). Use use_reentrant=False, or "
            "switch checkpointing off: lowtide's blocks recompute their activations already."
        )


def mark_shared(slots: dict[Tensor, Slot], runners: Sequence[BlockRunner], model: nn.Module) -> None:
    """Find parameters that more than one place sends gradients to: they are complete at the end of the pass only."""
    seen: dict[Tensor, int] = {}
    for runner in runners:
        runner.slots = [slots[param] for param in runner.block.parameters() if param in slots]
        for slot in runner.slots:
            slot.runner = runner
            seen[slot.param] = seen.get(slot.param, 0) + 1
        runner.linear_layers = LinearLayers(runner.block, runner.slots, runner.engine.room)
    inside = {id(module) for runner in runners for module in runner.block.modules()}
    for module in model.modules():
        if id(module) not in inside:
            seen.update({p: seen[p] + 1 for p in module.parameters(recurse=False) if p in seen})
    in_micro_batches = {slot for runner in runners if runner.micro_batch_size is not None for slot in runner.slots}
    for param, places in seen.items():
        slot = slots[param]
        slot.shared = slot.always_shared = places > 1
        slot.in_own_dtype = slot.always_shared and slot not in in_micro_batches
    for slot in slots.values():
        slot.simple = (
            not (slot.shared or is_sharded(slot.param))
            and slot.runner is None
            and slot.param.is_cpu
            and slot.param.dtype not in SIXTEEN_BIT
        )
