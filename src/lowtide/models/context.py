"""The context of a model: how many tokens it takes at once."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..log import get_logger

_logger = get_logger(__name__)


def context_length(config: Any) -> int | None:
    """Tokens that a model was made for, or None if its config does not say.

    Args:
        config: of transformers, or of a module that has something of its own by this name.
    """
    limit = getattr(_text_config(config), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def _text_config(config: Any) -> Any:
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def has_learned_positions(model: nn.Module, limit: int) -> bool:
    """Whether there is a vector for each of ``limit`` positions, so that no more will do; some models have two vectors more."""
    config = getattr(model, "config", None)
    vocab_size = None if config is None else getattr(_text_config(config), "vocab_size", None)
    return any(
        isinstance(module, nn.Embedding)
        and limit <= module.num_embeddings <= limit + 2
        and module.num_embeddings != vocab_size
        for module in model.modules()
    )


def check_context(model: nn.Module, num_tokens: int, how: str) -> None:
    """Refuse rows that the model has no positions for; warn of those that are longer than it was made for.

    Args:
        model: of transformers.
        num_tokens: of the longest row.
        how: what to do about it, with ``{limit}`` for the number of tokens that would do.

    Raises:
        ValueError: the model has learned positions, and not that many.
    """
    config = getattr(model, "config", None)
    limit = None if config is None else context_length(config)
    if limit is None or num_tokens <= limit:
        return
    longer = f"rows of {num_tokens} tokens are longer than the context of the model, {limit} tokens (max_position_embeddings)"
    if has_learned_positions(model, limit):
        raise ValueError(f"{longer}: {how.format(limit=limit)}")
    _logger.warning("%s: what it makes of later positions is not known; %s", longer, how.format(limit=limit))
