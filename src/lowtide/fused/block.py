"""The one primitive: a block is run without a graph, and run again with one when its gradient arrives.

Forward keeps only the block's input. Backward recomputes the block, micro-batch by micro-batch, and back-propagates each at
once; gradients accumulate over the whole batch while only this block's are alive ("layer-major" accumulation), and on the
last micro-batch every parameter is updated as its gradient completes. The recompute is Chen et al. 2016 (arXiv 1604.06174);
what it can leave out is in ``last_product.py``.

The block's ``forward`` is replaced on the instance, so that hooks of others (FSDP2, a user's own) stay outside.
"""

from __future__ import annotations

import inspect
import weakref
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..optim.shards import compute_device, is_sharded
from .call import Call
from .last_product import LastProduct
from .linear import LinearLayers
from .matmul16 import fast_matmuls
from .replay import keep_random_state
from .sharded import UnshardedSums

if TYPE_CHECKING:
    from .engine import Engine
    from .slot import Slot

# Arguments that hold a cache of keys and values: a recompute would append to them twice, and training needs none.
_CACHE_ARGUMENTS = ("past_key_values", "past_key_value", "layer_past", "cache_params")


class Home(Protocol):
    """Where a block's weights live; called around every use of the block."""

    def fetch(self, block: nn.Module) -> None:
        """Make the weights usable on the device they are computed on."""

    def release(self, block: nn.Module) -> None:
        """The weights were only read and are not needed for now."""

    def write_back(self, block: nn.Module) -> None:
        """The weights were updated and are not needed for now."""


class BlockInputs(Protocol):
    """Keeps the inputs of blocks between the forward and the backward pass; the two are saved-tensor hooks of autograd."""

    def pack(self, tensor: Tensor) -> Any:
        """Take a tensor in; what is returned stands for it."""

    def unpack(self, packed: Any) -> Tensor:
        """The tensor again, on its device. May be asked for twice."""


class BlockRunner:
    """Runs one block for the engine; ``install`` puts it around the block's forward.

    Args:
        block: any module; hidden states first, the batch in the first dimension of whatever belongs to a sample.
        engine: the engine that the block's parameters are fused with.
        home: where the block's weights live.
        micro_batch_size: samples per pass through the block; None for the whole batch.

    Raises:
        ValueError: the block holds a batch norm, whose statistics would depend on the micro-batch and be counted twice.
    """

    def __init__(self, block: nn.Module, engine: Engine, home: Home, micro_batch_size: int | None) -> None:
        for name, module in block.named_modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                raise ValueError(
                    f"a block cannot hold a batch norm ({name}): its statistics would be counted twice in the recompute and "
                    "depend on micro_batch_size. Leave this module out of blocks=."
                )
            if getattr(module, "batch_first", True) is False and micro_batch_size is not None:
                raise ValueError(
                    f"{name or type(block).__name__} takes the sequence in the first dimension (batch_first=False), which would be "
                    "cut instead of the batch: use batch_first=True, or micro_batch_size=None"
                )
        self.block, self.engine, self.home, self.micro_batch_size = block, engine, home, micro_batch_size
        weight = next((param for param in block.parameters() if param.dim() >= 2), None)
        self.weight = None if weight is None or compute_device(weight) != weight.device else weight
        sharded = any(is_sharded(param) for param in block.parameters())
        self.sums = UnshardedSums(block) if sharded and micro_batch_size is not None else None
        self.last_product = LastProduct(block)
        self.slots: list[Slot] = []
        self.linear_layers = LinearLayers(block, (), engine.room)  # see mark_shared
        self.calls: weakref.WeakSet[Call] = weakref.WeakSet()  # whose graph is alive
        self.original = block.forward
        self.parameters = inspect.signature(block.forward).parameters
        self._replaced: Any = None

    def install(self) -> None:
        """Replace the block's forward on the instance."""
        self._replaced = self.block.__dict__.get("forward")
        self.block.forward = self.run

    def remove(self) -> None:
        """Put the block's own forward back."""
        if self._replaced is None:
            self.block.__dict__.pop("forward", None)
        else:
            self.block.forward = self._replaced

    def close_step(self) -> None:
        """Forget what belongs to one step: graphs made before it are stale, as the weights have changed."""
        self.calls.clear()
        for slot in self.slots:
            slot.shared = slot.always_shared

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """The block's forward in training; outside training, or without gradients, the original."""
        if not (self.block.training and torch.is_grad_enabled()):
            self.home.fetch(self.block)
            try:
                with fast_matmuls(self.weight):
                    return self.original(*args, **kwargs)
            finally:
                self.home.release(self.block)
        self._refuse_checkpointing()
        if self.engine.loss_scale is None and _float16_autocast():
            raise RuntimeError(
                "float16 autocast needs loss scaling, or small gradients vanish: use fuse(..., loss_scale='dynamic'), or "
                "bfloat16 autocast"
            )
        args, kwargs = self._drop_caches(args, kwargs)
        call = Call(self, args, kwargs)
        tensors, call.tensors = call.tensors, []  # only autograd keeps them: the call lives as long as the user's loss
        if not (self.slots or any(tensor.requires_grad for tensor in tensors)):
            return call.unflatten_output(tuple(call.run_all(tensors)))
        if any(not earlier.done for earlier in self.calls):
            for slot in self.slots:
                slot.shared = True  # this block's gradients come in several parts, complete at the end of the pass
        self.calls.add(call)
        # With frozen embeddings no input of the first block requires a gradient: the anchor keeps it in the graph.
        anchor = torch.empty(0, requires_grad=True)
        with self.engine.keeping_inputs():
            return call.unflatten_output(_RunBlock.apply(call, anchor, *tensors))

    def _refuse_checkpointing(self) -> None:
        if getattr(self.block, "gradient_checkpointing", False):
            raise RuntimeError(
                "gradient checkpointing was switched on after fuse(): lowtide's blocks recompute their activations "
                "already. Call model.gradient_checkpointing_disable()."
            )

    def _drop_caches(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        kwargs = {name: None if name in _CACHE_ARGUMENTS else value for name, value in kwargs.items()}
        names = list(self.parameters)[: len(args)]
        if any(name in _CACHE_ARGUMENTS for name in names):
            args = tuple(
                None if index < len(names) and names[index] in _CACHE_ARGUMENTS else value
                for index, value in enumerate(args)
            )
        return args, kwargs


def _float16_autocast() -> bool:
    return any(
        torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16
        for device in ("cpu", "cuda")
    )


class _RunBlock(torch.autograd.Function):
    """Runs a call without a graph; its backward recomputes and updates."""

    @staticmethod
    def forward(ctx: Any, call: Call, anchor: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        outputs = call.run_all(list(tensors))
        ctx.call = call
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(output for output in outputs if not output.is_floating_point()))
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        call: Call = ctx.call
        needs_grad = ctx.needs_input_grad[2:]
        given = [grad for grad in grad_outputs if grad is not None]
        if not given:
            return (None,) * (2 + len(needs_grad))
        engine, home, block = call.runner.engine, call.runner.home, call.runner.block
        _check_backward(call)
        engine.enter_backward(given[0])
        if engine.skipping or engine.enter_block(call):
            return (None,) * (2 + len(needs_grad))
        tensors = list(ctx.saved_tensors)
        grads: list[Tensor | None] = [None] * len(tensors)
        home.fetch(block)
        try:
            with keep_random_state(call.device), engine.block_backward(call.runner), fast_matmuls(call.runner.weight):
                for number, micro_batch in enumerate(call.micro_batches):
                    more_to_come = number < len(call.micro_batches) - 1
                    engine.accumulate(more_to_come)
                    inputs = _recompute(call, number, tensors, needs_grad, grad_outputs)
                    _gather_grads(call, micro_batch, tensors, inputs, grads)
                    if more_to_come and call.runner.sums is not None:
                        call.runner.sums.add()
                for slot in call.runner.slots:
                    if not slot.shared:
                        slot.flush()  # had a gradient from an earlier micro-batch but none from the last
        finally:  # after an error, too: what has been updated is updated
            updated = not engine.measuring and not all(slot.shared for slot in call.runner.slots)
            (home.write_back if updated else home.release)(block)
        call.done = True  # also when only measured: a forward pass that follows is another graph of the same step
        return (None, None, *grads)


def _check_backward(call: Call) -> None:
    if not torch.autograd._is_checkpoint_valid():  # type: ignore[attr-defined,unused-ignore]
        raise RuntimeError(
            "torch.autograd.grad() and backward(inputs=...) would update the weights of a fused model: call engine.remove() "
            "first, or compute these gradients on a copy that is not fused"
        )
    if call.step != call.runner.engine.step_number:
        raise RuntimeError(
            "this loss was computed before the last step(), with weights that have changed since: run the model again"
        )


def _recompute(
    call: Call,
    number: int,
    tensors: list[Tensor],
    needs_grad: tuple[bool, ...],
    grad_outputs: tuple[Tensor | None, ...],
) -> list[Tensor]:
    """Run one micro-batch with a graph and back-propagate it; returns its inputs, with their gradients."""
    micro_batch = call.micro_batches[number]
    inputs = [
        tensor.detach().requires_grad_(needed)
        for tensor, needed in zip(call.slices(tensors, micro_batch), needs_grad, strict=True)
    ]

    linear_layers = call.runner.linear_layers

    def forward() -> Any:
        call.random_states[number].restore()
        with torch.enable_grad(), torch.autocast(**call.autocast), linear_layers.taken():
            return call.forward(inputs)

    output = call.runner.last_product.run(forward)
    outputs = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
    linear_layers.look_at(outputs)
    pairs = [
        (part, grad[call.rows(grad, micro_batch)])
        for part, grad in zip(outputs, grad_outputs, strict=True)
        if grad is not None and part.requires_grad
    ]
    if pairs:
        del output, outputs  # the graph must die tensor by tensor as it is walked
        parts, part_grads = zip(*pairs, strict=True)
        del pairs
        torch.autograd.backward(parts, part_grads)
    return inputs


def _gather_grads(
    call: Call,
    micro_batch: tuple[int, int],
    tensors: list[Tensor],
    inputs: list[Tensor],
    grads: list[Tensor | None],
) -> None:
    """Add the input gradients of one micro-batch to those of the whole batch."""
    for index, part in enumerate(inputs):
        if part.grad is None:
            continue
        if not call.split[index]:
            grads[index] = part.grad if grads[index] is None else grads[index].add_(part.grad)  # type: ignore[union-attr]
            continue
        whole = grads[index]
        if whole is None:
            whole = grads[index] = torch.zeros_like(tensors[index])
        whole[micro_batch[0] : micro_batch[1]] = part.grad
