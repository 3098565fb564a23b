"""The memory of a whole training step, moment by moment, without a tensor that has any.

The model runs forward and backward once on the meta device. Its blocks are replaced by stand-ins that keep their inputs and
make their outputs, as the engine's do (``fused/block.py``), and note how much is alive when each begins; what a block
holds inside is traced apart, once for each kind of block. Embedding, masks, final norm and their gradients are the
model's own operations; the head and its loss have a stand-in.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..fused.slices import can_be_held
from ..optim.sliced import rows_at_a_time
from .attention import fused_attention
from .block_trace import BlockCall, Transient
from .head_loss import HeadLoss
from .moments import Moment, StepTrace
from .tracing import GRADIENTS, KEPT, Bytes, MemoryTrace, added

_CACHE_ARGUMENTS = ("past_key_values", "past_key_value", "layer_past", "cache_params")


def trace_step(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    *,
    batch_size: int,
    seq_len: int,
    masked: bool,
    two_passes: bool,
    update: Transient,
    head_in_slices: bool = False,
    embedding_in_rows: bool = False,
    keeps: bool = False,
    **options: Any,
) -> StepTrace:
    """Run one training step of a causal language model on the meta device.

    Args:
        model: on the meta device, in training mode.
        blocks: its decoder layers.
        batch_size, seq_len: of the step, all of whose tokens but the first of a sequence count.
        masked: the batch is padded or packed, so that the model makes an attention mask [B, 1, S, S].
        two_passes: the norm of the gradients is measured before the pass that updates.
        update: temporaries that updating a parameter needs.
        head_in_slices, embedding_in_rows: their gradients are not whole, see ``vocabulary_slices`` of :func:`lowtide.fuse`.
        keeps: there are decoder layers that are not among ``blocks``, whose activations are kept.
        options: of :class:`MemoryTrace`.

    Raises:
        Exception: whatever the model raises where it cannot run on the meta device.
    """
    tracer = _StepTracer(model, blocks, update, MemoryTrace(answer=not masked, **options))
    tracer.head_in_slices, tracer.embedding_in_rows = head_in_slices, embedding_in_rows
    with torch.device("meta"), fused_attention(), tracer.installed(), tracer.trace:
        batch = _batch(batch_size, seq_len, masked)
        loss = tracer.loss(batch)
        for phase in ("measure", "backward") if two_passes else ("backward",):
            tracer.phase = phase
            loss.backward(retain_graph=phase == "measure")
            tracer.finish()
    own = [max((t.nbytes for t in call.tensors() if t.requires_grad), default=0) for call in tracer.calls]
    moments = tracer.moments()
    return StepTrace(
        tracer.before, moments, tuple(tracer.calls), tracer.kept_bytes, max(own, default=0), tracer.before_heap, keeps
    )


def _batch(batch_size: int, seq_len: int, masked: bool) -> dict[str, Tensor]:
    ids = torch.empty((batch_size, seq_len), dtype=torch.int64)
    batch = {"input_ids": ids, "labels": torch.empty_like(ids)}
    if masked:
        batch["attention_mask"] = torch.empty_like(ids)
    return batch


class _StepTracer:
    """State of one traced step: hooks on parameters outside the blocks, stand-ins for the blocks."""

    def __init__(self, model: nn.Module, blocks: Sequence[nn.Module], update: Transient, trace: MemoryTrace) -> None:
        self.model, self.blocks, self.update = model, list(blocks), update
        inside = {id(module) for block in blocks for module in block.modules()}
        self._outside = _uses(model, inside)  # of each parameter outside the blocks: modules that use it
        self.trace = trace
        self.trace.ignore([*model.parameters(), *model.buffers()])
        self.phase = "forward"
        self.before: Bytes = {}
        self.before_heap = 0
        self._moments: list[Moment] = []  # the last one without its end
        self._resumed = 0
        self.calls: list[BlockCall] = []
        self._kept: dict[int, int] = {}
        self._sums: dict[Tensor, Tensor] = {}
        self.head_in_slices = self.embedding_in_rows = False
        self._held: Tensor | None = None  # rows of the head's gradient
        self._in_slices: list[
            tuple[Tensor, list[Tensor]]
        ] = []  # matrices, and what is kept until the end of the pass for them

    @property
    def kept_bytes(self) -> int:
        return sum(self._kept.values())

    def installed(self) -> ExitStack:
        """Context: blocks are stand-ins, and parameters outside them have hooks."""
        stack = ExitStack()
        for index, block in enumerate(self.blocks):
            stack.enter_context(patch.object(block, "forward", self._stand_in(index, block)))
        for param in self._outside:
            handle = param.register_post_accumulate_grad_hook(self._on_grad)
            stack.callback(handle.remove)
        embedding = self.model.get_input_embeddings()  # type: ignore[operator]
        if self.embedding_in_rows and type(embedding).forward is nn.Embedding.forward:
            stack.enter_context(patch.object(embedding, "forward", self._rows_of(embedding)))
        return stack

    def _rows_of(self, embedding: nn.Module) -> Callable[[Tensor], Tensor]:
        return lambda input: _Rows.apply(self, embedding.weight, input)

    def in_slices(self, param: Tensor, *kept: Tensor, of_head: bool = False) -> None:
        """A gradient that is made slice by slice: now, or at the end of the pass, until when these are kept."""
        follows = of_head and self.embedding_in_rows and type(self.model.get_input_embeddings()) is nn.Embedding  # type: ignore[operator]
        if self._outside[param] > 1 and follows and can_be_held(kept[0].shape[0], param.shape[0]):
            # The head's, of a tied matrix: all rows but those of the batch's tokens, each of which may be another.
            self._visit_slices(param, kept)
            with self.trace.kind(GRADIENTS):
                self._held = torch.empty_like(kept[0])
        elif self._outside[param] > 1:
            self._in_slices.append((param, list(kept)))
        else:
            self._visit_slices(param, kept)

    def _visit_slices(self, param: Tensor, kept: Sequence[Tensor]) -> None:
        rows = rows_at_a_time(*param.shape)
        piece = 4 * rows * param.shape[1]
        extra = added(self.update(param[:rows]), {GRADIENTS: piece}) if self.phase == "backward" else {GRADIENTS: piece}
        self.trace.transient(extra)

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """The loss with its graph, as ``models/loss.py`` computes it."""
        model: Any = self.model
        labels = batch.pop("labels")
        hidden = model.base_model(**batch, use_cache=False, return_dict=True).last_hidden_state
        hidden, labels = hidden[:, :-1], labels[:, 1:]
        counted = torch.empty(labels.numel(), dtype=torch.int64)
        hidden = hidden.reshape(-1, hidden.shape[-1]).index_select(0, counted)
        weight = model.get_output_embeddings().weight
        if self.head_in_slices and hidden.requires_grad:
            hidden.register_hook(lambda _: self.in_slices(weight, hidden.detach(), of_head=True))
        return HeadLoss.apply(self.trace, hidden, weight, self.head_in_slices)

    def finish(self) -> None:
        """The end of a pass: what was summed is used, and what is made in slices."""
        for param, kept in self._in_slices:
            self._visit_slices(param, kept)
        self._in_slices, self._held = [], None
        while self._sums:
            param, grad = self._sums.popitem()
            self._apply(param)
            del grad

    def begin(self, index: int) -> None:
        """A block begins; ``resume`` follows when what remains of it has been made."""
        self._end()
        self._moments.append(Moment(self.phase, index, added(self.trace.live), self.trace.heap, {}, (0, 0)))

    def resume(self) -> None:
        """The block has ended."""
        self.trace.take_peak()
        self._resumed = self.trace.heap

    def moments(self) -> tuple[Moment, ...]:
        """All of them, at the end."""
        self._end()
        return tuple(self._moments)

    def _end(self) -> None:
        heap, after = (self._resumed, self.trace.heap_high), self.trace.take_peak()
        if self._moments:
            self._moments[-1] = dataclasses.replace(self._moments[-1], after=after, after_heap=heap)
        else:
            self.before, self.before_heap = after, heap[1]

    def keep(self, tensors: Sequence[Tensor]) -> None:
        """Autograd keeps these for the backward pass."""
        for tensor in tensors:
            self._kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
            self.trace.retag(tensor, KEPT)

    def _stand_in(self, index: int, block: nn.Module) -> Callable[..., Any]:
        names = list(inspect.signature(block.forward).parameters)
        original = block.forward

        def run(*args: Any, **kwargs: Any) -> Any:
            kwargs = {name: None if name in _CACHE_ARGUMENTS else value for name, value in kwargs.items()}
            args = tuple(None if name in _CACHE_ARGUMENTS else value for name, value in zip(names, args, strict=False))
            tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            self.calls.append(BlockCall(block, *pytree.tree_map_only(Tensor, _uncounted_like, (args, kwargs))))
            self.begin(index)
            template = self._output_of(original, args, kwargs)
            outputs, out_spec = pytree.tree_flatten(template)
            positions = [i for i, leaf in enumerate(outputs) if isinstance(leaf, Tensor)]
            shapes = [(outputs[i].shape, outputs[i].dtype) for i in positions]
            anchor = torch.empty(0, device="meta", requires_grad=True)
            made = _StandIn.apply(self, index, shapes, anchor, *tensors)
            self.resume()
            for position, tensor in zip(positions, made, strict=True):
                outputs[position] = tensor
            return pytree.tree_unflatten(outputs, out_spec)

        return run

    def _output_of(self, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """The structure of the block's output; nothing of this is counted."""
        with torch.utils._python_dispatch._disable_current_modes(), torch.device("meta"), torch.no_grad():
            trace = MemoryTrace(answer=self.trace.answer)  # answers where the block asks a tensor for a number
            with trace:
                return original(*args, **kwargs)

    @torch.no_grad()
    def _on_grad(self, param: Tensor) -> None:
        grad, param.grad = param.grad, None
        if grad is None:
            return  # it comes in slices
        self.trace.retag(grad, GRADIENTS)
        if self._outside[param] == 1:
            self._apply(param)
        elif param in self._sums:
            self._sums[param].add_(grad)
        else:
            self._sums[param] = grad

    def _apply(self, param: Tensor) -> None:
        if self.phase == "backward":
            self.trace.transient(self.update(param))


def _uses(model: nn.Module, inside: set[int]) -> dict[Tensor, int]:
    uses: dict[Tensor, int] = {}
    for module in model.modules():
        if id(module) not in inside:
            for param in module.parameters(recurse=False):
                uses[param] = uses.get(param, 0) + 1
    return uses


def _uncounted_like(tensor: Tensor) -> Tensor:
    """The same on the meta device, seen by no trace: it may live on without a consequence."""
    with torch.utils._python_dispatch._disable_current_modes():
        like = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    return like.requires_grad_(tensor.requires_grad)


class _Rows(torch.autograd.Function):
    """An embedding that gives the rows of its gradient to the tracer."""

    @staticmethod
    def forward(ctx: Any, tracer: _StepTracer, weight: Tensor, ids: Tensor) -> Tensor:
        ctx.tracer, ctx.weight = tracer, weight
        return torch.nn.functional.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, ...]:
        ctx.tracer.in_slices(ctx.weight, grad.detach())
        return None, None, None


class _StandIn(torch.autograd.Function):
    """A block: keeps its inputs, makes its outputs and the gradients of its inputs."""

    @staticmethod
    def forward(
        ctx: Any, tracer: _StepTracer, index: int, shapes: list[Any], anchor: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        outputs = tuple(torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in shapes)
        tracer.keep(tensors)
        ctx.tracer, ctx.index = tracer, index
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(output for output in outputs if not output.is_floating_point()))
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.tracer.begin(ctx.index)
        needed = ctx.needs_input_grad[4:]
        made = [torch.empty_like(t) if need else None for t, need in zip(ctx.saved_tensors, needed, strict=True)]
        ctx.tracer.resume()
        return (None, None, None, None, *made)
