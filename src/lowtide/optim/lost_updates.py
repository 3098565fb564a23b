"""How many updates leave no trace in 16-bit weights, by looking at a few elements of a few parameters.

An update that is smaller than half the distance to the next 16-bit number changes nothing when it is rounded to nearest. If
that happens to most of them, the learning rate is too small for the dtype. With stochastic rounding an update that leaves
its weight alone is not lost, because others move theirs by a whole step; there the share says how coarse the steps are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_SAMPLE_NUMEL = 256  # elements looked at in a parameter; in a matrix so many rows of so many columns:
_SAMPLE_SIDE = 16
_ONE_IN = 8  # parameters, so that the cost is a fraction of a kernel launch a parameter
_MEMORY = 0.9  # what is left of a count after one step: the share is that of the last ten steps or so


class LostUpdates:
    """Counts, on the devices where the parameters are; nothing is read until somebody asks."""

    def __init__(self) -> None:
        self._counts: dict[torch.device, Tensor] = {}  # [unchanged, updated]
        self._calls = 0

    def before(self, param: Tensor, grad: Tensor | None) -> Tensor | None:
        """Before an update: a sample of the weights if this parameter's turn has come, else None.

        Args:
            param: the parameter.
            grad: its gradient; None if nobody has made it: then comes :meth:`after_unseen`.
        """
        self._calls += 1
        # A multiplicative hash, not the remainder: a model whose number of parameters divides by it would show the same ones.
        if (self._calls * 0x9E3779B1 & 0xFFFFFFFF) >> 16 & (_ONE_IN - 1):
            return None
        if not (param.is_contiguous() and (grad is None or grad.is_contiguous())) or param.numel() == 0:
            return None
        return _sample(param).clone()

    def after(self, before: Tensor, param: Tensor, grad: Tensor) -> None:
        """After the update: compare. Elements without a gradient were not updated and do not count."""
        self._count(before, param, _sample(grad) != 0)

    def after_unseen(self, before: Tensor, param: Tensor, grad_at: Callable[[slice, slice], Tensor]) -> None:
        """The same for the gradient of a matrix that nobody has made.

        Args:
            before: from :meth:`before`.
            param: the matrix.
            grad_at: gives elements of the gradient, for some rows and columns.
        """
        self._count(before, param, grad_at(*_places(param)) != 0)

    def _count(self, before: Tensor, param: Tensor, updated: Tensor) -> None:
        unchanged = updated & (_sample(param) == before)
        counts = torch.stack((unchanged.sum(), updated.sum())).to(torch.float32)
        if param.device in self._counts:
            self._counts[param.device].add_(counts)
        else:
            self._counts[param.device] = counts

    def close_step(self) -> None:
        """Let older counts fade."""
        for counts in self._counts.values():
            counts.mul_(_MEMORY)

    def state_dict(self) -> dict[str, Any]:
        """What a resume needs, as plain numbers. Waits for the device."""
        return {
            "calls": self._calls,
            "counts": {str(device): counts.tolist() for device, counts in self._counts.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave; counts of a device that is not there any more begin anew."""
        self._calls, self._counts = state["calls"], {}
        for name, counts in state["counts"].items():
            device = torch.device(name)
            if device.type == "cpu" or (device.type == "cuda" and (device.index or 0) < _num_gpus()):
                self._counts[device] = torch.tensor(counts, dtype=torch.float32, device=device)

    def share(self) -> float | None:
        """Updates that left their weight as it was, as a share of 1; None while nothing was sampled. Waits for the device."""
        unchanged, updated = 0.0, 0.0
        for counts in self._counts.values():
            values = counts.tolist()
            unchanged, updated = unchanged + values[0], updated + values[1]
        return unchanged / updated if updated else None


def _num_gpus() -> int:
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _sample(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    if tensor.dim() == 2:
        return tensor[_places(tensor)]
    flat = tensor.view(-1)
    return flat[:: max(1, flat.numel() // _SAMPLE_NUMEL)][:_SAMPLE_NUMEL]


def _places(matrix: Tensor) -> tuple[slice, slice]:
    """Rows and columns of a matrix that are looked at."""
    steps = [max(1, size // _SAMPLE_SIDE) for size in matrix.shape]
    rows, cols = (slice(0, step * _SAMPLE_SIDE, step) for step in steps)
    return rows, cols
