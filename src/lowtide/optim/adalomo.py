"""AdaLomo: an adaptive rule whose state is two vectors a matrix (arXiv 2310.10195, algorithm 1).

The second moment is factored over the last two dimensions as in Adafactor (Shazeer & Stern 2018, arXiv 1804.04235):
R holds a running mean of g^2 over each row, C over each column, and R C^T / mean(R) stands for the full moment. The
update is normalised to a root mean square of at most ``clip_threshold`` and scaled by that of the parameter. Where ranks hold some
rows each of a parameter, the means over it are made of their sums: two small collective calls.

Shape letters: L = product of all dimensions before the last two, M = rows, N = columns; l and m of them are here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from . import kernels
from .adalomo_slices import FactoredSlices
from .base import SIXTEEN_BIT, SummedOptimizer, compute_dtype, prepared
from .prepare import Prepare
from .rounding import paired_slices, slice_numel
from .shards import is_sharded, like_param, local_part
from .sliced import Pieces
from .squares import slices_of, sum_of_squares, sums_by_row_and_column, weighted_sums_by_row

_ROW, _COL = "exp_avg_sq_row", "exp_avg_sq_col"  # their names in the state


class AdaLomo(SummedOptimizer):
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

    def _steps(
        self, param: Tensor, grad: Tensor, group: dict[str, Any], prepare: Prepare | None
    ) -> Iterator[list[Tensor]]:
        if param.numel() == 0:
            return
        state = self.state[param]
        if "step" not in state:
            self._init_state(param, state)
        state["step"] += 1
        beta = 1.0 - state["step"] ** group["decay_rate"]
        pieces = (_Factored if param.dim() >= 2 else _Full)(param, local_part(grad), state, prepare)
        yield from pieces.update_moments(beta, group["eps"])
        sums = pieces.sums_of_squares()
        yield list(sums)
        update_scale, decay = _scales(sums, param.numel(), group)
        writer = self._writer(param, group, state["step"]) if param.dtype in SIXTEEN_BIT else None
        fast = None if writer is None else kernels.chosen(pieces.param, pieces.grad)
        if writer is not None and fast is not None:
            options = {} if prepare is None else prepare.kernel_options
            matrices, grads, row, col = pieces.factors()
            fast.adalomo_step(
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

    may_keep_gradients = False
    num_slice_walks = 3

    def update_slices(self, param: Tensor, pieces: Pieces, group: dict[str, Any]) -> None:
        """See :class:`FusibleOptimizer`."""
        state = self.state[param]
        if "step" not in state:
            self._init_state(param, state)
        step = state["step"] + 1
        slices = FactoredSlices(param, pieces, state[_ROW], state[_COL])
        if not slices.update_moments(1.0 - step ** group["decay_rate"], group["eps"]):
            return
        state["step"] = step
        update_scale, decay = _scales(slices.sums_of_squares(), param.numel(), group)
        slices.apply(update_scale, decay, self._writer(param, group, step) if param.dtype in SIXTEEN_BIT else None)

    def _init_state(self, param: Tensor, state: dict[str, Any]) -> None:
        local = local_part(param)

        def zeros(entry: str, local_shape: Sequence[int], shape: Sequence[int]) -> Tensor:
            found = torch.zeros(local_shape, dtype=compute_dtype(param), device=local.device)
            return like_param(param, found, shape) if self.state_is_sharded(param, entry, torch.Size(shape)) else found

        state["step"] = 0
        if param.dim() >= 2:
            state[_ROW] = zeros(_ROW, local.shape[:-1], param.shape[:-1])
            col_shape = (*param.shape[:-2], param.shape[-1])
            state[_COL] = zeros(_COL, col_shape if param.dim() == 2 else (local.shape[0], *col_shape[1:]), col_shape)
        else:
            state["exp_avg_sq"] = zeros("exp_avg_sq", local.shape, param.shape)

    def state_is_sharded(self, param: Tensor, entry: str, shape: torch.Size) -> bool:
        """See :class:`FusibleOptimizer`. A matrix has one mean for every column over all rows, which every rank keeps."""
        if entry == _ROW or (entry == _COL and param.dim() > 2):
            return is_sharded(param)
        return entry != _COL and super().state_is_sharded(param, entry, shape)


def _scales(sums: Sequence[Tensor], numel: int, group: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
    """(What the update is multiplied with, what the weight is multiplied with before) from the two sums of squares."""
    # They stay tensors on the device: reading them would make the host wait once a parameter.
    update_rms, param_rms = ((square / numel).sqrt_() for square in sums)
    lr = group["lr"] * param_rms.clamp_(min=group["param_scale_min"])
    decay = 1.0 - lr * group["weight_decay"] if group["weight_decay"] else None
    return lr / (update_rms / group["clip_threshold"]).clamp_(min=1.0), decay


class _Full:
    """A parameter with fewer than two dimensions: one second moment an element."""

    def __init__(self, param: Tensor, grad: Tensor, state: dict[str, Any], prepare: Prepare | None) -> None:
        self.param, self.moment = local_part(param), local_part(state["exp_avg_sq"])
        self.grad, self.prepare = grad, prepare
        self.numel = slice_numel(param.device)

    def _slices(self) -> Iterator[tuple[Tensor, Tensor, Tensor, int]]:
        for param, grad, offset in paired_slices(self.param, self.grad, self.numel):
            moment = self.moment if param is self.param else self.moment[offset : offset + param.numel()]
            yield param, prepared(grad, self.moment.dtype, self.prepare), moment, offset

    def update_moments(self, beta: float, eps: float) -> Iterator[list[Tensor]]:
        for _, grad, moment, _ in self._slices():
            moment.mul_(beta).add_(grad.square().add_(eps), alpha=1.0 - beta)
            del grad  # a generator keeps what it names
        yield from ()

    def sums_of_squares(self) -> tuple[Tensor, Tensor]:
        """(of the update, of the parameter), over the rows that are here."""
        update_sum = torch.zeros((), dtype=self.moment.dtype, device=self.param.device)
        param_sum = torch.zeros_like(update_sum)
        for param, grad, moment, _ in self._slices():
            update_sum += (grad.square() / moment).sum()
            param_sum += param.to(moment.dtype).square().sum()
        return update_sum, param_sum

    def factors(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """(parameter, gradient, None, what each element of it is multiplied with)."""
        return self.param, self.grad, None, self.moment.rsqrt()

    def updates(self) -> Iterator[tuple[Tensor, Tensor, int]]:
        for param, grad, moment, offset in self._slices():
            yield param, grad * moment.rsqrt(), offset


class _Factored:
    """A parameter with two or more dimensions, seen as L matrices of M x N, of which m rows of one or l whole ones are here."""

    def __init__(self, param: Tensor, grad: Tensor, state: dict[str, Any], prepare: Prepare | None) -> None:
        self.param, self.grad, self.prepare = local_part(param), grad, prepare
        cols = param.shape[-1]
        self.rows = param.shape[-2]  # of a whole matrix
        rows = self.param.shape[-2]  # that are here
        count = self.param.shape[:-2].numel()
        # Strides that do not merge into [l, m, N] (channels-last convolutions) are worked on in a copy.
        self.matrices = self.param.reshape(count, rows, cols)
        self.copied = self.matrices.data_ptr() != self.param.data_ptr()
        self.grads = grad.reshape(count, rows, cols)
        self.row = local_part(state[_ROW]).view(count, rows)
        self.col = local_part(state[_COL]).view(count, cols)
        self.parts_of_matrices = rows != self.rows or (is_sharded(param) and param.dim() == 2)
        self.row_mean = self.row  # replaced in update_moments

    def update_moments(self, beta: float, eps: float) -> Iterator[list[Tensor]]:
        by_row, col_sum = sums_by_row_and_column(self.grads, self.row.dtype, self.prepare, eps)
        self.row.mul_(beta).add_(by_row.div_(self.col.shape[1]), alpha=1.0 - beta)
        if self.parts_of_matrices:
            row_sum = self.row.sum(dim=1, keepdim=True)
            yield [col_sum, row_sum]
            self.row_mean = row_sum / self.rows
        else:
            self.row_mean = self.row.mean(dim=1, keepdim=True)
        self.col.mul_(beta).add_(col_sum, alpha=(1.0 - beta) / self.rows)

    def sums_of_squares(self) -> tuple[Tensor, Tensor]:
        """(of the update, of the parameter), over the rows that are here."""
        # u^2 summed along a row is a product of g^2 with the reciprocal column moments: no u is made for it.
        by_row = weighted_sums_by_row(self.grads, self.col.reciprocal(), self.prepare)
        update_sum = by_row.mul_(self.row_mean).div_(self.row).sum()
        return update_sum, sum_of_squares(self.matrices, self.row.dtype)

    def factors(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """(parameter [l, m, N], gradient [l, m, N], what each row [l, m] and each column [l, N] is multiplied with)."""
        row = (self.row / self.row_mean).rsqrt_()
        return self.matrices, self.grads, row, self.col.rsqrt()

    def updates(self) -> Iterator[tuple[Tensor, Tensor, int]]:
        _, _, row, col = self.factors()
        assert row is not None
        row, col = row.unsqueeze(-1), col.unsqueeze(1)
        _, rows, cols = self.matrices.shape
        for where in slices_of(self.matrices.shape, self.matrices.device):
            update = prepared(self.grads[where], self.row.dtype, self.prepare) * row[where]
            yield self.matrices[where], update.mul_(col[where[0]]), (where[0].start * rows + where[1].start) * cols
        if self.copied:
            self.param.copy_(self.matrices.view(self.param.shape))
