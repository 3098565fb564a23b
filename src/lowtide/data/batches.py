"""Batches: examples become tensors, packed into full sequences or padded, in an order that (seed, epoch) decide.

Packed sequences hold several whole examples each. ``position_ids`` restart at 0 with every example; transformers builds
the block-diagonal attention mask from that, so that no example attends to another. Two conditions of transformers
(5.23): the model must run without a cache (``model.config.use_cache = False``; with one the mask is plain causal and
examples leak into each other), and attention is "sdpa", "eager" or "flex_attention" ("flash_attention_2" looks at
batches of one row only).

Shapes: B rows of a batch, S positions of a row.
"""

from __future__ import annotations

import array
import bisect
import hashlib
import random
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import TypeVar

import torch
from torch import Tensor

from .tokens import IGNORED, Example

T = TypeVar("T")


class Batches:
    """The batches of every epoch.

    Packed: S = ``max_seq_len``, and the number of sequences is the same in every epoch, because it depends on the
    lengths alone. Padded: one example a row, S = the longest of the batch. The last batch may have fewer than
    ``batch_size`` rows.

    Raises:
        ValueError: there are no examples, one is longer than ``max_seq_len`` or has no token to train on, or a number
            is out of range.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        *,
        batch_size: int,
        max_seq_len: int,
        pad_token_id: int,
        packing: bool,
        seed: int,
        shuffle: bool = True,
    ) -> None:
        _check(examples, batch_size, max_seq_len, pad_token_id)
        self.batch_size = batch_size
        self.max_seq_len = max_seq_len
        self.pad_token_id = pad_token_id
        self.packing = packing
        self.seed = seed
        self.shuffle = shuffle
        # Flat 32-bit storage: lists of Python integers take several times the memory, for the whole of the training.
        self._ids = _flat(example.input_ids for example in examples)
        self._labels = _flat(example.labels for example in examples)
        self._lengths = [len(example.input_ids) for example in examples]
        self._starts = [0, *accumulate(self._lengths)]
        self._labels[self._starts[:-1]] = IGNORED  # nothing in its own example precedes a first token
        self._plan = pack_lengths(self._lengths, max_seq_len) if packing else [[length] for length in self._lengths]

    def __len__(self) -> int:
        """Batches per epoch."""
        return -(-len(self._plan) // self.batch_size)

    @property
    def packing_waste(self) -> float:
        """Share of all positions that hold padding, between 0 and 1 (padded: in epoch 0; it depends on the order)."""
        if self.packing:
            num_positions = len(self._plan) * self.max_seq_len
        else:
            rows = [self._lengths[row[0]] for row in self._sequences(0)]
            groups = [rows[i : i + self.batch_size] for i in range(0, len(rows), self.batch_size)]
            num_positions = sum(max(group) * len(group) for group in groups)
        return 1 - sum(self._lengths) / num_positions

    @property
    def fingerprint(self) -> str:
        """Tells other data, another split or another tokenizer: 16 hexadecimal digits over all ids, labels and lengths."""
        digest = hashlib.sha256()
        for tensor in (self._ids, self._labels, torch.tensor(self._lengths)):
            digest.update(tensor.numpy().data)
        return digest.hexdigest()[:16]

    def epoch(self, epoch: int, start: int = 0) -> Iterator[dict[str, Tensor]]:
        """The batches of one epoch from number ``start`` on, in the same order whenever it is asked for.

        Each is a dict of int64 tensors [B, S] on the CPU: ``input_ids``, ``labels`` (unshifted, -100 = not trained on),
        and ``position_ids`` if packed, ``attention_mask`` (1 = token, 0 = padding on the right) if padded.
        """
        sequences = self._sequences(epoch)
        for first in range(start * self.batch_size, len(sequences), self.batch_size):
            yield self._batch(sequences[first : first + self.batch_size])

    def _sequences(self, epoch: int) -> list[list[int]]:
        """For every sequence of the epoch the indices of its examples."""
        rng = random.Random(f"{self.seed}/{epoch}")
        order = list(range(len(self._lengths)))
        if self.shuffle:
            rng.shuffle(order)
        if not self.packing:
            return [[index] for index in order]
        # The plan says which lengths share a sequence; which examples of that length do is drawn anew every epoch.
        by_length: dict[int, list[int]] = {}
        for index in reversed(order):
            by_length.setdefault(self._lengths[index], []).append(index)
        sequences = [[by_length[length].pop() for length in lengths] for lengths in self._plan]
        if self.shuffle:
            rng.shuffle(sequences)
        return sequences

    def _batch(self, sequences: list[list[int]]) -> dict[str, Tensor]:
        longest = max(self._lengths[index] for sequence in sequences for index in sequence)
        shape = (len(sequences), self.max_seq_len if self.packing else longest)
        input_ids = torch.full(shape, self.pad_token_id)
        labels = torch.full(shape, IGNORED)
        position_ids = torch.empty(shape, dtype=torch.int64)
        attention_mask = torch.zeros(shape, dtype=torch.int64)
        for row, sequence in enumerate(sequences):
            end = 0
            for index in sequence:
                start, end = end, end + self._lengths[index]
                stored = slice(self._starts[index], self._starts[index + 1])
                input_ids[row, start:end] = self._ids[stored]
                labels[row, start:end] = self._labels[stored]
                position_ids[row, start:end] = torch.arange(end - start)
            position_ids[row, end:] = torch.arange(shape[1] - end)
            attention_mask[row, :end] = 1
        batch = {"input_ids": input_ids, "labels": labels}
        return batch | ({"position_ids": position_ids} if self.packing else {"attention_mask": attention_mask})


def pack_lengths(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing: the lengths of every sequence, each with a sum of at most ``capacity``.

    The longest go first, each into the fullest sequence that still has room. The number of
    sequences is asymptotically at most 11/9 of the fewest possible (Johnson et al. 1974, doi.org/10.1137/0203025).
    """
    sequences: list[list[int]] = []
    with_room: dict[int, list[int]] = {}  # room -> sequences that have exactly that much left
    rooms: list[int] = []  # the keys of with_room, sorted
    for length in sorted(lengths, reverse=True):
        place = bisect.bisect_left(rooms, length)
        if place < len(rooms):
            room = rooms[place]
            number = with_room[room].pop()
            if not with_room[room]:
                del with_room[room], rooms[place]
        else:
            room, number = capacity, len(sequences)
            sequences.append([])
        sequences[number].append(length)
        left = room - length
        if left not in with_room:
            bisect.insort(rooms, left)
        with_room.setdefault(left, []).append(number)
    return sequences


def split_held_out(records: Sequence[T], fraction: float, seed: int) -> tuple[list[T], list[T]]:
    """Split at random, by ``seed``, into (train, held out); both keep the given order.

    Held out are ``fraction`` of the records, rounded, but at least one; at least one is left to train on. Examples can
    be split as well as records: a single long text is one record, but many examples.

    Raises:
        ValueError: ``fraction`` is not strictly between 0 and 1, or there are fewer than two records.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"the held-out fraction must lie between 0 and 1, got {fraction}")
    if len(records) < 2:
        raise ValueError(f"cannot hold out part of {len(records)} record(s): at least two are needed; add data")
    num_held_out = min(max(1, round(len(records) * fraction)), len(records) - 1)
    held_out = set(random.Random(seed).sample(range(len(records)), num_held_out))
    train = [record for index, record in enumerate(records) if index not in held_out]
    return train, [records[index] for index in sorted(held_out)]


def _check(examples: Sequence[Example], batch_size: int, max_seq_len: int, pad_token_id: int) -> None:
    if not examples:
        raise ValueError("no examples to make batches of")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if pad_token_id is None:
        raise ValueError("pad_token_id is None; use the end-of-sequence token for a tokenizer without a padding token")
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


def _flat(lists: Iterator[list[int]]) -> Tensor:
    """All numbers of all lists behind one another, int32."""
    numbers = array.array("i")
    for some in lists:
        numbers.extend(some)
    return torch.frombuffer(numbers, dtype=torch.int32)
