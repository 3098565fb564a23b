"""The gradient of a linear layer's weight, made by the tiles of Intel's AMX and applied while it is made: ``product.h``.

A gradient that is written, read for its norm and read again for the update goes through memory three times, beside a weight that goes through
it twice. Here its values never leave the processor, and the weight is read and written while the next values are computed, so that
with large layers the product with its update takes about as long as torch's product alone (``benchmarks/tiled_product.py``; narrow ones gain nothing).

The bits of the update are those of :func:`lowtide.optim.kernels.native.lomo_step`. Those of the gradient are those of torch's product,
up to the order in which the tokens are added up: in some shapes one element of ten thousand differs in its last bit.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import launch, native

_SIDE = 32  # columns of a factor must be a multiple of it
_MOST_TOKENS = 2048  # more do not lie in a core's cache
_FEWEST = 2**16  # elements of the product: below it a call costs more than it saves
# A gradient whose elements are surely smaller than this has a norm that float32 can hold.
_LARGEST = 1e15
_NONE = 3  # no rounding: nothing is updated


class TiledProduct:
    """``left.T @ right``, which has not been made yet; get one from :meth:`of`.

    Attributes:
        shape: [O, I], of the product.
        made_norm: its 2-norm, once it has been made; until then NaN.
    """

    def __init__(self, left: Tensor, right: Tensor, scratch: Tensor, num_threads: int) -> None:
        self.shape = torch.Size((left.shape[1], right.shape[1]))
        self.made_norm = math.nan
        self._left, self._right = left, right
        self._scratch, self._num_threads = scratch, num_threads

    @classmethod
    def of(cls, left: Tensor, right: Tensor, scratch: Callable[[int], Tensor]) -> TiledProduct | None:
        """Of two matrices, [T, O] and [T, I]; None: let torch make it.

        Args:
            left: bfloat16 on a CPU, with neighbours in a row side by side.
            right: the same.
            scratch: gives a tensor of that many bytes, aligned to 64, which is this product's until it has been used.

        There is none without AMX, for shapes that it does not pay for or that do not divide into tiles, and where an element of
        the product could be so large that a sum of their squares is not finite.
        """
        if not (_fits(left) and _fits(right) and left.shape[1] * right.shape[1] >= _FEWEST and allowed()):
            return None
        tokens, rows, cols = left.shape[0], left.shape[1], right.shape[1]
        assert right.shape[0] == tokens
        if not 0 < tokens <= _MOST_TOKENS:
            return None
        num_threads = torch.get_num_threads()
        packed_bytes = -(-tokens // _SIDE) * _SIDE * cols * 2
        taken = scratch(packed_bytes + num_threads * native.call("product_room", tokens))
        largest = torch.empty(2, dtype=torch.int32, device="cpu")
        native.call(
            "product_begin", left.data_ptr(), left.stride(0), right.data_ptr(), right.stride(0), tokens, rows, cols,
            taken.data_ptr(), largest.data_ptr(), num_threads,
        )  # fmt: skip
        of_left, of_right = largest.to(torch.int16).view(torch.bfloat16).tolist()
        if not of_left * of_right * tokens < _LARGEST:  # or NaN
            return None
        return cls(left, right, taken, num_threads)

    def norm(self) -> float:
        """The 2-norm of the product, which nobody gets to see."""
        return self._make()

    def into(self, out: Tensor) -> float:
        """Write the product.

        Args:
            out: [O, I], bfloat16, contiguous.

        Returns:
            its 2-norm.
        """
        assert out.shape == self.shape and out.dtype == torch.bfloat16 and out.is_contiguous()
        return self._make(grad=out)

    def at(self, rows: slice, cols: slice) -> Tensor:
        """Some elements of the product, float32."""
        return self._left[:, rows].float().t() @ self._right[:, cols].float()

    def lomo_step(
        self,
        param: Tensor,
        *,
        lr: float,
        decay: float = 1.0,
        rounding: str,
        key: int = 0,
        start: int = 0,
        compensation: Tensor | None = None,
    ) -> float:
        """As :func:`lowtide.optim.kernels.native.lomo_step` with the product as the gradient.

        Args:
            param: [O, I], bfloat16, contiguous, on a CPU.
            lr: see there, as all the others.
            decay: what the parameter is multiplied with first.
            rounding: how the result is written.
            key: of the noise.
            start: even; place of the first element in the noise.
            compensation: int16, like ``param``.

        Returns:
            the 2-norm of the product.
        """
        assert param.shape == self.shape and start % 2 == 0
        launch.check(param, param, rounding, compensation)
        torch.autograd.graph.increment_version(param)
        return self._make(None, param, compensation, lr, decay, key & 0xFFFFFFFF, start & 0xFFFFFFFF, rounding)

    def _make(
        self,
        grad: Tensor | None = None,
        weight: Tensor | None = None,
        rest: Tensor | None = None,
        lr: float = 0.0,
        decay: float = 1.0,
        key: int = 0,
        start: int = 0,
        rounding: str | None = None,
    ) -> float:
        left, (rows, cols), packed = self._left, self.shape, self._scratch
        tokens = left.shape[0]
        sums = torch.empty(native.call("product_blocks", tokens, rows, cols), dtype=torch.float64, device="cpu")
        rooms = packed.data_ptr() + -(-tokens // _SIDE) * _SIDE * cols * 2
        native.call(
            "product_end", left.data_ptr(), left.stride(0), packed.data_ptr(), tokens, rows, cols, *map(native.pointer, (grad, weight, rest)),
            lr, decay, key, start, _NONE if rounding is None else native.ROUNDING[rounding], sums.data_ptr(), rooms, self._num_threads,
        )  # fmt: skip
        self.made_norm = math.sqrt(sums.sum().item())
        return self.made_norm


@functools.cache
def allowed() -> bool:
    """Whether the processor has tiles, the kernels were compiled for them, and the system lets this process use them."""
    return native.available() and bool(native.call("tiles_allowed"))


def _fits(factor: Any) -> bool:
    return (
        type(factor) is Tensor
        and factor.dtype == torch.bfloat16
        and factor.device.type == "cpu"
        and factor.dim() == 2
        and factor.shape[1] % _SIDE == 0
        and factor.stride(1) == 1
    )
