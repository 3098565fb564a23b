"""An example as text again, so that people can see what is trained on: every token, special ones too, in the order of training."""

from __future__ import annotations

import itertools
import re
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from .tokens import IGNORED, Example

# The first pair that does not occur in the text itself is used.
_MARKS = (("⟦", "⟧"), ("⟪", "⟫"), ("⦃", "⦄"), ("⟦⟦⟦", "⟧⟧⟧"))


class Span(NamedTuple):
    """The text of consecutive tokens of which all or none are trained on, and all or none are special or added ones."""

    text: str
    trained: bool
    special: bool


def example_spans(example: Example, tokenizer: PreTrainedTokenizerBase) -> list[Span]:
    """The whole of an example as text.

    Where a span ends inside of a character (a text that was cut there), both sides show U+FFFD. Control characters but
    newlines and tabs are written like ``\\x1b``, so that no terminal obeys them.
    """
    special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    tokens = zip(example.input_ids, example.labels, strict=True)
    spans: list[Span] = []
    before: list[int] = []
    for (trained, is_special), group in itertools.groupby(tokens, lambda t: (t[1] != IGNORED, t[0] in special)):
        ids = [token for token, _ in group]
        # Not by themselves: a SentencePiece tokenizer leaves out the blank that the first token of a text begins with.
        known, text = _decode(before, tokenizer), _decode(before + ids, tokenizer)
        text = text[len(known) :] if text.startswith(known) else _decode(ids, tokenizer)
        spans.append(Span(_visible(text), trained, is_special))
        before = ids
    return spans


def mark_trained(spans: list[Span]) -> tuple[str, tuple[str, str]]:
    """The text of spans with marks around what is trained on, and those marks."""
    whole = "".join(span.text for span in spans)
    opening, closing = next(
        (pair for pair in _MARKS if not any(mark in whole for mark in pair)),
        _MARKS[-1],
    )
    runs = [
        (trained, "".join(span.text for span in group))
        for trained, group in itertools.groupby(spans, lambda s: s.trained)
    ]
    return "".join(f"{opening}{text}{closing}" if trained else text for trained, text in runs), (opening, closing)


def _decode(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    text = tokenizer.decode(
        ids, skip_special_tokens=False, clean_up_tokenization_spaces=False, spaces_between_special_tokens=False
    )
    assert isinstance(text, str)
    return text


def _visible(text: str) -> str:
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda match: f"\\x{ord(match[0]):02x}", text)
