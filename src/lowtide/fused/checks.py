"""What a fused backward cannot work with, refused before a weight changes, with what to do instead."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..optim import FusibleOptimizer
from ..optim.shards import is_sharded, shard_axes

_SMALLEST_LOSS_SCALE = 128.0  # no AMP scaler starts lower; a user's own loss weights are rarely such powers of two


def check_model(model: nn.Module) -> None:
    """Refuse wrappers that would reduce or scale gradients after they are used, and checkpointing that nests.

    Raises:
        ValueError: the model is wrapped in DDP, FSDP1 or DataParallel, or uses gradient checkpointing of transformers; several
            processes take part and a parameter is not sharded, or along another dimension than the first.
        RuntimeError: the model is fused already.
    """
    wrapper = type(model).__name__
    if wrapper in ("DistributedDataParallel", "FullyShardedDataParallel", "DataParallel"):
        raise ValueError(
            f"the model is wrapped in {wrapper}, which reduces gradients after a fused backward has used them, so that the "
            "ranks would drift apart. Train in one process with the bare model (model.module)."
        )
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        whole = [name for name, param in model.named_parameters() if param.requires_grad and not is_sharded(param)]
        if whole:
            raise ValueError(
                f"{distributed.get_world_size()} processes take part, and gradients of {whole[0]} would not be exchanged between "
                "them, so that the ranks would drift apart: call lowtide.shard(model) before the optimizer is made"
            )
    for param in model.parameters():
        if is_sharded(param):
            shard_axes(param)
    if getattr(model, "_lowtide_engine", None) is not None:
        raise RuntimeError("this model is fused already: call engine.remove() on its engine first")
    for name, module in model.named_modules():
        if getattr(module, "gradient_checkpointing", False) and getattr(module, "_gradient_checkpointing_func", None):
            raise ValueError(
                f"gradient checkpointing is on in {name or type(model).__name__}: lowtide's blocks recompute their "
                "activations already. Call model.gradient_checkpointing_disable() first."
            )
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse and module.weight.requires_grad:
            raise ValueError(f"{name} makes sparse gradients, which the update rules do not take: set its sparse=False")


def check_optimizers(model: nn.Module, optimizers: Sequence[FusibleOptimizer], scaled: bool) -> None:
    """Refuse optimizers that cannot be fused, or that together do not cover the model exactly once.

    Raises:
        TypeError: an optimizer is not one of lowtide's.
        ValueError: trainable parameters without an optimizer, with two, in float16 without loss scaling (``scaled``),
            or with a gradient left over.
        RuntimeError: an optimizer is fused already.
    """
    if not optimizers:
        raise ValueError("fuse() needs at least one optimizer")
    owners: dict[Tensor, int] = {}
    for number, optimizer in enumerate(optimizers):
        if not isinstance(optimizer, FusibleOptimizer):
            name = type(optimizer).__name__
            raise TypeError(
                f"{name} cannot update one parameter at a time: use lowtide.Lomo, lowtide.AdaLomo, or "
                f"lowtide.PerParameter({name}, params, ...)"
            )
        if optimizer._close_step is not None:
            raise RuntimeError("this optimizer is fused already: call engine.remove() on its engine first")
        for group in optimizer.param_groups:
            for param in group["params"]:
                if owners.setdefault(param, number) != number:
                    raise ValueError("a parameter belongs to two optimizers and would be updated twice")
    named = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
    missing = [name for name, param in named if param not in owners]
    if missing:
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise ValueError(
            f"{len(missing)} trainable parameters are in no optimizer: {shown}. Give them to one, or freeze them with "
            "requires_grad_(False)."
        )
    for name, param in named:
        if param.dtype == torch.float16 and not scaled:
            raise ValueError(
                f"{name} is float16, whose small gradients vanish without loss scaling: use fuse(..., loss_scale='dynamic'), or "
                "bfloat16 or float32 weights"
            )
        if param.grad is not None:
            raise ValueError(f"{name} still has a gradient from before: call optimizer.zero_grad() before fuse()")


def check_loss(loss: Tensor) -> None:
    """Refuse a loss that cannot be back-propagated, or that a GradScaler has multiplied.

    Raises:
        RuntimeError: no graph.
        ValueError: not a single number, or scaled.
    """
    if loss.numel() != 1:
        raise ValueError(f"the loss must be a single number, got shape {tuple(loss.shape)}: reduce it with .mean()")
    if not loss.requires_grad:
        raise RuntimeError(
            "the loss has no graph: was it computed under torch.no_grad(), or with every parameter frozen?"
        )
    factor = getattr(loss.grad_fn, "_saved_other", None)
    if type(loss.grad_fn).__name__ == "MulBackward0" and isinstance(factor, Tensor) and factor.dtype == torch.float32:
        scale = float(factor) if factor.numel() == 1 else 0.0
        if scale >= _SMALLEST_LOSS_SCALE and math.log2(scale).is_integer():
            raise ValueError(
                f"the loss was multiplied by {scale:.0f}, as torch.amp.GradScaler does; a fused backward would apply the "
                "scaled gradients. Pass the plain loss: fuse(..., loss_scale='dynamic') does the scaling itself."
            )
