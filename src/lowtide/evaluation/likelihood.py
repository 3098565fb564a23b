"""Held-out loss and perplexity: the mean negative log-likelihood of the counted tokens, and its exponential.

The mean is over the tokens of all batches together, so it depends neither on the batch size nor on how sequences of
different length fall into batches. Shape letters: B sequences in a batch, S tokens in a sequence, V entries in the
vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

# Logits in the model's own dtype exist for about this many tokens at a time, float32 copies of them for fewer.
_PIECE_TOKENS = 1024
_FLOAT32_TOKENS = 256


@dataclasses.dataclass(frozen=True)
class LossResult:
    """A held-out score.

    Attributes:
        loss: mean negative log-likelihood of a counted token, in nats.
        perplexity: ``exp(loss)``; infinity where that is too large for a float.
        num_tokens: tokens counted.
    """

    loss: float
    perplexity: float
    num_tokens: int


def evaluate_loss(model: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> LossResult:
    """Score a causal language model; no gradients, in evaluation mode, and its mode restored afterwards.

    Args:
        model: a Hugging Face causal language model, or any module called with the entries of a batch that returns an
            object with ``logits`` [B, S, V].
        batches: dictionaries with ``labels``, int64 [B, S], unshifted (the token at position s is predicted at s - 1),
            -100 where nothing is counted, and the model's inputs, whose first dimension is B. They are moved to the
            device of the model's parameters.

    Raises:
        ValueError: no token is counted in all the batches.
    """
    device = next(model.parameters()).device
    was_training = model.training
    total, num_tokens = 0.0, 0
    model.eval()
    try:
        with torch.no_grad():
            for batch in batches:
                for piece in _pieces(batch):
                    loss, count = _summed_loss(model, {name: value.to(device) for name, value in piece.items()})
                    total += loss
                    num_tokens += count
    finally:
        model.train(was_training)
    if num_tokens == 0:
        raise ValueError("nothing to evaluate: the held-out data has no token that the loss counts")
    mean = total / num_tokens
    return LossResult(mean, math.exp(mean) if mean < 700 else math.inf if mean == mean else math.nan, num_tokens)


def _pieces(batch: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """The batch in pieces of whole sequences, of about ``_PIECE_TOKENS`` tokens, so that the logits stay small."""
    num_rows, seq_len = batch["labels"].shape
    rows = max(1, _PIECE_TOKENS // seq_len)
    for start in range(0, num_rows, rows):
        yield {name: value[start : start + rows] for name, value in batch.items()}


def _summed_loss(model: nn.Module, piece: dict[str, Tensor]) -> tuple[float, int]:
    """Sum of the negative log-likelihoods and the number of counted tokens of one piece."""
    labels = piece.pop("labels")[:, 1:].flatten()
    counted = labels != -100
    if not counted.any():
        return 0.0, 0
    logits = model(**piece).logits[:, :-1].flatten(0, 1)
    total = torch.zeros((), dtype=torch.float64, device="cpu")
    for part, targets in zip(logits.split(_FLOAT32_TOKENS), labels.split(_FLOAT32_TOKENS), strict=True):
        total += nn.functional.cross_entropy(part.float(), targets, ignore_index=-100, reduction="sum").double().cpu()
    return total.item(), int(counted.sum())
