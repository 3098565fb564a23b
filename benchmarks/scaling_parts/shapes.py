"""Models by name, as the planner's shape of a step."""

from __future__ import annotations

import functools
from typing import Any

import torch

from lowtide.models import find_blocks
from lowtide.planning import StepShape

# hidden, mlp, layers, heads, key-value heads, width of a head, vocabulary, tied. Sources: the models' own config.json; LLaMA from
# arXiv 2302.13971, table 2; the last ones are of benchmarks (cpu_peers.py, numerics.py).
MODELS = {
    "Llama 3.2 1B": (2048, 8192, 16, 32, 8, 64, 128256, True),
    "Llama 3.2 3B": (3072, 8192, 28, 24, 8, 128, 128256, True),
    "Llama 3.1 8B": (4096, 14336, 32, 32, 8, 128, 128256, False),
    "Qwen3 14B": (5120, 17408, 40, 40, 8, 128, 151936, False),
    "Qwen3 32B": (5120, 25600, 64, 64, 8, 128, 151936, False),
    "Llama 3.1 70B": (8192, 28672, 80, 64, 8, 128, 128256, False),
    "LLaMA 7B": (4096, 11008, 32, 32, 32, 128, 32000, False),
    "LLaMA 13B": (5120, 13824, 40, 40, 40, 128, 32000, False),
    "LLaMA 30B": (6656, 17920, 60, 52, 52, 128, 32000, False),
    "LLaMA 65B": (8192, 22016, 80, 64, 64, 128, 32000, False),
    "smollm2": (576, 1536, 30, 9, 3, 64, 49152, True),
    "tinyllama": (2048, 5632, 22, 32, 4, 64, 32000, False),
    "tinyllama, 2 layers": (2048, 5632, 2, 32, 4, 64, 32000, False),
    "0.1M": (64, 176, 2, 4, 4, 16, 256, True),
    "tiny": (64, 160, 2, 4, 2, 16, 1000, True),
    "0.4b": (960, 2560, 32, 15, 5, 64, 49152, True),
    "3b": (3200, 8640, 26, 32, 32, 100, 32000, False),
    "7b": (4096, 11008, 32, 32, 32, 128, 32000, False),
    "layers-8": (1024, 2816, 8, 16, 16, 64, 1000, False),
    "layers-32": (512, 1408, 32, 8, 8, 64, 1000, False),
    "layers-128": (256, 704, 128, 4, 4, 64, 1000, False),
    "layers-512": (128, 352, 512, 2, 2, 64, 1000, False),
}


@functools.cache
def step_shape(
    model: str,
    batch_size: int,
    seq_len: int,
    *,
    optimizer: str = "lomo",
    dtype: str = "bfloat16",
    device: str = "cuda",
    exact_clipping: bool = False,
) -> StepShape:
    """A step without padding; the same one every time, which remembers what it has traced.

    Args:
        model: a key of ``MODELS``.
        batch_size, seq_len: of the step.
        optimizer: adalomo, lomo, adamw or sgd.
        dtype: of weights and computation.
        device: cpu or cuda.
        exact_clipping: two passes.
    """
    shape = _whole(model, dtype, device).resized(batch_size=batch_size, seq_len=seq_len)
    shape.optimizer, shape.exact_clipping = optimizer, exact_clipping
    return shape


@functools.cache
def _whole(model: str, dtype: str, device: str) -> StepShape:
    """To be resized only."""
    from transformers import LlamaConfig

    hidden, mlp, layers, heads, kv_heads, width, vocab, tied = MODELS[model]
    # Qwen3 has norms of queries and keys on top, which are vectors.
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads,
        head_dim=width, vocab_size=vocab, tie_word_embeddings=tied, use_cache=False,
    )  # fmt: skip
    options: dict[str, Any] = {"dtype": getattr(torch, dtype), "device": device, "batch_size": 1, "seq_len": 2}
    return StepShape(config, find_blocks=find_blocks, masked=False, **options)


def homes(shape: StepShape, home: str) -> dict[str, str]:
    """All units in one home."""
    return {unit.name: home for unit in shape.units}
