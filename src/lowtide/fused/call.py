"""One call of a block: its arguments taken apart, cut into micro-batches, and its outputs put together again.

Shape letters: B = batch, the first dimension of the block's first tensor argument.
"""

from __future__ import annotations

from collections.abc import MutableMapping, MutableSequence
from types import EllipsisType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .matmul16 import fast_matmuls
from .replay import RandomState, autocast_state

if TYPE_CHECKING:
    from .block import BlockRunner

# Arguments that run over positions or heads, not samples; where B happens to equal their first dimension, shapes cannot tell.
_POSITION_ARGUMENTS = ("cache_position", "alibi", "position_bias")


class Call:
    """One call of a block: its arguments taken apart, how to split them, and the random state of every micro-batch."""

    def __init__(self, runner: BlockRunner, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.runner = runner
        self.leaves, self.spec = pytree.tree_flatten((args, kwargs))
        self.positions = [index for index, leaf in enumerate(self.leaves) if isinstance(leaf, Tensor)]
        self.tensors = [self.leaves[index] for index in self.positions]
        # Autograd keeps the tensors; holding them here too would outlive the backward pass
        for index in self.positions:
            self.leaves[index] = None
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
        self.done = False  # its gradients have been used, or measured
        self.kept = False  # they were kept in the first of two passes
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
        outputs: list[Tensor] = []
        home.fetch(block)
        try:
            with torch.autocast(**self.autocast), fast_matmuls(self.runner.weight):
                for micro_batch in self.micro_batches:
                    self.random_states.append(RandomState(self.device))
                    leaves, spec = pytree.tree_flatten(self.forward(self.slices(tensors, micro_batch)))
                    self._collect(outputs, leaves, spec, micro_batch)
        finally:
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

    def rows(self, whole: Tensor, micro_batch: tuple[int, int]) -> slice | EllipsisType:
        """The rows of a whole-batch output that belong to a micro-batch (tokens of it, where they are flattened)."""
        if len(self.micro_batches) == 1:
            return ...
        per_sample = whole.shape[0] // self.batch_size
        return slice(micro_batch[0] * per_sample, micro_batch[1] * per_sample)

    def unflatten_output(self, tensors: tuple[Tensor, ...]) -> Any:
        """The output in the structure that the block's own forward returned."""
        leaves = list(self.output_leaves)
        for index, tensor in zip(self.output_positions, tensors, strict=True):
            leaves[index] = tensor
        return pytree.tree_unflatten(leaves, self.output_spec)
