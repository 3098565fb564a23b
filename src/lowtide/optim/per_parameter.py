"""Any torch-style optimizer class, one parameter at a time: the general form of "optimizer in backward".

Each parameter gets an instance of the class of its own, whose options are those of the parameter's group at the moment
of the update, so learning-rate schedulers work as usual. The optimizer state is kept (an Adam needs its moments); what
is saved is the gradients.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import kernels
from .base import ROUNDING_STEP, SIXTEEN_BIT, FusibleOptimizer, prepared
from .prepare import Prepare
from .shards import like_param, local_part, set_values
from .writing import COMPENSATION

_OURS = ("rounding", "rounding_seed")
_GROUP = "group"  # where a parameter's state keeps what the class counts in its parameter group


class PerParameter(FusibleOptimizer):
    """Run ``optimizer_class`` inside the backward pass, or as an ordinary optimizer.

    16-bit parameters are updated in float32 and rounded once: the class sees a float32 copy of one parameter at a time
    and its state is float32. Other parameters are updated by the class directly, bit for bit as without lowtide.

    Args:
        optimizer_class: e.g. ``torch.optim.AdamW``; any class with ``param_groups``, ``state`` and ``step()``.
        params: parameters or parameter groups, as in torch.
        rounding: as in :class:`lowtide.Lomo`.
        rounding_seed: as in :class:`lowtide.Lomo`.
        options: passed to ``optimizer_class``.

    Raises:
        TypeError: ``optimizer_class`` is no optimizer class, or does not know an option.
        ValueError: an option is out of range.
    """

    must_not_see_broken = (
        True  # with a gradient of zeros such a class would still move by its momentum, and count a step
    )

    def __init__(
        self,
        optimizer_class: type[Optimizer],
        params: Iterable[Any],
        *,
        rounding: str | None = None,
        rounding_seed: int = 0,
        **options: Any,
    ) -> None:
        if not (isinstance(optimizer_class, type) and issubclass(optimizer_class, Optimizer)):
            raise TypeError(f"PerParameter needs a subclass of torch.optim.Optimizer, got {optimizer_class!r}")
        if issubclass(optimizer_class, FusibleOptimizer):
            raise TypeError(f"{optimizer_class.__name__} can be fused as it is: use it without PerParameter")
        self.optimizer_class = optimizer_class
        self._inner: dict[Tensor, Optimizer] = {}
        self._passed: dict[Tensor, dict[str, Any]] = {}  # the group's options as they were handed on last
        # An instance over a stand-in fills in the defaults of the class and checks the options.
        defaults = optimizer_class([torch.nn.Parameter(torch.zeros(1))], **options).defaults
        super().__init__(params, {**defaults, "rounding": rounding, "rounding_seed": rounding_seed})

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._inner, self._passed = {}, {}  # made anew around the loaded state when next needed

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "optimizer_class": self.optimizer_class}

    def _update(self, param: Tensor, grad: Tensor, group: dict[str, Any], prepare: Prepare | None) -> None:
        """The class's own step; for a 16-bit parameter on a float32 copy of it."""
        inner = self._inner.get(param)
        if inner is None:
            inner = self._inner[param] = self._make_inner(param, group)
        inner_group = inner.param_groups[0]
        self._pass_options(param, group, inner_group)
        proxy = inner_group["params"][0]
        sixteen_bit = param.dtype in SIXTEEN_BIT
        if sixteen_bit:
            writer = self._writer(param, group)
            set_values(proxy, writer.read(local_part(param.detach()), 0))
        kept = param.grad  # unfused, the gradient belongs to the caller
        proxy.grad = like_param(param, prepared(local_part(grad), proxy.dtype, prepare), param.shape)
        inner.step()
        proxy.grad = None
        if sixteen_bit:
            target, value = local_part(param), local_part(proxy.detach())
            if (fast := kernels.chosen(target, value)) is not None:
                fast.round_into(target, value, **writer.kernel_options(target))
            else:
                writer.write(target, value, 0)
            set_values(proxy, torch.empty(0, device=param.device))
        else:
            param.grad = kept
        state = self.state[param]
        state.update(inner.state[proxy])
        if own := _own_entries(inner_group, group):
            state[_GROUP] = own

    def _pass_options(self, param: Tensor, group: dict[str, Any], inner_group: dict[str, Any]) -> None:
        """Hand on what changed in the group; what the class itself counts in its group is left alone."""
        passed = self._passed.setdefault(param, {})
        for name, value in group.items():
            if name not in ("params", *_OURS) and (name not in passed or passed[name] is not value):
                if name in passed or name not in self.state[param].get(_GROUP, {}):
                    inner_group[name] = value
                passed[name] = value

    def _make_inner(self, param: Tensor, group: dict[str, Any]) -> Optimizer:
        options = {name: value for name, value in group.items() if name in self.defaults and name not in _OURS}
        proxy = torch.nn.Parameter(param.detach().to(torch.float32)) if param.dtype in SIXTEEN_BIT else param
        inner = self.optimizer_class([proxy], **_constructor_options(self.optimizer_class, options))
        saved = self.state.get(param, {})
        inner.param_groups[0].update(saved.get(_GROUP, {}))
        loaded = {name: value for name, value in saved.items() if name not in (ROUNDING_STEP, COMPENSATION, _GROUP)}
        if loaded:
            inner.state[proxy] = loaded
        return inner


def _own_entries(inner_group: dict[str, Any], group: dict[str, Any]) -> dict[str, Any]:
    """What the class has put into, or changed in, its own parameter group."""
    return {
        name: value
        for name, value in inner_group.items()
        if name != "params" and (name not in group or group[name] is not value)
    }


def _constructor_options(optimizer_class: type[Optimizer], options: dict[str, Any]) -> dict[str, Any]:
    """The options that the constructor takes; some classes put more into ``defaults`` than they accept."""
    import inspect

    accepted = inspect.signature(optimizer_class.__init__).parameters
    return {name: value for name, value in options.items() if name in accepted}
