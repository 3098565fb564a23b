"""The processes that train one model together: how many, which one this is, and what they have to agree on.

Collective calls here are of a few numbers. Everything that decides whether a step is taken goes through them, so that no rank takes a
step that another leaves out, which would let the weights drift apart and leave the others waiting for ever.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class Ranks:
    """All processes of the default process group, or this one alone where there is none.

    Args:
        alone: this one only, whatever else there is.

    Attributes:
        size: how many.
        rank: which one this is, from 0.
        launch: what all processes that torchrun has started together have in common, over restarts, and no others; None without it.
    """

    def __init__(self, alone: bool = False) -> None:
        distributed = torch.distributed
        running = not alone and distributed.is_available() and distributed.is_initialized()
        self.launch: str | None = None
        self.size = distributed.get_world_size() if running else 1
        self.rank = distributed.get_rank() if running else 0
        self._device = _device_of_collectives() if self.size > 1 else torch.device("cpu")

    @property
    def is_first(self) -> bool:
        """This is the one that writes and speaks for all."""
        return self.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """Each number added up over all ranks, in float64; the same bits on every rank. One collective call."""
        if self.size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=self._device)
        torch.distributed.all_reduce(tensor)
        return [float(value) for value in tensor.tolist()]

    def all(self, flag: bool) -> bool:
        """Whether it is true on every rank."""
        return self.sum([0.0 if flag else 1.0])[0] == 0.0

    def any(self, flag: bool) -> bool:
        """Whether it is true on any rank."""
        return not self.all(not flag)

    def broadcast(self, value: Any) -> Any:
        """What the first rank has; plain numbers, text, lists and dictionaries of them, as JSON can hold."""
        if self.size == 1:
            return value
        import json

        text = json.dumps(value).encode() if self.is_first else b""
        length = int(self.sum([float(len(text))])[0])
        tensor = torch.zeros(length, dtype=torch.uint8, device=self._device)
        if self.is_first:
            tensor.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
        torch.distributed.broadcast(tensor, src=0)
        return json.loads(bytes(tensor.tolist()))


ALONE = Ranks(alone=True)


def _device_of_collectives() -> torch.device:
    """Where a few numbers have to be to be exchanged: on the host if some backend takes them there."""
    backend = str(torch.distributed.get_backend_config())
    if "cpu:" in backend or "gloo" in backend:
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def sum_in_place(tensors: Sequence[Tensor], groups: Sequence[Any]) -> None:
    """Add tensors up over the ranks of process groups, one after the other; one collective call for each dtype and group.

    Args:
        tensors: any shapes, on one device; written in place.
        groups: of torch.distributed.
    """
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        by_dtype.setdefault(tensor.dtype, []).append(tensor)
    for some in by_dtype.values():
        flat = torch.cat([tensor.reshape(-1) for tensor in some])
        for group in groups:
            torch.distributed.all_reduce(flat, group=group)
        for tensor, summed in zip(some, flat.split([tensor.numel() for tensor in some]), strict=True):
            tensor.copy_(summed.view(tensor.shape))
