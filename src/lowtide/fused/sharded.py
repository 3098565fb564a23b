"""Parameters that FSDP2 shards, in a fused backward pass.

FSDP2 gathers a block's weights before its backward pass and scatters the sums of its gradients over the ranks behind it; then it calls the
hooks of the block's parameters, one after the other, with the rows that this rank holds. So the update of a block waits until its last
parameter has come, and what the ranks have to tell each other (norms, which also say whether all is finite, and the sums that a rule
needs) takes a few collective calls of a few numbers a block, whatever the number of its parameters and of micro-batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..optim.base import SIXTEEN_BIT, FusibleOptimizer, Update
from ..optim.prepare import Prepare
from ..optim.shards import is_sharded, like_param, local_part, sum_over_shards
from .clipping import _norm
from .slot import Slot

if TYPE_CHECKING:
    from .engine import Engine
    from .passes import BackwardPass


class ShardGroup:
    """Parameters whose gradients are scattered together.

    Attributes:
        num_params: those that are trained.
    """

    def __init__(self) -> None:
        self.num_params = 0


class ShardedSlot(Slot):
    """A trainable parameter of which this rank holds some rows. Its gradients are of these rows, and complete when they come."""

    __slots__ = ("group",)

    group: ShardGroup

    def on_grad(self, param: Tensor) -> None:
        """The hook, called by FSDP2: ``param.grad`` is the sum over all ranks and micro-batches."""
        engine, grad = self.engine, param.grad
        if grad is None:
            return
        grad, param.grad = local_part(grad), None
        if not engine._open:
            engine.enter_backward(grad)
        if engine._skip or (engine._kept is not None and self in engine._kept):
            return
        if self.shared:  # its module was called several times
            self._accumulate(grad)
        else:
            self.apply(grad)

    def apply(self, grad: Tensor) -> None:
        """The gradient waits for those of its group."""
        if not self.engine._skip:
            self.engine.arrived.add(self, grad)


class Arrived:
    """Gradients that have come and wait for the rest of their group.

    Args:
        engine: measures them, and says what is done to them.
    """

    def __init__(self, engine: BackwardPass) -> None:
        self.engine = engine
        self._entries: list[tuple[ShardedSlot, Tensor]] = []

    def add(self, slot: ShardedSlot, grad: Tensor) -> None:
        """One more; with the last of a group, or the first of another, they are used."""
        if self._entries and self._entries[0][0].group is not slot.group:
            self.flush()
        self._entries.append((slot, grad))
        if len(self._entries) == slot.group.num_params:
            self.flush()

    def drop(self) -> None:
        """Forget them."""
        self._entries = []

    def flush(self) -> None:
        """Use what is there: measure it in the first of two passes, else update."""
        entries, self._entries = self._entries, []
        engine = self.engine
        if not entries or engine.skipping:
            return
        if engine.measuring:
            for _, grad in entries:
                engine.clamp_measured(grad)
            norms = self._norms(entries)
            for (slot, grad), norm in zip(entries, norms, strict=True):
                engine.measured(slot, grad, norm)
            return
        for slot, _ in entries:
            slot.refuse_second()
        if engine._norm.is_known:
            prepares: list[Prepare | None] = [engine._prepare] * len(entries)
        else:
            prepares, norms = [], self._norms(entries)
            for (slot, _), norm in zip(entries, norms, strict=True):
                prepares.append(engine.prepare_with(slot, norm))
                if engine.skipping:
                    return
        self._update(entries, prepares)

    def _update(self, entries: Sequence[tuple[ShardedSlot, Tensor]], prepares: Sequence[Prepare | None]) -> None:
        by_optimizer: dict[FusibleOptimizer, list[Update]] = {}
        for (slot, grad), prepare in zip(entries, prepares, strict=True):
            slot.step = self.engine.step_number
            group = slot.optimizer.param_groups[slot.group_index]
            whole = like_param(slot.param, grad, slot.param.shape)
            by_optimizer.setdefault(slot.optimizer, []).append((slot.param, whole, group, prepare))
        self.engine._num_updated += len(entries)
        for optimizer, updates in by_optimizer.items():
            optimizer.update_sharded(updates)

    def _norms(self, entries: Sequence[tuple[ShardedSlot, Tensor]]) -> Sequence[float | Tensor]:
        """Of the whole gradients, the same on every rank; numbers where the host does not wait for them, else float32 tensors."""
        squares = torch.stack([_norm(grad).double().square() for _, grad in entries])
        sum_over_shards(entries[0][0].param, [squares])
        norms = squares.sqrt_().mul_(self.engine._inv_scale)
        if norms.is_cpu and self.engine._reads_norms:
            return norms.tolist()
        return list(norms.float().unbind())


def make_slots(engine: Engine, optimizers: Sequence[FusibleOptimizer]) -> dict[Tensor, Slot]:
    """A slot for every trainable parameter that the optimizers hold."""
    return {
        param: (ShardedSlot if is_sharded(param) else Slot)(engine, param, optimizer, index)
        for optimizer in optimizers
        for index, group in enumerate(optimizer.param_groups)
        for param in group["params"]
        if param.requires_grad
    }


def form_groups(slots: Sequence[Slot], model: nn.Module) -> None:
    """Tell each sharded slot which others its gradient comes with: those of the same module that FSDP2 was applied to."""
    of_param: dict[Tensor, ShardedSlot] = {slot.param: slot for slot in slots if isinstance(slot, ShardedSlot)}
    if not of_param:
        return
    from torch.distributed.fsdp import FSDPModule

    groups: dict[Any, ShardGroup] = {}

    def visit(module: nn.Module, group: ShardGroup) -> None:
        if isinstance(module, FSDPModule):
            group = groups.setdefault(module._get_fsdp_state(), ShardGroup())
        for param in module.parameters(recurse=False):
            slot = of_param.pop(param, None)
            if slot is not None:
                slot.group = group
                group.num_params += 1
        for child in module.children():
            visit(child, group)

    visit(model, ShardGroup())


class UnshardedSums:
    """Adds up the gradients of micro-batches in float32 while a block's weights are whole, where these are 16-bit.

    Without it autograd adds them up in the dtype of the weights. FSDP2 has the place for such a sum, and takes it from there when
    it scatters.

    Args:
        block: that FSDP2 was applied to, or that has nothing to be added up.
    """

    def __init__(self, block: nn.Module) -> None:
        self._params: list[Any] = []
        trained = [param for param in block.parameters() if param.requires_grad]
        if any(param.dtype in SIXTEEN_BIT for param in trained):
            from torch.distributed.fsdp import FSDPModule

            for module in block.modules():
                if isinstance(module, FSDPModule) and (group := module._get_fsdp_state()._fsdp_param_group) is not None:
                    self._params.extend(group.fsdp_params)

    def add(self) -> None:
        """Behind a micro-batch that is not the last."""
        for param in self._params:
            if param.sharded_param.requires_grad:
                param.accumulate_unsharded_grad_if_needed()
                param.to_accumulated_grad_if_needed()
