"""How long a step takes on several ranks that share a model, from counts of operations and bytes.

Each unit (embedding, decoder layer, head) is gathered once a pass over the model, and its gradients are scattered once a pass backward,
whatever the number of micro-batches; either moves (N - 1) / N of it to a rank, and as much from it, for N ranks that share its rows. Where
there are copies of the rows, an all-reduce of a rank's rows between them follows: twice (C - 1) / C of these for C copies.
On a GPU that runs beside the computation, on a CPU one waits for the other. Each rank updates its own rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from .footprint import sum_bytes
from .sharded import Sharding, own_rows, unit_elements
from .speeds import Speeds
from .step_shape import StepShape
from .timing import step_flops, update_seconds

# Between CPUs, where nothing is given: Ethernet of 10 Gbit/s. Between GPUs it is the bus, see ``speeds.py``.
ASSUMED_CPU_LINK = 1.25e9


@dataclasses.dataclass(frozen=True)
class Link:
    """What ranks send to each other through.

    Attributes:
        rank_s: bytes a second from one rank to the others, and at the same time to it.
        node_s: the same between ranks that have copies of the same rows.
        source: of ``rank_s``, for people.
    """

    rank_s: float
    node_s: float
    source: str


@dataclasses.dataclass(frozen=True)
class ShardedTime:
    """Where the time of a step goes, on each rank.

    Attributes:
        step_s: seconds of a step.
        compute_s, link_s, bus_s: seconds that each would take alone; the bus is between host memory and GPU.
        update_s: of a rank's rows, part of ``compute_s``; 0 where the host updates them, whose speed is not known.
        exposed_s: of the first gather, which nothing can hide; 0 where nothing is hidden.
        bottleneck: "compute", "link" or "PCIe".
        flops: operations of a rank.
        gather_bytes, scatter_bytes, reduce_bytes: to a rank in a step: weights, sums of gradients, and those between copies.
    """

    step_s: float
    compute_s: float
    link_s: float
    bus_s: float
    update_s: float
    exposed_s: float
    bottleneck: str
    flops: float
    gather_bytes: int
    scatter_bytes: int
    reduce_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return dataclasses.asdict(self)


def find_link(speeds: Speeds, device: str, given: Mapping[str, float | None] | None = None) -> Link:
    """Rates that are given; without one, between GPUs that of the bus, and between CPUs an assumed one.

    Args:
        speeds: of the machine.
        device: "cpu" or "cuda".
        given: bytes a second as ``rank_s`` and ``node_s``; the latter is the former unless given.
    """
    given = given or {}
    rank_s, node_s = given.get("rank_s"), given.get("node_s")
    source = "given"
    if rank_s is None and device == "cpu":
        rank_s, source = ASSUMED_CPU_LINK, "assumed"
    elif rank_s is None:
        rank_s = min(speeds.to_device, speeds.from_device)
        source = f"that of PCIe, {speeds.sources['to_device']}"
    return Link(rank_s, rank_s if node_s is None else node_s, source)


def sharded_time(rank: StepShape, sharding: Sharding, speeds: Speeds, link: Link) -> ShardedTime:
    """The time of a step.

    Args:
        rank: the step of the rank with the most rows of the batch, see ``sharded.rank_shape``.
        sharding: how the ranks share the model.
        speeds: of each rank's machine.
        link: between ranks.
    """
    shards, copies = sharding.num_shards, sharding.num_ranks // sharding.num_shards
    num_backward = 2 if rank.exact_clipping else 1
    elements = sum(unit_elements(rank.model.get_submodule(unit.name), shards) for unit in rank.units)
    share = (shards - 1) / shards
    gathered = (1 + num_backward) * share * elements * rank.dtype.itemsize
    scattered = num_backward * share * elements * sharding.reduce_itemsize(rank.dtype)
    own_gradients = elements / shards * sharding.reduce_itemsize(rank.dtype)
    reduced = num_backward * 2 * (copies - 1) / copies * own_gradients
    link_s = (gathered + scattered) / link.rank_s + reduced / link.node_s
    flops = step_flops(rank)
    update_s = 0.0
    bus_s = 0.0
    if sharding.offload and rank.device != "cpu":
        own = sum_bytes(own_rows(param, shards) for param in rank.model.parameters())
        bus_s = max((1 + num_backward) * own / speeds.to_device, num_backward * own / speeds.from_device)
    else:
        update_s = update_seconds((own_rows(param, shards) for param in rank.model.parameters()), rank, speeds)
    compute_s = flops / speeds.flops + update_s
    lanes = {"compute": compute_s, "link": link_s, "PCIe": bus_s}
    first = unit_elements(rank.model.get_submodule(rank.units[0].name), shards) * rank.dtype.itemsize
    exposed_s = share * first / link.rank_s if rank.device != "cpu" else 0.0
    return ShardedTime(
        step_s=max(lanes.values()) + exposed_s if rank.device != "cpu" else compute_s + link_s,
        compute_s=compute_s,
        link_s=link_s,
        bus_s=bus_s,
        update_s=update_s,
        exposed_s=exposed_s,
        bottleneck=max(lanes, key=lambda name: lanes[name]),
        flops=flops,
        gather_bytes=round(gathered),
        scatter_bytes=round(scattered),
        reduce_bytes=round(reduced),
    )
