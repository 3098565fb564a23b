"""What every update rule shares: a torch optimizer that can also step one parameter at a time.

A rule implements :meth:`FusibleOptimizer.update_param`. Everything that steps goes through it: the ordinary ``step()``,
and the fused engine, which calls it the moment a gradient is complete. So both do the same arithmetic by construction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .rounding import ROUNDINGS, mix_key, round_stochastic_

# Applied to a float32 copy of each slice of a gradient, in place allowed: unscaling and clipping by the engine.
Prepare = Callable[[Tensor], Tensor]

SIXTEEN_BIT = (torch.bfloat16, torch.float16)


class FusibleOptimizer(Optimizer):
    """Base of lowtide's optimizers. Use :class:`Lomo`, :class:`AdaLomo` or :class:`PerParameter`.

    Args:
        params: parameters or parameter groups, as in torch.
        defaults: the options of the rule; ``lr``, ``weight_decay``, ``rounding`` and ``rounding_seed`` are checked here.

    Raises:
        ValueError: an option is out of range.
        TypeError: a parameter is not a real floating-point tensor.
    """

    # Set by the engine for as long as this optimizer is fused: called by step() with this optimizer, does no arithmetic.
    _close_step: Callable[[Optimizer], None] | None = None

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any]) -> None:
        self._param_index: dict[Tensor, int] = {}
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as in torch; its options are checked."""
        if self._close_step is not None:
            raise RuntimeError(
                "this optimizer is fused, and a new group would never be updated: fuse the model again after adding it"
            )
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        self._check_group(group)
        for param in group["params"]:
            if not param.is_floating_point():
                raise TypeError(f"{type(self).__name__} updates real floating-point tensors, got one of {param.dtype}")
        self._number_params()

    def _check_group(self, group: dict[str, Any]) -> None:
        for name in ("lr", "weight_decay"):
            if group.get(name, 0.0) < 0.0:
                raise ValueError(f"{name} must not be negative, got {group[name]}")
        if group["rounding"] is not None and group["rounding"] not in ROUNDINGS:
            raise ValueError(f"rounding must be one of {', '.join(ROUNDINGS)} or None, got {group['rounding']!r}")

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._number_params()

    def _number_params(self) -> None:
        params = (param for group in self.param_groups for param in group["params"])
        self._param_index = {param: index for index, param in enumerate(params)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a complete state. Float32 moments of 16-bit parameters stay float32, where torch would cast them."""
        super().load_state_dict(state_dict)
        params = [param for group in self.param_groups for param in group["params"]]
        saved_ids = [index for group in state_dict["param_groups"] for index in group["params"]]
        for saved_id, param in zip(saved_ids, params, strict=True):
            for name, value in state_dict["state"].get(saved_id, {}).items():
                loaded = self.state[param][name]
                if isinstance(value, Tensor) and value.dtype != loaded.dtype:
                    self.state[param][name] = value.detach().clone().to(loaded.device)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        # torch's GradScaler asks for this before it steps an optimizer: the earliest moment at which it shows itself.
        if self._close_step is not None:
            raise RuntimeError(
                "torch.amp.GradScaler cannot be used with a fused backward: the weights were already updated, with scaled "
                "gradients. Reload them, train in bfloat16 (which needs no scaler) and call engine.backward(loss)."
            )
        return False

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient; fused, only close the step (the update is already done)."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._close_step is not None:
            self._close_step(self)
            return loss
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self.update_param(param, param.grad, group)
        return loss

    def update_param(self, param: Tensor, grad: Tensor, group: dict[str, Any], prepare: Prepare | None = None) -> None:
        """Update one parameter in place from its gradient. Called without grad mode.

        Args:
            param: the parameter, any shape, float32/float64/bfloat16/float16.
            grad: its gradient, same shape; same dtype or float32. Left as it is unless ``prepare`` is given.
            group: the parameter group it belongs to (``lr`` and the other options are read now, so schedulers work).
            prepare: applied to every float32 piece of the gradient before it is used (unscaling, clipping).
        """
        raise NotImplementedError

    def _rounding(self, param: Tensor, group: dict[str, Any]) -> str:
        return group["rounding"] or "stochastic"

    def _noise_key(self, param: Tensor, group: dict[str, Any], step: int) -> int:
        return mix_key(group["rounding_seed"], self._param_index[param], step)

    def _writer(self, param: Tensor, group: dict[str, Any], step: int) -> Callable[[Tensor, Tensor, int], None]:
        """How float32 results get into this 16-bit parameter: a function of (target slice, float32 slice, offset)."""
        if self._rounding(param, group) == "nearest":
            return _round_nearest_
        key = self._noise_key(param, group, step)
        return lambda target, value, offset: round_stochastic_(target, value, key, offset)


def _round_nearest_(target: Tensor, value: Tensor, offset: int) -> None:
    target.copy_(value)


def compute_dtype(param: Tensor) -> torch.dtype:
    """The dtype a rule computes in: float32 for 16-bit parameters, else the parameter's own."""
    return torch.float32 if param.dtype in SIXTEEN_BIT else param.dtype


def prepared(grad: Tensor, dtype: torch.dtype, prepare: Prepare | None) -> Tensor:
    """A gradient slice in the dtype that the rule computes in, unscaled and clipped; the gradient itself is not changed."""
    return grad.to(dtype) if prepare is None else prepare(grad.to(dtype, copy=True))
