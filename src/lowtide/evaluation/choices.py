"""Accuracy on multiple choice: the answer is the choice that the model finds likeliest after the prompt.

Prompts and choices become tokens exactly as prompt/completion records do in training (``lowtide.data.encode_records``),
so a model is asked what it was taught. Shape letters: B rows in a piece, S tokens in its longest row, K positions whose
predictions are needed, V entries in the vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..data import ChoiceItem, Record, encode_records
from ..log import get_logger
from ..models.context import context_length
from ..models.padding import padding_id
from ..optim.shards import compute_device

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_logger = get_logger(__name__)

NORMALIZATIONS = ("sum", "per_token")

# Tokens, padding included, that go through the model at once; float32 logits exist for fewer positions still.
_PIECE_TOKENS = 1024
_FLOAT32_TOKENS = 256
_NO_LIMIT = 2**31


@dataclass(frozen=True)
class ChoiceResult:
    """A score on multiple choice.

    Attributes:
        accuracy: share of the items whose likeliest choice is the right one, between 0 and 1.
        num_items: items scored.
        predictions: index of the likeliest choice of every item, in their order.
    """

    accuracy: float
    num_items: int
    predictions: list[int]


@dataclass
class _Row:
    """Tokens that go through the model once, however many choices are read off their predictions.

    ``wanted`` holds (index of the choice, first position, tokens): token j is predicted at the position plus j.
    """

    input_ids: list[int]
    wanted: list[tuple[int, int, list[int]]]

    @property
    def first_position(self) -> int:
        return min(first for _, first, _ in self.wanted)


def choice_accuracy(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[ChoiceItem],
    *,
    normalize: str = "sum",
    count_end: bool = False,
) -> ChoiceResult:
    """The share of items whose likeliest choice is the right one; of equally likely choices the first counts.

    Args, errors: see ``choice_log_likelihoods``.

    Raises:
        ValueError: also when an item's ``gold`` is not the index of one of its choices.
    """
    _check_normalization(normalize)
    return choice_accuracies(model, tokenizer, items, count_end=count_end)[normalize]


def choice_accuracies(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, items: Sequence[ChoiceItem], *, count_end: bool = False
) -> dict[str, ChoiceResult]:
    """The same under every one of ``NORMALIZATIONS``, by its name, for the price of one.

    Args, errors: see ``choice_log_likelihoods``.

    Raises:
        ValueError: also when an item's ``gold`` is not the index of one of its choices.
    """
    for index, item in enumerate(items):
        if not 0 <= item.gold < len(item.choices):
            raise ValueError(f"item {index}: gold is {item.gold}, but there are {len(item.choices)} choices")
    sums = _sums(model, tokenizer, items, count_end)
    return {name: _result(items, [_normalized(some, name) for some in sums]) for name in NORMALIZATIONS}


def _result(items: Sequence[ChoiceItem], scores: list[list[float]]) -> ChoiceResult:
    predictions = [max(range(len(some)), key=some.__getitem__) for some in scores]
    num_right = sum(guess == item.gold for guess, item in zip(predictions, items, strict=True))
    return ChoiceResult(num_right / len(items), len(items), predictions)


def choice_log_likelihoods(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[ChoiceItem],
    *,
    normalize: str = "sum",
    count_end: bool = False,
) -> list[list[float]]:
    """The log-likelihood, in nats, of every choice of every item given its prompt.

    No gradients, in evaluation mode, and the model's mode restored afterwards. Of a prompt that is longer than the model's context
    (``max_position_embeddings``) the end is used, behind the token that begins a sequence.

    Args:
        model: a Hugging Face causal language model, or any module that returns ``logits`` [B, S, V].
        tokenizer: its tokenizer.
        items: at least one; the ``gold`` of an item is not used.
        normalize: ``"sum"`` adds the log-likelihoods of a choice's tokens up, ``"per_token"`` divides that by their
            number, which is fairer to long choices.
        count_end: count the end-of-sequence token behind a choice as one of its tokens. Needed where a choice is the
            beginning of another ("no", "no idea").

    Raises:
        ValueError: there are no items or no choices, ``normalize`` is unknown, or an item cannot be tokenised.
    """
    _check_normalization(normalize)
    return [_normalized(some, normalize) for some in _sums(model, tokenizer, items, count_end)]


def _check_normalization(normalize: str) -> None:
    if normalize not in NORMALIZATIONS:
        raise ValueError(f"normalize must be one of {', '.join(NORMALIZATIONS)}, got {normalize!r}")


def _normalized(some: list[tuple[float, int]], normalize: str) -> list[float]:
    return [total / count if normalize == "per_token" else total for total, count in some]


def _sums(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, items: Sequence[ChoiceItem], count_end: bool
) -> list[list[tuple[float, int]]]:
    """(summed log-likelihood, number of tokens) of every choice of every item."""
    if not items or not all(item.choices for item in items):
        raise ValueError("nothing to score: there must be items, and every item must have choices")
    config = getattr(model, "config", None)
    rows = _rows(items, tokenizer, count_end, None if config is None else context_length(config))
    flat = [(0.0, 1)] * sum(len(item.choices) for item in items)
    pad = padding_id(tokenizer, model)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for piece in _pieces(rows):
                for choice, total, count in _score(model, piece, pad):
                    flat[choice] = total, count
    finally:
        model.train(was_training)
    scores = iter(flat)
    return [[next(scores) for _ in item.choices] for item in items]


def _rows(
    items: Sequence[ChoiceItem], tokenizer: PreTrainedTokenizerBase, count_end: bool, limit: int | None
) -> list[_Row]:
    """Rows of tokens, each once: choices of one token each share the row that is their prompt. None is longer than ``limit``."""
    for index, item in enumerate(items):
        if not item.prompt:
            raise ValueError(f"item {index}: the prompt is empty, so nothing predicts the first token of a choice")
    records = [
        Record(f"item {index}", number, prompt=item.prompt, completion=choice)
        for index, item in enumerate(items)
        for number, choice in enumerate(item.choices, start=1)
    ]
    examples, _ = encode_records(records, tokenizer, _NO_LIMIT)
    rows: dict[tuple[int, ...], _Row] = {}
    num_cut = 0
    for choice, (record, example) in enumerate(zip(records, examples, strict=True)):
        num_prompt = next(i for i, label in enumerate(example.labels) if label != -100)
        answer = example.input_ids[num_prompt:]
        if not count_end and len(answer) > 1:
            answer = answer[:-1]
        # What the last token is need not go in: nothing is predicted after it.
        row_ids = example.input_ids[: num_prompt + len(answer) - 1]
        if limit is not None and len(row_ids) > limit:
            if len(answer) >= limit:
                raise ValueError(
                    f"{record.where}: a choice of {len(answer)} tokens, and the context of the model has {limit}"
                )
            begin = row_ids[:1] if row_ids[0] == tokenizer.bos_token_id else []
            num_prompt -= len(row_ids) - limit
            row_ids = begin + row_ids[len(begin) - limit :]
            num_cut += 1
        row = rows.setdefault(tuple(row_ids), _Row(row_ids, []))
        row.wanted.append((choice, num_prompt - 1, answer))
    if num_cut:
        _logger.warning(
            "%d of %d prompts with a choice are longer than the context of the model, %d tokens: they lose their beginning",
            num_cut,
            len(examples),
            limit,
        )
    return list(rows.values())


def _pieces(rows: list[_Row]) -> Iterator[list[_Row]]:
    """Rows of similar length together, about ``_PIECE_TOKENS`` tokens with the padding."""
    piece: list[_Row] = []
    for row in sorted(rows, key=lambda row: len(row.input_ids)):
        if piece and (len(piece) + 1) * len(row.input_ids) > _PIECE_TOKENS:
            yield piece
            piece = []
        piece.append(row)
    if piece:
        yield piece


def _score(model: nn.Module, piece: list[_Row], pad: int) -> Iterator[tuple[int, float, int]]:
    """(choice, summed log-likelihood, number of tokens) of every choice in a piece."""
    device = compute_device(next(model.parameters()))
    length = max(len(row.input_ids) for row in piece)
    input_ids = torch.full((len(piece), length), pad)
    attention_mask = torch.zeros_like(input_ids)
    for index, row in enumerate(piece):
        input_ids[index, : len(row.input_ids)] = torch.tensor(row.input_ids)
        attention_mask[index, : len(row.input_ids)] = 1
    first = min(row.first_position for row in piece)
    logits = _logits_from(model, input_ids.to(device), attention_mask.to(device), first)
    wanted = [(index, *entry) for index, row in enumerate(piece) for entry in row.wanted]
    where = [(index, start - first + j) for index, _, start, ids in wanted for j in range(len(ids))]
    targets = torch.tensor([token for *_, ids in wanted for token in ids], device=device)
    row_index, position = (torch.tensor(part, device=device) for part in zip(*where, strict=True))
    log_likelihoods = torch.cat(
        [
            _log_likelihoods(logits[rows, positions], some)
            for rows, positions, some in zip(
                *(part.split(_FLOAT32_TOKENS) for part in (row_index, position, targets)), strict=True
            )
        ]
    )
    counts = [len(ids) for *_, ids in wanted]
    for (_, choice, _, _), part in zip(wanted, log_likelihoods.split(counts), strict=True):
        yield choice, part.double().sum().item(), len(part)


def _logits_from(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, first: int) -> Tensor:
    """Logits [B, K, V] of the positions from ``first`` on; no others are computed where the model allows that."""
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        kept: Tensor = model(**inputs, logits_to_keep=input_ids.shape[1] - first).logits
        return kept
    logits: Tensor = model(**inputs).logits
    return logits[:, first:]


def _log_likelihoods(logits: Tensor, targets: Tensor) -> Tensor:
    """Log-likelihoods, float32 [N], of the tokens ``targets`` [N] under ``logits`` [N, V]."""
    return -nn.functional.cross_entropy(logits.float(), targets, reduction="none")
