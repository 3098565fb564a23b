"""The one primitive: a block is run without a graph, and run again with one when its gradient arrives.

Forward keeps only the block's input. Backward recomputes the block, micro-batch by micro-batch, and back-propagates each at
once; gradients accumulate over the whole batch while only this block's are alive ("layer-major" accumulation), and on the
last micro-batch every parameter is updated as its gradient completes. The recompute is Chen et al. 2016 (arXiv 1604.06174).

The block's ``forward`` is replaced on the instance, so that hooks of others (FSDP2, a user's own) stay outside.

Shape letters: B = batch, the first dimension of the block's first tensor argument.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import MutableMapping, MutableSequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .replay import RandomState, autocast_state, keep_random_state

if TYPE_CHECKING:
    from .engine import Engine
    from .slot import Slot

# Arguments that hold a cache of keys and values: a recompute would append to them twice, and training needs none.
_CACHE_ARGUMENTS = ("past_key_values", "past_key_value", "layer_past", "cache_params")
# Arguments that run over positions or heads, not samples; where B happens to equal their first dimension, shapes cannot tell.
_POSITION_ARGUMENTS = ("cache_position", "alibi", "position_bias")


class Home(Protocol):
    """Where a block's weights live; called around every use of the block."""

    def fetch(self, block: nn.Module) -> None:
        """Make the weights usable on the device they are computed on."""

    def release(self, block: nn.Module) -> None:
        """The weights were only read and are not needed for now."""

    def write_back(self, block: nn.Module) -> None:
        """The weights were updated and are not needed for now."""


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
        self.slots: list[Slot] = []
        self.calls: weakref.WeakSet[_Call] = weakref.WeakSet()  # whose graph is alive
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
            output = self.original(*args, **kwargs)
            self.home.release(self.block)
            return output
        self._refuse_checkpointing()
        if any(autocast_state(device)["dtype"] == torch.float16 for device in _autocast_devices()):
            raise RuntimeError(
                "float16 autocast needs a loss scaler, which this version has not: use bfloat16 autocast"
            )
        args, kwargs = self._drop_caches(args, kwargs)
        call = _Call(self, args, kwargs)
        tensors, call.tensors = call.tensors, []  # only autograd keeps them: the call lives as long as the user's loss
        if not (self.slots or any(tensor.requires_grad for tensor in tensors)):
            return call.unflatten_output(tuple(call.run_all(tensors)))
        if any(not earlier.done for earlier in self.calls):
            for slot in self.slots:
                slot.shared = True  # this block's gradients come in several parts, complete at the end of the pass
        self.calls.add(call)
        # With frozen embeddings no input of the first block requires a gradient: the anchor keeps it in the graph.
        anchor = torch.empty(0, requires_grad=True)
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


def _autocast_devices() -> list[str]:
    return [device for device in ("cpu", "cuda") if torch.is_autocast_enabled(device)]


class _Call:
    """One call of a block: its arguments taken apart, how to split them, and the random state of every micro-batch."""

    def __init__(self, runner: BlockRunner, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.runner = runner
        self.leaves, self.spec = pytree.tree_flatten((args, kwargs))
        self.positions = [index for index, leaf in enumerate(self.leaves) if isinstance(leaf, Tensor)]
        self.tensors = [self.leaves[index] for index in self.positions]
        for index in self.positions:
            self.leaves[index] = (
                None  # autograd keeps the tensors; holding them here too would outlive the backward pass
            )
        for leaf in self.leaves:
            if isinstance(leaf, MutableMapping | MutableSequence):
                raise ValueError(
                    f"{type(runner.block).__name__} is handed a {type(leaf).__name__}, through which blocks pass each other tensors "
                    "that carry no gradient here: use fuse(..., blocks=[])"
                )
        if not self.tensors:
            raise ValueError(f"{type(runner.block).__name__} was called without a tensor: it cannot be a block")
        first = self.tensors[0]
        self.batch_size = first.shape[0] if first.dim() else 1
        self.device = first.device
        size = runner.micro_batch_size or self.batch_size
        starts = range(0, self.batch_size, size) if self.batch_size > size else (0,)
        self.micro_batches = [(start, min(start + size, self.batch_size)) for start in starts]
        named = {**dict(zip(runner.parameters, args, strict=False)), **kwargs}
        over_positions = [id(named[name]) for name in _POSITION_ARGUMENTS if name in named]
        self.split = [
            len(self.micro_batches) > 1 and self._per_sample(tensor, id(tensor) in over_positions)
            for tensor in self.tensors
        ]
        self.random_states: list[RandomState] = []
        self.autocast = autocast_state(self.device.type)
        self.step = runner.engine.step_number
        self.done = False  # its gradients have been used
        self.output_spec: Any = None
        self.output_leaves: list[Any] = []

    def _per_sample(self, tensor: Tensor, over_positions: bool) -> bool:
        return tensor.dim() > 0 and tensor.shape[0] == self.batch_size and not over_positions

    def slices(self, tensors: list[Tensor], micro_batch: tuple[int, int]) -> list[Tensor]:
        """The arguments of one micro-batch."""
        start, stop = micro_batch
        return [tensor[start:stop] if split else tensor for tensor, split in zip(tensors, self.split, strict=True)]

    def forward(self, tensors: list[Tensor]) -> Any:
        """Call the block's own forward with these tensors in place of the original ones."""
        leaves = list(self.leaves)
        for index, tensor in zip(self.positions, tensors, strict=True):
            leaves[index] = tensor
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        return self.runner.original(*args, **kwargs)

    def run_all(self, tensors: list[Tensor]) -> list[Tensor]:
        """Run every micro-batch without a graph; returns the output's tensors, each for the whole batch."""
        home, block = self.runner.home, self.runner.block
        home.fetch(block)
        outputs: list[Tensor] = []
        for micro_batch in self.micro_batches:
            self.random_states.append(RandomState(self.device))
            leaves, spec = pytree.tree_flatten(self.forward(self.slices(tensors, micro_batch)))
            self._collect(outputs, leaves, spec, micro_batch)
        home.release(block)
        return outputs

    def _collect(self, outputs: list[Tensor], leaves: list[Any], spec: Any, micro_batch: tuple[int, int]) -> None:
        """Put the output of one micro-batch at its place in the output of the whole batch."""
        start, stop = micro_batch
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if len(self.micro_batches) == 1:
            outputs.extend(tensors)
        elif start == 0:
            outputs.extend(tensor.new_empty(self._whole_shape(tensor, stop)) for tensor in tensors)
        if start == 0:
            self.output_spec = spec
            self.output_leaves = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            self.output_positions = [index for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        if len(self.micro_batches) > 1:
            for whole, part in zip(outputs, tensors, strict=True):
                whole[self.rows(whole, micro_batch)] = part

    def _whole_shape(self, tensor: Tensor, size: int) -> tuple[int, ...]:
        if tensor.dim() == 0 or tensor.shape[0] % size:
            raise ValueError(
                f"{type(self.runner.block).__name__} returns a tensor of shape {tuple(tensor.shape)} for a micro-batch of "
                f"{size} samples: only tensors with the batch in their first dimension can be put together again. Use "
                "micro_batch_size=None for this model."
            )
        return (tensor.shape[0] // size * self.batch_size, *tensor.shape[1:])

    def rows(self, whole: Tensor, micro_batch: tuple[int, int]) -> slice:
        """The rows of a whole-batch output that belong to a micro-batch (tokens of it, where they are flattened)."""
        if len(self.micro_batches) == 1:
            return slice(None)
        per_sample = whole.shape[0] // self.batch_size
        return slice(micro_batch[0] * per_sample, micro_batch[1] * per_sample)

    def unflatten_output(self, tensors: tuple[Tensor, ...]) -> Any:
        """The output in the structure that the block's own forward returned."""
        leaves = list(self.output_leaves)
        for index, tensor in zip(self.output_positions, tensors, strict=True):
            leaves[index] = tensor
        return pytree.tree_unflatten(leaves, self.output_spec)


class _RunBlock(torch.autograd.Function):
    """Runs a call without a graph; its backward recomputes and updates."""

    @staticmethod
    def forward(ctx: Any, call: _Call, anchor: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        outputs = call.run_all(list(tensors))
        ctx.call = call
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(output for output in outputs if not output.is_floating_point()))
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        call: _Call = ctx.call
        needs_grad = ctx.needs_input_grad[2:]
        given = [grad for grad in grad_outputs if grad is not None]
        if not given:
            return (None,) * (2 + len(needs_grad))
        engine, home, block = call.runner.engine, call.runner.home, call.runner.block
        _check_backward(call)
        engine.enter_backward(given[0])
        if engine.skipping:
            return (None,) * (2 + len(needs_grad))
        tensors = list(ctx.saved_tensors)
        grads: list[Tensor | None] = [None] * len(tensors)
        home.fetch(block)
        with keep_random_state(call.device), engine.block_backward(call.runner):
            for number, micro_batch in enumerate(call.micro_batches):
                engine.accumulate(number < len(call.micro_batches) - 1)
                inputs = _recompute(call, number, tensors, needs_grad, grad_outputs)
                _gather_grads(call, micro_batch, tensors, inputs, grads)
            for slot in call.runner.slots:
                if not slot.shared:
                    slot.flush()  # had a gradient from an earlier micro-batch but none from the last
        if engine.measuring:
            home.release(block)
        else:
            home.write_back(block)
            call.done = True
        return (None, None, *grads)


def _check_backward(call: _Call) -> None:
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
    call: _Call,
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
    call.random_states[number].restore()
    with torch.enable_grad(), torch.autocast(**call.autocast):
        output = call.forward(inputs)
    outputs = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
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
    call: _Call,
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
