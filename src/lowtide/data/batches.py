"""Batches: examples become tensors, packed into full sequences or padded, in an order that (seed, epoch) decide.

Packed sequences hold several whole examples each. ``position_ids`` restart at 0 with every example; transformers builds
the block-diagonal attention mask from that, so that no example attends to another. Three conditions of transformers
(5.23): the model must be one that does so (``lowtide.evaluation.keeps_documents_apart`` asks it), it must run without a cache
(``model.config.use_cache = False``; with one the mask is plain causal and examples leak into each other), and attention is "sdpa",
"eager" or "flex_attention"; those that are called flash tell documents apart in a batch of one row only (see
``TrainConfig.rows_at_once``).

Shapes: B rows of a batch, S positions of a row.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
from collections.abc import Iterator, Sequence
from typing import TypeVar

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from .held_out import split_numbers
from .store import Ints, Selection, TokenStore
from .tokens import IGNORED, Example

T = TypeVar("T")

# Padded rows are as long as a multiple of this. Matrix units want it, and libraries (oneDNN) keep code for every shape they have met:
# several megabytes for each length of a batch.
_MULTIPLE = 8


class Batches:
    """The batches of every epoch.

    Packed: S = ``max_seq_len``, and the number of sequences is the same in every epoch, because it depends on the
    lengths alone. Padded: one example a row, S = the longest of the batch, rounded up to
    a multiple of 8 where ``max_seq_len`` allows it. The last batch may have fewer than
    ``batch_size`` rows.

    Raises:
        ValueError: there are no examples, one is longer than ``max_seq_len`` or has no token to train on, or a number
            is out of range.
    """

    def __init__(
        self,
        examples: Sequence[Example] | Selection,
        *,
        batch_size: int,
        max_seq_len: int,
        pad_token_id: int,
        packing: bool,
        seed: int,
        shuffle: bool = True,
    ) -> None:
        self._chosen = examples if isinstance(examples, Selection) else _checked(examples, max_seq_len)
        _check(self._chosen, batch_size, pad_token_id)
        self.batch_size = batch_size
        self.max_seq_len = max_seq_len
        self.pad_token_id = pad_token_id
        self.packing = packing
        self.seed = seed
        self.shuffle = shuffle
        # Sequence i holds examples of the lengths plan[bounds[i] : bounds[i + 1]].
        lengths = self._chosen.lengths
        self._longest = int(lengths.max())
        self._plan: Ints = lengths
        self._bounds: Ints = numpy.arange(len(lengths) + 1)
        if packing:
            self._plan, self._bounds = _pack(lengths, max_seq_len)

    def __len__(self) -> int:
        """Batches per epoch."""
        return -(-(len(self._bounds) - 1) // self.batch_size)

    @property
    def packing_waste(self) -> float:
        """Share of all positions that hold padding, between 0 and 1 (padded: in epoch 0; it depends on the order)."""
        num_sequences = len(self._bounds) - 1
        if self.packing:
            num_positions = num_sequences * self.max_seq_len
        else:
            examples, order = self._sequences(0)
            rows = self._chosen.lengths[examples[order]]
            firsts = numpy.arange(0, num_sequences, self.batch_size)
            sizes = numpy.diff(numpy.append(firsts, num_sequences))
            num_positions = int((self._padded(numpy.maximum.reduceat(rows, firsts)) * sizes).sum(dtype=numpy.int64))
        return 1 - int(self._chosen.lengths.sum(dtype=numpy.int64)) / num_positions

    @property
    def num_positions(self) -> int:
        """What positions of a model are needed: packed, those of the longest example; padded, S of the longest batch."""
        return self._longest if self.packing else int(self._padded(numpy.array(self._longest)))

    @property
    def shares_rows(self) -> bool:
        """Some row holds several examples."""
        return len(self._bounds) - 1 < len(self._chosen)

    def padded(self) -> Batches:
        """The same examples, one a row."""
        return Batches(
            self._chosen,
            batch_size=self.batch_size,
            max_seq_len=self.max_seq_len,
            pad_token_id=self.pad_token_id,
            packing=False,
            seed=self.seed,
            shuffle=self.shuffle,
        )

    @property
    def fingerprint(self) -> str:
        """Tells other data, another split or another tokenizer: 16 hexadecimal digits over all ids, labels and lengths."""
        return self._chosen.digest()

    @property
    def num_examples(self) -> int:
        """Examples, of which a packed row holds several."""
        return len(self._chosen)

    def example(self, number: int) -> tuple[list[int], list[bool]]:
        """(token ids, whether each is trained on) of one example, in the order of the data."""
        tokens = self._chosen.tokens(number)
        return numpy.where(tokens < 0, ~tokens, tokens).tolist(), (tokens >= 0).tolist()

    def epoch(self, epoch: int, start: int = 0) -> Iterator[dict[str, Tensor]]:
        """The batches of one epoch from number ``start`` on, in the same order whenever it is asked for.

        Each is a dict of int64 tensors [B, S] on the CPU: ``input_ids``, ``labels`` (unshifted, -100 = not trained on),
        and ``position_ids`` if packed, ``attention_mask`` (1 = token, 0 = padding on the right) if padded.
        """
        examples, order = self._sequences(epoch)
        for first in range(start * self.batch_size, len(order), self.batch_size):
            numbers = order[first : first + self.batch_size]
            yield self._batch([examples[self._bounds[i] : self._bounds[i + 1]].tolist() for i in numbers])

    def _sequences(self, epoch: int) -> tuple[Ints, Ints]:
        """The examples of all sequences behind one another, and the order of the sequences."""
        num_examples, num_sequences = len(self._chosen), len(self._bounds) - 1
        order = self._order(num_examples, f"{self.seed}/{epoch}/examples")
        if not self.packing:
            return order, numpy.arange(num_sequences)
        # The plan says which lengths share a sequence; which examples of that length do is drawn anew every epoch.
        examples = numpy.empty(num_examples, dtype=numpy.int64)
        by_length = order[numpy.argsort(self._chosen.lengths[order], kind="stable")]
        examples[numpy.argsort(self._plan, kind="stable")] = by_length
        return examples, self._order(num_sequences, f"{self.seed}/{epoch}/sequences")

    def _padded(self, longest: Ints) -> Ints:
        """How long the rows of batches with examples this long are."""
        return numpy.minimum(-(-longest.astype(numpy.int64) // _MULTIPLE) * _MULTIPLE, self.max_seq_len)

    def _order(self, number: int, what: str) -> Ints:
        """The numbers below ``number``, in an order that ``what`` decides, today and in any later version of anything."""
        if not self.shuffle:
            return numpy.arange(number)
        key = int.from_bytes(hashlib.sha256(what.encode()).digest()[:8], "little")
        return numpy.argsort(_splitmix64(numpy.arange(number, dtype=numpy.uint64), key), kind="stable")

    def _batch(self, sequences: list[list[int]]) -> dict[str, Tensor]:
        longest = max(int(self._chosen.lengths[number]) for sequence in sequences for number in sequence)
        shape = (len(sequences), self.max_seq_len if self.packing else int(self._padded(numpy.array(longest))))
        input_ids = torch.full(shape, self.pad_token_id)
        labels = torch.full(shape, IGNORED)
        position_ids = torch.empty(shape, dtype=torch.int64)
        attention_mask = torch.zeros(shape, dtype=torch.int64)
        for row, sequence in enumerate(sequences):
            end = 0
            for number in sequence:
                tokens = self._chosen.tokens(number)
                start, end = end, end + len(tokens)
                input_ids[row, start:end] = torch.from_numpy(numpy.where(tokens < 0, ~tokens, tokens))
                labels[row, start:end] = torch.from_numpy(numpy.where(tokens < 0, IGNORED, tokens))
                position_ids[row, start:end] = torch.arange(end - start)
            position_ids[row, end:] = torch.arange(shape[1] - end) % self._longest  # no more than any example has
            attention_mask[row, :end] = 1
        batch = {"input_ids": input_ids, "labels": labels}
        return batch | ({"position_ids": position_ids} if self.packing else {"attention_mask": attention_mask})


def _splitmix64(numbers: NDArray[numpy.uint64], key: int) -> NDArray[numpy.uint64]:
    """Random-looking 64 bits for every number (Steele, Lea and Flood 2014, doi.org/10.1145/2660193.2660195)."""
    mixed = numbers * numpy.uint64(0x9E3779B97F4A7C15) + numpy.uint64(key)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> numpy.uint64(shift))) * numpy.uint64(factor)
    return mixed ^ (mixed >> numpy.uint64(31))


def pack_lengths(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing: the lengths of every sequence, each with a sum of at most ``capacity``.

    The longest go first, each into the fullest sequence that still has room. The number of
    sequences is asymptotically at most 11/9 of the fewest possible (Johnson et al. 1974, doi.org/10.1137/0203025).
    """
    plan, bounds = _pack(numpy.asarray(lengths), capacity)
    return [plan[start:end].tolist() for start, end in itertools.pairwise(bounds)]


def _pack(lengths: Ints, capacity: int) -> tuple[Ints, Ints]:
    """The same as one array, and where every sequence begins and the last one ends in it."""
    decreasing = numpy.sort(lengths)[::-1]
    numbers = numpy.empty(len(lengths), dtype=numpy.int64)  # of the sequence that a length goes to
    num_sequences = 0
    with_room: dict[int, list[int]] = {}  # room -> sequences that have exactly that much left
    rooms: list[int] = []  # the keys of with_room, sorted
    for index, each in enumerate(decreasing):
        length = int(each)
        place = bisect.bisect_left(rooms, length)
        if place < len(rooms):
            room = rooms[place]
            number = with_room[room].pop()
            if not with_room[room]:
                del with_room[room], rooms[place]
        else:
            room, number = capacity, num_sequences
            num_sequences += 1
        numbers[index] = number
        left = room - length
        if left > 0:
            if left not in with_room:
                bisect.insort(rooms, left)
            with_room.setdefault(left, []).append(number)
    plan = decreasing[numpy.argsort(numbers, kind="stable")]
    return plan, numpy.concatenate([[0], numpy.cumsum(numpy.bincount(numbers, minlength=num_sequences))])


def split_held_out(records: Sequence[T], fraction: float, seed: int) -> tuple[list[T], list[T]]:
    """Split at random, by ``seed``, into (train, held out); both keep the given order.

    Held out are ``fraction`` of the records, rounded, but at least one; at least one is left to train on. Examples can
    be split as well as records: a single long text is one record, but many examples.

    Raises:
        ValueError: ``fraction`` is not strictly between 0 and 1, or there are fewer than two records.
    """
    train, held_out = split_numbers(len(records), fraction, seed)
    return [records[index] for index in train], [records[index] for index in held_out]


def _check(chosen: Selection, batch_size: int, pad_token_id: int) -> None:
    if not len(chosen):
        raise ValueError("no examples to make batches of")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if pad_token_id is None:
        raise ValueError("pad_token_id is None; use the end-of-sequence token for a tokenizer without a padding token")


def _checked(examples: Sequence[Example], max_seq_len: int) -> Selection:
    for index, example in enumerate(examples):
        if len(example.input_ids) != len(example.labels):
            raise ValueError(
                f"example {index} has {len(example.input_ids)} token ids but {len(example.labels)} labels; "
                "every token needs one"
            )
        if len(example.input_ids) > max_seq_len:
            raise ValueError(
                f"example {index} has {len(example.input_ids)} tokens, more than max_seq_len = {max_seq_len}; "
                "encode the records with the same max_seq_len"
            )
        if example.labels[1:].count(IGNORED) == len(example.labels[1:]):
            raise ValueError(
                f"example {index} has no token to train on (all labels but the first are {IGNORED}); drop it"
            )
    return TokenStore.of_examples(examples).all()
