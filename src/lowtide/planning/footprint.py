"""What a model takes, counted from its config alone: it is built on the meta device, where tensors have no memory."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .tracing import Bytes

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def num_parameters(config: PreTrainedConfig, *, trust_remote_code: bool = False) -> int:
    """The number of parameters of the causal language model with this config; tied ones count once.

    Raises:
        ValueError: transformers has no causal language model for this config, or it contradicts itself.
    """
    return sum(param.numel() for param in skeleton(config, torch.float32, trust_remote_code).parameters())


def weights_bytes(config: PreTrainedConfig, dtype: torch.dtype, *, trust_remote_code: bool = False) -> int:
    """The bytes of all parameters when the model is built in ``dtype``; tied ones count once, buffers not at all.

    Raises:
        ValueError: transformers has no causal language model for this config, or it contradicts itself.
    """
    return sum_bytes(skeleton(config, dtype, trust_remote_code).parameters())


def skeleton(config: PreTrainedConfig, dtype: torch.dtype, trust_remote_code: bool = False) -> nn.Module:
    """The causal language model with this config on the meta device, in training mode.

    Raises:
        ValueError: transformers has no causal language model for this config, or it contradicts itself.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        # a copy, because the dtype is noted in it
        model: nn.Module = AutoModelForCausalLM.from_config(
            copy.deepcopy(config), dtype=dtype, trust_remote_code=trust_remote_code
        )
    return model.train()


@dataclasses.dataclass(frozen=True)
class Unit:
    """What is moved as one: a decoder layer, the input embedding, or the output head (both together where they are tied).

    Attributes:
        name: of its module in the model.
        num_bytes: of its parameters.
        num_parameters: elements of them.
        is_layer: it is a decoder layer.
    """

    name: str
    num_bytes: int
    num_parameters: int
    is_layer: bool


@dataclasses.dataclass(frozen=True)
class Footprint:
    """Bytes by kind (``planning.KINDS``) in each place, at the moment when the device holds most.

    Where the device is a CPU, its memory is the machine's: everything in memory stands under ``device``.
    """

    device: Bytes
    host: Bytes
    disk: Bytes

    def totals(self) -> dict[str, int]:
        """Bytes of each place."""
        return {place: sum(getattr(self, place).values()) for place in ("device", "host", "disk")}

    def to_dict(self) -> dict[str, dict[str, int]]:
        """Plain values for JSON."""
        return dataclasses.asdict(self)


def sum_bytes(params: Iterable[Tensor]) -> int:
    """Bytes of several tensors; they may be on the meta device."""
    return sum(param.numel() * param.element_size() for param in params)
