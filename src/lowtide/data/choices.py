"""Multiple choice: a prompt, its possible continuations, and which of them is right. What it is trained as, too."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from .record import Record

T = TypeVar("T")


@dataclass(frozen=True)
class ChoiceItem:
    """A prompt, its possible continuations (leading blanks included) and the index of the right one.

    ``group`` is what related items have in common, such as their passage: they are kept on one side of a split. None for an item
    that is for itself. Items that differ in it alone are equal.
    """

    prompt: str
    choices: Sequence[str]
    gold: int
    group: str | None = field(default=None, compare=False, repr=False)


def as_records(items: Sequence[ChoiceItem], source: str) -> list[Record]:
    """What a model is trained on to give the right answer: prompt/completion records, so that the loss is on the answer only.

    Args:
        items: with their right answers.
        source: where they came from, for messages.
    """
    return [
        Record(source, number, prompt=item.prompt, completion=item.choices[item.gold])
        for number, item in enumerate(items, start=1)
    ]


def sample(items: Sequence[T], count: int, seed: int) -> list[T]:
    """At most so many, drawn by the seed, in their own order."""
    if len(items) <= count:
        return list(items)
    chosen = sorted(random.Random(seed).sample(range(len(items)), count))
    return [items[index] for index in chosen]


def hold_out(items: Sequence[ChoiceItem], count: int, seed: int) -> tuple[list[ChoiceItem], list[ChoiceItem]]:
    """(the rest, at most so many that are held out), drawn by the seed, each in their own order.

    Of items with groups whole ones are held out, so that it may be a few less; or the smallest group where none is as small as that.
    """
    if any(item.group is not None for item in items):
        chosen = _whole_groups(items, count, seed)
    else:
        chosen = set(sample(range(len(items)), count, seed))
    rest = [item for index, item in enumerate(items) if index not in chosen]
    return rest, [item for index, item in enumerate(items) if index in chosen]


def _whole_groups(items: Sequence[ChoiceItem], count: int, seed: int) -> set[int]:
    groups: dict[str | int, list[int]] = {}
    for index, item in enumerate(items):
        groups.setdefault(index if item.group is None else item.group, []).append(index)
    order = list(groups.values())
    random.Random(seed).shuffle(order)
    chosen: set[int] = set()
    for group in order:
        if len(chosen) + len(group) <= count:
            chosen.update(group)
    smallest: list[int] = min(order, key=len)
    return chosen or set(smallest)


def majority_share(items: Sequence[ChoiceItem]) -> float:
    """Accuracy of always giving the answer that is right most often: what a score has to beat."""
    counts: dict[int, int] = {}
    for item in items:
        counts[item.gold] = counts.get(item.gold, 0) + 1
    return max(counts.values()) / len(items)
