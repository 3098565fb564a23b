"""The public entry: joins a model, its optimizers, the fused engine and the home of the weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from .fused import AdaptiveClip, LossScale
from .fused import Engine as _Engine
from .models.blocks import find_blocks, resolve_blocks
from .models.loss import ChunkedLoss
from .weights import DeviceHome


class Engine(_Engine):
    """What :func:`fuse` returns: the fused engine of one model, and what was changed on the model for it."""

    chunked_loss: ChunkedLoss | None = None

    def remove(self) -> None:
        """Take all hooks away: model and optimizers are ordinary again. Calling it twice does no harm."""
        super().remove()
        if self.chunked_loss is not None:
            self.chunked_loss.remove()
            self.chunked_loss = None


def fuse(
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer],
    *,
    micro_batch_size: int | None = None,
    clip_grad_norm: float | None = None,
    clip_grad_value: float | None = None,
    clip: str = "exact",
    clip_warmup_steps: int = 20,
    clip_memory_bytes: int = 0,
    loss_scale: LossScale | float | str | None = "auto",
    weights: str = "device",
    blocks: Iterable[nn.Module | str] | None = None,
    chunked_loss: bool = True,
) -> Engine:
    """Update every parameter inside the backward pass, the moment its gradient is complete.

    After this, a training step is ``loss = model(**batch).loss; engine.backward(loss); optimizer.step()``, where ``step()``
    only closes the step. Gradients of at most one tensor exist at a time, or of one block with micro-batches.

    Args:
        model: any module. The decoder layers of Hugging Face models become blocks: only their inputs are kept, and
            activations are recomputed. Other models can name their blocks; without blocks only the update is fused.
        optimizer: one or several of lowtide's optimizers, which together hold all trainable parameters.
        micro_batch_size: samples that go through a block at a time, or None for the whole batch. The result does not depend
            on it (a sum in another order aside); peak memory does. Needs blocks.
        clip_grad_norm: largest 2-norm of all gradients together; use ``engine.backward(loss)``.
        clip: how: ``"exact"`` walks the graph twice in every step. ``"adaptive"`` does so for ``clip_warmup_steps`` steps, and
            then clips each gradient to 1.05 times the running norm of its own parameter, in one pass (AdaGC, arXiv 2502.11034).
        clip_warmup_steps: see ``clip``.
        clip_memory_bytes: spare memory for gradients that exact clipping keeps between its passes, so that less has to be
            computed twice; with room for all of them there is one pass.
        clip_grad_value: every element of a gradient is clamped to plus or minus this, before clipping by norm.
        loss_scale: ``"dynamic"``, a :class:`LossScale`, a number for a fixed scale, or None. ``"auto"`` is dynamic for float16
            weights and None otherwise. Float16 autocast over other weights needs ``"dynamic"``.
        weights: where the weights live; this version knows ``"device"``.
        blocks: modules, or their names; the name of a ModuleList stands for its children. None finds those of Hugging Face
            models; an empty list turns blocks off.
        chunked_loss: a Hugging Face causal language model computes its training loss in slices of the vocabulary, and returns
            ``logits=None`` then. Models whose head is not understood keep their own loss. False leaves the model's forward alone.

    Raises:
        ValueError, TypeError, RuntimeError: something here cannot be fused; the message says what to do instead.
    """
    if weights != "device":
        raise ValueError(f"weights={weights!r}: this version keeps weights on the device only, use weights='device'")
    for name, value in (
        ("micro_batch_size", micro_batch_size),
        ("clip_grad_norm", clip_grad_norm),
        ("clip_grad_value", clip_grad_value),
    ):
        if value is not None and value <= 0:
            raise ValueError(f"{name} must be positive or None, got {value}")
    if clip not in ("exact", "adaptive"):
        raise ValueError(f"clip must be exact or adaptive, got {clip!r}")
    if clip == "adaptive" and clip_grad_norm is None:
        raise ValueError("clip='adaptive' needs clip_grad_norm, the bound of its warm-up: 1.0 is usual")
    if clip_warmup_steps < 1 or clip_memory_bytes < 0:
        raise ValueError(
            f"clip_warmup_steps must be at least 1 and clip_memory_bytes at least 0, got {clip_warmup_steps}, {clip_memory_bytes}"
        )
    found = find_blocks(model) if blocks is None else resolve_blocks(model, blocks)
    if micro_batch_size is not None and not found:
        raise ValueError(
            "micro_batch_size needs blocks, and none were found in this model: name them with fuse(..., blocks=['layers'])"
        )
    if found and getattr(getattr(model, "config", None), "output_router_logits", False):
        raise ValueError(
            "output_router_logits=True adds a router loss that reads inside the blocks, which would get no gradient: set "
            "model.config.output_router_logits = False"
        )
    if found and (shared := _kv_shared_layers(model)):
        raise ValueError(
            f"{shared} layers of this model reuse the keys and values of earlier ones, which recomputed blocks cannot pass on: "
            "use fuse(..., blocks=[])"
        )
    optimizers = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)
    engine = Engine(
        model,
        optimizers,  # type: ignore[arg-type]  # checked by the engine, with a message for users
        blocks=found,
        home=DeviceHome(),
        micro_batch_size=micro_batch_size,
        clip_grad_norm=clip_grad_norm,
        clip_grad_value=clip_grad_value,
        adaptive=AdaptiveClip(clip_warmup_steps) if clip == "adaptive" else None,
        loss_scale=_loss_scale(loss_scale, model),
        kept_gradients_bytes=clip_memory_bytes,
    )
    if chunked_loss and (loss := ChunkedLoss.of(model)) is not None:
        loss.install()
        engine.chunked_loss = loss
    return engine


def _loss_scale(wanted: LossScale | float | str | None, model: nn.Module) -> LossScale | None:
    if wanted == "auto":
        has_float16 = any(param.dtype == torch.float16 for param in model.parameters() if param.requires_grad)
        return LossScale() if has_float16 else None
    if wanted == "dynamic":
        return LossScale()
    if isinstance(wanted, str):
        raise ValueError(f"loss_scale must be auto, dynamic, a number or None, got {wanted!r}")
    return LossScale.fixed(wanted) if isinstance(wanted, int | float) else wanted


def _kv_shared_layers(model: nn.Module) -> int:
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(text, "num_kv_shared_layers", None) or 0
