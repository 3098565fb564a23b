"""How long a step takes, from counts of operations and bytes.

Operations: 2 for each parameter of a matrix and token in a forward pass (Kaplan et al. 2020, arXiv 2001.08361, section 2.1), and
as many for scores and values of causal attention over half the square of the sequence. A block is run forward, run forward
again unless its activations are kept, and backward at twice that; exact clipping repeats the latter two. The head has as many:
logits, logits again where they were not kept, two gradients.

Bytes: a streamed block is read once for each of these passes over the model and written once. Transfers run beside the
computation, so the slowest of computation, bus and disk decides.

Updates: each reads the gradient and reads and writes the weight, which is bound by the device's memory; it waits for the products and they
for it, so it is part of the computation. Exact clipping reads each gradient once more, for its norm.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..fused.slices import can_be_held
from .footprint import Unit
from .head_loss import kept_share
from .speeds import Speeds
from .step_shape import StepShape
from .updates import update_traffic

# Blocks that are still in the pool where the pass turns round, and again where the next step begins: not read a second time.
_KEPT_AT_A_TURN = 2


@dataclasses.dataclass(frozen=True)
class StepTime:
    """Where the time of a step goes.

    Attributes:
        step_s: seconds of a step.
        compute_s, bus_s, disk_s: seconds that each would take alone.
        update_s: of the weights, part of ``compute_s``.
        exposed_s: of the first block, which nothing can hide.
        bottleneck: "compute", "PCIe" or "disk".
        flops: operations of a step.
        bus_bytes: the larger of what a step moves to the device and from it.
        disk_read_bytes, disk_write_bytes: of a step.
        tokens_to_hide: tokens a step from which on the transfers are hidden; 0 without transfers, None if no number is enough.
    """

    step_s: float
    compute_s: float
    bus_s: float
    disk_s: float
    update_s: float
    exposed_s: float
    bottleneck: str
    flops: float
    bus_bytes: int
    disk_read_bytes: int
    disk_write_bytes: int
    tokens_to_hide: int | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return dataclasses.asdict(self)


def step_time(shape: StepShape, homes: Mapping[str, str], block_inputs: str, speeds: Speeds) -> StepTime:
    """The time of a step.

    Args:
        shape: of the step.
        homes: of each unit by name: device, host or disk.
        block_inputs: device, or host.
        speeds: of the machine.
    """
    on_cpu = shape.device == "cpu"
    on_disk = [unit for unit in shape.units if homes[unit.name] == "disk"]
    in_host = [unit for unit in shape.units if homes[unit.name] == "host" and not on_cpu]
    disk_read, disk_write = _traffic(on_disk, shape.exact_clipping)
    host_read, host_write = _traffic(in_host, shape.exact_clipping)
    inputs = shape.step.input_bytes * len(shape.recomputed) if block_inputs == "host" and not on_cpu else 0
    num_backward = 2 if shape.exact_clipping else 1
    to_device, from_device = host_read + inputs * num_backward, host_write + inputs
    if not on_cpu:
        to_device, from_device = to_device + disk_read, from_device + disk_write
    update_s = update_seconds(shape.model.parameters(), shape, speeds)
    compute_s = step_flops(shape) / speeds.flops + update_s
    # the bus works in both directions at once, a disk does not
    bus_s = max(to_device / speeds.to_device, from_device / speeds.from_device)
    disk_s = disk_read / speeds.disk_read + disk_write / speeds.disk_write
    first_s = max([0.0, *(u.num_bytes / speeds.disk_read for u in on_disk[:1])])
    first_s = max([first_s, *(u.num_bytes / speeds.to_device for u in in_host[:1])])
    lanes = {"compute": compute_s, "PCIe": bus_s, "disk": disk_s}
    return StepTime(
        step_s=max(lanes.values()) + first_s,
        compute_s=compute_s,
        bus_s=bus_s,
        disk_s=disk_s,
        update_s=update_s,
        exposed_s=first_s,
        bottleneck=max(lanes, key=lambda name: lanes[name]),
        flops=step_flops(shape),
        bus_bytes=max(to_device, from_device),
        disk_read_bytes=disk_read,
        disk_write_bytes=disk_write,
        tokens_to_hide=_tokens_to_hide(
            shape, compute_s - update_s, update_s, bus_s, disk_s, inputs * num_backward / speeds.to_device
        ),
    )


def step_flops(shape: StepShape) -> float:
    """Floating-point operations of a step."""
    tokens = shape.batch_size * shape.seq_len
    passes = 4 + (
        3 if shape.exact_clipping else 0
    )  # forward, again, backward at twice that; and the last two once more
    attention = 2 * tokens * shape.seq_len * _attention_width(shape)
    layers = [2 * tokens * _active_parameters(shape, block) + attention for block in shape.blocks]
    not_again = sum(layers[len(shape.recomputed) :]) * (2 if shape.exact_clipping else 1)
    model: Any = shape.model
    weight = model.get_output_embeddings().weight
    head = 2 * tokens * weight.numel()
    num_head = passes - kept_share(tokens, weight, shape.dtype.itemsize) + _repeated_logits(shape)
    not_again += shape.left_out_flops * (2 if shape.exact_clipping else 1)
    return float(passes * sum(layers) - not_again + num_head * head)


def _repeated_logits(shape: StepShape) -> int:
    """Times that logits are made again because the gradient of a tied matrix comes in slices at the end (``fused/slices.py``).

    With weights that move they always are; this is not told apart.
    """
    in_slices = shape.optimizer == "lomo" and not shape.gathered and shape.dtype != torch.float16
    if not in_slices or not shape.units[-1].is_layer:
        return 0
    model: Any = shape.model
    plain = type(model.get_input_embeddings()) is torch.nn.Embedding
    if plain and can_be_held(shape.batch_size * shape.seq_len, model.get_output_embeddings().weight.shape[0]):
        return 0
    return 2 if shape.exact_clipping else 1


def update_seconds(params: Iterable[Tensor], shape: StepShape, speeds: Speeds) -> float:
    """What updating parameters takes in a step, by the bytes that move between the device and its memory.

    Args:
        params: all of the model, or the rows that a rank has of them; may be on the meta device.
        shape: of the step.
        speeds: of the machine.
    """
    if speeds.memory is None:
        return 0.0
    again = 1 if shape.exact_clipping else 0
    moved = sum(update_traffic(param, shape.optimizer, shape.rounding) + again * param.nbytes for param in params)
    return moved / speeds.memory


def _active_parameters(shape: StepShape, block: Any) -> float:
    """Parameters that a token is multiplied with: of a mixture's experts only those that are chosen."""
    text = shape.config.get_text_config()
    chosen = getattr(text, "num_experts_per_tok", None)
    total = 0.0
    for param in block.parameters():
        if param.dim() >= 3 and chosen:
            total += param.numel() * min(1.0, chosen / param.shape[0])
        elif param.dim() >= 2:
            total += param.numel()
    return total


def _attention_width(shape: StepShape) -> int:
    text = shape.config.get_text_config()
    heads = getattr(text, "num_attention_heads", None) or 0
    width = getattr(text, "head_dim", None) or (text.hidden_size // heads if heads else 0)
    return heads * width


def _traffic(units: list[Unit], exact_clipping: bool) -> tuple[int, int]:
    """(read, written) bytes of a step."""
    total = sum(unit.num_bytes for unit in units)
    ends = sum(unit.num_bytes for unit in units[-_KEPT_AT_A_TURN:]) + sum(u.num_bytes for u in units[:_KEPT_AT_A_TURN])
    return max((3 if exact_clipping else 2) * total - ends, 0), total


def _tokens_to_hide(
    shape: StepShape, products_s: float, update_s: float, bus_s: float, disk_s: float, inputs_s: float
) -> int | None:
    tokens = shape.batch_size * shape.seq_len
    slowest = max(bus_s, disk_s)
    if slowest == 0:
        return 0
    # block inputs are moved for every token, weights once a step, and updated once a step
    fixed_s = max(bus_s - inputs_s, disk_s) - update_s
    spare_s = (products_s - inputs_s) / tokens
    if spare_s <= 0:
        return None
    return max(0, math.ceil(fixed_s / spare_s))
