"""Linear layers of a block, in its recomputes: their weights' gradients are made in one place in memory, and applied there.

autograd makes the gradient of a weight anew each time and hands it over. On a CPU that is memory which the system gives page by page, as often as it has been
given back: a third of a step's page faults. So in a recompute a linear layer whose weight is a bfloat16 matrix on a CPU gets a node of its own in the graph,
which puts the gradient where the one before it has been, has it applied, and returns none; with Intel's AMX the gradient is not even put
anywhere, but applied while it is made (``optim/kernels/product.py``). Where somebody else needs the gradient (a weight that the graph uses in
several places, gradients that are kept for clipping, rules that may keep them) the node returns it, and autograd takes it from there. Where the weight has hooks, or somebody watches
what autograd saves, the layer is torch's own. Hooks on autograd's AccumulateGrad nodes cannot be seen, and are not called.

The arithmetic is that of ``nn.Linear``, but see ``turned.py``.

Shape letters: T = tokens, I = in_features, O = out_features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from ..optim.kernels.product import TiledProduct
from .last_product import is_compiled
from .matmul16 import computes_16bit
from .slices import walk_graph
from .turned import transposed_product

if TYPE_CHECKING:
    from .slot import Slot

_FEWEST = 2**16  # elements of a weight: for smaller ones autograd's way is as good

_saved_tensors_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
_in_functorch = getattr(torch._C, "_are_functorch_transforms_active", None)


class GradientRoom:
    """Memory for one gradient at a time, as large as the largest so far.

    Attributes:
        observer: is told of every gradient before it is used, and with None after that.
    """

    def __init__(self) -> None:
        self._room: Tensor | None = None
        self._scratch: Tensor | None = None
        self.observer: Callable[[Slot, Tensor | None], None] | None = None

    def of(self, weight: Tensor) -> Tensor:
        """Room for the gradient of a weight, in its shape; whatever was there is lost."""
        if self._room is None or self._room.numel() < weight.numel():
            self._room = None  # before there is another
            self._room = weight.new_empty(weight.numel())
        return self._room[: weight.numel()].view(weight.shape)

    def scratch(self, num_bytes: int) -> Tensor:
        """Memory for whoever makes a gradient: uint8 [num_bytes]; whatever was there is lost."""
        if self._scratch is None or self._scratch.numel() < num_bytes:
            self._scratch = None  # before there is another
            self._scratch = torch.empty(num_bytes, dtype=torch.uint8, device="cpu")
        return self._scratch[:num_bytes]

    def fit(self, numel: int) -> None:
        """Nothing larger than that many elements is wanted for now."""
        if self._room is not None and self._room.numel() > numel:
            self._room = None

    def release(self) -> None:
        """The pass is over."""
        self._room = self._scratch = None


class LinearLayers:
    """The linear layers of one block.

    Args:
        block: any module.
        slots: of its parameters.
        room: for their gradients; blocks share it.
    """

    def __init__(self, block: nn.Module, slots: Iterable[Slot], room: GradientRoom) -> None:
        possible = computes_16bit() and not any(is_compiled(module) for module in block.modules())
        self._slots = {slot.param: slot for slot in slots if possible and _is_large(slot.param)}
        self._largest = max((param.numel() for param in self._slots), default=0)
        self._room = room
        self._uses: list[tuple[_Use, Any]] = []  # with their nodes

    def taken(self) -> AbstractContextManager[Any]:
        """Around the forward pass of a recompute, with the weights where they are computed."""
        self._uses = []
        if not any(param.device.type == "cpu" for param in self._slots):
            return nullcontext()
        self._room.fit(self._largest)
        return _Mode(self._slots, self._room, self._uses)

    def look_at(self, outputs: Iterable[Tensor]) -> None:
        """After it: find the layers whose weight is used nowhere else in the graph.

        Args:
            outputs: of the block.
        """
        uses, self._uses = self._uses, []  # the graph holds them
        if not uses:
            return
        edges, nodes = walk_graph(outputs, {use.slot.param for use, _ in uses})
        for use, node in uses:
            use.is_only = edges[use.slot.param] == 1 and node in nodes


class _Use:
    """A call of a linear layer.

    Attributes:
        is_only: the graph of the block uses the weight here and nowhere else.
    """

    __slots__ = ("is_only", "room", "slot")

    def __init__(self, slot: Slot, room: GradientRoom) -> None:
        self.slot, self.room, self.is_only = slot, room, False


class _Mode(TorchFunctionMode):
    def __init__(self, slots: dict[Tensor, Slot], room: GradientRoom, uses: list[tuple[_Use, Any]]) -> None:
        super().__init__()
        self._slots, self._room, self._uses = slots, room, uses

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is functional.linear and not kwargs and len(args) in (2, 3):
            slot = self._slots.get(args[1])
            if slot is not None and _is_plain(*args):
                use = _Use(slot, self._room)
                out, node = _linear(*args, use=use)
                if node is not None:
                    self._uses.append((use, node))
                return out
        return func(*args, **(kwargs or {}))


def _is_plain(x: Any, weight: Tensor, bias: Any = None) -> bool:
    """Whether a node of our own does what torch would do: bfloat16 on a CPU, and nobody watches what is saved or comes back."""
    if type(x) is not Tensor or x.dim() < 2 or x.numel() == 0 or not torch.is_grad_enabled():
        return False
    if not (x.dtype == weight.dtype == torch.bfloat16 and x.device.type == weight.device.type == "cpu"):
        return False
    if not weight.is_contiguous():
        return False
    if bias is not None and (type(bias) not in (Tensor, nn.Parameter) or bias.dtype != weight.dtype or bias.dim() != 1):
        return False
    if torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") != weight.dtype:
        return False
    if weight._backward_hooks or len(getattr(weight, "_post_accumulate_grad_hooks", None) or ()) > 1:
        return False
    if _saved_tensors_hooks is None or _saved_tensors_hooks(True) is not None:
        return False
    return _in_functorch is not None and not _in_functorch()


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, use: _Use) -> tuple[Tensor, Any]:
    """The output, and the node of the graph that made it."""
    out = _Linear.apply(x.reshape(-1, weight.shape[1]), weight, bias, use)
    # Not a view for autograd, as with torch's own: it may be changed in place.
    return torch.ops.aten._unsafe_view(out, (*x.shape[:-1], weight.shape[0])), out.grad_fn


class _Linear(torch.autograd.Function):
    """``functional.linear`` of x [T, I], whose backward has the gradient of the weight applied."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, use: _Use) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.use = use
        ctx.set_materialize_grads(False)
        return functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_output is None:
            return None, None, None, None
        x, weight = ctx.saved_tensors
        use: _Use = ctx.use
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        grad_x = grad_output @ weight if needs_x else None
        grad_bias = grad_output.sum(0) if needs_bias else None
        grad_weight: Tensor | None = None
        if needs_weight and torch.is_grad_enabled():  # somebody differentiates this once more
            grad_weight = grad_output.t() @ x
        elif needs_weight and use.is_only and use.slot.takes_borrowed:
            _apply_product(use, grad_output, x)
        elif needs_weight:
            grad_weight = transposed_product(grad_output, x)
        return grad_x, grad_weight, grad_bias, None


def _apply_product(use: _Use, left: Tensor, right: Tensor) -> None:
    """Have ``left.T @ right`` applied: while it is made, or else when it has been."""
    room, slot = use.room, use.slot
    product = TiledProduct.of(left, right, room.scratch)
    if product is not None and room.observer is None and slot.take_product(product):
        return
    grad = room.of(slot.param)
    if product is None:
        transposed_product(left, right, out=grad)
    else:
        product.into(grad)
    _use_borrowed(use, grad)


def _use_borrowed(use: _Use, grad: Tensor) -> None:
    observer = use.room.observer
    if observer is not None:
        observer(use.slot, grad)
    use.slot.take_borrowed(grad)
    if observer is not None:
        observer(use.slot, None)


def _is_large(param: Tensor) -> bool:
    return (
        type(param) is nn.Parameter and param.dtype == torch.bfloat16 and param.dim() == 2 and param.numel() >= _FEWEST
    )
