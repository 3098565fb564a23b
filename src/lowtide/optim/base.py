"""What every update rule shares: a torch optimizer that can also step one parameter at a time.

A rule implements ``_update``. Everything that steps goes through :meth:`FusibleOptimizer.update_param`, which calls it: the
ordinary ``step()``, and the fused engine the moment a gradient is complete. So both do the same arithmetic by construction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .lost_updates import LostUpdates
from .prepare import Prepare
from .rounding import ROUNDINGS, mix_key
from .shards import first_element, is_sharded, local_part, sum_over_shards
from .sliced import Pieces
from .writing import Compensated, Nearest, Stochastic, Writer

if TYPE_CHECKING:
    from .kernels.product import TiledProduct

# Parameter, gradient, its parameter group, and what is done to the gradient first.
Update = tuple[Tensor, Tensor, dict[str, Any], Prepare | None]
SIXTEEN_BIT = (torch.bfloat16, torch.float16)
ROUNDING_STEP = "rounding_step"  # in the state: how often a parameter was rounded stochastically


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
        self.lost_updates = LostUpdates()
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
        self.lost_updates = LostUpdates()
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
        self.lost_updates.close_step()
        return loss

    def update_param(self, param: Tensor, grad: Tensor, group: dict[str, Any], prepare: Prepare | None = None) -> None:
        """Update one parameter in place from its gradient. Called without grad mode.

        Args:
            param: the parameter, any shape, float32/float64/bfloat16/float16.
            grad: its gradient, same shape; same dtype or float32. It is not changed.
            group: the parameter group it belongs to (``lr`` and the other options are read now, so schedulers work).
            prepare: applied to every float32 piece of the gradient before it is used (unscaling, clipping).
        """
        if param.dtype not in SIXTEEN_BIT or self._rounding(group) == "compensated":
            self._update(param, grad, group, prepare)
            return
        before = self.lost_updates.before(local_part(param), local_part(grad))
        self._update(param, grad, group, prepare)
        if before is not None:
            self.lost_updates.after(before, local_part(param), local_part(grad))

    def update_by_product(
        self, param: Tensor, product: TiledProduct, group: dict[str, Any], prepare: Prepare | None
    ) -> float | None:
        """:meth:`update_param` with a gradient that is applied while it is made, for rules that can do this.

        Args:
            param: the parameter, a bfloat16 matrix on a CPU.
            product: its gradient, complete and finite.
            group: the parameter group it belongs to.
            prepare: what is done to the gradient first.

        Returns:
            the 2-norm of the gradient as it comes, or None: nothing has been done, and the gradient itself is wanted.
        """
        return None

    def update_sharded(self, updates: Sequence[Update]) -> None:
        """Update several parameters whose rows are spread over ranks in the same way; every rank calls this with the same ones.

        The sums over ranks that a rule needs are made for all of them together: as many collective calls as for one.

        Args:
            updates: arguments of :meth:`update_param`; gradients as ``DTensor`` like their parameters.
        """
        for param, grad, group, prepare in updates:
            self.update_param(param, grad, group, prepare)

    # Whether a gradient that is not finite has to be kept from the rule, also where finding out means to wait for the device; a rule
    # for which this is False changes nothing, or next to nothing, by the gradient of zeros that it gets there.
    must_not_see_broken = False

    # Whether something may refer to a gradient after its update, so that its memory cannot be used for the next one. A rule that keeps
    # none says so.
    may_keep_gradients = True

    # How often the rule walks over the slices of a gradient; 0: it needs the whole.
    num_slice_walks = 0

    @property
    def takes_products(self) -> bool:
        """Whether :meth:`update_by_product` does something, and :meth:`update_slices` takes slices that have not been made."""
        return False

    def needs_all_rows(self, group: dict[str, Any]) -> bool:
        """Whether an update changes rows whose gradient is zero."""
        return bool(group.get("weight_decay", 0.0))

    def update_slices(self, param: Tensor, pieces: Pieces, group: dict[str, Any]) -> None:
        """:meth:`update_param` for a matrix whose gradient is made slice by slice, for rules with ``num_slice_walks``.

        Args:
            param: [V, H], contiguous.
            pieces: the gradient; rows that are left out have none.
            group: the parameter group it belongs to.
        """
        raise NotImplementedError(f"{type(self).__name__} needs whole gradients")

    def state_is_sharded(self, param: Tensor, entry: str, shape: torch.Size) -> bool:
        """Whether an entry of a parameter's state has the parameter's rows, and lies where they lie.

        Args:
            param: the parameter.
            entry: its name in the state.
            shape: of the whole entry.
        """
        return is_sharded(param) and param.dim() > 0 and shape == param.shape

    def _update(self, param: Tensor, grad: Tensor, group: dict[str, Any], prepare: Prepare | None) -> None:
        """The rule; arguments as for :meth:`update_param`."""
        raise NotImplementedError

    def _rounding(self, group: dict[str, Any]) -> str:
        return group["rounding"] or "stochastic"

    def _writer(self, param: Tensor, group: dict[str, Any], step: int | None = None) -> Writer:
        """Reads and writes this 16-bit parameter in its next update.

        Stochastic rounding needs noise that differs from step to step, also after a resume. A rule that counts its steps
        passes the number; for others ``rounding_step`` in the state counts.
        """
        rounding, state = self._rounding(group), self.state[param]
        if rounding == "nearest":
            return Nearest()
        if rounding == "compensated":
            return Compensated.of(param, state)
        if step is None:
            step = state[ROUNDING_STEP] = state.get(ROUNDING_STEP, 0) + 1
        return Stochastic(mix_key(group["rounding_seed"], self._param_index[param], step), first_element(param))


class SummedOptimizer(FusibleOptimizer):
    """A rule that needs sums over a whole parameter, whose rows may be spread over ranks.

    It implements ``_steps``, which yields its sums over the rows that are here and goes on with the sums over all rows.
    """

    def _steps(
        self, param: Tensor, grad: Tensor, group: dict[str, Any], prepare: Prepare | None
    ) -> Iterator[list[Tensor]]:
        """The rule; arguments as for :meth:`update_param`. What is yielded has been summed over ranks, in place, afterwards."""
        raise NotImplementedError

    def _update(self, param: Tensor, grad: Tensor, group: dict[str, Any], prepare: Prepare | None) -> None:
        for sums in self._steps(param, grad, group, prepare):
            sum_over_shards(param, sums)

    def update_sharded(self, updates: Sequence[Update]) -> None:
        """See :class:`FusibleOptimizer`."""
        looked_at = [
            self.lost_updates.before(local_part(param), local_part(grad))
            if param.dtype in SIXTEEN_BIT and self._rounding(group) != "compensated"
            else None
            for param, grad, group, _ in updates
        ]
        running = [self._steps(*update) for update in updates]
        while running:
            sums = [next(steps, None) for steps in running]
            running = [steps for steps, found in zip(running, sums, strict=True) if found is not None]
            sum_over_shards(updates[0][0], [tensor for found in sums if found is not None for tensor in found])
        for (param, grad, _, _), before in zip(updates, looked_at, strict=True):
            if before is not None:
                self.lost_updates.after(before, local_part(param), local_part(grad))


def compute_dtype(param: Tensor) -> torch.dtype:
    """The dtype a rule computes in: float32 for 16-bit parameters, else the parameter's own."""
    return torch.float32 if param.dtype in SIXTEEN_BIT else param.dtype


def prepared(grad: Tensor, dtype: torch.dtype, prepare: Prepare | None) -> Tensor:
    """A gradient slice in the dtype that the rule computes in, unscaled and clipped; the gradient itself is not changed."""
    return grad.to(dtype) if prepare is None else prepare(grad.to(dtype, copy=True))
