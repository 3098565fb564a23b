"""The fused engine: every parameter is updated, and its gradient freed, the moment the gradient is complete.

A hook on each parameter runs right after autograd has accumulated its gradient (LOMO paper, section 3.1; PyTorch calls the
technique "optimizer step in backward"). The engine keeps one step consistent: one backward pass, then one ``step()`` of each
optimizer, which closes the step. Everything that would update twice, or not at all, is refused before a weight changes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from ..log import get_logger
from ..optim import FusibleOptimizer
from ..optim.shards import is_sharded, local_part
from ..ranks import Ranks
from .block import BlockInputs, BlockRunner, Home
from .checks import check_loss, check_model, check_optimizers
from .clipping import AdaptiveClip, GradNorm, clip_coefficient
from .huge_pages import use_huge_pages
from .kept import KeptGradients
from .loss_scale import LossScale
from .passes import BackwardPass
from .sharded import form_groups, make_slots
from .slices import SliceIntake, count_edges
from .slot import mark_shared

_logger = get_logger(__name__)

_WARN_LOST_SHARE = 0.5  # of the updates, with rounding to nearest
_CHECK_LOST_EVERY = 100  # steps, and once after the tenth: reading it waits for the device


class Engine(BackwardPass):
    """Updates a model inside its backward pass. Made by :func:`lowtide.fuse`; see there for most arguments.

    Args:
        whole_batch: those of the blocks that take the whole batch at once, whatever the micro-batch.
        home: of the blocks' weights.
        block_inputs: keeps the blocks' inputs for the backward pass; None keeps them on the device.
        kept_gradients_bytes: ``clip_memory_bytes``.

    Attributes:
        step_skipped: the last backward pass updated nothing, because the loss, a gradient or their norm was not finite.
        num_skipped_steps: how often that has happened.
        step_partial: the last backward pass met a gradient that was not finite after some parameters had been updated; those
            after it were not. With exact ``clip_grad_norm`` this cannot happen: such a step is skipped.
        loss_scale: what the loss is multiplied with, or None.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[FusibleOptimizer],
        *,
        blocks: Iterable[nn.Module] = (),
        whole_batch: Collection[nn.Module] = (),
        home: Home,
        block_inputs: BlockInputs | None = None,
        micro_batch_size: int | None = None,
        clip_grad_norm: float | None = None,
        clip_grad_value: float | None = None,
        adaptive: AdaptiveClip | None = None,
        loss_scale: LossScale | None = None,
        kept_gradients_bytes: int = 0,
    ) -> None:
        check_model(model)
        check_optimizers(model, optimizers, scaled=loss_scale is not None)
        super().__init__()
        self.model, self.optimizers = model, tuple(optimizers)
        self.clip_grad_norm, self.clip_grad_value = clip_grad_norm, clip_grad_value
        self.adaptive, self.loss_scale = adaptive, loss_scale
        self._block_inputs = block_inputs
        self._waiting: set[Optimizer] = set()  # have not closed the step of the last backward pass
        self._warned_lost = self._warned_mode = self._in_huge_pages = False
        self._slots = make_slots(self, self.optimizers)
        form_groups(list(self._slots.values()), model)
        if any(is_sharded(param) for param in self._slots):
            self.ranks = Ranks()
        self._unhooked = [p for o in optimizers for g in o.param_groups for p in g["params"] if not p.requires_grad]
        self._runners = [
            BlockRunner(block, self, home, None if block in whole_batch else micro_batch_size) for block in blocks
        ]
        mark_shared(self._slots, self._runners, model)
        self._intakes: list[SliceIntake] = []
        if clip_grad_norm is not None and kept_gradients_bytes:
            self._kept = KeptGradients(self._slots.values(), kept_gradients_bytes)
        self._attach()

    # The user's side ------------------------------------------------------------------------------------------------

    def backward(self, loss: Tensor, total_norm: float | None = None) -> None:
        """Back-propagate ``loss`` and update every parameter on the way. Then call ``step()`` on each optimizer.

        With exact ``clip_grad_norm`` the graph is walked twice, first for the norm alone. A loss that is not finite, or a norm
        that is not, updates nothing: ``step_skipped`` says so, and the step is closed as usual.

        Args:
            loss: zero-dimensional, with a graph.
            total_norm: of its gradients, where :meth:`measure_norm` has measured it: exact clipping walks the graph once then.

        Raises:
            RuntimeError: the step before this one was not closed by ``optimizer.step()``, or the loss has no graph.
            ValueError: the loss is not a single number, or was scaled by a GradScaler.
        """
        check_loss(loss)
        self._refuse_second_backward()
        self._look_at_mode()
        value = float(loss.detach())
        if not self.ranks.all(math.isfinite(value)):
            self._norm = GradNorm(math.nan)
            self._skip_step(f"the loss is {value}" if self.ranks.size == 1 else "the loss is not finite on some rank")
            self._close_backward()
            return
        if self.loss_scale is not None:
            loss = loss.float() * self.loss_scale.scale
        self._count_uses(loss)
        if self._two_passes or (total_norm is not None and self.adaptive is None):
            self._measure_and_update(loss, total_norm)
        else:
            self._begin()
            self._run(loss)
            self._close_backward()
        finite = math.isfinite(self._norm.value())
        if not (finite or self.step_skipped or self.step_partial):
            self.step_partial = True  # found on the device, where the host does not look at each gradient
            _logger.warning("a gradient was not finite: what came after it in this step was not updated")
        if self.loss_scale is not None:
            self.loss_scale.update(overflow=not finite)

    def _count_uses(self, loss: Tensor) -> None:
        """Of vocabulary matrices that several modules share: see ``SliceIntake.num_edges``."""
        shared = {intake.slot.param: intake for intake in self._intakes if intake.slot.always_shared}
        if shared:
            for param, number in count_edges(loss, shared).items():
                shared[param].num_edges = number

    def measure_norm(self, loss: Tensor) -> float:
        """The 2-norm of the gradients of ``loss``. No weight changes, no step begins, and the graph is kept.

        It is what exact clipping measures, and :meth:`backward` takes it as ``total_norm``, for this loss or another with
        the same gradients. A loss that is not finite has the norm NaN. With ``clip="adaptive"`` it cannot be used.

        Args:
            loss: as for :meth:`backward`; not scaled.

        Raises:
            RuntimeError, ValueError: as in :meth:`backward`; or clipping is adaptive.
        """
        check_loss(loss)
        self._refuse_second_backward()
        self._look_at_mode()
        if self.adaptive is not None:
            raise RuntimeError("measure_norm is for exact clipping: adaptive clipping measures by itself")
        if not self.ranks.all(math.isfinite(float(loss.detach()))):
            return math.nan
        kept, self._kept = self._kept, None  # the gradients would be those of this graph, and another may follow
        try:
            return self._measure(loss if self.loss_scale is None else loss.float() * self.loss_scale.scale)
        finally:
            self._kept = kept

    def _measure_and_update(self, loss: Tensor, known: float | None) -> None:
        if known is None:
            norm = self._measure(loss)
        else:
            norm, self._norm = known, GradNorm(known)
            if self._kept is not None:
                self._kept.drop()
        if not math.isfinite(norm):
            self._skip_step(f"the gradient norm is {norm}")
        else:
            coefficient = 1.0 if self.clip_grad_norm is None else clip_coefficient(norm, self.clip_grad_norm)
            if self.adaptive is not None:
                self.adaptive.warm_up(coefficient)
            self._begin(coefficient, self._norm)
            if known is not None or self._kept is None or not self._kept.fits:
                self._run(loss)
            self._apply_kept()
        self._close_backward()

    @property
    def grad_norm(self) -> float | None:
        """2-norm of all gradients of the last backward pass; None before the first, NaN if the loss was not finite.

        It is measured before clipping, except that with both kinds of clipping, values are clamped before the norm is taken.
        """
        if self._step == 0 and not self._waiting:
            return None
        return self._norm.value()

    @property
    def lost_update_share(self) -> float | None:
        """Share of the updates of 16-bit weights, over about ten steps, that left their weight as it was; a sample.

        With rounding to nearest these are lost, and a large share says that the learning rate is too small for the dtype. With
        stochastic rounding nothing is lost on average. None where nothing was sampled (float32, compensated rounding).
        """
        shares = [share for optimizer in self.optimizers if (share := optimizer.lost_updates.share()) is not None]
        return max(shares, default=None)

    def state_dict(self) -> dict[str, Any]:
        """What the engine itself needs to go on: counts of steps, the loss scale, running norms. Plain numbers."""
        state: dict[str, Any] = {
            "num_steps": self._step,
            "num_skipped_steps": self.num_skipped_steps,
            "lost_updates": [optimizer.lost_updates.state_dict() for optimizer in self.optimizers],
        }
        if self.loss_scale is not None:
            state["loss_scale"] = self.loss_scale.state_dict()
        if self.adaptive is not None:
            state["adaptive"] = self.adaptive.state_dict(self._names())
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave; parts that this engine does not use are left out.

        Raises:
            ValueError: running norms of parameters that this model has not.
        """
        self._step, self.num_skipped_steps = state.get("num_steps", self._step), state["num_skipped_steps"]
        for slot in self._slots.values():
            slot.step = -1  # its last update may have been in a step that comes again
        self._forget_step()
        if "lost_updates" in state:
            for optimizer, sampled in zip(self.optimizers, state["lost_updates"], strict=True):
                optimizer.lost_updates.load_state_dict(sampled)
        if self.loss_scale is not None and "loss_scale" in state:
            self.loss_scale.load_state_dict(state["loss_scale"])
        if self.adaptive is not None and "adaptive" in state:
            self.adaptive.load_state_dict(state["adaptive"], self._names())

    def intake_of(self, param: Tensor, num_places: int) -> SliceIntake | None:
        """What takes the gradient of a vocabulary matrix in slices; None if it has to be whole.

        Args:
            param: the matrix.
            num_places: modules that use it.
        """
        slot = self._slots.get(param)
        if slot is None or is_sharded(param) or self._kept is not None:
            return None
        if slot.runner is not None and slot.runner.micro_batch_size is not None:
            return None  # a part of a block, whose gradients are sums over micro-batches
        if not slot.optimizer.num_slice_walks:
            return None
        if slot.runner is None and (param.dim() != 2 or not param.is_contiguous()):
            return None  # weights that move are contiguous where they are computed, and may be away now
        if slot.intake is None:
            slot.intake, slot.simple = SliceIntake(slot), False
            self._intakes.append(slot.intake)
            if num_places > 1:
                slot.shared = slot.always_shared = slot.in_own_dtype = True
        return slot.intake

    def block_of(self, module: nn.Module) -> BlockRunner | None:
        """Who runs this module, if it is a block."""
        return next((runner for runner in self._runners if runner.block is module), None)

    def _names(self) -> dict[Tensor, str]:
        return {param: name for name, param in self.model.named_parameters() if param in self._slots}

    def remove(self) -> None:
        """Take all hooks away: model and optimizers are ordinary again. Calling it twice does no harm."""
        for slot in self._slots.values():
            slot.detach()
        for runner in self._runners:
            runner.remove()
        for optimizer in self.optimizers:
            optimizer.__dict__.pop("_close_step", None)
        self._slots, self._runners, self._intakes = {}, [], []
        self.room.release()
        self.model.__dict__.pop("_lowtide_engine", None)

    def __deepcopy__(self, memo: dict[int, Any]) -> Engine:
        raise RuntimeError(
            "a fused model cannot be copied: the hooks of the copy would update the original. Copy it before fuse(), or after "
            "engine.remove()."
        )

    # Steps ----------------------------------------------------------------------------------------------------------

    @property
    def _two_passes(self) -> bool:
        return self.clip_grad_norm is not None and (self.adaptive is None or self.adaptive.warming_up)

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

    def _look_at_mode(self) -> None:
        """Blocks that ran in evaluation mode have kept their activations, and nothing of them is recomputed.

        Raises:
            RuntimeError: their weights live elsewhere, and are not those any more that the graph was made with.
        """
        runners = [runner for runner in self._runners if runner.slots]
        if not runners or any(runner.block.training or runner.calls for runner in runners):
            return
        if any(getattr(runner.home, "streamed", ()) for runner in runners):
            raise RuntimeError(
                "the loss was computed in evaluation mode, in which layers are not computed again in the backward pass, and their weights "
                "have been moved away since: call model.train(), and run the model again"
            )
        if not self._warned_mode:
            self._warned_mode = True
            _logger.warning(
                "the model is in evaluation mode, in which it keeps all activations and logits, takes no micro-batches and has no "
                "dropout: call model.train() before it is trained (transformers loads models in evaluation mode)"
            )

    def _refuse_plain_backward(self) -> None:
        self._look_at_mode()
        if self._two_passes:
            raise RuntimeError("clip_grad_norm needs two passes: call engine.backward(loss) instead of loss.backward()")
        if self.loss_scale is not None:
            raise RuntimeError("the loss must be scaled: call engine.backward(loss) instead of loss.backward()")

    def _close_step(self, optimizer: Optimizer) -> None:
        if not self._waiting and not self._open:
            return  # step() without a backward pass does nothing, as in torch
        if self._open:
            self.arrived.drop()
            for slot in self._slots.values():
                slot.drop()  # left behind by a backward pass that was broken off
        if any(param.grad is not None for param in self._unhooked):
            raise RuntimeError("a parameter was unfrozen after fuse(), so nothing updates it: fuse the model again")
        self._open = self._accumulating = False
        self._waiting.discard(optimizer)
        if isinstance(optimizer, FusibleOptimizer):
            optimizer.lost_updates.close_step()
        if not self._waiting:
            self._step += 1
            self._forget_step()
            self._use_huge_pages()
            if self._step == 10 or self._step % _CHECK_LOST_EVERY == 0:
                self._warn_lost()

    def _forget_step(self) -> None:
        self.room.release()  # after an error in the middle of a pass
        for runner in self._runners:
            runner.close_step()
        for intake in self._intakes:
            intake.close_step()

    def _use_huge_pages(self) -> None:
        """After the first step: by then weights have been written, and there is a state."""
        if self._in_huge_pages:
            return
        self._in_huge_pages = True
        states = (
            value for optimizer in self.optimizers for state in optimizer.state.values() for value in state.values()
        )
        tensors = itertools.chain(self.model.parameters(), (value for value in states if isinstance(value, Tensor)))
        use_huge_pages(local_part(tensor) for tensor in tensors)

    def _warn_lost(self) -> None:
        for optimizer in self.optimizers:
            if self._warned_lost or all(group["rounding"] != "nearest" for group in optimizer.param_groups):
                continue
            share = optimizer.lost_updates.share()
            if share is not None and share > _WARN_LOST_SHARE:
                self._warned_lost = True
                _logger.warning(
                    "%.0f %% of the updates are lost: the learning rate is too small for 16-bit weights that are rounded to "
                    "nearest. Use rounding='stochastic' or 'compensated', or a larger rate.",
                    100 * share,
                )

    def _attach(self) -> None:
        for slot in self._slots.values():
            slot.attach()
        for runner in self._runners:
            runner.install()
        for optimizer in self.optimizers:
            optimizer._close_step = self._close_step
        self.model._lowtide_engine = self  # type: ignore[assignment]
