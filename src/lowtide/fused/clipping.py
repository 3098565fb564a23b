"""Norms and clipping of gradients that are never stored together.

The global norm is accumulated in the hooks, one zero-dimensional tensor a parameter, on the parameter's device; it is read
only when somebody asks. Clipping by that norm needs it before the first update, so the engine runs the backward pass
twice over the same graph: once to measure, once to update (LOMO paper, section 3.3).
"""

from __future__ import annotations

import torch
from torch import Tensor

# Elements that are converted to float32 at a time on a CPU, where a 16-bit norm would be rounded to 16 bits.
_SLICE_NUMEL = 2**18


class GradNorm:
    """The 2-norm of all gradients of one backward pass, collected tensor by tensor without a host synchronisation.

    Args:
        value: the norm, where it is known without measuring (NaN for a pass that did not take place).
    """

    def __init__(self, value: float | None = None) -> None:
        self._norms: list[Tensor] = []
        self._value = value

    def add(self, grad: Tensor) -> None:
        """Take in one complete gradient, any shape; nothing to do if the norm is known already."""
        if self._value is not None:
            return
        if grad.dtype in (torch.bfloat16, torch.float16):
            self._norms.append(_norm_16bit(grad))
        else:
            self._norms.append(torch.linalg.vector_norm(grad))

    def value(self) -> float:
        """The norm over everything added; reading it waits for the device. 0.0 if nothing was added."""
        if self._value is None:
            device = self._norms[0].device if self._norms else torch.device("cpu")
            norms = [norm.to(device, torch.float32) for norm in self._norms]
            self._value = float(torch.linalg.vector_norm(torch.stack(norms))) if norms else 0.0
        return self._value


def _norm_16bit(grad: Tensor) -> Tensor:
    if grad.device.type != "cpu" or not grad.is_contiguous() or grad.numel() <= _SLICE_NUMEL:
        return torch.linalg.vector_norm(grad, dtype=torch.float32)
    norms = [torch.linalg.vector_norm(piece, dtype=torch.float32) for piece in grad.view(-1).split(_SLICE_NUMEL)]
    return torch.linalg.vector_norm(torch.stack(norms))


def clip_coefficient(total_norm: float, max_norm: float) -> float:
    """What every gradient is multiplied with: ``min(1, max_norm / (total_norm + 1e-6))``, as in torch."""
    return min(1.0, max_norm / (total_norm + 1e-6))


class Clip:
    """Clamps by value, then multiplies by the coefficient of the norm; what the engine hands to an update rule.

    Args:
        value: every element is clamped to [-value, value], or None.
        coefficient: factor from clipping by norm, 1.0 for none.
    """

    def __init__(self, value: float | None, coefficient: float = 1.0) -> None:
        self.value, self.coefficient = value, coefficient

    def __call__(self, grad: Tensor) -> Tensor:
        if self.value is not None:
            grad = grad.clamp_(-self.value, self.value)
        return grad if self.coefficient == 1.0 else grad.mul_(self.coefficient)
