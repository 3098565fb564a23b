"""Wording: what errors about data have in common, and the check of a text that all formats share."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Any


def is_empty(value: Any) -> bool:
    """Whether a value counts as absent: null, or an empty string, list or object."""
    return value is None or value in ("", [], {})


def checked_text(value: Any, name: str, where: str) -> str:
    """A value that must be a text with something in it.

    Args:
        value: as the file has it.
        name: what it is called there.
        where: the place, for people.

    Raises:
        ValueError: it is of another type, empty, or no text that can be encoded.
    """
    if not isinstance(value, str):
        raise ValueError(f"{where}: {name} is {type_name(value)}, it must be a string; correct or remove this record")
    if not value.strip():
        raise ValueError(f"{where}: {name} is an empty string; correct or remove this record")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where}: {name} has half a surrogate pair at character {error.start}; correct or remove this record"
        ) from None
    return value


def type_name(value: Any) -> str:
    """What a value is, in words of JSON: "a list"."""
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object"}
    return "null" if value is None else names.get(type(value), f"a {type(value).__name__}")


def shown(keys: Sequence[str], limit: int = 6) -> str:
    """Some keys for an error message, shortened."""
    some = [repr(key if len(key) <= 60 else f"{key[:60]}...") for key in keys[:limit]]
    return ", ".join(some) + (", ..." if len(keys) > limit else "")


def hint(keys: Iterable[str], wanted: Sequence[str]) -> str:
    """`` (is 'txt' meant to be 'text'?)`` when one of the keys is nearly a wanted one, else nothing."""
    for key in keys:
        close = difflib.get_close_matches(str(key).lower(), wanted, n=1, cutoff=0.7)
        if key not in wanted and close:
            return f" (is {key!r} meant to be {close[0]!r}?)"
    return ""
