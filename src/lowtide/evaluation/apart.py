"""Whether a model keeps the documents of a packed row apart: asked of the model itself, in one short forward pass.

``position_ids`` that begin again are all that says where a document of a packed row ends. Most models of transformers make their
attention mask from it; some do not look at it (GPT-OSS, OPT, Falcon, BLOOM in 5.23), and a state or a convolution that runs along the row
(Mamba, Qwen3-Next, LFM2) goes from one document into the next, whatever the mask.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ..optim.shards import compute_device

_DOCUMENT = 8  # tokens of a document: the second begins within any window or kernel that reaches beyond one token
# Differences that rounding explains, relative to the size of the logits. In the same place of a row there are none in the models that were
# looked at; between two places sums have another order.
_SAME_PLACE = {torch.float32: 2e-6, torch.float64: 2e-6}  # 16-bit ones: 2e-3
_OTHER_PLACE = {torch.float32: 1e-3, torch.float64: 1e-3}  # 16-bit ones: a tenth


def keeps_documents_apart(
    model: nn.Module, tokens: PreTrainedTokenizerBase | Sequence[int], *, one_row_at_a_time: bool = False
) -> bool:
    """Whether a document's logits are what they are alone, whatever stands before it in its row.

    Where nothing can be said, because logits are not finite or the tokenizer has no two ordinary tokens, the answer is yes. No gradients,
    in evaluation mode; the model's mode and the random state are as before.

    Args:
        model: a causal language model of transformers, as it will be trained: its attention, and the engine if there is one.
        tokens: the tokenizer, or ids of ordinary tokens, at least two different ones, which are repeated if they are few.
        one_row_at_a_time: for flash attention, which tells documents apart in batches of one row only.

    Raises:
        ValueError: fewer than two different ids.
    """
    if not isinstance(tokens, Sequence):
        tokens = _ordinary_tokens(tokens, model)
        if len(tokens) < 2:
            return True
    parameters = inspect.signature(model.forward).parameters
    takes_rest = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values())
    if "position_ids" not in parameters and not takes_rest:
        return False
    first, other, second = _documents(tokens)
    rows = torch.stack(
        [torch.cat(pair) for pair in ((first, second), (other, second), (second, first), (first, second))]
    )
    position_ids = torch.arange(_DOCUMENT).repeat(2).expand(len(rows), -1)
    options = {"use_cache": False} if hasattr(getattr(model, "config", None), "use_cache") else {}
    device, was_training = compute_device(next(model.parameters())), model.training
    pieces = range(len(rows)) if one_row_at_a_time else (slice(None),)
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            logits = torch.cat([
                model(input_ids=rows[piece].view(-1, 2 * _DOCUMENT).to(device), position_ids=position_ids[piece].view(-1, 2 * _DOCUMENT).to(device), **options).logits
                for piece in pieces
            ])  # fmt: skip
    finally:
        model.train(was_training)
    logits = logits.float()
    if not bool(torch.isfinite(logits).all()):
        return True
    dtype = next(model.parameters()).dtype
    other_place = _OTHER_PLACE.get(dtype, 0.1)
    # Experts that get another number of tokens in a pass of its own may round otherwise.
    same_place = other_place if one_row_at_a_time else _SAME_PLACE.get(dtype, 2e-3)
    return _are_apart(logits, same_place, other_place)


def _documents(token_ids: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Three, int64 [_DOCUMENT] each, the first two with another token in every place."""
    if len(set(token_ids)) < 2:
        raise ValueError(f"at least two different tokens are needed, got {list(token_ids)[:4]}")
    ids = torch.tensor(list(dict.fromkeys(token_ids)))
    index = torch.arange(_DOCUMENT)
    return ids[index % len(ids)], ids[(index + 1) % len(ids)], ids[(index * 3 + 2) % len(ids)]


def _are_apart(logits: Tensor, same_place: float, other_place: float) -> bool:
    """Of rows [first second], [other second], [second first] and [first second], float32 [4, 2 * _DOCUMENT, V]."""
    second, after_other, again = (logits[row, _DOCUMENT:] for row in (0, 1, 3))
    at_the_start = logits[2, :_DOCUMENT]
    size = _distance(second, second.mean(dim=-1, keepdim=True))
    noise = 4 * _distance(second, again)
    same, elsewhere = noise + same_place * size, noise + other_place * size
    return _distance(second, after_other) <= same and _distance(second, at_the_start) <= elsewhere


def _distance(one: Tensor, other: Tensor) -> float:
    """Mean over the vocabulary, at the token where it is largest."""
    return (one - other).abs().mean(dim=-1).amax().item()


def _ordinary_tokens(tokenizer: PreTrainedTokenizerBase, model: Any) -> list[int]:
    """Tokens that mean text, from all over the vocabulary, as many as three documents have if there are so many."""
    vocab_size, count = model.config.get_text_config().vocab_size, 3 * _DOCUMENT
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    found = [token for token in range(min(len(tokenizer), vocab_size)) if token not in special]
    return found[:: max(1, len(found) // count)][:count]
