"""What a recompute need not compute: the last matrix product of a block.

A block is run again for what its backward pass reads. In most decoder layers nothing reads the output of the last linear layer (the MLP's down projection,
a quarter of the block's products): it is added to the residual stream, and a sum needs no values to be differentiated. torch's checkpointing stops
early for the same reason. Here the graph itself is made again, so the layer is called as always, and only its product is left out: its
output has the shape and whatever the memory held.

Which layer is the last to be called is seen in a block's first recompute. That nothing reads its output is seen every time, because what the backward pass
reads is saved by autograd: if anything is saved after it (by a norm, an activation, a multiplication with a gate), the block is run
once more as it is, and always after that.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

_T = TypeVar("_T")
_aten = torch.ops.aten


class LastProduct:
    """Runs the recomputes of one block, without its last product where nothing needs it.

    Args:
        block: any module.

    Attributes:
        flops: floating-point operations that the last recompute left out.
    """

    def __init__(self, block: nn.Module) -> None:
        self._inside = [module for module in block.modules() if module is not block]
        self._layers = [module for module in self._inside if _has_matrix(module)]
        compiled = any(_is_compiled(module) for module in [block, *self._inside])
        self._possible = bool(self._layers) and not compiled
        self._last: tuple[nn.Module, int] | None = None  # layer, and which of its calls in a recompute
        self.flops = 0

    def run(self, forward: Callable[[], _T]) -> _T:
        """Recompute.

        Args:
            forward: runs the block, with a graph. May be called twice.

        Returns:
            what ``forward`` returns; values may be left out that no backward pass reads.
        """
        self.flops = 0
        if not self._possible or self._is_watched():
            return forward()
        if self._last is None:
            return self._find(forward)
        layer, number = self._last
        found, is_right = self._leave_out(forward, layer, number)
        if is_right:
            return found
        self._possible, self.flops = False, 0
        del found
        return forward()

    def _is_watched(self) -> bool:
        """Somebody's hooks would see values that were not computed."""
        if torch.nn.modules.module._global_forward_hooks:
            return True
        return any(module._forward_hooks for module in self._inside)

    def _find(self, forward: Callable[[], _T]) -> _T:
        """Recompute as usual, and see which layer is called last."""
        called: list[nn.Module] = []
        with ExitStack() as stack:
            for layer in self._layers:
                handle = layer.register_forward_hook(lambda module, *_: called.append(module))
                stack.callback(handle.remove)
            found = forward()
        if called:
            self._last = (called[-1], called.count(called[-1]))
        else:
            self._possible = False
        return found

    def _leave_out(self, forward: Callable[[], _T], layer: nn.Module, number: int) -> tuple[_T, bool]:
        """Recompute without the product of one call of a layer; also whether nothing has needed it."""
        watch = _Watch()
        replaced, original, calls = layer.__dict__.get("forward"), layer.forward, 0

        def without(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls != number or not watch.sees():
                return original(*args, **kwargs)
            with _NoProducts() as mode:
                out = original(*args, **kwargs)
            self.flops = mode.flops
            watch.is_on = mode.flops > 0
            return out

        layer.__dict__["forward"] = without
        try:
            with torch.autograd.graph.saved_tensors_hooks(watch.pack, watch.unpack):
                found = forward()
        finally:
            if replaced is None:
                layer.__dict__.pop("forward", None)
            else:
                layer.__dict__["forward"] = replaced
        return found, not watch.has_seen


class _Watch:
    """Sees what autograd saves; as hooks for saved tensors it changes nothing."""

    def __init__(self) -> None:
        self.is_on = self.has_seen = False

    def pack(self, tensor: Tensor) -> Tensor:
        self.has_seen = self.has_seen or self.is_on
        return tensor

    def unpack(self, tensor: Tensor) -> Tensor:
        return tensor

    def sees(self) -> bool:
        """Whether what is saved now is seen here, and not by hooks that were put over these."""
        if self.has_seen:
            return False
        self.is_on = True
        with torch.enable_grad():
            torch.ones((), requires_grad=True).exp()
        saw, self.is_on, self.has_seen = self.has_seen, False, False
        return saw


class _NoProducts(TorchDispatchMode):
    """Matrix products give tensors of their shape with no values."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        first = _FIRST_FACTOR.get(func)
        if first is None or any(type(each) not in (Tensor, nn.Parameter) for each in args[first : first + 2]):
            return func(*args, **(kwargs or {}))
        left, right = args[first : first + 2]
        self.flops += 2 * left.numel() * right.shape[-1]
        return left.new_empty((*left.shape[:-1], right.shape[-1]))


# Where the factors are among the arguments.
_FIRST_FACTOR = {
    _aten.mm.default: 0, _aten.bmm.default: 0, _aten.addmm.default: 1, _aten.baddbmm.default: 1
}  # fmt: skip


def _has_matrix(module: nn.Module) -> bool:
    return any(param.dim() >= 2 for param in module.parameters(recurse=False))


def _is_compiled(module: nn.Module) -> bool:
    return getattr(module, "_compiled_call_impl", None) is not None or hasattr(module, "_orig_mod")
