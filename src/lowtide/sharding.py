"""A model on several GPUs or machines: the public entry that spreads its weights before it is fused."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from .models.blocks import find_blocks, outer_modules, resolve_blocks
from .models.chunked_loss import ChunkedLoss
from .models.lora import adapted_layers
from .optim.base import SIXTEEN_BIT
from .weights.sharding import check_mesh, check_offload, gpus_connected, make_mesh, shard_modules


def shard(
    model: nn.Module,
    mesh: Any = None,
    *,
    ranks_per_node: int | None = None,
    reduce_dtype: torch.dtype | str | None = "auto",
    offload: bool = False,
    blocks: Iterable[nn.Module | str] | None = None,
) -> nn.Module:
    """Spread a model's weights over all processes (FSDP2), so that each holds some rows of every parameter.

    Call it on every rank, then make the optimizer, then :func:`lowtide.fuse`. Each rank gives the model its own part of the batch.
    The loss that a Hugging Face model returns in training is the mean over the counted tokens of all ranks together; a loss of
    your own counts as the mean over one rank's part, and gradients are averaged over ranks.

        torch.distributed.init_process_group("cpu:gloo,cuda:nccl")
        model = lowtide.shard(model)
        optimizer = lowtide.AdaLomo(model.parameters(), lr=1e-3)
        engine = lowtide.fuse(model, optimizer, micro_batch_size=2)

    Args:
        model: any module, the same on every rank; changed in place. Models that were loaded lazily get their weights here, block
            by block, and no rank ever holds all of them.
        mesh: a ``DeviceMesh`` over all processes with one dimension, or two: copies, and rows. None for one on GPUs if the process group
            has a backend for them (NCCL), else on the CPU.
        ranks_per_node: without ``mesh``: spread the rows within groups of so many ranks only, each of which has a copy of the
            model, and add gradients up between the groups. For machines that are connected slowly.
        reduce_dtype: in which gradients are added up over ranks and over micro-batches. ``"auto"``: float32 where weights are
            16-bit. None: the dtype of the weights, half as much to send.
        offload: keep weights in host memory, where they are also updated, for GPUs with too little memory for their share. Without
            effect on a CPU. Needs torch 2.13.
        blocks: as in :func:`lowtide.fuse`.

    Returns:
        The model.

    Raises:
        RuntimeError: there is no process group, or this torch is too old for ``offload``.
        ValueError: the processes cannot be divided as wanted, or the mesh leaves some out; the model has adapters of peft, is sharded
            already, or has trained parameters of several dtypes in one block.
    """
    from torch.distributed.fsdp import FSDPModule

    if isinstance(model, FSDPModule):
        raise ValueError("this model is sharded already")
    if adapted_layers(model):
        raise ValueError("a model with adapters of peft cannot be sharded yet: train it in one process")
    if offload:
        check_offload()
    if mesh is None:
        mesh = make_mesh("cuda" if torch.cuda.is_available() and gpus_connected() else "cpu", ranks_per_node)
    check_mesh(mesh)
    if reduce_dtype == "auto":
        sixteen_bit = any(param.dtype in SIXTEEN_BIT for param in model.parameters())
        reduce_dtype = torch.float32 if sixteen_bit else None
    if isinstance(reduce_dtype, str):
        raise ValueError(f"reduce_dtype must be a torch.dtype, None or 'auto', got {reduce_dtype!r}")
    found = find_blocks(model) if blocks is None else resolve_blocks(model, blocks)
    shard_modules(
        model,
        _units(found, outer_modules(model, found)),
        mesh,
        reduce_dtype=reduce_dtype,
        offload=offload,
        before_root=lambda: ChunkedLoss.look_at(model),
    )
    return model


def _units(blocks: Sequence[nn.Module], outer: Sequence[nn.Module]) -> list[list[nn.Module]]:
    """Modules that are gathered together: each alone, but for those that share parameters."""
    units: list[list[nn.Module]] = []
    for module in [*outer[:1], *blocks, *outer[1:]]:
        params = set(module.parameters())
        joined = [unit for unit in units if any(params & set(member.parameters()) for member in unit)]
        merged = [*(member for unit in joined for member in unit), module]
        units = [unit for unit in units if unit not in joined]
        position = 0 if joined and joined[0][0] in outer else len(units)
        units.insert(position, merged)
    return [unit for unit in units if any(True for module in unit for _ in module.parameters())]
