"""Records: what a user's files hold, read strictly and before any tokenizer is involved.

Text files (.txt, .md) are one record a file. Of the other file types (``rows.py``) every row is one, in one of five formats
(``formats.py``) that are told from its keys, the same one for the whole of a file. Every error is one line that names the file,
the line or row, and what to do.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..log import get_logger
from .formats import format_of, ignored_keys, make_record, shown
from .json_files import not_utf8
from .record import Record, Row, where
from .rows import JSON_SUFFIXES, TABLE_SUFFIXES, read_rows

__all__ = ["OnBad", "Record", "Source", "read_records", "read_sources"]

logger = get_logger(__name__)

TEXT_SUFFIXES = (".txt", ".md")
SUFFIXES = TEXT_SUFFIXES + JSON_SUFFIXES + TABLE_SUFFIXES

OnBad = Callable[[ValueError], None]  # told of a record that cannot be used


@dataclass(frozen=True)
class Source:
    """A file, or a data set of the hub, with what was found in it.

    Attributes:
        name: path or id.
        file_type: "text", "JSON Lines", "JSON", "CSV", "TSV", "Parquet" or "hub data set".
        format: "text", "messages", "prompt/completion", "alpaca" or "sharegpt".
        records: at least one.
    """

    name: str
    file_type: str
    format: str
    records: list[Record]

    def __str__(self) -> str:
        """What was detected, in a line."""
        number = len(self.records)
        return f"{self.name}: {self.format} ({self.file_type}), {number} record{'s' if number > 1 else ''}"


def read_records(paths: str | Path | Sequence[str | Path], on_bad: OnBad | None = None) -> list[Record]:
    """Read all records of one or more files, directories (searched with their subdirectories) or hub data set ids.

    A string that is no existing path and looks like ``org/name`` is loaded with ``datasets.load_dataset`` (its train
    split). The order is that of the arguments, then of the sorted file names, then of the lines.

    Args:
        paths: what to read.
        on_bad: called with the error of every line or row that is no usable record, which is then left out; None to refuse
            the file.

    Raises:
        FileNotFoundError: a path does not exist, a directory holds no data file, a hub data set cannot be loaded.
        ValueError: a file is not UTF-8, malformed, empty, of an unknown type, or mixes formats.
    """
    return [record for source in read_sources(paths, on_bad) for record in source.records]


def read_sources(paths: str | Path | Sequence[str | Path], on_bad: OnBad | None = None) -> list[Source]:
    """As :func:`read_records`, file by file. What was detected in each is logged, too."""
    entries = [paths] if isinstance(paths, (str, Path)) else list(paths)
    if not entries:
        raise ValueError("no data files given")
    return [source for entry in entries for source in _read_entry(entry, on_bad)]


def _read_entry(entry: str | Path, on_bad: OnBad | None) -> list[Source]:
    path = Path(entry).expanduser()
    if not str(entry):
        raise FileNotFoundError("the data path is empty; name a file, a directory or a hub data set")
    if path.is_dir():
        return [_read_file(file, on_bad) for file in _data_files(path)]
    if path.exists():
        return [_read_file(path, on_bad)]
    if isinstance(entry, str) and _looks_like_hub_id(entry):
        return [_read_hub(entry, on_bad)]
    raise FileNotFoundError(f"{entry}: no such file or directory")


def _data_files(directory: Path) -> list[Path]:
    """Data files below a directory, sorted; hidden files and folders (``.git``, ``.cache``) are not data."""
    found = [
        path
        for path in sorted(directory.rglob("*"))
        if path.suffix.lower() in SUFFIXES
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(directory).parts)
    ]
    if not found:
        raise FileNotFoundError(f"{directory}: holds no {', '.join(SUFFIXES)} file")
    return found


def _read_file(path: Path, on_bad: OnBad | None) -> Source:
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(f"{path}: unknown file type {path.suffix!r}; data files end in {', '.join(SUFFIXES)}")
    if suffix in TEXT_SUFFIXES:
        source = Source(str(path), "text", "text", _read_text(path))
    else:
        file_type, rows = read_rows(path)
        source = _source_of(str(path), file_type, rows, on_bad)
    logger.info("%s", source)
    return source


def _read_text(path: Path) -> list[Record]:
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise not_utf8(f"{path}:{line}", raw, error.start, error.start) from None
    text = text.removeprefix("\ufeff").replace("\r\n", "\n")
    if not text.strip():
        raise ValueError(f"{path}: no records (the file is empty)")
    return [Record(str(path), 1, text=text)]


def _source_of(name: str, file_type: str, rows: Iterable[Row], on_bad: OnBad | None) -> Source:
    """The records of one source, which must all be of the first one's format."""
    records: list[Record] = []
    ignored: set[str] = set()
    first_format, num_bad, noun = "", 0, "lines"
    for line, number, row in rows:
        noun = "lines" if number is None else "rows"
        try:
            if isinstance(row, ValueError):
                raise row
            place = where(name, line, number)
            format = format_of(row, place)
            if first_format and format.name != first_format:
                first = f"line {records[0].line}" if number is None else f"row {records[0].row}"
                raise ValueError(
                    f"{place}: a {format.name!r} record in a file that began with {first_format!r} ({first}); "
                    "put each kind into a file of its own"
                )
            records.append(make_record(row, format, name, line, number))
        except ValueError as error:
            if on_bad is None:
                raise
            on_bad(error)
            num_bad += 1
            continue
        first_format = format.name
        ignored |= ignored_keys(row, format)
    if not records:
        raise ValueError(f"{name}: no records ({f'all {num_bad} {noun} are bad' if num_bad else 'the file is empty'})")
    if ignored:
        logger.warning("%s: ignoring the keys %s", name, shown(sorted(ignored)))
    return Source(name, file_type, first_format, records)


def _looks_like_hub_id(name: str) -> bool:
    """``org/name``, unless it is more likely a mistyped path: a data file's name, or inside an existing directory."""
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) is None:
        return False
    return Path(name).suffix.lower() not in SUFFIXES and not Path(name).parent.is_dir()


def _read_hub(name: str, on_bad: OnBad | None) -> Source:
    import datasets  # takes seconds, and most users read files

    try:
        rows = datasets.load_dataset(name, split="train")
    except Exception as error:  # datasets, huggingface_hub and requests each raise families of their own
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise FileNotFoundError(
            f"{name}: neither an existing path nor a data set that the hub gave ({type(error).__name__}: {reason})"
        ) from error
    numbered = (Row(None, number, row) for number, row in enumerate(rows, start=1))
    source = _source_of(name, "hub data set", numbered, on_bad)
    logger.info("%s", source)
    return source
