"""Markdown tables, and the places of the page that they go into."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Of cells that are text already."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def error(predicted: float, measured: float) -> str:
    """Signed and relative, in per cent."""
    share = round(predicted / measured - 1, 2)
    return f"{share + 0.0:+.0%}"  # no minus zero


def number(value: float) -> str:
    """Three figures, without an exponent."""
    if value >= 1000:
        return f"{round(value, 2 - len(str(int(value))) + 1):,.0f}"
    return f"{value:.3g}"


def replaced(page: str, name: str, text: str) -> str:
    """The page with a part between its marks made new.

    Raises:
        ValueError: the page has no such part, or several.
    """
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end of {name} -->)", re.DOTALL)
    new, count = pattern.subn(lambda found: f"{found[1]}\n{text}\n\n{found[2]}", page)
    if count != 1:
        raise ValueError(f"the page has {count} parts named {name!r}")
    return new


def part(page: str, name: str) -> str:
    """What stands between the marks.

    Raises:
        ValueError: the page has no such part.
    """
    found = re.search(rf"<!-- {name} -->\n\n(.*?)\n\n<!-- end of {name} -->", page, re.DOTALL)
    if found is None:
        raise ValueError(f"the page has no part named {name!r}")
    return found[1]


def write(path: Path, parts: dict[str, str]) -> None:
    """All parts into a page."""
    page = path.read_text(encoding="utf-8")
    for name, text in parts.items():
        page = replaced(page, name, text)
    path.write_text(page, encoding="utf-8")
