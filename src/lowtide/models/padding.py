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
    find: Any = getattr(model, "get_input_embeddings", None)
    weight = getattr(find() if find is not None else None, "weight", None)
    num_rows = None if weight is None else weight.shape[0]
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((each for each in known if each is not None and (num_rows is None or each < num_rows)), 0)
