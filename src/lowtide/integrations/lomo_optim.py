"""For code written for the public package ``lomo-optim``: the same classes and calls, run by lowtide's engine.

One import line changes, ``from lowtide.integrations.lomo_optim import AdaLomo, Lomo``, and the loop stays as it is::

    optimizer = Lomo(model, lr=1e-3, clip_grad_norm=1.0)
    loss = model(**batch).loss
    optimizer.grad_norm(loss)            # only with clip_grad_norm
    loss = model(**batch).loss           # another forward pass, or the same loss again
    optimizer.fused_backward(loss, lr)   # updates every parameter, and closes the step

``docs/from-lomo-optim.md`` says what differs, and how the same is written with :func:`lowtide.fuse`.
"""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..fused import LossScale
from ..fusing import Engine, fuse
from ..log import get_logger
from ..optim import AdaLomo as _AdaLomo
from ..optim import FusibleOptimizer
from ..optim import Lomo as _Lomo
from ..optim.base import SIXTEEN_BIT

__all__ = ["AdaLomo", "Lomo"]

_logger = get_logger(__name__)

_DEFAULT_LOSS_SCALE = 2**10  # of the public AdaLomo, where it is multiplied with whatever the weights are
# Of the public scaler, what means something here; its scale may grow beyond what ours would start with.
_SCALER_ARGUMENTS = ("init_scale", "scale_factor", "scale_window", "min_scale")


class LossScalerView:
    """What scripts for lomo-optim ask ``optimizer.loss_scaler`` for, to leave a step out whose gradients overflowed."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.has_overflow_serial = False  # in the last pass of this optimizer

    @property
    def loss_scale(self) -> float:
        """What the loss is multiplied with now."""
        assert self._engine.loss_scale is not None
        return self._engine.loss_scale.scale


class _Door(FusibleOptimizer):
    """The calls of lomo-optim on an optimizer of lowtide, which it fuses with the model.

    Attributes:
        engine: of the model; ``engine.remove()`` makes the model an ordinary one again.
        loss_scaler: None unless there are float16 weights.
    """

    model: nn.Module
    engine: Engine
    loss_scaler: LossScalerView | None

    def _join(
        self, model: nn.Module, clip_grad_norm: float | None, clip_grad_value: float | None, scale: LossScale | None
    ) -> None:
        _stop_checkpointing(model)
        self.model = model
        self.engine = fuse(
            model,
            self,
            clip_grad_norm=clip_grad_norm,
            clip_grad_value=None if clip_grad_value is not None and clip_grad_value <= 0 else clip_grad_value,
            loss_scale=scale,
            chunked_loss=False,  # these scripts may use the logits
        )
        self.loss_scaler = None if scale is None else LossScalerView(self.engine)
        self._forget()

    def _forget(self) -> None:
        self._measured: float | None = None  # norm of the gradients of the next step
        self._measured_loss: weakref.ref[Tensor] | None = None
        self._measured_value = math.nan
        self._dropped = False  # the next step was skipped in grad_norm already

    @property
    def lr(self) -> float:
        """The learning rate of the last step."""
        return float(self.param_groups[0]["lr"])

    @property
    def clip_grad_norm(self) -> float | None:
        """The largest norm of all gradients together, or None."""
        return self.engine.clip_grad_norm

    @property
    def clip_grad_value(self) -> float | None:
        """The largest absolute value of an element of a gradient, or None."""
        return self.engine.clip_grad_value

    def grad_norm(self, loss: Tensor) -> float:
        """Measure the norm of the gradients that the next :meth:`fused_backward` will clip by. Changes no weight.

        The graph is kept: the same loss can be given to ``fused_backward``, or one from another forward pass. If the norm
        is not finite, the step is skipped: ``fused_backward`` need not be called, and does nothing if it is.

        Args:
            loss: zero-dimensional, with a graph; not scaled.

        Returns:
            The 2-norm of all gradients together, before clipping.

        Raises:
            RuntimeError, ValueError: as :meth:`lowtide.Engine.backward`.
        """
        self._forget()
        norm = self.engine.measure_norm(loss)
        self._note_overflow(not math.isfinite(norm))
        if not math.isfinite(norm):
            self._dropped = True
            self.engine.backward(loss, norm)  # counts the skipped step, and lets the loss scale fall
            self.step()
            return norm
        self._measured, self._measured_loss, self._measured_value = norm, weakref.ref(loss), float(loss.detach())
        return norm

    def fused_backward(self, loss: Tensor, lr: float) -> None:
        """Back-propagate ``loss``, update every parameter on the way with this learning rate, and close the step.

        With ``clip_grad_norm`` the norm that :meth:`grad_norm` has measured is used, once, if it is that of this loss: the
        same loss, or one of equal value from another forward pass. Otherwise (no ``grad_norm`` before, another batch, dropout)
        it is measured here. Either way the clipping is exact.

        Args:
            loss: zero-dimensional, with a graph; not scaled.
            lr: learning rate of this step.

        Raises:
            RuntimeError, ValueError: as :meth:`lowtide.Engine.backward`; or ``lr`` is negative or not finite.
        """
        lr = float(lr)
        if not 0.0 <= lr < math.inf:
            raise ValueError(f"lr must be a finite number that is not negative, got {lr}")
        if self._dropped:
            self._forget()
            return
        norm = self._norm_of(loss)
        self._forget()
        for group in self.param_groups:
            group["lr"] = lr
        self.engine.backward(loss, norm)
        self._note_overflow(self.engine.step_skipped or self.engine.step_partial)
        self.step()

    def _norm_of(self, loss: Tensor) -> float | None:
        """What grad_norm has measured, if that was this loss; None to measure it now."""
        if self._measured is None or self._measured_loss is None:
            return None
        if self._measured_loss() is loss:
            return self._measured
        # 16 bits are too few to tell two losses apart.
        same = loss.dtype not in SIXTEEN_BIT and float(loss.detach()) == self._measured_value
        if not same:
            _warn_once(
                "the loss given to fused_backward is not the one that grad_norm has measured (dropout, or another batch), so its "
                "norm is measured again: give both the same loss to save a backward pass"
            )
        return self._measured if same else None

    def _note_overflow(self, overflow: bool) -> None:
        if self.loss_scaler is not None:
            self.loss_scaler.has_overflow_serial = overflow

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resume needs: the optimizer's state, and the engine's (loss scale, counts) as ``"engine"``."""
        return {**super().state_dict(), "engine": self.engine.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` gave. Of one that lomo-optim saved, which has no state, only the learning rate is used."""
        groups = state_dict["param_groups"]
        if not all("rounding" in group for group in groups):
            _logger.warning(
                "this optimizer state was saved by lomo-optim, which saves none of its moments: only the learning rate is taken over"
            )
            for mine, saved in zip(self.param_groups, groups, strict=True):
                mine["lr"] = float(saved["lr"])
            return
        super().load_state_dict(state_dict)
        if "engine" in state_dict:
            self.engine.load_state_dict(state_dict["engine"])
        self._forget()


class Lomo(_Door, _Lomo):
    """``lomo_optim.Lomo`` on lowtide; see :class:`_Door` for its calls.

    Args:
        model: what is trained, all its parameters that require a gradient. It is fused with this optimizer.
        lr: learning rate, until :meth:`fused_backward` is given another.
        clip_grad_norm: largest norm of all gradients together; call :meth:`grad_norm` before :meth:`fused_backward`.
        clip_grad_value: largest absolute value of an element of a gradient; 0 or less for none.
        weight_decay: decoupled, as a multiple of the learning rate.
        loss_scale_args: of the loss scale of float16 weights: ``init_scale``, ``scale_factor``, ``scale_window``, ``min_scale``.
            Others are left out with a warning.

    Raises:
        ValueError, TypeError, RuntimeError: what :func:`lowtide.fuse` refuses.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-3,
        clip_grad_norm: float | None = None,
        clip_grad_value: float | None = None,
        weight_decay: float = 0.0,
        loss_scale_args: Mapping[str, Any] | None = None,
    ) -> None:
        scale = _scale_from_arguments(model, loss_scale_args or {})
        _Lomo.__init__(self, _floating(model), lr=lr, weight_decay=weight_decay)
        self._join(model, clip_grad_norm, clip_grad_value, scale)


class AdaLomo(_Door, _AdaLomo):
    """``lomo_optim.AdaLomo`` on lowtide, on any device; see :class:`_Door` for its calls.

    Args:
        model: as in :class:`Lomo`.
        lr: as in :class:`Lomo`.
        loss_scale: where the dynamic loss scale of float16 weights begins; other weights need none.
        eps: added to the squared gradient, and the smallest root mean square of a parameter that its step is scaled with.
        clip_threshold: largest root mean square of an update.
        decay_rate: exponent of the averaging schedule.
        clip_grad_norm: as in :class:`Lomo`.
        clip_grad_value: as in :class:`Lomo`.
        weight_decay: decoupled, as a multiple of the scaled learning rate.

    Raises:
        ValueError, TypeError, RuntimeError: what :func:`lowtide.fuse` refuses.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-3,
        loss_scale: float | None = _DEFAULT_LOSS_SCALE,
        eps: tuple[float, float] = (1e-30, 1e-3),
        clip_threshold: float = 1.0,
        decay_rate: float = -0.8,
        clip_grad_norm: float | None = None,
        clip_grad_value: float | None = None,
        weight_decay: float = 0.0,
    ) -> None:
        if loss_scale not in (None, 0, _DEFAULT_LOSS_SCALE) and not _has_float16(model):
            _warn_once("loss_scale means nothing here: only float16 weights need one, and theirs is dynamic")
        scale = _scale_from_arguments(model, {"init_scale": loss_scale or _DEFAULT_LOSS_SCALE})
        _AdaLomo.__init__(
            self,
            _floating(model),
            lr=lr,
            eps=eps[0],
            param_scale_min=eps[1],
            clip_threshold=clip_threshold,
            decay_rate=decay_rate,
            weight_decay=weight_decay,
        )
        self._join(model, clip_grad_norm, clip_grad_value, scale)


def _floating(model: nn.Module) -> list[nn.Parameter]:
    """Its parameters, without those of a quantised base, which are frozen integers."""
    return [param for param in model.parameters() if param.is_floating_point()]


def _stop_checkpointing(model: Any) -> None:
    """Of transformers, which newer versions call activation checkpointing."""
    stop = getattr(model, "activation_checkpointing_disable", None) or getattr(
        model, "gradient_checkpointing_disable", None
    )
    if stop is not None and any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        _warn_once("gradient checkpointing was switched off: lowtide recomputes the layers of the model itself")
        stop()


def _has_float16(model: nn.Module) -> bool:
    return any(param.dtype == torch.float16 for param in model.parameters() if param.requires_grad)


def _scale_from_arguments(model: nn.Module, arguments: Mapping[str, Any]) -> LossScale | None:
    """Our loss scale with the numbers of the public scaler, for float16 weights only."""
    unknown = sorted(set(arguments) - set(_SCALER_ARGUMENTS))
    if unknown:
        _warn_once(f"{', '.join(unknown)} of loss_scale_args means nothing here and is left out")
    if not _has_float16(model):
        return None
    factor, initial = float(arguments.get("scale_factor", 2.0)), float(arguments.get("init_scale", 2.0**16))
    return LossScale(
        initial,
        growth_factor=factor,
        backoff_factor=1.0 / factor,
        growth_interval=int(arguments.get("scale_window", 200)),
        smallest=min(float(arguments.get("min_scale", 1.0)), initial),
        largest=max(2.0**24, initial),
    )


@functools.cache
def _warn_once(message: str) -> None:
    _logger.warning(message)
