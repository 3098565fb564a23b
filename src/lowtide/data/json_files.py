"""Rows of JSON files: JSON Lines, and JSON in one piece."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from ..log import get_logger
from .formats import WANTED
from .record import Row, where
from .wording import hint, shown, type_name

logger = get_logger(__name__)

_MARK = b"\xef\xbb\xbf"  # byte order mark
_LIST_NAMES = ("data", "train")


def not_utf8(place: str, raw: bytes, index: int, offset: int) -> ValueError:
    """The error for a byte that is not UTF-8.

    Args:
        place: where, for people.
        raw: bytes with the bad one among them.
        index: of the bad byte in ``raw``.
        offset: of the bad byte in the file.
    """
    utf16 = offset < 2 and raw[:2] in (b"\xff\xfe", b"\xfe\xff")
    advice = "it looks like UTF-16; " if utf16 else ""
    return ValueError(f"{place}: byte {offset} (0x{raw[index]:02x}) is not valid UTF-8; {advice}save the file as UTF-8")


def json_line_rows(path: Path, file: BinaryIO, *, wanted: str = WANTED) -> Iterator[Row]:
    """The object on every line that is not blank, or what is wrong with it.

    Args:
        path: of the file, for messages.
        file: open at its beginning.
        wanted: what an object has to be, to be said of what is none.
    """
    offset = 0
    # Binary lines end at \n alone; text mode and splitlines() would also cut at characters that JSON allows in strings.
    for number, raw in enumerate(file, start=1):
        try:
            line = raw.decode("utf-8")
            line = (line.removeprefix("\ufeff") if number == 1 else line).strip()
            if line:
                yield Row(number, None, _json_object(line, f"{path}:{number}", wanted))
        except UnicodeDecodeError as error:
            yield Row(number, None, not_utf8(f"{path}:{number}", raw, error.start, offset + error.start))
        except ValueError as error:
            yield Row(number, None, error)
        offset += len(raw)


def _json_object(line: str, place: str, wanted: str) -> dict[str, Any]:
    if line.startswith("["):
        raise ValueError(
            f"{place}: a JSON array, but every line must be one object; convert it: jq -c '.[]' old.json > new.jsonl, or "
            "name the file .json if it is one array"
        )
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{place}: malformed JSON at column {error.colno} ({error.msg}); every line must be one whole JSON object"
        ) from None
    except (ValueError, RecursionError) as error:  # a number of 5000 digits, nesting of 1000 levels
        raise ValueError(f"{place}: JSON that cannot be read ({error}); correct or remove the line") from None
    if not isinstance(row, dict):
        raise ValueError(f"{place}: {type_name(row)} instead of a JSON object; {wanted}")
    return row


def is_one_document(path: Path) -> bool:
    """Whether a .json file is JSON in one piece; otherwise each of its lines is."""
    with path.open("rb") as file:
        lines = (line for raw in file if (line := raw.removeprefix(_MARK).strip()))
        first, more = next(lines, b""), next(lines, None)
    if first.startswith(b"[") or first == b"{":
        return True
    if more is not None:
        return re.match(rb'\{[^{}\[\]]*"(data|train)"\s*:\s*(\[|$)', first) is not None and _parsed(first) is None
    return bool(_lists(_parsed(first)))


def _parsed(raw: bytes) -> Any:
    try:
        return json.loads(raw)
    except (ValueError, RecursionError):
        return None


def _lists(document: Any) -> list[str]:
    return [name for name in _LIST_NAMES if isinstance(document, dict) and isinstance(document.get(name), list)]


def json_document_rows(path: Path, file: BinaryIO) -> Iterator[Row]:
    raw = file.read()
    try:
        document = json.loads(raw.decode("utf-8").removeprefix("\ufeff"))
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise not_utf8(f"{path}:{line}", raw, error.start, error.start) from None
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}:{error.lineno}: malformed JSON at column {error.colno} ({error.msg}); the file must be one whole JSON "
            "array of objects, or have an object on each line"
        ) from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: JSON that cannot be read ({error}); correct the file") from None
    for number, item in enumerate(_items(document, path), start=1):
        place = where(str(path), None, number)
        wrong = ValueError(f"{place}: {type_name(item)} instead of a JSON object; {WANTED}")
        yield Row(None, number, item if isinstance(item, dict) else wrong)


def _items(document: list[Any] | dict[str, Any], path: Path) -> list[Any]:
    if isinstance(document, list):
        return document
    names = _lists(document)
    if len(names) > 1:
        raise ValueError(f"{path}:1: an object with lists under 'data' and 'train' at once; keep one of them")
    if not names:
        raise ValueError(
            f"{path}:1: an object without a list under 'data' or 'train'{hint(document, _LIST_NAMES)}; write an array of "
            "objects, or JSON Lines, where every line must be one whole JSON object"
        )
    others = sorted(set(document) - set(names))
    if others:
        logger.warning("%s: reading the list under %r, ignoring the keys %s", path, names[0], shown(others))
    items: list[Any] = document[names[0]]
    return items
