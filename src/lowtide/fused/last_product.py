"""What a recompute need not compute: the last matrix product of a block.

A block is run again for what its backward pass reads. In most decoder layers nothing reads the output of the last linear layer (the MLP's down projection,
a quarter of the block's products): it is added to the residual stream, and a sum needs no values to be differentiated. torch's checkpointing stops
early for the same reason. Here the graph itself is made again, so the layer is called as always, and only its product is left out: its
output has the shape and whatever the memory held.

Which layer is the last to be called is seen in a block's first recompute. What happens to its output is seen every time: from that product on a
dispatch mode follows the values that were not computed, and allows only operations that move, add or scale them. If there is any other, the
block is run once more as it is, and always after that. Functions with a backward of their own are found in the graph.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

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
        self._layers = [module for module in self._inside if _is_plain(module)]
        compiled = any(is_compiled(module) for module in [block, *self._inside])
        self._possible = bool(self._layers) and not compiled
        self._last: tuple[nn.Module, int] | None = None  # layer, and which of its calls in a recompute
        self._graph_is_known = False
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
        if "forward" in layer.__dict__:
            return forward()
        found, flops = self._leave_out(forward, layer, number)
        if flops:
            self.flops = flops
            assert found is not None
            return found
        self._possible = False
        return forward()

    def _is_watched(self) -> bool:
        """Somebody's hooks would see values that were not computed."""
        everywhere = torch.nn.modules.module
        if everywhere._global_forward_hooks or everywhere._global_forward_pre_hooks:
            return True
        return any(module._forward_hooks or module._forward_pre_hooks for module in self._inside)

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

    def _leave_out(self, forward: Callable[[], _T], layer: nn.Module, number: int) -> tuple[_T | None, int]:
        """Recompute without the product of one call of a layer; the operations left out are 0 if something has needed it."""
        original, thread, calls = layer.forward, threading.get_ident(), 0
        modes, mode, node = len(_get_current_dispatch_mode_stack()), _WithoutProduct(), None
        stack = ExitStack()

        def without(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls, node
            if threading.get_ident() != thread:  # the same module is used elsewhere meanwhile
                return original(*args, **kwargs)
            calls += 1
            # Under modes of others this one could not be left after them.
            if calls != number or len(_get_current_dispatch_mode_stack()) != modes:
                return original(*args, **kwargs)
            stack.enter_context(mode)
            out = original(*args, **kwargs)
            node = out.grad_fn
            return out

        layer.__dict__["forward"] = without
        try:
            with stack:
                found = forward()
        except Exception:  # of this or of whatever cannot be run so; if it is the block's own it comes again
            return None, 0
        finally:
            del layer.__dict__["forward"]
        if mode.is_needed or not mode.flops:
            return None, 0
        if not self._graph_is_known and not _needs_no_values(found, node):
            return None, 0
        self._graph_is_known = True
        return found, mode.flops


class _IsNeeded(Exception):
    """Values that were not computed would be used."""


class _WithoutProduct(TorchDispatchMode):
    """The first matrix product gives a tensor of its shape with no values, and what becomes of it is followed.

    Attributes:
        flops: floating-point operations that were left out.
        is_needed: something uses the values.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops, self.is_needed = 0, False
        self._without: dict[int, Any] = {}  # storages without values; held, so that no other gets the same address

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self._without:
            first = _FIRST_FACTOR.get(func)
            if first is None or any(type(each) not in (Tensor, nn.Parameter) for each in args[first : first + 2]):
                return func(*args, **kwargs)
            left, right = args[first : first + 2]
            out = left.new_empty((*left.shape[:-1], right.shape[-1]))
            self.flops = 2 * left.numel() * right.shape[-1]
            self._mark(out)
            return out
        given = [each for each in pytree.tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        if not any(self._is_without(each) for each in given):
            return func(*args, **kwargs)
        if func in _SCALES and len(given) == 1:
            pass  # by a number
        elif func not in _NEEDS_NO_VALUES:
            self.is_needed = True
            raise _IsNeeded(str(func))
        out = func(*args, **kwargs)
        for each in pytree.tree_leaves(out):
            if isinstance(each, Tensor):
                self._mark(each)
        return out

    def _mark(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self._without[storage._cdata] = storage

    def _is_without(self, tensor: Tensor) -> bool:
        try:
            return tensor.untyped_storage()._cdata in self._without
        except (NotImplementedError, RuntimeError):  # a sparse tensor, or a wrapper: not one that came from here
            return False


# Where the factors are among the arguments.
_FIRST_FACTOR = {
    _aten.mm.default: 0, _aten.bmm.default: 0, _aten.addmm.default: 1, _aten.baddbmm.default: 1
}  # fmt: skip
_SCALES = {_aten.mul.Tensor, _aten.mul_.Tensor, _aten.mul.Scalar, _aten.div.Tensor, _aten.div_.Tensor, _aten.div.Scalar}
_NEEDS_NO_VALUES = {
    _aten.add.Tensor, _aten.add_.Tensor, _aten.add.Scalar, _aten.sub.Tensor, _aten.sub_.Tensor, _aten.rsub.Scalar, _aten.neg.default,
    _aten.view.default, _aten._unsafe_view.default, _aten.alias.default, _aten.detach.default, _aten.unsqueeze.default, _aten.squeeze.dim,
    _aten.squeeze.default, _aten.t.default, _aten.transpose.int, _aten.permute.default, _aten.expand.default, _aten.clone.default,
    _aten._to_copy.default, _aten.cat.default, _aten.slice.Tensor, _aten.select.int, _aten.split.Tensor, _aten._reshape_alias.default,
}  # fmt: skip
_NODES = {
    "AddBackward0", "SubBackward0", "RsubBackward1", "NegBackward0", "MulBackward0", "DivBackward0", "ViewBackward0", "UnsafeViewBackward0",
    "AliasBackward0", "UnsqueezeBackward0", "SqueezeBackward0", "SqueezeBackward1", "TBackward0", "TransposeBackward0", "PermuteBackward0",
    "ExpandBackward0", "CloneBackward0", "ToCopyBackward0", "CatBackward0", "SliceBackward0", "SelectBackward0", "SplitBackward0", "ReshapeAliasBackward0",
}  # fmt: skip


def _needs_no_values(found: Any, node: Any) -> bool:
    """Whether all that leads from a node to what was found is of torch's own kinds that keep no values.

    Args:
        found: what a block returned.
        node: of the graph, in front of what was left out.
    """
    if node is None:
        return True
    followers: dict[Any, list[Any]] = {}
    todo = [leaf.grad_fn for leaf in pytree.tree_leaves(found) if isinstance(leaf, Tensor) and leaf.grad_fn is not None]
    seen = set(todo)
    while todo:
        each = todo.pop()
        for other, _ in each.next_functions:
            if other is not None:
                followers.setdefault(other, []).append(each)
                if other not in seen:
                    seen.add(other)
                    todo.append(other)
    todo, passed = list(followers.get(node, ())), set()
    while todo:
        each = todo.pop()
        if each not in passed:
            passed.add(each)
            if each.name() not in _NODES:
                return False
            todo.extend(followers.get(each, ()))
    return True


def _is_plain(module: nn.Module) -> bool:
    """A layer whose forward is one product with its weight: ``nn.Linear``, or transformers' ``Conv1D``, and no class derived from them."""
    return type(module) is nn.Linear or (
        type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"
    )


def is_compiled(module: nn.Module) -> bool:
    """Whether torch.compile has been there, so that what its layers do cannot be changed any more."""
    return getattr(module, "_compiled_call_impl", None) is not None or hasattr(module, "_orig_mod")
