"""Operations of products that recomputes leave out, found by running the blocks on the meta device."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..fused.last_product import LastProduct
from .attention import fused_attention
from .block_trace import BlockCall


def left_out_flops(calls: Iterable[BlockCall]) -> float:
    """Of one recompute of every block (``fused/last_product.py``); 0 for blocks that cannot run on the meta device.

    Args:
        calls: blocks and their arguments.
    """
    alike: dict[Any, float] = {}
    total = 0.0
    for call in calls:
        key = (type(call.block), tuple(param.shape for param in call.block.parameters()))
        if key not in alike:
            alike[key] = _of_one(call)
        total += alike[key]
    return total


def _of_one(call: BlockCall) -> float:
    product = LastProduct(call.block)

    def forward() -> Any:
        args, kwargs = pytree.tree_map_only(Tensor, _again, (call.args, call.kwargs))
        return call.block(*args, **kwargs)

    try:
        with torch.device("meta"), torch.enable_grad(), fused_attention():
            product.run(forward)
            product.run(forward)
    except Exception:  # whatever a block raises there
        return 0.0
    return float(product.flops)


def _again(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_(tensor.requires_grad)
