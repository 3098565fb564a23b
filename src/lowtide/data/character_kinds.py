"""Real material that every Python carries: the kinds of Unicode characters, learnt from their names.

The module ``unicodedata`` holds the Unicode Character Database: some 34000 named characters, each with a general
category (Unicode Standard Annex #44, section 5.7.1). From the name ("thai digit five") the kind has to be told, one of
``KINDS``: the first letter of the category, L, N, P or S. (Combining marks, M, are left out: few people know them.)

Names of one family are alike ("thai digit five", "thai digit six"), so a random split would let a model answer by
heart. Here the *first word* of a name decides on which side of the split a character falls: no held-out name begins
with a word that a training name begins with, and most scripts of the held-out names never occur in training. What is
still shared are words inside the names, such as "digit" or "vowel sign": to learn what those mean is the task.

The database grows with Python's version (3.11 has Unicode 14, 3.13 has 15.1), so scores differ a little between them.
"""

from __future__ import annotations

import hashlib
import random
import sys
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

KINDS = ("letter", "number", "punctuation", "symbol")
_KIND_OF_CATEGORY = {"L": "letter", "N": "number", "P": "punctuation", "S": "symbol"}

# Their names are made from a number or by a fixed rule, so that they say nothing about the character.
_NUMBERED = ("CJK ", "HANGUL SYLLABLE", "TANGUT", "NUSHU", "KHITAN", "VARIATION SELECTOR", "SIGNWRITING", "TAG ")
# So that no large family ("signwriting", "cuneiform sign") makes up most of a kind.
_MOST_PER_FAMILY = 12
_HELD_OUT_SHARE = 0.35


@dataclass(frozen=True)
class Character:
    """A named character.

    Attributes:
        text: the character itself, a string of length 1.
        name: its Unicode name in lower case ("thai digit five").
        kind: one of ``KINDS``.
    """

    text: str
    name: str
    kind: str

    @property
    def family(self) -> str:
        """The first word of the name, usually a script ("thai")."""
        return self.name.split()[0]

    def row(self) -> dict[str, str]:
        """The character as a line of a JSONL file: ``prompt`` and ``completion``."""
        return {"prompt": prompt_for(self.name), "completion": f" {self.kind}"}


def prompt_for(name: str) -> str:
    """The question about a character's name."""
    return f'What kind of character is "{name}"? Answer:'


def all_characters() -> list[Character]:
    """Every character of the database whose name describes it, in the order of the code points."""
    characters = []
    for code_point in range(sys.maxunicode + 1):
        text = chr(code_point)
        kind = _KIND_OF_CATEGORY.get(unicodedata.category(text)[0])
        name = unicodedata.name(text, "")
        if kind and name and not name.startswith(_NUMBERED):
            characters.append(Character(text, name.lower(), kind))
    return characters


def make_split(num_train: int, num_held_out: int, seed: int = 0) -> tuple[list[Character], list[Character]]:
    """Training and held-out characters, shuffled, as many of one kind as of another (but for a remainder).

    The same numbers and seed give the same characters on every machine with the same version of Unicode.

    Args:
        num_train: characters to train on.
        num_held_out: characters to hold out; none of their names begins with a word that a training name begins with.
        seed: decides which families are held out, which characters are drawn, and their order.

    Raises:
        ValueError: the database has not that many characters of some kind.
    """
    sides: tuple[list[Character], list[Character]] = ([], [])
    for character in all_characters():
        sides[_is_held_out(character.family, seed)].append(character)
    rng = random.Random(seed)
    train = _balanced(sides[0], num_train, rng, "num_train")
    return train, _balanced(sides[1], num_held_out, rng, "num_held_out")


def _is_held_out(family: str, seed: int) -> bool:
    # A hash of the family alone: characters that a later Unicode adds do not move the others to the other side.
    digest = hashlib.sha256(f"{seed}:{family}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < _HELD_OUT_SHARE * 2**64


def _balanced(characters: Iterable[Character], count: int, rng: random.Random, name: str) -> list[Character]:
    """Draw ``count`` characters, equally many of each kind."""
    by_kind: dict[str, list[Character]] = defaultdict(list)
    seen: Counter[tuple[str, str]] = Counter()
    shuffled = list(characters)
    rng.shuffle(shuffled)
    for character in shuffled:
        seen[character.kind, character.family] += 1
        if seen[character.kind, character.family] <= _MOST_PER_FAMILY:
            by_kind[character.kind].append(character)
    drawn = []
    for index, kind in enumerate(KINDS):
        wanted = count // len(KINDS) + (index < count % len(KINDS))
        if wanted > len(by_kind[kind]):
            raise ValueError(
                f"{name} must be at most {len(KINDS) * min(len(by_kind[kind]) for kind in KINDS)}: Unicode "
                f"{unicodedata.unidata_version} has no more characters of every kind for that side, got {count}"
            )
        drawn += by_kind[kind][:wanted]
    rng.shuffle(drawn)
    return drawn
