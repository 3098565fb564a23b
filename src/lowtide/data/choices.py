"""Multiple choice: a prompt, its possible continuations, and which of them is right. What it is trained as, too."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from .record import Record

T = TypeVar("T")


@dataclass(frozen=True)
class ChoiceItem:
    """A prompt, its possible continuations (leading blanks included) and the index of the right one."""

    prompt: str
    choices: Sequence[str]
    gold: int


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


def majority_share(items: Sequence[ChoiceItem]) -> float:
    """Accuracy of always giving the answer that is right most often: what a score has to beat."""
    counts: dict[int, int] = {}
    for item in items:
        counts[item.gold] = counts.get(item.gold, 0) + 1
    return max(counts.values()) / len(items)
