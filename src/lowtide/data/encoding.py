"""Encoding: records become examples that fit, one chunk of records at a time, so that no number of records fills the memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from ..log import get_logger
from .record import Record
from .tokens import IGNORED, Example, encode_whole

_logger = get_logger(__name__)

# A call of a fast tokenizer is parallel over its texts; more at once only costs memory, about 100 bytes a token.
_RECORDS_PER_CALL = 1024
_CHARACTERS_PER_CALL = 2**20


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


@dataclass(frozen=True)
class Encoded:
    """What a record came to, or one piece of a long text.

    Attributes:
        record: its number, counted from 0.
        examples: that fit.
        truncated: whether each of them was cut.
        num_dropped: examples left out, because nothing is trained on in what fits.
    """

    record: int
    examples: list[Example]
    truncated: Sequence[bool] = ()
    num_dropped: int = 0

    def __post_init__(self) -> None:
        if not self.truncated:
            object.__setattr__(self, "truncated", (False,) * len(self.examples))
        assert len(self.truncated) == len(self.examples)


@dataclass
class Encoder:
    """Tokenises records into examples of at most ``max_seq_len`` tokens.

    A longer text becomes several examples with ``split_long`` (what packing wants): each begins with the last token of
    the one before, so that every token but the very first is predicted exactly once. Without it a text keeps its start.
    Longer prompt/completion and messages records are cut, at their end or at their beginning.

    Attributes:
        truncation: of them, "end" may cut the answer off, and what then has nothing to train on is dropped; "start"
            keeps the last tokens, behind the token that begins every sequence, if the tokenizer has one.
        num_records: so far.
        only_text: all of them were texts.
        others: as named.

    Raises:
        ValueError: ``max_seq_len`` is too small.
    """

    tokenizer: PreTrainedTokenizerBase
    max_seq_len: int
    split_long: bool = True
    truncation: str = "end"
    num_records: int = 0
    only_text: bool = True
    _num_rewritten: int = 0
    _first: str = ""  # where the first record is
    _shortest: int | None = None  # tokens up to and with the first trained one, of the example with the fewest
    _tail: list[int] = field(default_factory=list)  # of a text that goes on
    _kept_start: bool = False  # of it, without split_long

    def __post_init__(self) -> None:
        if self.max_seq_len < 2:
            raise ValueError(
                f"--max-seq-len must be at least 2 (a token and the one it predicts), got {self.max_seq_len}"
            )
        if self.truncation not in ("end", "start"):
            raise ValueError(f"truncation must be end or start, got {self.truncation!r}")

    def encode(self, records: Iterable[Record]) -> Iterator[Encoded]:
        """The examples of every record, in the order of the records.

        Raises:
            ValueError: as :func:`encode_whole`.
        """
        for chunk in _chunks(records):
            for record, whole in zip(chunk, encode_whole(chunk, self.tokenizer), strict=True):
                self._first = self._first or record.where
                self.num_records += not record.continues
                self.only_text &= record.text is not None
                self._num_rewritten += len(whole) > 1
                yield self._fit(record, whole)

    def end(self, num_examples: int) -> None:
        """To be called when all is encoded.

        Args:
            num_examples: that were made.

        Raises:
            ValueError: there were no records, or not one example has a trained token within ``max_seq_len``.
        """
        if not self.num_records:
            raise ValueError("no records to encode")
        if self._num_rewritten:
            _logger.warning(
                "the chat template rewrites earlier turns: %d conversations become one example per assistant turn",
                self._num_rewritten,
            )
        if not num_examples:
            reason = (
                f"within {self.max_seq_len} tokens; raise --max-seq-len (the shortest prompt needs {self._shortest} or more)"
                if self._shortest is not None
                else "at any length: they hold one token each, or the chat template leaves the assistant's turns out"
            )
            raise ValueError(
                f"none of the {self.num_records} records ({self._first}, ...) has a token to train on {reason}"
            )

    def _fit(self, record: Record, whole: list[Example]) -> Encoded:
        number = self.num_records - 1
        if record.continues or record.continued:
            return self._fit_piece(record, whole[0].input_ids, number)
        split = self.split_long and record.text is not None
        examples: list[Example] = []
        truncated: list[bool] = []
        num_dropped = 0
        from_start = self.truncation == "start" and record.text is None
        for example in whole:
            pieces = self._keep_end(example) if from_start else _cut(example, self.max_seq_len, split)
            if not pieces:
                self._look_at_dropped(example)
            examples += pieces
            num_dropped += not pieces
            truncated += [not split and len(example.input_ids) > self.max_seq_len] * len(pieces)
        return Encoded(number, examples, truncated, num_dropped)

    def _keep_end(self, example: Example) -> list[Example]:
        """The example without its beginning, if it is too long."""
        ids, labels = example.input_ids, example.labels
        if len(ids) > self.max_seq_len:
            first = ids[:1] if ids[0] == self.tokenizer.bos_token_id else []
            kept = self.max_seq_len - len(first)
            ids, labels = first + ids[-kept:], [IGNORED] * len(first) + labels[-kept:]
        return _cut(Example(ids, labels), self.max_seq_len, False)

    def _fit_piece(self, record: Record, ids: list[int], number: int) -> Encoded:
        """The same examples as if the text had come as a whole."""
        if not record.continues:
            self._tail, self._kept_start = [], False
        ids, length = self._tail + ids, self.max_seq_len
        starts = range(0, max(0, len(ids) - length + 1), length - 1)
        pieces = [ids[start : start + length] for start in starts]
        self._tail = ids[len(starts) * (length - 1) :]
        if not record.continued:
            pieces += [self._tail] if len(self._tail) > 1 else []
            self._tail = []
        truncated = False
        if not self.split_long:
            truncated = not self._kept_start and bool(pieces)
            pieces = pieces[:1] if truncated else []
            self._kept_start |= truncated
        examples = [Example(piece, [IGNORED, *piece[1:]]) for piece in pieces]
        return Encoded(number, examples, [truncated] * len(examples))

    def _look_at_dropped(self, example: Example) -> None:
        needed = next((i for i, label in enumerate(example.labels, 1) if i > 1 and label != IGNORED), None)
        if needed is not None:
            self._shortest = min(needed, self._shortest or needed)


def encode_records(
    records: Sequence[Record],
    tokenizer: PreTrainedTokenizerBase,
    max_seq_len: int,
    *,
    split_long: bool = True,
    truncation: str = "end",
) -> tuple[list[Example], TokenStats]:
    """Tokenise records into examples of at most ``max_seq_len`` tokens, in the order of the records; see :class:`Encoder`.

    Raises:
        ValueError: there are no records, or not one example has a trained token within ``max_seq_len``; the tokenizer
            has no end-of-sequence token (text, prompt/completion), no chat template or no offsets (messages).
    """
    encoder = Encoder(tokenizer, max_seq_len, split_long, truncation)
    encoded = list(encoder.encode(records))
    examples = [example for each in encoded for example in each.examples]
    encoder.end(len(examples))
    stats = TokenStats(
        num_records=encoder.num_records,
        num_tokens=sum(len(example.input_ids) for example in examples),
        num_trained_tokens=sum(len(example.labels) - example.labels.count(IGNORED) for example in examples),
        num_truncated=sum(sum(each.truncated) for each in encoded),
        num_dropped=sum(each.num_dropped for each in encoded),
    )
    return examples, stats


def _chunks(records: Iterable[Record]) -> Iterator[list[Record]]:
    chunk: list[Record] = []
    num_characters = 0
    for record in records:
        chunk.append(record)
        num_characters += _num_characters(record)
        if len(chunk) == _RECORDS_PER_CALL or num_characters > _CHARACTERS_PER_CALL:
            yield chunk
            chunk, num_characters = [], 0
    if chunk:
        yield chunk


def _num_characters(record: Record) -> int:
    turns = sum(len(message["content"]) for message in record.messages or ())
    return turns + sum(len(text) for text in (record.text, record.prompt, record.completion) if text)


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
