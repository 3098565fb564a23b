"""Norms and clipping of gradients that are never stored together.

The global norm is accumulated in the hooks, one zero-dimensional tensor a parameter, on the parameter's device; it is read
only when somebody asks. Clipping by that norm needs it before the first update, so the engine runs the backward pass
twice over the same graph: once to measure, once to update (LOMO paper, section 3.3).

:class:`AdaptiveClip` needs no second pass: it holds each gradient against a running norm of its own.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..optim.base import SIXTEEN_BIT
from ..optim.kernels import native

# Elements that are converted to float32 at a time on a CPU, where a 16-bit norm would be rounded to 16 bits.
_SLICE_NUMEL = 2**18
vector_norm = torch.linalg.vector_norm


class GradNorm:
    """The 2-norm of all gradients of one backward pass, collected tensor by tensor without a host synchronisation.

    Args:
        value: the norm, where it is known without measuring (NaN for a pass that did not take place).
        inv_scale: reciprocal of the loss scale: the gradients that are added are larger by the scale.
    """

    def __init__(self, value: float | None = None, inv_scale: float = 1.0) -> None:
        self._norms: list[Tensor] = []  # on devices that the host does not wait for
        self.sum_squares = 0.0  # of those that the host has read
        self._value, self._inv_scale = value, inv_scale

    @property
    def is_known(self) -> bool:
        """It was given or has been read: nothing is to be added."""
        return self._value is not None

    def add(self, grad: Tensor, add: bool = True) -> Tensor:
        """Take in one complete gradient, any shape; returns its own norm, float32 and zero-dimensional on its device.

        Args:
            grad: the gradient.
            add: False for its own norm only.
        """
        norm = _norm(grad)
        if self._inv_scale != 1.0:
            norm = norm * self._inv_scale
        if add:
            self._norms.append(norm)
        return norm

    def read(self, grad: Tensor, add: bool = True) -> float:
        """The same, where nothing has to be waited for: returns the gradient's own norm as a number."""
        norm = (_norm(grad) if grad.dtype in SIXTEEN_BIT else vector_norm(grad)).item() * self._inv_scale
        if add:
            self.sum_squares += norm * norm
        return norm

    def take(self, norm: float | Tensor) -> None:
        """Take in the norm of one gradient that was measured elsewhere: a number, or zero-dimensional and not read."""
        if isinstance(norm, Tensor):
            self._norms.append(norm)
        else:
            self.sum_squares += norm * norm

    def value(self) -> float:
        """The norm over everything added; reading it waits for the device. 0.0 if nothing was added."""
        if self._value is None:
            squares = self.sum_squares
            if self._norms:
                device = self._norms[0].device
                norms = [norm.to(device, torch.float32) for norm in self._norms]
                squares += float(torch.linalg.vector_norm(torch.stack(norms))) ** 2
            self._value = math.sqrt(squares)
        return self._value


def _norm(grad: Tensor) -> Tensor:
    if grad.dtype not in SIXTEEN_BIT:
        return torch.linalg.vector_norm(grad)
    if native.takes(grad):
        return torch.tensor(native.norm(grad), dtype=torch.float32)
    if grad.device.type != "cpu" or not grad.is_contiguous() or grad.numel() <= _SLICE_NUMEL:
        return torch.linalg.vector_norm(grad, dtype=torch.float32)
    norms = [torch.linalg.vector_norm(piece, dtype=torch.float32) for piece in grad.view(-1).split(_SLICE_NUMEL)]
    return torch.linalg.vector_norm(torch.stack(norms))


def clip_coefficient(total_norm: float, max_norm: float) -> float:
    """What every gradient is multiplied with: ``min(1, max_norm / (total_norm + 1e-6))``, as in torch."""
    return min(1.0, max_norm / (total_norm + 1e-6))


class AdaptiveClip:
    """Clips each gradient to a little more than the running norm of its own parameter, in one pass.

    AdaGC (Wang et al., arXiv 2502.11034): ``c = min(1, ratio * running / norm)``, then ``running = decay * running +
    (1 - decay) * c * norm``. In the warm-up the gradients are clipped by their global norm, exactly and in two passes, and
    the running norm is the smallest clipped norm so far; so it keeps the size that the global bound gave it. A parameter
    whose gradients have all been zero has no running norm yet, and its first gradient passes as it is.

    Args:
        warmup_steps: steps that are clipped by the global norm.
        ratio: how far above its running norm a gradient may be; 1.05 is the paper's.
        decay: of the running norm; 0.98 is the paper's.
    """

    def __init__(self, warmup_steps: int, ratio: float = 1.05, decay: float = 0.98) -> None:
        self.warmup_steps, self.ratio, self.decay = warmup_steps, ratio, decay
        self.num_warmup_steps = 0  # taken so far
        self._running: dict[Tensor, Tensor] = {}
        self._measured: dict[Tensor, Tensor] = {}

    @property
    def warming_up(self) -> bool:
        """The next step is one that is clipped by the global norm."""
        return self.num_warmup_steps < self.warmup_steps

    def measured(self, param: Tensor, norm: Tensor | float) -> None:
        """In the first pass of a warm-up step: the norm of one parameter's gradient, a number or zero-dimensional."""
        self._measured[param] = torch.as_tensor(norm, dtype=torch.float32)

    def warm_up(self, coefficient: float) -> None:
        """After that pass: what its gradients will be multiplied with."""
        self.num_warmup_steps += 1
        for param, norm in self._measured.items():
            clipped, before = norm * coefficient, self._running.get(param)
            if before is not None:
                clipped = torch.where(before > 0, torch.minimum(before, clipped), clipped)
            self._running[param] = clipped
        self._measured = {}

    def forget_measured(self) -> None:
        """That pass came to nothing."""
        self._measured = {}

    def coefficient(self, param: Tensor, norm: Tensor | float) -> Tensor:
        """What this gradient is multiplied with; zero-dimensional, on its device, at most 1.

        Args:
            param: the parameter.
            norm: of its complete gradient, a number or zero-dimensional float32; one that is not finite does not count.
        """
        norm = torch.as_tensor(norm, dtype=torch.float32)
        running = self._running.get(param)
        if running is None:
            running = self._running[param] = torch.zeros_like(norm)
        known = (running > 0) & (norm > 0)
        coefficient = torch.where(known, (self.ratio * running / norm).clamp(max=1.0), 1.0)
        moved = torch.where(running > 0, torch.lerp(running, norm * coefficient, 1.0 - self.decay), norm)
        running.copy_(torch.where(torch.isfinite(norm), moved, running))
        return coefficient

    def state_dict(self, names: dict[Tensor, str]) -> dict[str, Any]:
        """Running norms by parameter name, as plain numbers."""
        running = {names[param]: float(value) for param, value in self._running.items()}
        return {"num_warmup_steps": self.num_warmup_steps, "running_norms": running}

    def load_state_dict(self, state: dict[str, Any], names: dict[Tensor, str]) -> None:
        """Take over what :meth:`state_dict` gave.

        Raises:
            ValueError: it names a parameter that this model has not.
        """
        params = {name: param for param, name in names.items()}
        unknown = sorted(set(state["running_norms"]) - set(params))
        if unknown:
            raise ValueError(f"the saved running norms name parameters that this model does not train: {unknown[:3]}")
        self.num_warmup_steps = state["num_warmup_steps"]
        self._running = {
            params[name]: torch.tensor(value, dtype=torch.float32, device=params[name].device)
            for name, value in state["running_norms"].items()
        }
