"""Lomo: stochastic gradient descent without momentum, the rule of the LOMO paper (arXiv 2306.09782, section 3.1).

For one parameter p with gradient g: ``p *= 1 - lr * weight_decay; p -= lr * g``. In float32 without weight decay it is
bit-identical to ``torch.optim.SGD``. It has no state, except that of the rounding of 16-bit weights: a counter of steps for
stochastic rounding, ``compensation`` for compensated.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from . import kernels
from .base import ROUNDING_STEP, SIXTEEN_BIT, FusibleOptimizer, compute_dtype, prepared
from .prepare import Prepare
from .rounding import paired_slices, slice_numel
from .shards import is_sharded, local_part
from .sliced import Pieces
from .writing import Writer

if TYPE_CHECKING:
    from .kernels.product import TiledProduct


class Lomo(FusibleOptimizer):
    """SGD whose update can be fused into the backward pass, so that no gradient is stored.

    Args:
        params: parameters or parameter groups, as in torch.
        lr: learning rate. Plain SGD wants larger rates than Adam: 1e-2 to 5e-2 is the paper's range, with clipping.
        weight_decay: decoupled weight decay per step, as a multiple of ``lr``.
        rounding: how float32 results are written into 16-bit weights: ``"stochastic"`` (the default there: unbiased),
            ``"compensated"`` (exact, at 2 more bytes a parameter) or ``"nearest"`` (loses small updates). Without effect on
            float32 weights.
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

    may_keep_gradients = False
    num_slice_walks = 1

    def _update(self, param: Tensor, grad: Tensor, group: dict[str, Any], prepare: Prepare | None) -> None:
        writer = self._writer(param, group) if param.dtype in SIXTEEN_BIT else None
        self._apply(local_part(param), local_part(grad), group, prepare, writer)

    @property
    def takes_products(self) -> bool:
        """See :class:`FusibleOptimizer`: unless somebody has changed the rule."""
        mine = all(getattr(type(self), name) is function for name, function in _RULE.items())
        return mine and not any(name in self.__dict__ for name in _RULE)

    def update_by_product(
        self, param: Tensor, product: TiledProduct, group: dict[str, Any], prepare: Prepare | None
    ) -> float | None:
        """See :class:`FusibleOptimizer`."""
        factor = 1.0 if prepare is None else prepare.factor
        if not self.takes_products or factor is None or is_sharded(param) or not kernels.native.takes(param):
            return None
        counts = self._rounding(group) != "compensated"
        before = self.lost_updates.before(param, None) if counts else None
        writer = self._writer(param, group)
        norm = self._apply_product(param, product, group, prepare, writer)
        if before is not None:
            self.lost_updates.after_unseen(before, param, product.at)
        return norm

    def update_slices(self, param: Tensor, pieces: Pieces, group: dict[str, Any]) -> None:
        """See :class:`FusibleOptimizer`: every slice is updated when it comes."""
        writer: Writer | None = None
        for rows, grad, prepare in pieces:
            if writer is None and param.dtype in SIXTEEN_BIT:
                begun = self.state[param].get(ROUNDING_STEP) if pieces.again else None
                writer = self._writer(param, group, begun)
            if not isinstance(grad, Tensor):
                assert writer is not None and isinstance(rows, slice)
                self._apply_product(param[rows], grad, group, prepare, writer.of_rows(rows, param.shape[1]))
                continue
            if isinstance(rows, Tensor) and self._apply_to_rows(param, rows, grad, group, prepare, writer):
                continue
            of_rows = None if writer is None else writer.of_rows(rows, param.shape[1])
            if isinstance(rows, slice):
                self._apply(param[rows], grad, group, prepare, of_rows)
                continue
            target = param.index_select(0, rows)
            self._apply(target, grad, group, prepare, of_rows)
            param.index_copy_(0, rows, target)
            if of_rows is not None:
                of_rows.put_back()

    def _apply_product(
        self, param: Tensor, product: TiledProduct, group: dict[str, Any], prepare: Prepare | None, writer: Writer
    ) -> float:
        """The update by a gradient that is made meanwhile; its 2-norm."""
        factor = 1.0 if prepare is None else prepare.factor
        assert factor is not None
        options = writer.kernel_options(param)
        return product.lomo_step(param, lr=group["lr"] * factor, decay=_decay(group), **options)

    def _apply_to_rows(
        self,
        param: Tensor,
        rows: Tensor,
        grad: Tensor,
        group: dict[str, Any],
        prepare: Prepare | None,
        writer: Writer | None,
    ) -> bool:
        """The update of some rows of a 16-bit matrix where they lie, by one kernel; False if there is none for it."""
        native = kernels.native
        on_cpu = grad.is_cpu and rows.is_cpu
        if writer is None or not (on_cpu and native.takes(param) and native.takes_grad(grad) and grad.is_contiguous()):
            return False
        if type(self)._apply is not Lomo._apply:  # somebody has changed the rule
            return False
        factor = 1.0 if prepare is None else prepare.factor
        options = {} if prepare is None or factor is not None else prepare.kernel_options
        options.update(writer.kernel_options(param), lr=group["lr"] * (1.0 if factor is None else factor))
        native.lomo_step(param, grad, decay=_decay(group), rows=rows.contiguous(), **options)
        return True

    def _apply(
        self, param: Tensor, grad: Tensor, group: dict[str, Any], prepare: Prepare | None, writer: Writer | None
    ) -> None:
        """The update of the rows that are here; ``writer`` for 16-bit ones."""
        factor = 1.0 if prepare is None else prepare.factor
        if factor is not None:
            prepare = None  # it goes into the learning rate
        step_size, decay = group["lr"] * (1.0 if factor is None else factor), _decay(group)
        if writer is not None:
            _apply_16bit(param, grad, prepare, step_size, decay, writer)
            return
        if prepare is None:
            if decay != 1.0:
                param.mul_(decay)
            param.add_(grad, alpha=-step_size)
            return
        for param_slice, grad_slice, _ in paired_slices(param, grad, slice_numel(param.device)):
            if decay != 1.0:
                param_slice.mul_(decay)
            param_slice.add_(prepared(grad_slice, compute_dtype(param), prepare), alpha=-step_size)


# As they are here, whoever replaces them later, in a class or in an object.
_RULE = {name: vars(Lomo)[name] for name in ("update_slices", "_update", "_apply")}
_RULE |= {name: getattr(Lomo, name) for name in ("update_param", "_writer")}


def _decay(group: dict[str, Any]) -> float:
    return 1.0 - float(group["lr"] * group["weight_decay"])


def _apply_16bit(
    param: Tensor, grad: Tensor, prepare: Prepare | None, step_size: float, decay: float, writer: Writer
) -> None:
    fast = kernels.chosen(param, grad) if writer.takes_kernels else None
    if fast is not None:
        options = {} if prepare is None else prepare.kernel_options
        fast.lomo_step(param, grad, lr=step_size, decay=decay, **options, **writer.kernel_options(param))
        return
    dtype = compute_dtype(param)
    for param_slice, grad_slice, offset in paired_slices(param, grad, slice_numel(param.device)):
        value = writer.read(param_slice, offset)
        if decay != 1.0:
            value.mul_(decay)
        value.add_(grad_slice if prepare is None else prepared(grad_slice, dtype, prepare), alpha=-step_size)
        writer.write(param_slice, value, offset)
