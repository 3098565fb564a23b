"""Lomo: stochastic gradient descent without momentum, the rule of the LOMO paper (arXiv 2306.09782, section 3.1).

For one parameter p with gradient g: ``p *= 1 - lr * weight_decay; p -= lr * g``. In float32 without weight decay it is
bit-identical to ``torch.optim.SGD``. It has no state.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from .base import SIXTEEN_BIT, FusibleOptimizer, Prepare, compute_dtype, prepared
from .rounding import paired_slices, slice_numel


class Lomo(FusibleOptimizer):
    """SGD whose update can be fused into the backward pass, so that no gradient is stored.

    Args:
        params: parameters or parameter groups, as in torch.
        lr: learning rate. Plain SGD wants larger rates than Adam: 1e-2 to 5e-2 is the paper's range, with clipping.
        weight_decay: decoupled weight decay per step, as a multiple of ``lr``.
        rounding: how float32 results are written into 16-bit weights: ``"stochastic"`` (the default there: unbiased) or
            ``"nearest"`` (loses small updates). Without effect on float32 weights.
        rounding_seed: seed of the stochastic rounding.

    Raises:
        ValueError: an option is out of range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-2,
        *,
        weight_decay: float = 0.0,
        rounding: str | None = None,
        rounding_seed: int = 0,
    ) -> None:
        defaults = {"lr": lr, "weight_decay": weight_decay, "rounding": rounding, "rounding_seed": rounding_seed}
        super().__init__(params, defaults)

    def update_param(self, param: Tensor, grad: Tensor, group: dict[str, Any], prepare: Prepare | None = None) -> None:
        """See :meth:`FusibleOptimizer.update_param`."""
        lr, weight_decay = group["lr"], group["weight_decay"]
        if param.dtype in SIXTEEN_BIT:
            self._update_16bit(param, grad, group, prepare)
            return
        decay = 1.0 - lr * weight_decay
        if prepare is None:
            if weight_decay:
                param.mul_(decay)
            param.add_(grad, alpha=-lr)
            return
        for param_slice, grad_slice, _ in paired_slices(param, grad, slice_numel(param.device)):
            if weight_decay:
                param_slice.mul_(decay)
            param_slice.add_(prepared(grad_slice, compute_dtype(param), prepare), alpha=-lr)

    def _update_16bit(self, param: Tensor, grad: Tensor, group: dict[str, Any], prepare: Prepare | None) -> None:
        lr, weight_decay = group["lr"], group["weight_decay"]
        step = 0
        if self._rounding(param, group) == "stochastic":  # the noise must differ from step to step, also after a resume
            state = self.state[param]
            step = state["step"] = state.get("step", 0) + 1
        write = self._writer(param, group, step)
        dtype = compute_dtype(param)
        for param_slice, grad_slice, offset in paired_slices(param, grad, slice_numel(param.device)):
            value = param_slice.to(dtype)
            if weight_decay:
                value.mul_(1.0 - lr * weight_decay)
            value.add_(grad_slice if prepare is None else prepared(grad_slice, dtype, prepare), alpha=-lr)
            write(param_slice, value, offset)
