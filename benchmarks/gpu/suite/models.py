"""LLaMA shapes with random weights that are made on the card, one parameter at a time, when a home takes them in."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig

from bigger_than_memory import SHAPES
from lowtide.models.lazy import skeleton

from .context import Context

_VOCABULARY = 32000

# Dense FLOP/s with 16-bit numbers and float32 sums, from the makers' data sheets.
_PEAK_FLOPS = {
    "H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12, "3090": 71e12, "5090": 209e12,
}  # fmt: skip


def llama_config(context: Context, name: str, num_layers: int | None = None) -> LlamaConfig:
    """The config of a shape; in a rehearsal one of the same kind that is tiny.

    Args:
        num_layers: instead of the shape's own.
    """
    shape = dict(SHAPES[name])
    if context.rehearse:
        shape.update(
            hidden_size=64,
            intermediate_size=256,
            num_attention_heads=4,
            num_hidden_layers=min(6, shape["num_hidden_layers"]),
        )
        shape.pop("num_key_value_heads", None)
    if num_layers is not None:
        shape["num_hidden_layers"] = min(num_layers, shape["num_hidden_layers"])
    return LlamaConfig(
        vocab_size=256 if context.rehearse else _VOCABULARY, tie_word_embeddings=False, use_cache=False, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, max_position_embeddings=2**17, **shape,
    )  # fmt: skip


def random_model(context: Context, config: LlamaConfig) -> Any:
    """A Llama of this config in training mode, whose weights come from ``lowtide_source``."""
    model = skeleton(config, context.dtype)
    shapes = {name: param.shape for name, param in model.named_parameters()}
    generator = torch.Generator(context.device).manual_seed(0)

    def source(name: str) -> torch.Tensor:
        value = torch.empty(shapes[name], dtype=context.dtype, device=context.device)
        return value.fill_(1.0) if value.ndim == 1 else value.normal_(0.0, 0.02, generator=generator)

    model.lowtide_source = source
    return model.train()


def num_parameters(config: LlamaConfig) -> int:
    """Of a Llama of this config."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    kv = hidden // heads * (config.num_key_value_heads or heads)
    layer = 2 * hidden**2 + 2 * hidden * kv + 3 * hidden * config.intermediate_size + 2 * hidden
    return config.num_hidden_layers * layer + 2 * config.vocab_size * hidden + hidden


def flops_per_token(config: LlamaConfig, seq_len: int) -> float:
    """Floating-point operations that a training step needs a token: 6 a parameter (the embedding apart), and causal attention.

    What is recomputed does not count, as is usual for model FLOPs utilisation (PaLM, arXiv 2204.02311, appendix B).
    """
    products = num_parameters(config) - config.vocab_size * config.hidden_size
    return 6 * products + 6 * config.num_hidden_layers * config.hidden_size * seq_len


def peak_flops(context: Context) -> float | None:
    """Of the card, if it is known."""
    if context.rehearse:
        return None
    name = torch.cuda.get_device_name()
    return next((flops for part, flops in _PEAK_FLOPS.items() if part in name), None)
