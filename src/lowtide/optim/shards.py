"""Parameters of which every rank holds some rows: FSDP2's ``DTensor``, as the rules and the engine see them.

A rule computes on the rows that are here (:func:`local_part`). Sums over a whole parameter are made with :func:`sum_over_shards`, and
noise is that of the place in the whole parameter (:func:`first_element`), so that a result does not depend on how many ranks share it.

Shape letters: M = rows, the first dimension of the whole parameter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..ranks import sum_in_place


def is_sharded(tensor: Tensor) -> bool:
    """A ``DTensor``: its rows are spread over ranks."""
    # Asked for every parameter in every step; the module is imported only where somebody shards.
    return type(tensor) not in (Tensor, torch.nn.Parameter) and hasattr(tensor, "_local_tensor")


def local_part(tensor: Tensor) -> Tensor:
    """The rows that this rank holds, sharing memory with the tensor; an ordinary tensor itself."""
    return tensor._local_tensor if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def compute_device(param: Tensor) -> torch.device:
    """Where a parameter is computed with, which is not where it lives if its rows wait in host memory."""
    if not is_sharded(param) or param.device_mesh.device_type == param.device.type:  # type: ignore[attr-defined]
        return param.device
    kind: str = param.device_mesh.device_type  # type: ignore[attr-defined]
    return torch.device(kind, torch.accelerator.current_device_index())


def set_values(tensor: Tensor, local: Tensor) -> None:
    """Put other values in the place of this rank's rows, or of an ordinary tensor's values."""
    if is_sharded(tensor):
        tensor._local_tensor = local  # type: ignore[attr-defined]
    else:
        tensor.data = local


def shard_axes(param: Tensor) -> list[int]:
    """Axes of its device mesh over which the rows are spread; over the others every rank has the same.

    Raises:
        ValueError: it is spread over another dimension than the first.
    """
    axes = []
    for axis, placement in enumerate(param.placements):  # type: ignore[attr-defined]
        if placement.is_replicate():
            continue
        if type(placement).__name__ != "Shard" or placement.dim != 0:
            raise ValueError(f"a parameter is spread over ranks as {placement}, and only Shard(dim=0) is understood")
        axes.append(axis)
    if len(axes) > 1:
        raise ValueError(f"a parameter is spread over {len(axes)} axes of its device mesh, and only one is understood")
    return axes


def num_shards(param: Tensor) -> int:
    """Over how many ranks its rows are spread; 1 for an ordinary tensor."""
    mesh: Any = param.device_mesh if is_sharded(param) else None  # type: ignore[attr-defined]
    return 1 if mesh is None else int(torch.Size(mesh.size(axis) for axis in shard_axes(param)).numel())


def largest_part(param: Tensor) -> int:
    """Elements that a rank holds at most: what every rank can reckon with alike. All of an ordinary tensor's."""
    return -(-(param.shape[0] if param.dim() else 1) // num_shards(param)) * param.shape[1:].numel()


def rows_of(param: Tensor) -> slice:
    """Which rows of the whole parameter this rank holds: chunks of equal size, the last ones shorter or empty, as FSDP2 cuts."""
    num_rows = param.shape[0] if param.dim() else 1
    for axis in shard_axes(param) if is_sharded(param) else ():
        mesh: Any = param.device_mesh  # type: ignore[attr-defined]
        chunk = -(-num_rows // mesh.size(axis))
        start = min(mesh.get_local_rank(axis) * chunk, num_rows)
        return slice(start, min(start + chunk, num_rows))
    return slice(0, num_rows)


def first_element(param: Tensor) -> int:
    """Place of the local part's first element in the flattened whole parameter; 0 for an ordinary tensor."""
    if not is_sharded(param) or not param.dim():
        return 0
    return rows_of(param).start * param.shape[1:].numel()


def like_param(param: Tensor, local: Tensor, shape: Sequence[int]) -> Tensor:
    """A tensor of this rank's rows as a part of one whose rows lie as the parameter's; the tensor itself if nothing is sharded.

    Args:
        param: says how.
        local: rows of this rank.
        shape: of the whole; its first dimension is the parameter's.
    """
    if not is_sharded(param):
        return local
    from torch.distributed.tensor import DTensor

    stride = torch.empty(shape, device="meta").stride()
    mesh, placements = param.device_mesh, param.placements  # type: ignore[attr-defined]
    found: Tensor = DTensor.from_local(local, mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride)
    return found


def sum_over_shards(param: Tensor, tensors: Sequence[Tensor]) -> None:
    """Add tensors up, in place, over the ranks that hold the rows of a parameter; nothing to do for an ordinary one.

    Args:
        param: says which ranks.
        tensors: any shapes, of the parameter's device.
    """
    if tensors and is_sharded(param):
        mesh: Any = param.device_mesh  # type: ignore[attr-defined]
        sum_in_place(tensors, [mesh.get_group(axis) for axis in shard_axes(param)])
