"""Models of Hugging Face: loading and saving, their blocks, and a loss that never holds all logits."""

from .blocks import find_blocks, resolve_blocks
from .chunked_loss import ChunkedLoss, causal_lm_loss
from .hub import load_config, load_model, load_tokenizer, parse_dtype, save_model, set_attention
from .lora import Adapters, add_lora
from .loss import linear_cross_entropy

__all__ = [
    "Adapters",
    "ChunkedLoss",
    "add_lora",
    "causal_lm_loss",
    "find_blocks",
    "linear_cross_entropy",
    "load_config",
    "load_model",
    "load_tokenizer",
    "parse_dtype",
    "resolve_blocks",
    "save_model",
    "set_attention",
]
