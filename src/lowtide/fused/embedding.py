"""An embedding whose gradient is never a matrix: what it hands on are the rows that the batch has touched."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .rows import TouchedRows
from .slices import SliceIntake, Use

if TYPE_CHECKING:
    from .block import BlockRunner


def takes_embedding(module: nn.Module, is_block: bool = False) -> bool:
    """Whether :class:`EmbeddingForward` computes what this module does. The forward of a block has been replaced by its runner."""
    return (
        (is_block or "forward" not in module.__dict__)
        and isinstance(module, nn.Embedding)
        and type(module).forward is nn.Embedding.forward
        and module.max_norm is None
        and not module.scale_grad_by_freq
        and not module.sparse
    )


class EmbeddingForward:
    """The forward of an embedding layer that gives its gradient to an intake. Outside training it is the layer's own.

    Args:
        module: one that :func:`takes_embedding` takes; :meth:`install` replaces its forward.
        intake: of its weight.
        runner: who runs the module where it is a block.
    """

    def __init__(self, module: nn.Embedding, intake: SliceIntake, runner: BlockRunner | None) -> None:
        self.module, self.intake, self.runner = module, intake, runner
        self.original = module.forward if runner is None else runner.original

    def install(self) -> None:
        """Replace the module's forward, or what the runner calls."""
        if self.runner is not None:
            self.runner.original = self
        else:
            self.module.__dict__["forward"] = self

    def remove(self) -> None:
        """The module's own forward again."""
        if self.runner is not None:
            self.runner.original = self.original
        else:
            self.module.__dict__.pop("forward", None)

    def __call__(self, input: Tensor) -> Tensor:  # the name of nn.Embedding's argument
        """Rows of the weight, [..., H], for ids [...]."""
        if not (torch.is_grad_enabled() and self.module.weight.requires_grad):
            return self.original(input)
        found: Tensor = _TakeRows.apply(
            self.module.weight,
            input,
            self.module.padding_idx,
            self.intake,
            self.intake.begin(self.module.weight, input.detach()),
        )
        return found


class _TakeRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, ids: Tensor, padding_idx: int | None, intake: SliceIntake, use: Use
    ) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.padding_idx, ctx.intake, ctx.use, ctx.num_rows = padding_idx, intake, use, weight.shape[0]
        return functional.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (ids,) = ctx.saved_tensors
        gradient = TouchedRows(ids, grad, ctx.num_rows, ctx.padding_idx)
        if ctx.intake.take(ctx.use, gradient, grad):
            return None, None, None, None, None
        padding = -1 if ctx.padding_idx is None else ctx.padding_idx
        whole = torch.ops.aten.embedding_dense_backward(grad, ids, ctx.num_rows, padding, False)
        return whole, None, None, None, None
