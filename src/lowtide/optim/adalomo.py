"""AdaLomo: an adaptive rule whose state is two vectors a matrix (arXiv 2310.10195, algorithm 1).

The second moment is factored over the last two dimensions as in Adafactor (Shazeer & Stern 2018, arXiv 1804.04235):
R holds a running mean of g^2 over each row, C over each column, and R C^T / mean(R) stands for the full moment. The
update is normalised to a root mean square of at most ``clip_threshold`` and scaled by that of the parameter.

Shape letters: L = product of all dimensions before the last two, M = rows, N = columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from . import kernels
from .base import SIXTEEN_BIT, FusibleOptimizer, compute_dtype, prepared
from .prepare import Prepare
from .rounding import paired_slices, slice_numel


class AdaLomo(FusibleOptimizer):
    """Adaptive learning rates per element at the memory cost of SGD; needs no tuning of clipping.

    For step t = 1, 2, ...: ``beta = 1 - t**decay_rate``; ``R = beta R + (1 - beta) mean_col(g^2 + eps)``;
    ``C = beta C + (1 - beta) mean_row(g^2 + eps)``; ``u = g / sqrt(R / mean(R)) / sqrt(C)``;
    ``u /= max(1, RMS(u) / clip_threshold)``; ``lr' = lr * max(param_scale_min, RMS(p))``;
    ``p *= 1 - lr' * weight_decay``; ``p -= lr' * u``. Parameters with fewer than two dimensions keep a full second moment.

    State per parameter: ``step`` (int) and float32 ``exp_avg_sq_row`` [..., M] and ``exp_avg_sq_col`` [..., N], or
    ``exp_avg_sq`` in the parameter's shape.

    Args:
        params: parameters or parameter groups, as in torch.
        lr: learning rate relative to the root mean square of each parameter; 5e-4 to 3e-3 is usual.
        eps: added to g^2, so that a zero gradient does not divide by zero.
        param_scale_min: smallest root mean square of a parameter that its step is scaled with.
        clip_threshold: largest root mean square of an update.
        decay_rate: exponent of the averaging schedule, between -1 and 0.
        weight_decay: decoupled weight decay, as a multiple of the scaled rate.
        rounding: as in :class:`Lomo`.
        rounding_seed: as in :class:`Lomo`.

    Raises:
        ValueError: an option is out of range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        *,
        eps: float = 1e-30,
        param_scale_min: float = 1e-3,
        clip_threshold: float = 1.0,
        decay_rate: float = -0.8,
        weight_decay: float = 0.0,
        rounding: str | None = None,
        rounding_seed: int = 0,
    ) -> None:
        defaults = {
            "lr": lr,
            "eps": eps,
            "param_scale_min": param_scale_min,
            "clip_threshold": clip_threshold,
            "decay_rate": decay_rate,
            "weight_decay": weight_decay,
            "rounding": rounding,
            "rounding_seed": rounding_seed,
        }
        super().__init__(params, defaults)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        if group["eps"] <= 0.0 or group["clip_threshold"] <= 0.0:
            raise ValueError(f"eps and clip_threshold must be positive, got {group['eps']}, {group['clip_threshold']}")
        if not -1.0 <= group["decay_rate"] < 0.0:
            raise ValueError(f"decay_rate must lie in [-1, 0), got {group['decay_rate']}")

    def _update(self, param: Tensor, grad: Tensor, group: dict[str, Any], prepare: Prepare | None) -> None:
        if param.numel() == 0:
            return
        state = self.state[param]
        if "step" not in state:
            self._init_state(param, state)
        state["step"] += 1
        beta = 1.0 - state["step"] ** group["decay_rate"]
        pieces = (_Factored if param.dim() >= 2 else _Full)(param, grad, state, prepare)
        pieces.update_moments(beta, group["eps"])
        update_rms, param_rms = pieces.root_mean_squares()
        # Both stay tensors on the device: reading them would make the host wait once a parameter.
        lr = group["lr"] * param_rms.clamp_(min=group["param_scale_min"])
        update_scale = lr / (update_rms / group["clip_threshold"]).clamp_(min=1.0)
        decay = 1.0 - lr * group["weight_decay"] if group["weight_decay"] else None
        writer = self._writer(param, group, state["step"]) if param.dtype in SIXTEEN_BIT else None
        if writer is not None and kernels.wanted(param, grad):
            options = {} if prepare is None else prepare.kernel_options
            matrices, grads, row, col = pieces.factors()
            kernels.adalomo_step(
                matrices, grads, row, col, update_scale, decay, **options, **writer.kernel_options(matrices)
            )
            return
        for param_slice, update, offset in pieces.updates():
            value = param_slice if writer is None else writer.read(param_slice, offset)
            if decay is not None:
                value.mul_(decay)
            value.sub_(update.mul_(update_scale))
            if writer is not None:
                writer.write(param_slice, value, offset)

    def _init_state(self, param: Tensor, state: dict[str, Any]) -> None:
        zeros: dict[str, Any] = {"dtype": compute_dtype(param), "device": param.device}
        state["step"] = 0
        if param.dim() >= 2:
            state["exp_avg_sq_row"] = torch.zeros(param.shape[:-1], **zeros)
            state["exp_avg_sq_col"] = torch.zeros((*param.shape[:-2], param.shape[-1]), **zeros)
        else:
            state["exp_avg_sq"] = torch.zeros(param.shape, **zeros)


class _Full:
    """A parameter with fewer than two dimensions: one second moment an element."""

    def __init__(self, param: Tensor, grad: Tensor, state: dict[str, Any], prepare: Prepare | None) -> None:
        self.param, self.moment = param, state["exp_avg_sq"]
        self.grad, self.prepare = grad, prepare
        self.numel = slice_numel(param.device)

    def _slices(self) -> Iterator[tuple[Tensor, Tensor, Tensor, int]]:
        for param, grad, offset in paired_slices(self.param, self.grad, self.numel):
            moment = self.moment if param is self.param else self.moment[offset : offset + param.numel()]
            yield param, prepared(grad, self.moment.dtype, self.prepare), moment, offset

    def update_moments(self, beta: float, eps: float) -> None:
        for _, grad, moment, _ in self._slices():
            moment.mul_(beta).add_(grad.square().add_(eps), alpha=1.0 - beta)

    def root_mean_squares(self) -> tuple[Tensor, Tensor]:
        update_sum = torch.zeros((), dtype=self.moment.dtype, device=self.param.device)
        param_sum = torch.zeros_like(update_sum)
        for param, grad, moment, _ in self._slices():
            update_sum += (grad.square() / moment).sum()
            param_sum += param.to(moment.dtype).square().sum()
        count = self.param.numel()
        return (update_sum / count).sqrt_(), (param_sum / count).sqrt_()

    def factors(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """(parameter, gradient, None, what each element of it is multiplied with)."""
        return self.param, self.grad, None, self.moment.rsqrt()

    def updates(self) -> Iterator[tuple[Tensor, Tensor, int]]:
        for param, grad, moment, offset in self._slices():
            yield param, grad * moment.rsqrt(), offset


class _Factored:
    """A parameter with two or more dimensions, seen as L matrices of M x N.

    Slices hold several whole matrices where they are small (experts, convolutions), else rows of one matrix.
    """

    def __init__(self, param: Tensor, grad: Tensor, state: dict[str, Any], prepare: Prepare | None) -> None:
        rows, cols = param.shape[-2:]
        self.param, self.prepare = param, prepare
        # Strides that do not merge into [L, M, N] (channels-last convolutions) are worked on in a copy.
        self.matrices = param.reshape(-1, rows, cols)
        self.copied = self.matrices.data_ptr() != param.data_ptr()
        self.grads = grad.reshape(-1, rows, cols)
        self.row = state["exp_avg_sq_row"].view(-1, rows)
        self.col = state["exp_avg_sq_col"].view(-1, cols)
        self.numel = slice_numel(param.device)

    def _slices(self) -> Iterator[tuple[tuple[slice, slice], Tensor]]:
        """((matrices, rows), float32 gradient [l, m, N]) in the order of the flattened parameter."""
        count, rows, cols = self.matrices.shape
        num_rows = max(1, min(rows, self.numel // cols))
        num_matrices = max(1, self.numel // (rows * cols)) if num_rows == rows else 1
        for matrix in range(0, count, num_matrices):
            for row in range(0, rows, num_rows):
                where = slice(matrix, matrix + num_matrices), slice(row, row + num_rows)
                yield where, prepared(self.grads[where], self.row.dtype, self.prepare)

    def update_moments(self, beta: float, eps: float) -> None:
        col_sum = torch.zeros_like(self.col)
        for where, grad in self._slices():
            squared = grad.square().add_(eps)
            self.row[where].mul_(beta).add_(squared.mean(dim=2), alpha=1.0 - beta)
            col_sum[where[0]] += squared.sum(dim=1)
        self.col.mul_(beta).add_(col_sum, alpha=(1.0 - beta) / self.matrices.shape[1])

    def root_mean_squares(self) -> tuple[Tensor, Tensor]:
        update_sum = torch.zeros((), dtype=self.row.dtype, device=self.row.device)
        param_sum = torch.zeros_like(update_sum)
        row_mean = self.row.mean(dim=1, keepdim=True)
        for where, grad in self._slices():
            # u^2 summed along a row is a product of g^2 with the reciprocal column moments: no u is made for it.
            by_row = grad.square().matmul(self.col[where[0]].reciprocal().unsqueeze(-1)).squeeze(-1)
            update_sum += by_row.mul_(row_mean[where[0]]).div_(self.row[where]).sum()
            param_sum += self.matrices[where].to(self.row.dtype).square().sum()
        count = self.param.numel()
        return (update_sum / count).sqrt_(), (param_sum / count).sqrt_()

    def factors(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """(parameter [L, M, N], gradient [L, M, N], what each row [L, M] and each column [L, N] is multiplied with)."""
        row = (self.row / self.row.mean(dim=1, keepdim=True)).rsqrt_()
        return self.matrices, self.grads, row, self.col.rsqrt()

    def updates(self) -> Iterator[tuple[Tensor, Tensor, int]]:
        _, _, row, col = self.factors()
        assert row is not None
        row, col = row.unsqueeze(-1), col.unsqueeze(1)
        _, rows, cols = self.matrices.shape
        for where, grad in self._slices():
            update = (grad * row[where]).mul_(col[where[0]])
            yield self.matrices[where], update, (where[0].start * rows + where[1].start) * cols
        if self.copied:
            self.param.copy_(self.matrices.view(self.param.shape))
