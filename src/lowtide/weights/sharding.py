"""Weights spread over the GPUs of one machine or several: FSDP2 (``torch.distributed.fsdp.fully_shard``) around every block.

Each rank holds some rows of every parameter. A block's weights are gathered before its forward pass and before its backward pass, and
the sums of its gradients are scattered behind it: one all-gather a block and pass, one reduce-scatter a block and step, whatever the
number of micro-batches. This is ZeRO-3 (Rajbhandari et al., arXiv 1910.02054), as the LOMO paper uses it for 65B.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..optim.shards import is_sharded, like_param, local_part
from .home import malloc_trim
from .host_comm import use_slices
from .placing import LazyWeights

_SAFE_OFFLOAD = (2, 13)  # before it, a hook could read a gradient whose copy to host memory was still under way


def shard_modules(
    model: nn.Module,
    units: Sequence[Sequence[nn.Module]],
    mesh: Any,
    *,
    reduce_dtype: torch.dtype | None,
    offload: bool,
    before_root: Callable[[], None],
) -> None:
    """Apply ``fully_shard`` to every unit and to what is left of the model.

    A model whose weights have not been loaded (``model.lowtide_source``) gets them here, one unit after the other, so that no
    rank ever has more than its rows and one unit.

    Args:
        model: any module, its parameters on one device.
        units: modules that are gathered together, in the order of the forward pass.
        mesh: one-dimensional, or two-dimensional: rows are spread over the last dimension, and the first has copies of them.
        reduce_dtype: in which gradients are added up over ranks; None for that of the parameters.
        offload: keep this rank's rows in host memory, and update them there.
        before_root: called when what is outside of all units has its weights, and nothing is sharded yet.
    """
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

    source: LazyWeights | None = getattr(model, "lowtide_source", None)
    names = {id(param): name for name, param in model.named_parameters()}  # a reference would keep the whole of it
    on_gpu = mesh.device_type == "cuda"
    policy: Any = CPUOffloadPolicy(pin_memory=True) if offload and on_gpu else OffloadPolicy()
    options: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": MixedPrecisionPolicy(reduce_dtype=reduce_dtype),
        "offload_policy": policy,
        # The root's, too, which FSDP2 would leave whole: between two passes every parameter is what the optimizer knows.
        "reshard_after_forward": True,
    }

    def load(params: Sequence[nn.Parameter]) -> None:
        for param in params:
            if source is not None and id(param) in names:
                param.data = source(names.pop(id(param))).to(param.dtype)

    inside = {id(param) for unit in units for module in unit for param in module.parameters()}
    for unit in units:
        _check_dtypes(names, [param for module in unit for param in module.parameters()])
    _check_dtypes(names, [param for param in model.parameters() if id(param) not in inside])
    load([param for param in model.parameters() if id(param) not in inside])
    outer = [unit for unit in units if any(isinstance(module, nn.Embedding | nn.Linear) for module in unit)]
    load([param for unit in outer for module in unit for param in module.parameters()])
    before_root()
    sharded: list[Any] = []
    for unit in units:
        load([param for module in unit for param in module.parameters()])
        sharded.append(fully_shard(list(unit) if len(unit) > 1 else unit[0], **options))
    sharded.append(fully_shard(model, **options))
    if not on_gpu:
        _spare_host_memory(model)
    if source is not None:
        del model.lowtide_source


def _spare_host_memory(model: nn.Module) -> None:
    """On a CPU nothing is gained by gathering the next block's weights while one computes, and two would be in memory."""
    from torch.distributed.fsdp import FSDPModule

    sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in sharded:
        module.set_modules_to_backward_prefetch([module])  # in place of the one before it: itself, which is there
    if hasattr(FSDPModule, "set_custom_all_gather"):
        use_slices(sharded)
    if (trim := malloc_trim()) is not None:
        trim(0)  # what loading has left behind


def gpus_connected() -> bool:
    """The default process group has a backend for GPUs."""
    distributed = torch.distributed
    return distributed.is_initialized() and "nccl" in str(distributed.get_backend_config())


def check_mesh(mesh: Any) -> None:
    """
    Raises:
        ValueError: it does not have all processes: losses and norms are those of all.
    """
    if (size := torch.distributed.get_world_size()) != mesh.size():
        raise ValueError(f"the mesh has {mesh.size()} of {size} processes: give one over all of them, or none")


def _check_dtypes(names: Mapping[int, str], params: Sequence[nn.Parameter]) -> None:
    """
    Raises:
        ValueError: those that are trained have several dtypes, which cannot be sent together.
    """
    trained = {param.dtype: names[id(param)] for param in params if param.requires_grad}
    if len(trained) > 1:
        found = " and ".join(f"{name} in {dtype}" for dtype, name in trained.items())
        raise ValueError(
            f"parameters that are gathered together must have one dtype, and there are {found}: convert the model first"
        )


def check_offload() -> None:
    """
    Raises:
        RuntimeError: this version of torch would read gradients before they are there.
    """
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < _SAFE_OFFLOAD:
        raise RuntimeError(
            f"offload=True needs torch 2.13 or later, and this is {torch.__version__}: before it, FSDP2 lets a hook read gradients whose "
            "copy to host memory is under way, and weights would silently go wrong. Update torch, or leave offload off"
        )


def make_mesh(device_type: str, ranks_per_node: int | None) -> Any:
    """A device mesh over all processes.

    Args:
        device_type: "cuda" or "cpu".
        ranks_per_node: rows are spread over so many ranks that follow one another, and every such group has a copy of all; None
            to spread them over all ranks.

    Raises:
        RuntimeError: there is no process group.
        ValueError: the number of processes is not a multiple of ``ranks_per_node``.
    """
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        raise RuntimeError(
            "no process group: start with torchrun and call torch.distributed.init_process_group() first, or use `torchrun ... -m "
            "lowtide train`, which does it"
        )
    from torch.distributed.device_mesh import init_device_mesh

    size = distributed.get_world_size()
    if ranks_per_node is None:
        return init_device_mesh(device_type, (size,), mesh_dim_names=("shard",))
    if ranks_per_node < 1 or size % ranks_per_node:
        raise ValueError(f"{size} processes cannot be divided into groups of {ranks_per_node}")
    return init_device_mesh(
        device_type, (size // ranks_per_node, ranks_per_node), mesh_dim_names=("replicate", "shard")
    )


def whole_tensor(tensor: Tensor) -> Tensor:
    """All rows of a tensor that is spread over ranks, on every rank, which must all call this; others as they are."""
    if not is_sharded(tensor):
        return tensor
    if (
        tensor.dtype == torch.int16
    ):  # of compensated rounding; gloo cannot send it, so its bits go as those of another type
        as_other = like_param(tensor, local_part(tensor).view(torch.bfloat16), tensor.shape)
        return as_other.full_tensor().view(torch.int16)  # type: ignore[attr-defined]
    return tensor.full_tensor()  # type: ignore[attr-defined]


def for_the_first(tensor: Tensor) -> Tensor | None:
    """The same, in host memory of the first rank; None on the others, which keep nothing of it."""
    if not is_sharded(tensor):
        return tensor
    found = whole_tensor(tensor)
    return found.cpu() if torch.distributed.get_rank() == 0 else None
