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


@dataclass(frozen=True)
class Example:
    """Token ids and their unshifted labels, of the same length. The first label is always -100: nothing precedes it."""

    input_ids: list[int]
    labels: list[int]


def as_completion(record: Record) -> Record:
    """An Alpaca record as prompt and completion in Alpaca's wording, for tokenizers without a chat template; another as it is."""
    if record.instruction is None or record.messages is None:
        return record
    prompt, completion = alpaca_prompt(*record.instruction), record.messages[-1]["content"]
    return dataclasses.replace(record, messages=None, instruction=None, prompt=prompt, completion=completion)


def encode_whole(records: Sequence[Record], tokenizer: PreTrainedTokenizerBase) -> list[list[Example]]:
    """For every record its examples, of any length; a fast tokenizer works on several at a time.

    Of a text that comes in pieces, each is an example. Together they are that of the text, but that the first label of every
    piece is -100.

    Raises:
        ValueError: the tokenizer has no end-of-sequence token (text, prompt/completion), no chat template or no offsets
            (messages).
    """
    if tokenizer.chat_template is None:
        records = [as_completion(record) for record in records]
    by_encoder: dict[Callable[..., list[list[Example]]], list[int]] = {}
    for index, record in enumerate(records):
        encoder = (
            _encode_texts if record.text is not None else _encode_chats if record.messages else _encode_completions
        )
        by_encoder.setdefault(encoder, []).append(index)
    encoded: list[list[Example]] = [[] for _ in records]
    for encoder, indices in by_encoder.items():
        for index, examples in zip(indices, encoder([records[i] for i in indices], tokenizer), strict=True):
            encoded[index] = examples
    return encoded


def _encode_texts(records: list[Record], tokenizer: PreTrainedTokenizerBase) -> list[list[Example]]:
    eos = _eos(tokenizer, records[0])
    whole = [record.text or "" for record in records if not record.continues]
    encoded = iter(_tokenize(tokenizer, whole)["input_ids"] if whole else [])
    examples = []
    for record in records:
        ids = _continuation(tokenizer, record.text or "")[0] if record.continues else next(encoded)
        if not record.continued:
            ids = _closed(ids, eos)
        elif ids[-1:] == [eos]:  # the tokenizer has closed the first piece
            ids = ids[:-1]
        examples.append([Example(ids, [IGNORED, *ids[1:]])])
    return examples


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
