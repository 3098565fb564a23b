"""The fused engine: every parameter is updated, and its gradient freed, the moment the gradient is complete.

A hook on each parameter runs right after autograd has accumulated its gradient (LOMO paper, section 3.1; PyTorch calls the
technique "optimizer step in backward"). The engine keeps one step consistent: one backward pass, then one ``step()`` of each
optimizer, which closes the step. Everything that would update twice, or not at all, is refused before a weight changes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.optim import Optimizer

from ..log import get_logger
from ..optim import FusibleOptimizer
from ..optim.base import Prepare
from .block import BlockRunner, Home
from .checks import check_loss, check_model, check_optimizers
from .clipping import Clip, GradNorm, clip_coefficient
from .slot import Slot

_logger = get_logger(__name__)


class Engine:
    """Updates a model inside its backward pass. Made by :func:`lowtide.fuse`; see there for the arguments.

    Attributes:
        step_skipped: the last backward pass updated nothing, because the loss or the gradient norm was not finite.
        num_skipped_steps: how often that has happened.
        step_partial: the last ``engine.backward`` met a gradient that was not finite, after a loss that was; weights were
            updated with it. With ``clip_grad_norm`` this cannot happen: such a step is skipped.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[FusibleOptimizer],
        *,
        blocks: Iterable[nn.Module] = (),
        home: Home,
        micro_batch_size: int | None = None,
        clip_grad_norm: float | None = None,
        clip_grad_value: float | None = None,
    ) -> None:
        check_model(model)
        check_optimizers(model, optimizers)
        self.model, self.optimizers = model, tuple(optimizers)
        self.clip_grad_norm, self.clip_grad_value = clip_grad_norm, clip_grad_value
        self.step_skipped, self.num_skipped_steps = False, 0
        self.step_partial = False
        self._norm = GradNorm()
        self._step = 0  # number of the current step; a slot remembers the last one that updated it
        self._open = False  # a backward pass is under way, or was broken off
        self._waiting: set[Optimizer] = set()  # have not closed the step of the last backward pass
        self._measuring = False  # first of two passes: collect the norm, update nothing
        self._skip = False  # drop every gradient of this pass
        self._running: BlockRunner | None = None  # the block whose nested backward passes are under way
        self._accumulating = False  # micro-batches other than the last go through it
        self._graph_task: int | None = None
        self._prepare: Prepare | None = None
        self._slots = {param: Slot(self, param, optimizer, index) for param, optimizer, index in _trainable(optimizers)}
        self._unhooked = [p for o in optimizers for g in o.param_groups for p in g["params"] if not p.requires_grad]
        self._runners = [BlockRunner(block, self, home, micro_batch_size) for block in blocks]
        self._mark_shared()
        self._attach()

    # The user's side ------------------------------------------------------------------------------------------------

    def backward(self, loss: Tensor) -> None:
        """Back-propagate ``loss`` and update every parameter on the way. Then call ``step()`` on each optimizer.

        With ``clip_grad_norm`` the graph is walked twice, first for the norm alone. A loss that is not finite, or a norm
        that is not, updates nothing: ``step_skipped`` says so, and the step is closed as usual.

        Args:
            loss: zero-dimensional, with a graph.

        Raises:
            RuntimeError: the step before this one was not closed by ``optimizer.step()``, or the loss has no graph.
            ValueError: the loss is not a single number, or was scaled by a GradScaler.
        """
        check_loss(loss)
        self._refuse_second_backward()
        value = float(loss.detach())
        if not math.isfinite(value):
            self._norm = GradNorm(math.nan)
            self._skip_step(f"the loss is {value}")
            self._close_backward()
            return
        coefficient, measured = 1.0, None
        if self.clip_grad_norm is not None:
            norm = self._measure(loss)
            if not math.isfinite(norm):
                self._skip_step(f"the gradient norm is {norm}")
                self._close_backward()
                return
            coefficient, measured = clip_coefficient(norm, self.clip_grad_norm), self._norm
        self._begin(coefficient, measured)
        self._run(loss)
        self._close_backward()
        if not math.isfinite(self._norm.value()):
            self.step_partial = True
            _logger.warning("a gradient was not finite though the loss was: weights were updated with it in this step")

    @property
    def grad_norm(self) -> float | None:
        """2-norm of all gradients of the last backward pass; None before the first, NaN if the loss was not finite.

        It is measured before clipping, except that with both kinds of clipping, values are clamped before the norm is taken.
        """
        if self._step == 0 and not self._waiting:
            return None
        return self._norm.value()

    def remove(self) -> None:
        """Take all hooks away: model and optimizers are ordinary again. Calling it twice does no harm."""
        for slot in self._slots.values():
            slot.detach()
        for runner in self._runners:
            runner.remove()
        for optimizer in self.optimizers:
            optimizer.__dict__.pop("_close_step", None)
        self._slots, self._runners = {}, []
        self.model.__dict__.pop("_lowtide_engine", None)

    def __deepcopy__(self, memo: dict[int, Any]) -> Engine:
        raise RuntimeError(
            "a fused model cannot be copied: the hooks of the copy would update the original. Copy it before fuse(), or after "
            "engine.remove()."
        )

    # One backward pass ----------------------------------------------------------------------------------------------

    def enter_backward(self, grad: Tensor | None) -> None:
        """Called at the first sign of a backward pass: by a hook or a block, with the first gradient seen."""
        if self._open:
            return
        self._refuse_second_backward()
        if self.clip_grad_norm is not None:
            raise RuntimeError("clip_grad_norm needs two passes: call engine.backward(loss) instead of loss.backward()")
        self._begin()
        self._graph_task = torch._C._current_graph_task_id()
        # Without engine.backward nobody has looked at the loss; a broken one shows in the first gradient it sends back.
        if grad is not None and not _is_finite(grad):
            self._norm = GradNorm(math.nan)
            self._skip_step("the gradient of the loss is not finite")
        Variable._execution_engine.queue_callback(self._close_backward)

    def _begin(self, coefficient: float = 1.0, measured: GradNorm | None = None) -> None:
        self._open, self._skip, self.step_skipped, self.step_partial = True, False, False, False
        self._graph_task = None
        self._norm = measured or GradNorm()
        clips = self.clip_grad_value is not None or coefficient != 1.0
        self._prepare = Clip(self.clip_grad_value, coefficient) if clips else None

    def _measure(self, loss: Tensor) -> float:
        """The first of two passes: the norm of the gradients that the second will apply. Changes no weight."""
        self._begin()
        self._measuring = True
        try:
            self._run(loss, retain_graph=True)
            self._finish_shared()
        except BaseException:
            for slot in self._slots.values():
                slot.drop()
            raise
        finally:
            self._measuring = self._open = False
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
        self._finish_shared()
        self._open, self._skip = False, False
        self._waiting = set(self.optimizers)

    @torch.no_grad()
    def _finish_shared(self) -> None:
        for slot in self._slots.values():
            slot.flush()

    def _skip_step(self, why: str) -> None:
        self._skip = self.step_skipped = True
        self.num_skipped_steps += 1
        _logger.warning("step skipped, no weight was changed: %s", why)

    def _refuse_second_backward(self) -> None:
        if self._waiting:
            names = " and ".join(sorted({type(optimizer).__name__ for optimizer in self._waiting}))
            raise RuntimeError(
                f"a second backward pass before step() of {names}: with a fused backward it would update every weight "
                "twice. Call optimizer.step() after each backward; to accumulate gradients over a larger batch, pass the "
                "whole batch to the model and set fuse(..., micro_batch_size=...)."
            )
        if self._open:
            raise RuntimeError(
                "the last backward pass was broken off by an error, so some weights are updated and some are not. Load "
                "the last checkpoint, or call optimizer.step() to go on with the weights as they are."
            )

    def _close_step(self, optimizer: Optimizer) -> None:
        if not self._waiting and not self._open:
            return  # step() without a backward pass does nothing, as in torch
        if self._open:
            for slot in self._slots.values():
                slot.drop()  # left behind by a backward pass that was broken off
        if any(param.grad is not None for param in self._unhooked):
            raise RuntimeError("a parameter was unfrozen after fuse(), so nothing updates it: fuse the model again")
        self._open = self._accumulating = False
        self._waiting.discard(optimizer)
        if not self._waiting:
            self._step += 1
            for runner in self._runners:
                runner.close_step()

    # What blocks do with it -----------------------------------------------------------------------------------------

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

    def slots_of(self, module: nn.Module) -> list[Slot]:
        """The slots of a module's trainable parameters."""
        return [self._slots[param] for param in module.parameters() if param in self._slots]

    def _mark_shared(self) -> None:
        """Find parameters that more than one place sends gradients to: they are complete at the end of the pass only."""
        seen: dict[Tensor, int] = {}
        for runner in self._runners:
            runner.slots = self.slots_of(runner.block)
            for slot in runner.slots:
                slot.runner = runner
                seen[slot.param] = seen.get(slot.param, 0) + 1
        inside = {id(module) for runner in self._runners for module in runner.block.modules()}
        for module in self.model.modules():
            if id(module) not in inside:
                seen.update({p: seen[p] + 1 for p in module.parameters(recurse=False) if p in seen})
        for param, places in seen.items():
            self._slots[param].shared = self._slots[param].always_shared = places > 1

    def _attach(self) -> None:
        for slot in self._slots.values():
            slot.attach()
        for runner in self._runners:
            runner.install()
        for optimizer in self.optimizers:
            optimizer._close_step = self._close_step
        self.model._lowtide_engine = self  # type: ignore[assignment]


def _trainable(optimizers: Sequence[FusibleOptimizer]) -> Iterable[tuple[Tensor, FusibleOptimizer, int]]:
    for optimizer in optimizers:
        for index, group in enumerate(optimizer.param_groups):
            for param in group["params"]:
                if param.requires_grad:
                    yield param, optimizer, index


def _is_finite(tensor: Tensor) -> bool:
    # Two reductions to one number each: no temporary of the tensor's size, as torch.isfinite(tensor) would make.
    return bool(torch.isfinite(tensor.amax()) & torch.isfinite(tensor.amin()))
