"""A training loop of one's own with ``accelerate``, on the fused engine.

    accelerator = Accelerator()
    optimizer = AdaLomo(model.parameters(), lr=1e-3)
    engine = fuse_accelerator(accelerator, model, optimizer, clip_grad_norm=1.0)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

The rest of the loop stays as it is. Methods of this one accelerator are replaced, no class is changed:

    backward          is ``engine.backward``, so every parameter is updated there, and exact clipping has its two passes
    clip_grad_norm_   was done there: it returns the norm that was measured. By itself it would find no gradients and clip nothing
    save_state        saves what the engine remembers, too
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..fusing import Engine, fuse

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["fuse_accelerator"]


def fuse_accelerator(accelerator: Accelerator, model: nn.Module, optimizer: Optimizer, **options: Any) -> Engine:
    """Fuse a model for the loop of an accelerator. To be called before ``accelerator.prepare``, with what is given to it.

    ``engine.remove()`` makes all three ordinary again.

    Args:
        accelerator: one process on one device. The model is moved to that device here.
        model: as for :func:`lowtide.fuse`.
        optimizer: one of lowtide's.
        options: of :func:`lowtide.fuse`: ``micro_batch_size``, ``clip_grad_norm``, ``clip``, ...

    Raises:
        ValueError: the accelerator does something that the fused update cannot, or the model or the optimizer is prepared already; the
            message says what to do.
    """
    _check(accelerator, model, optimizer)
    if options.get("weights", "device") != "device":
        raise ValueError(
            "accelerator.save_state would write weights that live elsewhere as if they were nothing: use lowtide.fuse in a loop without "
            "accelerate, or lowtide train --weights"
        )
    model.to(accelerator.device)
    engine = fuse(model, optimizer, **options)
    _Fused(accelerator, engine).install()
    return engine


def _check(accelerator: Any, model: nn.Module, optimizer: Any) -> None:
    if accelerator.num_processes > 1:
        raise ValueError(
            f"accelerate runs {accelerator.num_processes} processes, and lowtide's engine updates in one: launch one process"
        )
    kind = getattr(accelerator.distributed_type, "value", accelerator.distributed_type)
    if kind not in ("NO", "MULTI_CPU"):
        raise ValueError(
            f"accelerate's {kind} shards or wraps what the fused update works on: use a plain Accelerator()"
        )
    if accelerator.scaler is not None:
        raise ValueError(
            "mixed_precision='fp16' scales the loss in a way of its own: use 'bf16', or load the model in torch.float16, for which lowtide "
            "scales it"
        )
    steps = accelerator.gradient_accumulation_steps
    if steps > 1:
        raise ValueError(
            f"gradient_accumulation_steps={steps} would update in every one of the {steps} backward passes: leave it out, give the model the "
            f"whole batch at once, and fuse_accelerator a micro_batch_size, which has the same result and the memory of a small batch"
        )
    if hasattr(optimizer, "optimizer") or hasattr(model, "_original_forward"):
        raise ValueError("fuse_accelerator comes before accelerator.prepare(), which wraps model and optimizer")


class _Fused:
    """The engine of one accelerator."""

    def __init__(self, accelerator: Any, engine: Engine) -> None:
        self.accelerator, self.engine = accelerator, engine
        self._remove_engine = engine.remove

    def install(self) -> None:
        """Put the methods below in the place of the accelerator's."""
        accelerator: Any = self.accelerator
        if "backward" in accelerator.__dict__:
            raise ValueError("this accelerator has a fused model already: call engine.remove() of it, or make another")
        accelerator.backward = self.backward
        accelerator.clip_grad_norm_, accelerator.clip_grad_value_ = self.clip_grad_norm, self.clip_grad_value
        accelerator.register_for_checkpointing(self.engine)
        self.engine.remove = self.remove  # type: ignore[method-assign]

    def backward(self, loss: Tensor, **kwargs: Any) -> None:
        """In the place of ``Accelerator.backward``."""
        if kwargs:
            raise ValueError(
                f"a fused backward takes no {', '.join(kwargs)}: the rate is the optimizer's, and the graph is used once"
            )
        self.engine.backward(loss)

    def clip_grad_norm(self, parameters: Iterable[Tensor], max_norm: float, norm_type: float = 2) -> Tensor:
        """In the place of ``Accelerator.clip_grad_norm_``: the norm before clipping."""
        self._refuse_other("clip_grad_norm", self.engine.clip_grad_norm, max_norm)
        if norm_type != 2:
            raise ValueError(f"the norm is the 2-norm, not that of type {norm_type}")
        return torch.tensor(float("nan") if self.engine.grad_norm is None else self.engine.grad_norm)

    def clip_grad_value(self, parameters: Iterable[Tensor], clip_value: float) -> None:
        """In the place of ``Accelerator.clip_grad_value_``."""
        self._refuse_other("clip_grad_value", self.engine.clip_grad_value, clip_value)

    def _refuse_other(self, name: str, own: float | None, asked: float) -> None:
        if own != asked:
            raise ValueError(
                f"the weights were updated in backward with {name}={own}, so it is too late to clip to {asked}: give fuse_accelerator "
                f"{name}={asked}"
            )

    def remove(self, keep_copy: bool = True) -> None:
        """In the place of ``engine.remove``."""
        for name in ("backward", "clip_grad_norm_", "clip_grad_value_"):
            self.accelerator.__dict__.pop(name, None)
        if self.engine in self.accelerator._custom_objects:
            self.accelerator._custom_objects.remove(self.engine)
        model = self.engine.model
        self._remove_engine(keep_copy)
        model.__dict__.pop("_original_forward", None)  # accelerate's, of a forward that is gone with the engine
