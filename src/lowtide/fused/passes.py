"""One backward pass of a fused model: what hooks and blocks ask while it is under way."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import Variable
from torch.autograd.graph import saved_tensors_hooks
from torch.optim import Optimizer

from ..log import get_logger
from ..optim.prepare import Prepare
from ..ranks import ALONE
from .clipping import AdaptiveClip, GradNorm
from .kept import KeptGradients
from .linear import GradientRoom
from .loss_scale import LossScale
from .sharded import Arrived

if TYPE_CHECKING:
    from ..optim import FusibleOptimizer
    from .block import BlockInputs, BlockRunner
    from .call import Call
    from .slot import Slot

_logger = get_logger(__name__)


class BackwardPass:
    """The engine's state during a pass. Abstract: :class:`Engine` says when a pass may begin, and closes the step."""

    optimizers: tuple[FusibleOptimizer, ...]
    clip_grad_norm: float | None
    clip_grad_value: float | None
    adaptive: AdaptiveClip | None
    loss_scale: LossScale | None
    _block_inputs: BlockInputs | None
    _slots: dict[Tensor, Slot]
    _waiting: set[Optimizer]

    def __init__(self) -> None:
        self.step_skipped, self.num_skipped_steps = False, 0
        self.step_partial = False
        self._norm = GradNorm()
        self._step = 0  # number of the current step; a slot remembers the last one that updated it
        self._open = False  # a backward pass is under way, or was broken off
        self._measuring = False  # first of two passes: collect the norm, update nothing
        self._skip = False  # drop every gradient of this pass
        self._plain = False  # nothing is done to the gradients of this pass but to look at their norm: see Slot.on_grad
        self._num_updated = 0  # parameters, in this pass
        self._running: BlockRunner | None = None  # the block whose nested backward passes are under way
        self._accumulating = False  # micro-batches other than the last go through it
        self._graph_task: int | None = None
        self._prepare: Prepare | None = None
        self._kept: KeptGradients | None = None
        # Gradients on an accelerator are not looked at one by one, which would make the host wait: a flag on each device
        # remembers that one was not finite, and turns the updates that follow into nothing.
        self._broken: dict[torch.device, Tensor] = {}
        self.ranks = ALONE  # that take part; the engine knows
        self.room = GradientRoom()  # for gradients of blocks, one at a time
        self.arrived = Arrived(self)  # sharded gradients that wait for others
        self._reads_norms = True  # where the host has not to wait for them; tests take the accelerator's path on a CPU

    def _refuse_second_backward(self) -> None:
        raise NotImplementedError

    def _refuse_plain_backward(self) -> None:
        raise NotImplementedError

    # The course of a pass -------------------------------------------------------------------------------------------

    def enter_backward(self, grad: Tensor | None) -> None:
        """Called at the first sign of a backward pass: by a hook or a block, with the first gradient seen."""
        if self._open:
            return
        self._refuse_second_backward()
        self._refuse_plain_backward()
        self._begin()
        self._graph_task = torch._C._current_graph_task_id()
        # Without engine.backward nobody has looked at the loss; a broken one shows in the first gradient it sends back.
        if grad is not None and not self.ranks.all(_is_finite(grad)):
            self._norm = GradNorm(math.nan)
            self._skip_step("the gradient of the loss is not finite")
        Variable._execution_engine.queue_callback(self._close_backward)

    @property
    def _inv_scale(self) -> float:
        return 1.0 if self.loss_scale is None else 1.0 / self.loss_scale.scale

    def _begin(self, coefficient: float = 1.0, measured: GradNorm | None = None) -> None:
        self._open, self._skip, self.step_skipped, self.step_partial = True, False, False, False
        self._graph_task, self._num_updated, self._broken = None, 0, {}
        self._norm = measured or GradNorm(inv_scale=self._inv_scale)
        nothing = self.clip_grad_value is None and coefficient == self._inv_scale == 1.0
        self._prepare = None if nothing else Prepare(self._inv_scale, self.clip_grad_value, coefficient)
        self._plain = nothing and measured is None and self.adaptive is None and self._reads_norms

    def _measure(self, loss: Tensor) -> float:
        """The first of two passes: the norm of the gradients that the second will apply. Changes no weight."""
        self._begin()
        self._measuring, self._plain = True, False
        if self._kept is not None:
            self._kept.begin()
        try:
            # Where every gradient is kept there is no second pass, and no need of the graph.
            self._run(loss, retain_graph=self._kept is None or not self._kept.fits)
            self._finish_shared()
        except BaseException:
            self._drop_all()
            raise
        finally:
            self._measuring = self._open = False
            self.room.release()
        if not math.isfinite(self._norm.value()):
            self._drop_all()
        return self._norm.value()

    def _run(self, loss: Tensor, retain_graph: bool = False) -> None:
        handle = loss.register_hook(self._note_graph_task)
        try:
            loss.backward(retain_graph=retain_graph)
        finally:
            handle.remove()

    def _note_graph_task(self, grad: Tensor) -> None:
        self._graph_task = torch._C._current_graph_task_id()

    def _close_backward(self) -> None:
        self.room.release()
        self._finish_shared()
        self.room.release()
        self._open = self._skip = self._plain = False
        self._waiting = set(self.optimizers)

    @torch.no_grad()
    def _finish_shared(self) -> None:
        """Use the gradients that were complete at the end of the pass only."""
        by_runner: dict[BlockRunner | None, list[Slot]] = {}
        for slot in self._slots.values():
            if slot.pending:
                by_runner.setdefault(slot.runner, []).append(slot)
        for runner, slots in by_runner.items():
            with self._weights_at_hand(runner, reads=any(slot.waits_in_slices for slot in slots)):
                for slot in slots:
                    slot.flush()
        self.arrived.flush()

    @torch.no_grad()
    def _apply_kept(self) -> None:
        if self._kept is None:
            return
        for runner, grads in itertools.groupby(self._kept.take_all(), key=lambda entry: entry[0].runner):
            with self._weights_at_hand(runner):
                for slot, grad in grads:
                    slot.apply(grad)
                    del grad  # before the next is handed out
        self.arrived.flush()

    @contextmanager
    def _weights_at_hand(self, runner: BlockRunner | None, reads: bool = False) -> Iterator[None]:
        """Around updates of a block's parameters outside of its own backward pass; ``reads``: gradients are made with them, too."""
        if runner is None or self._skip or (self._measuring and not reads):
            yield
            return
        runner.home.fetch(runner.block)
        try:
            yield
        finally:
            (runner.home.release if self._measuring else runner.home.write_back)(runner.block)

    def _drop_all(self) -> None:
        for slot in self._slots.values():
            slot.drop()
        self.arrived.drop()
        if self._kept is not None:
            self._kept.drop()
        if self.adaptive is not None:
            self.adaptive.forget_measured()

    def _skip_step(self, why: str) -> None:
        self._skip = self.step_skipped = True
        self._plain = self.step_partial = False
        self.num_skipped_steps += 1
        # An overflow is how a dynamic loss scale finds its level: nothing to warn of.
        tell = _logger.warning if self.loss_scale is None else _logger.info
        tell("step skipped, no weight was changed: %s", why)

    # What a slot asks -----------------------------------------------------------------------------------------------

    def measure(self, slot: Slot, grad: Tensor) -> None:
        """A complete gradient in the first of two passes."""
        self.clamp_measured(grad)
        self._note_measured(
            slot, grad, self._norm.read(grad) if grad.is_cpu and self._reads_norms else self._norm.add(grad)
        )

    def measured(self, slot: Slot, grad: Tensor, norm: float | Tensor) -> None:
        """The same where its norm is known, after :meth:`clamp_measured`: a number, or zero-dimensional on the device."""
        self._norm.take(norm)
        self._note_measured(slot, grad, norm)

    def measured_parts(self, slot: Slot, norm: float | Tensor) -> None:
        """The same for a gradient in slices, which is not kept."""
        self._norm.take(norm)
        if self.adaptive is not None:
            self.adaptive.measured(slot.param, norm)

    def part_norm(self, grad: Tensor) -> float | Tensor:
        """The 2-norm of a slice of a gradient, without the loss scale; not read where that would mean to wait."""
        on_host = grad.is_cpu and self._reads_norms
        return self._norm.read(grad, add=False) if on_host else self._norm.add(grad, add=False)

    def clamp_measured(self, grad: Tensor) -> None:
        """The norm is that of what will be applied."""
        if self.clip_grad_value is not None:
            limit = min(self.clip_grad_value / self._inv_scale, torch.finfo(grad.dtype).max)
            grad.clamp_(-limit, limit)

    def _note_measured(self, slot: Slot, grad: Tensor, norm: float | Tensor) -> None:
        if self.adaptive is not None:
            self.adaptive.measured(slot.param, norm)
        if self._kept is not None:
            self._kept.measured(slot, grad)

    def prepare(self, slot: Slot, grad: Tensor) -> Prepare | None:
        """What to do to a complete gradient before its update. May find that there must be none: see ``skipping``."""
        if self._norm.is_known:  # the second pass
            return self._prepare
        if not (grad.is_cpu and self._reads_norms):
            return self._prepare_on_device(slot, self._norm.add(grad))
        return self._prepare_on_host(slot, self._norm.read(grad))

    @property
    def prepares_unseen(self) -> bool:
        """Whether what is done to a gradient, if it is finite, does not depend on it, so that it can be applied while it is made."""
        if self._measuring:
            return self.adaptive is None and self.clip_grad_value is None
        return self._norm.is_known or (self.adaptive is None and self._reads_norms)

    def prepare_with(self, slot: Slot, norm: float | Tensor) -> Prepare | None:
        """The same in a single pass, where the norm of the gradient is known: a number, or zero-dimensional on the device."""
        self._norm.take(norm)
        return self._prepare_on_device(slot, norm) if isinstance(norm, Tensor) else self._prepare_on_host(slot, norm)

    def prepare_later(self, slot: Slot, grad: Tensor, norms: list[float | Tensor]) -> Prepare | None:
        """The same for a slice whose norm is put into ``norms``, for :meth:`take_norms`: sums in one order are the same bits."""
        norm = self.part_norm(grad)
        norms.append(norm)
        return self._prepare_on_device(slot, norm) if isinstance(norm, Tensor) else self._prepare_on_host(slot, norm)

    def take_norms(self, norms: list[float | Tensor]) -> None:
        """Of slices that were looked at earlier, unless the norm of this pass is known."""
        for norm in norms if not self._norm.is_known else ():
            self._norm.take(norm)

    def _prepare_on_host(self, slot: Slot, norm: float) -> Prepare | None:
        if not math.isfinite(norm):
            self._found_broken()
            return None
        if self.adaptive is None:
            return self._prepare
        return Prepare(self._inv_scale, self.clip_grad_value, self.adaptive.coefficient(slot.param, norm).item())

    def _prepare_on_device(self, slot: Slot, norm: Tensor) -> Prepare | None:
        coefficient = torch.ones_like(norm) if self.adaptive is None else self.adaptive.coefficient(slot.param, norm)
        broken = self._broken.get(norm.device)
        if broken is None:
            broken = self._broken[norm.device] = torch.zeros((), dtype=torch.bool, device=norm.device)
        broken.logical_or_(~torch.isfinite(norm))
        if slot.optimizer.must_not_see_broken and bool(broken):
            self._found_broken()
            return None
        return Prepare(self._inv_scale, self.clip_grad_value, torch.where(broken, torch.nan, coefficient))

    def _found_broken(self) -> None:
        if self._num_updated == 0:
            self._skip_step("the first gradient is not finite")
            return
        self._skip = self.step_partial = True
        self._plain = False
        _logger.warning(
            "a gradient was not finite: %d of %d parameters had been updated, the others were left alone in this step. Exact "
            "clip_grad_norm skips such a step before anything is updated.",
            self._num_updated,
            len(self._slots),
        )

    # What blocks ask ------------------------------------------------------------------------------------------------

    @property
    def step_number(self) -> int:
        """How many steps have been closed."""
        return self._step

    @property
    def skipping(self) -> bool:
        """Gradients of this pass are dropped: there is no need to compute them."""
        return self._skip

    @property
    def measuring(self) -> bool:
        """This is the first of two passes: nothing is updated, and the same graph is walked again."""
        return self._measuring

    def enter_block(self, call: Call) -> bool:
        """At the beginning of a block's backward: whether it was done in the first pass, and nothing is left to compute."""
        if self._kept is None:
            return False
        if self._measuring:
            self._kept.consider()
            call.kept = self._kept.keeping
            return False
        return call.kept

    def keeping_inputs(self) -> AbstractContextManager[Any]:
        """Around a call of a block: where autograd keeps the tensors that the block was called with."""
        kept = self._block_inputs
        return nullcontext() if kept is None else saved_tensors_hooks(kept.pack, kept.unpack)

    @contextmanager
    def block_backward(self, runner: BlockRunner) -> Iterator[None]:
        """Around the nested backward passes of one block."""
        self._running = runner
        try:
            yield
        finally:
            self._running, self._accumulating = None, False

    def accumulate(self, more_to_come: bool) -> None:
        """Whether gradients of the current block are still incomplete: micro-batches other than the last."""
        self._accumulating = more_to_come


def _is_finite(tensor: Tensor) -> bool:
    # Two reductions to one number each: no temporary of the tensor's size, as torch.isfinite(tensor) would make.
    return tensor.numel() == 0 or bool(torch.isfinite(tensor.amax()) & torch.isfinite(tensor.amin()))
