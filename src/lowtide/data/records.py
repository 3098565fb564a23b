"""Records: what a user's files hold, read strictly and before any tokenizer is involved.

Text files (.txt, .md) are one record a file. Of the other file types (``rows.py``) every row is one, in one of five formats
(``formats.py``) that are told from its keys, the same one for the whole of a file. Every error is one line that names the file,
the line or row, and what to do.

Files are read as they are needed, so that one larger than memory will do; JSON in one piece is the exception.
"""

from __future__ import annotations

import codecs
import dataclasses
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ..log import get_logger
from .formats import format_of, ignored_keys, make_record
from .inputs import TEXT_SUFFIXES, Input, find_inputs
from .json_files import not_utf8
from .record import Record, Row, where
from .rows import read_rows
from .wording import shown

__all__ = ["Detected", "OnBad", "Record", "Source", "read_records", "read_sources", "stream_records"]

logger = get_logger(__name__)

OnBad = Callable[[ValueError], None]  # told of a record that cannot be used
OnRead = Callable[[int], None]  # told of the bytes of a file that have been read so far
Prepare = Callable[[Record], Record]  # makes something more of a record, or raises ValueError: then it is a bad one

_PIECE = 2**20  # bytes of a text file that are read at once
_LONG = 8 * _PIECE  # text files up to here are one piece


@dataclass(frozen=True)
class Detected:
    """What was found in a file, or in a data set of the hub.

    Attributes:
        name: path or id.
        file_type: "text", "JSON Lines", "JSON", "CSV", "TSV", "Parquet" or "hub data set".
        format: "text", "messages", "prompt/completion", "alpaca" or "sharegpt".
        num_records: at least one.
    """

    name: str
    file_type: str
    format: str
    num_records: int

    def __str__(self) -> str:
        """What was detected, in a line."""
        number = self.num_records
        return f"{self.name}: {self.format} ({self.file_type}), {number} record{'s' if number > 1 else ''}"


@dataclass(frozen=True)
class Source(Detected):
    """The same, with all the records."""

    records: list[Record]


def read_records(paths: str | Path | Sequence[str | Path], on_bad: OnBad | None = None) -> list[Record]:
    """Read all records of one or more files, directories (searched with their subdirectories) or hub data set ids.

    The order is that of the arguments, then of the sorted file names, then of the lines.

    Args:
        paths: what to read; see :func:`find_inputs`.
        on_bad: called with the error of every line or row that is no usable record, which is then left out; None to refuse
            the file.

    Raises:
        FileNotFoundError: a path does not exist, a directory holds no data file, a hub data set cannot be loaded.
        ValueError: a file is not UTF-8, malformed, empty, of an unknown type, or mixes formats.
    """
    return [record for source in read_sources(paths, on_bad) for record in source.records]


def read_sources(paths: str | Path | Sequence[str | Path], on_bad: OnBad | None = None) -> list[Source]:
    """As :func:`read_records`, file by file. What was detected in each is logged, too."""
    return [_read_source(each, on_bad) for each in find_inputs(paths)]


def _read_source(given: Input, on_bad: OnBad | None) -> Source:
    records: list[Record] = []
    stream = stream_records(given, on_bad)
    while True:
        try:
            record = next(stream)
        except StopIteration as end:
            detected: Detected = end.value
            return Source(detected.name, detected.file_type, detected.format, detected.num_records, records)
        if record.continues:
            whole = (records[-1].text or "") + (record.text or "")
            records[-1] = dataclasses.replace(records[-1], text=whole, continued=False)
        else:
            records.append(record)


def stream_records(
    given: Input,
    on_bad: OnBad | None = None,
    on_read: OnRead | None = None,
    *,
    prepare: Prepare | None = None,
    tell: bool = True,
) -> Generator[Record, None, Detected]:
    """The records of one file or data set, one after the other; a long text file comes as several that continue each other.

    Args:
        given: the file or data set.
        on_bad: as in :func:`read_records`.
        on_read: called before every record with the number of bytes that have been read of the file.
        prepare: called with every record of a file type that has rows, as part of reading it.
        tell: log what was detected, which keys were ignored and how many conversations lost their first turns.

    Returns:
        What was detected, once all are read.

    Raises (while they are read):
        ValueError: as :func:`read_records`.
    """
    if given.path is None:
        numbered = (Row(None, number, row) for number, row in enumerate(given.rows, start=1))
        detected = yield from _records_of(given.name, "hub data set", numbered, on_bad, prepare, tell)
    else:
        with given.path.open("rb") as file:
            if given.path.suffix.lower() in TEXT_SUFFIXES:
                records = _read_text(given.path, file)
            else:
                file_type, rows = read_rows(given.path, file)
                records = _records_of(given.name, file_type, rows, on_bad, prepare, tell)
            detected = yield from _counted(records, file, on_read)
    if tell:
        logger.info("%s", detected)
    return detected


def _counted(
    records: Generator[Record, None, Detected], file: BinaryIO, on_read: OnRead | None
) -> Generator[Record, None, Detected]:
    while True:
        try:
            record = next(records)
        except StopIteration as end:
            detected: Detected = end.value
            return detected
        if on_read is not None:
            on_read(file.tell())
        yield record


def _read_text(path: Path, file: BinaryIO) -> Generator[Record, None, Detected]:
    """The whole of a file, or, of a long one, pieces that end where no tokenizer that we know joins tokens (:func:`_cut`)."""
    pieces = _text_pieces(path, file)
    text = next(pieces, "")
    empty, continues = not text.strip(), False
    for following in pieces:
        empty = empty and not following.strip()
        yield Record(str(path), 1, text=text, continues=continues, continued=True)
        text, continues = following, True
    if empty:
        raise ValueError(f"{path}: no records (the file is empty)")
    yield Record(str(path), 1, text=text, continues=continues)
    return Detected(str(path), "text", "text", 1)


def _text_pieces(path: Path, file: BinaryIO) -> Iterator[str]:
    is_long = path.stat().st_size > _LONG
    decoded = _decoded(path, file)
    if not is_long:
        yield "".join(decoded)
        return
    held = ""
    for text in decoded:
        held += text
        if cut := _cut(held):
            yield held[:cut]
            held = held[cut:]
    if held:
        yield held


def _pieces_of(record: Record) -> Iterator[Record]:
    """The record itself, or several that continue each other if its text is long."""
    text, continues = record.text or "", False
    while len(text) > _LONG:
        cut = _cut(text[:_LONG])
        yield dataclasses.replace(record, text=text[:cut], continues=continues, continued=True)
        text, continues = text[cut:], True
    yield dataclasses.replace(record, text=text, continues=True) if continues else record


def _cut(text: str) -> int:
    """Where to cut a text that goes on: behind its last newline between words; 0 for not yet.

    A text without such newlines is cut before a blank between words, or anywhere, rather than read as a whole. Where white space
    is longer than one character, tokenizers split it in ways that depend on what follows.
    """
    for mark, behind in (("\n", 1), (" ", 0)):
        at = len(text) - 1
        while (at := text.rfind(mark, 0, at)) > 0:
            if not (text[at + 1].isspace() or text[at - 1].isspace()):
                return at + behind
        if len(text) < _LONG:
            return 0
    return len(text)


def _decoded(path: Path, file: BinaryIO) -> Iterator[str]:
    """The text of a file in pieces of any length, newlines as \\n, without a byte order mark."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset = num_lines = 0
    return_held = ""  # a \r at the end of a piece may be half of a \r\n
    first = True
    while raw := file.read(_PIECE):
        kept = decoder.getstate()[0]
        try:
            text = decoder.decode(raw, final=False)
        except UnicodeDecodeError as error:
            raise _bad_text(path, kept + raw, error, offset - len(kept), num_lines) from None
        offset, num_lines = offset + len(raw), num_lines + raw.count(b"\n")
        text = return_held + (text.removeprefix("\ufeff") if first else text)
        return_held = "\r" if text.endswith("\r") else ""
        first = False
        yield (text[:-1] if return_held else text).replace("\r\n", "\n")
    kept = decoder.getstate()[0]
    try:
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise _bad_text(path, kept, error, offset - len(kept), num_lines) from None
    yield return_held


def _bad_text(path: Path, raw: bytes, error: UnicodeDecodeError, offset: int, num_lines: int) -> ValueError:
    line = num_lines + raw.count(b"\n", 0, error.start) + 1
    return not_utf8(f"{path}:{line}", raw, error.start, offset + error.start)


def _records_of(
    name: str, file_type: str, rows: Iterable[Row], on_bad: OnBad | None, prepare: Prepare | None, tell: bool
) -> Generator[Record, None, Detected]:
    """The records of one source, which must all be of the first one's format."""
    first: Record | None = None
    ignored: set[str] = set()
    first_format, first_error, num_records, num_bad, num_shortened, noun = "", "", 0, 0, 0, "lines"
    for line, number, row in rows:
        noun = "lines" if number is None else "rows"
        try:
            if isinstance(row, ValueError):
                raise row
            place = where(name, line, number)
            format = format_of(row, place)
            if first is not None and format.name != first_format:
                began = f"line {first.line}" if number is None else f"row {first.row}"
                raise ValueError(
                    f"{place}: a {format.name!r} record in a file that began with {first_format!r} ({began}); "
                    "put each kind into a file of its own"
                )
            record = make_record(row, format, name, line, number)
            record = record if prepare is None else prepare(record)
        except ValueError as error:
            if on_bad is None:
                raise
            on_bad(error)
            first_error = first_error or str(error)
            num_bad += 1
            continue
        first, first_format = first or record, format.name
        ignored |= ignored_keys(row, format)
        num_records += 1
        num_shortened += record.num_dropped_turns > 0
        yield from _pieces_of(record)
    if not num_records:
        why = f"all {num_bad} {noun} are bad; the first: {first_error}" if num_bad else "the file is empty"
        raise ValueError(f"{name}: no records ({why})")
    if tell:
        _tell(name, ignored, num_shortened)
    return Detected(name, file_type, first_format, num_records)


def _tell(name: str, ignored: set[str], num_shortened: int) -> None:
    if ignored:
        logger.warning("%s: ignoring the keys %s", name, shown(sorted(ignored)))
    if num_shortened:
        logger.warning(
            "%s: %d conversation%s with an assistant turn, which has no question and is left out",
            name,
            num_shortened,
            "s begin" if num_shortened > 1 else " begins",
        )
