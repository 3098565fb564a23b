"""What a model takes, counted from its config alone: it is built on the meta device, where tensors have no memory."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def num_parameters(config: PreTrainedConfig, *, trust_remote_code: bool = False) -> int:
    """The number of parameters of the causal language model with this config; tied ones count once.

    Raises:
        ValueError: transformers has no causal language model for this config, or it contradicts itself.
    """
    return sum(param.numel() for param in _skeleton(config, torch.float32, trust_remote_code).parameters())


def weights_bytes(config: PreTrainedConfig, dtype: torch.dtype, *, trust_remote_code: bool = False) -> int:
    """The bytes of all parameters when the model is built in ``dtype``; tied ones count once, buffers not at all.

    Raises:
        ValueError: transformers has no causal language model for this config, or it contradicts itself.
    """
    skeleton = _skeleton(config, dtype, trust_remote_code)
    return sum(param.numel() * param.element_size() for param in skeleton.parameters())


def _skeleton(config: PreTrainedConfig, dtype: torch.dtype, trust_remote_code: bool) -> nn.Module:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        # a copy, because the dtype is noted in it
        model: nn.Module = AutoModelForCausalLM.from_config(
            copy.deepcopy(config), dtype=dtype, trust_remote_code=trust_remote_code
        )
    return model
