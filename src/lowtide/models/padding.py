"""Which token fills the rows of a batch up."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def padding_id(tokenizer: PreTrainedTokenizerBase, model: nn.Module | None = None) -> int:
    """The tokenizer's padding token, or the one that ends a sequence, or 0. Padding is masked and never counted, so any token will do.

    Args:
        tokenizer: of the model.
        model: whose embedding must know the token: some tokenizers have one more than the model.
    """
    num_rows = None if model is None else _num_rows(model)
    known = (tokenizer.pad_token_id, getattr(tokenizer, "eos_token_id", None))
    return next((each for each in known if each is not None and (num_rows is None or each < num_rows)), 0)


def _num_rows(model: nn.Module) -> int | None:
    """Of its embedding, if it says which that is."""
    find: Any = getattr(model, "get_input_embeddings", None)
    try:
        weight = getattr(None if find is None else find(), "weight", None)
    except (NotImplementedError, AttributeError):  # of transformers, for architectures that it cannot tell
        return None
    return None if weight is None else int(weight.shape[0])
