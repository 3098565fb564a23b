"""Which of many records or examples are held out, as arrays: a list of them all would take more memory than short records do."""

from __future__ import annotations

import random

import numpy

from .store import Ints
from .store_files import marked_numbers, pieces


def split_numbers(number: int, fraction: float, seed: int) -> tuple[Ints, Ints]:
    """The numbers below ``number``, split at random, by ``seed``, into (train, held out); both rise.

    The same split as that of ``split_held_out``.

    Args:
        number: of records or examples.
        fraction: the share that is held out, rounded, but at least one; at least one is left to train on.
        seed: decides which.

    Raises:
        ValueError: ``fraction`` is not strictly between 0 and 1, or ``number`` is less than two.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"the held-out fraction must lie between 0 and 1, got {fraction}")
    if number < 2:
        raise ValueError(f"cannot hold out part of {number} record(s): at least two are needed; add data")
    num_held_out = min(max(1, round(number * fraction)), number - 1)
    held_out = numpy.zeros(number, dtype=numpy.bool_)
    held_out[random.Random(seed).sample(range(number), num_held_out)] = True
    train = marked_numbers((~piece for piece in pieces(held_out)), number)
    return train, marked_numbers(pieces(held_out), number)
