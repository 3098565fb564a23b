"""Held-out loss and perplexity: the mean negative log-likelihood of the counted tokens, and its exponential.

The mean is over the tokens of all batches together, so it depends neither on the batch size nor on how sequences of
different length fall into batches. Shape letters: B sequences in a batch, S tokens in a sequence, V entries in the
vocabulary. Logits [B, S, V] of a whole batch never exist in float32: where the model's head is understood the loss is
computed in slices of the vocabulary, as in training; elsewhere a few sequences go through the model at a time.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn

from ..models.chunked_loss import ChunkedLoss
from ..optim.shards import compute_device, is_sharded
from ..ranks import ALONE, Ranks

IGNORED = -100
# Where the model makes its own logits, they exist for about this many tokens at a time, float32 copies for fewer.
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


def evaluate_loss(model: nn.Module, batches: Iterable[Mapping[str, Tensor]], ranks: Ranks = ALONE) -> LossResult:
    """Score a causal language model; no gradients, in evaluation mode, and its mode restored afterwards.

    Args:
        model: a Hugging Face causal language model, or any module called with the entries of a batch that returns an
            object with ``logits`` [B, S, V].
        batches: dictionaries with ``labels``, int64 [B, S], unshifted (the token at position s is predicted at s - 1),
            -100 where nothing is counted, and the model's inputs, whose first dimension is B. They are moved to the
            device of the model's parameters.
        ranks: of a sharded model: each calls this with as many batches, its own, and the score is that of all of them. Without it
            every rank must have the same batches.

    Raises:
        ValueError: no token is counted in all the batches.
    """
    device = compute_device(next(model.parameters()))
    sharded = any(is_sharded(param) for param in model.parameters())
    chunked = ChunkedLoss.of(model)
    was_training = model.training
    total, num_tokens = 0.0, 0
    model.eval()
    try:
        with torch.no_grad(), _summed(model, chunked, sharded) as summed:
            for batch in batches:
                count = int((batch["labels"][:, 1:] != IGNORED).sum())
                if count or sharded:  # other ranks may have something to count, and need this rank's weights
                    total += summed({name: value.to(device) for name, value in batch.items()})
                    num_tokens += count
    finally:
        model.train(was_training)
    total, num_tokens = ranks.sum([total])[0], round(ranks.sum([num_tokens])[0])
    if num_tokens == 0:
        raise ValueError("nothing to evaluate: the held-out data has no token that the loss counts")
    mean = total / num_tokens
    return LossResult(mean, _exp(mean), num_tokens)


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


@contextmanager
def _summed(
    model: nn.Module, chunked: ChunkedLoss | None, sharded: bool
) -> Iterator[Callable[[dict[str, Tensor]], float]]:
    """What gives the summed loss of a batch."""
    if chunked is None:
        yield partial(_plain_sum, model, in_pieces=not sharded)  # ranks must run as many
        return
    with chunked.through_model() if sharded else nullcontext(chunked) as loss:
        # transformers divides the sum of the losses by this number of items; 1 leaves the sum
        yield lambda batch: float(loss(num_items_in_batch=1, **batch).loss)


def _plain_sum(model: nn.Module, batch: dict[str, Tensor], *, in_pieces: bool = True) -> float:
    # Packed documents are told apart by position_ids only where transformers keeps no cache.
    options = {"use_cache": False} if hasattr(getattr(model, "config", None), "use_cache") else {}
    total = 0.0
    for piece in _pieces(batch) if in_pieces else (dict(batch),):
        labels = piece.pop("labels")[:, 1:].flatten()
        logits = model(**piece, **options).logits[:, :-1].flatten(0, 1)
        for part, targets in zip(logits.split(_FLOAT32_TOKENS), labels.split(_FLOAT32_TOKENS), strict=True):
            total += float(nn.functional.cross_entropy(part.float(), targets, ignore_index=IGNORED, reduction="sum"))
    return total


def _pieces(batch: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """The batch in pieces of whole sequences, of about ``_PIECE_TOKENS`` tokens."""
    num_rows, seq_len = batch["labels"].shape
    rows = max(1, _PIECE_TOKENS // seq_len)
    for start in range(0, num_rows, rows):
        yield {name: value[start : start + rows] for name, value in batch.items()}
