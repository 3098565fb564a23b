"""Tokens: records become examples, that is token ids with labels that say which of them are learnt.

Labels are unshifted (the model shifts them); -100 marks a token that is not trained on. What is trained on:

    text                every token but the first, and the end-of-sequence token behind it
    prompt/completion   the completion and the end-of-sequence token behind it
    messages            the assistant turns, each with the end-of-turn token that the chat template writes
    alpaca              as messages; where the tokenizer has no chat template, the output as a completion of Alpaca's wording

In every case the ids before the trained part are the ids that inference would see: a token is never merged across the
end of a prompt.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from .chat import RenderedChat, render_chats
from .formats import alpaca_prompt
from .record import Record

IGNORED = -100
_RECORDS_PER_CALL = 1024  # a call of a fast tokenizer is parallel over its texts; more at once only costs memory


@dataclass(frozen=True)
class Example:
    """Token ids and their unshifted labels, of the same length. The first label is always -100: nothing precedes it."""

    input_ids: list[int]
    labels: list[int]


@dataclass(frozen=True)
class TokenStats:
    """Counts over the examples returned; ``num_truncated`` and ``num_dropped`` count examples.

    Dropped are those without a trained token inside ``max_seq_len``; a dropped example is not counted as truncated.
    """

    num_records: int
    num_tokens: int
    num_trained_tokens: int
    num_truncated: int
    num_dropped: int


def encode_records(
    records: Sequence[Record], tokenizer: PreTrainedTokenizerBase, max_seq_len: int, *, split_long: bool = True
) -> tuple[list[Example], TokenStats]:
    """Tokenise records into examples of at most ``max_seq_len`` tokens, in the order of the records.

    A longer text becomes several examples with ``split_long`` (what packing wants): each begins with the last token of
    the one before, so that every token but the very first is predicted exactly once. Without it a text keeps its start.
    Longer prompt/completion and messages records are always cut at their end.

    Raises:
        ValueError: there are no records, or not one example has a trained token within ``max_seq_len``; the tokenizer
            has no end-of-sequence token (text, prompt/completion), no chat template or no offsets (messages).
    """
    if not records:
        raise ValueError("no records to encode")
    if max_seq_len < 2:
        raise ValueError(f"--max-seq-len must be at least 2 (a token and the one it predicts), got {max_seq_len}")
    if tokenizer.chat_template is None:
        records = [as_completion(record) for record in records]
    whole = _encode_whole(records, tokenizer)
    examples: list[Example] = []
    num_truncated = num_dropped = 0
    for record, record_examples in zip(records, whole, strict=True):
        split = split_long and record.text is not None
        for example in record_examples:
            pieces = _cut(example, max_seq_len, split)
            examples += pieces
            num_dropped += not pieces
            num_truncated += bool(pieces) and not split and len(example.input_ids) > max_seq_len
    if not examples:
        raise _nothing_to_train_on(records, whole, max_seq_len)
    num_tokens = sum(len(example.input_ids) for example in examples)
    num_trained = sum(len(example.labels) - example.labels.count(IGNORED) for example in examples)
    return examples, TokenStats(len(records), num_tokens, num_trained, num_truncated, num_dropped)


def as_completion(record: Record) -> Record:
    """An Alpaca record as prompt and completion in Alpaca's wording, for tokenizers without a chat template; another as it is."""
    if record.instruction is None or record.messages is None:
        return record
    prompt, completion = alpaca_prompt(*record.instruction), record.messages[-1]["content"]
    return dataclasses.replace(record, messages=None, instruction=None, prompt=prompt, completion=completion)


def _nothing_to_train_on(records: Sequence[Record], whole: list[list[Example]], max_seq_len: int) -> ValueError:
    # Number of tokens up to and with the first trained one, of every example that has one.
    needed = [
        first
        for examples in whole
        for example in examples
        if (first := next((i for i, label in enumerate(example.labels, 1) if i > 1 and label != IGNORED), None))
    ]
    reason = (
        f"within {max_seq_len} tokens; raise --max-seq-len (the shortest prompt needs {min(needed)} or more)"
        if needed
        else "at any length: they hold one token each, or the chat template leaves the assistant's turns out"
    )
    return ValueError(f"none of the {len(records)} records ({records[0].where}, ...) has a token to train on {reason}")


def _cut(example: Example, max_seq_len: int, split: bool) -> list[Example]:
    """The example in one or more pieces that fit and have something to train on."""
    length = len(example.input_ids)
    starts = range(0, length - 1, max_seq_len - 1) if split else (0,)
    pieces = []
    for start in starts:
        ids = example.input_ids[start : start + max_seq_len]
        labels = [IGNORED, *example.labels[start + 1 : start + max_seq_len]]
        if labels.count(IGNORED) < len(labels):
            pieces.append(Example(ids, labels))
    return pieces


def _encode_whole(records: Sequence[Record], tokenizer: PreTrainedTokenizerBase) -> list[list[Example]]:
    """For every record its examples, of any length."""
    by_encoder: dict[Callable[..., list[list[Example]]], list[int]] = {}
    for index, record in enumerate(records):
        encoder = (
            _encode_texts if record.text is not None else _encode_chats if record.messages else _encode_completions
        )
        by_encoder.setdefault(encoder, []).append(index)
    encoded: list[list[Example]] = [[] for _ in records]
    for encoder, indices in by_encoder.items():
        for start in range(0, len(indices), _RECORDS_PER_CALL):
            some = indices[start : start + _RECORDS_PER_CALL]
            for index, examples in zip(some, encoder([records[i] for i in some], tokenizer), strict=True):
                encoded[index] = examples
    return encoded


def _encode_texts(records: list[Record], tokenizer: PreTrainedTokenizerBase) -> list[list[Example]]:
    eos = _eos(tokenizer, records[0])
    encoded = _tokenize(tokenizer, [record.text or "" for record in records])["input_ids"]
    closed = [_closed(ids, eos) for ids in encoded]
    return [[Example(ids, [IGNORED, *ids[1:]])] for ids in closed]


def _encode_completions(records: list[Record], tokenizer: PreTrainedTokenizerBase) -> list[list[Example]]:
    eos = _eos(tokenizer, records[0])
    pairs = [(record.prompt or "", record.completion or "") for record in records]
    adds_eos = _tokenize(tokenizer, ["a"])["input_ids"][0][-1:] == [eos]
    end = -1 if adds_eos else None  # an end-of-sequence token between prompt and completion would stop inference
    prompts = [ids[:end] for ids in _tokenize(tokenizer, [prompt for prompt, _ in pairs])["input_ids"]]
    joints = [
        ids[:end] for ids in _tokenize(tokenizer, [prompt + completion for prompt, completion in pairs])["input_ids"]
    ]
    examples = []
    for (_, completion), prompt_ids, joint in zip(pairs, prompts, joints, strict=True):
        if joint[: len(prompt_ids)] == prompt_ids and len(joint) > len(prompt_ids):
            answer = joint[len(prompt_ids) :]
        else:
            answer = _continuation(tokenizer, completion)[0]
        answer = _closed(answer, eos)
        examples.append([Example(prompt_ids + answer, [IGNORED] * len(prompt_ids) + answer)])
    return examples


def _encode_chats(records: list[Record], tokenizer: PreTrainedTokenizerBase) -> list[list[Example]]:
    if not tokenizer.is_fast:
        raise ValueError(
            f"{records[0].where}: 'messages' need a fast tokenizer (one with a tokenizer.json): only that knows which "
            "characters a token covers; convert it, or write the data as prompt/completion"
        )
    rendered = render_chats(records, tokenizer)
    flat = [chat for chats in rendered for chat in chats]
    encoded = _tokenize(tokenizer, [chat.text for chat in flat], add_special_tokens=False, offsets=True)
    tokenized = zip(flat, encoded["input_ids"], encoded["offset_mapping"], strict=True)
    examples = iter([_label_chat(tokenizer, chat, ids, offsets) for chat, ids, offsets in tokenized])
    return [[next(examples) for _ in chats] for chats in rendered]


def _label_chat(
    tokenizer: PreTrainedTokenizerBase, chat: RenderedChat, ids: list[int], offsets: list[tuple[int, int]]
) -> Example:
    cuts = [start for start, _ in chat.spans if _is_crossed(start, offsets)]
    if cuts:
        # A token reaches from the header into the answer (": " + "yes"): inference would not see it, so cut there.
        ids, offsets = _tokenize_cut(tokenizer, chat.text, cuts)
    labels = [IGNORED] * len(ids)
    spans = iter(chat.spans)
    start, end = next(spans)
    previous_high = 0
    for index, (low, high) in enumerate(offsets):
        # Byte-level tokenizers trim blanks off the offsets, so a token of one blank covers nothing, after itself.
        low = min(low, previous_high) if low == high else low
        previous_high = max(high, previous_high)
        while low >= end:
            start, end = next(spans, (len(chat.text) + 1, len(chat.text) + 2))
        if low >= start:
            labels[index] = ids[index]
    return Example(ids, labels)


def _is_crossed(position: int, offsets: list[tuple[int, int]]) -> bool:
    """Whether a token covers characters on both sides of a position."""
    previous_high = 0
    for low, high in offsets:
        # Offsets with blanks trimmed off leave gaps, and a gap belongs to the token behind it.
        if min(low, previous_high) < position < high:
            return True
        previous_high = max(high, previous_high)
    return False


def _tokenize_cut(
    tokenizer: PreTrainedTokenizerBase, text: str, cuts: list[int]
) -> tuple[list[int], list[tuple[int, int]]]:
    """Ids and offsets of a text whose tokens do not reach across the characters in ``cuts``."""
    encoded = _tokenize(tokenizer, [text[: cuts[0]]], add_special_tokens=False, offsets=True)
    ids, offsets = list(encoded["input_ids"][0]), list(encoded["offset_mapping"][0])
    for start, end in zip(cuts, [*cuts[1:], len(text)], strict=True):
        more_ids, more_offsets = _continuation(tokenizer, text[start:end], offsets=True)
        ids += more_ids
        offsets += [(start + low, start + high) for low, high in more_offsets]
    return ids, offsets


def _continuation(
    tokenizer: PreTrainedTokenizerBase, text: str, *, offsets: bool = False
) -> tuple[list[int], list[tuple[int, int]]]:
    """Ids (and offsets, if wanted) of a text that goes on after other text.

    SentencePiece tokenizers put a blank before a text, so "yes" alone would become " yes". After a newline they do not;
    its own ids are then taken off again.
    """
    plain, anchor, anchored = (
        _tokenize(tokenizer, [piece], add_special_tokens=False, offsets=offsets) for piece in (text, "\n", "\n" + text)
    )
    newline, ids = anchor["input_ids"][0], anchored["input_ids"][0]
    if newline and ids[: len(newline)] == newline and len(ids) > len(newline):
        kept = anchored["offset_mapping"][0][len(newline) :] if offsets else []
        return ids[len(newline) :], [(low - 1, high - 1) for low, high in kept]
    return plain["input_ids"][0], plain["offset_mapping"][0] if offsets else []


def _tokenize(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], *, add_special_tokens: bool = True, offsets: bool = False
) -> Any:
    extra = {"return_offsets_mapping": True} if offsets else {}  # slow tokenizers do not know the argument
    return tokenizer(
        texts,
        add_special_tokens=add_special_tokens,
        padding=False,
        truncation=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,  # that a text is longer than the model's context is expected here
        **extra,
    )


def _eos(tokenizer: PreTrainedTokenizerBase, record: Record) -> int:
    eos = tokenizer.eos_token_id
    if eos is None:
        raise ValueError(
            f"{record.where}: the tokenizer has no end-of-sequence token, without which the model cannot learn to "
            "stop; set eos_token in its tokenizer_config.json"
        )
    return int(eos)


def _closed(ids: list[int], eos: int) -> list[int]:
    return ids if ids[-1:] == [eos] else [*ids, eos]
