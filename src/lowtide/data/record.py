"""A record: one thing to learn from, and where it was found; and the row of a file that it is made from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple


@dataclass(frozen=True)
class RenderedChat:
    """A conversation as the model reads it; ``spans`` are the [start, end) characters trained on, in order."""

    text: str
    spans: list[tuple[int, int]]


@dataclass(frozen=True)
class Record:
    """One thing to learn from: either ``text``, or ``messages``, or ``prompt`` with ``completion``; the rest is None.

    Attributes:
        source: path of the file, or id of the hub data set.
        line: the line it begins on, counted from 1; None where there are no lines (Parquet, a JSON array, the hub).
        messages: turns of a conversation, each with "role" and "content", perhaps "name", and "weight": 0 for an assistant turn
            that is not trained on.
        instruction: (instruction, input) of an Alpaca record, which has ``messages`` too; the input may be empty. Used
            where the tokenizer has no chat template.
        row: its number in a table or an array, counted from 1, the header of a table left out; None in JSON Lines and text.
        continues: the text goes on from that of the record before; a long file is read in pieces.
        continued: the text goes on in the next record.
        num_dropped_turns: assistant turns that the conversation began with and that were left out.
        rendered: the conversation as text, once a chat template has accepted it.
        others: as named.
    """

    source: str
    line: int | None
    text: str | None = None
    messages: list[dict[str, Any]] | None = None
    prompt: str | None = None
    completion: str | None = None
    instruction: tuple[str, str] | None = None
    row: int | None = None
    continues: bool = False
    continued: bool = False
    num_dropped_turns: int = 0
    rendered: list[RenderedChat] | None = field(default=None, compare=False, repr=False)

    @property
    def where(self) -> str:
        """The place, as error messages name it: see :func:`where`."""
        return where(self.source, self.line, self.row)


class Row(NamedTuple):
    """A row and its place, as in ``Record``; instead of its keys and values, the error if it cannot be read."""

    line: int | None
    number: int | None
    content: dict[str, Any] | ValueError


def where(source: str, line: int | None, row: int | None) -> str:
    """``source:line``, ``source:line (row 3)`` or ``source: row 3``."""
    if line is None:
        return f"{source}: row {row}"
    return f"{source}:{line}" if row is None else f"{source}:{line} (row {row})"
