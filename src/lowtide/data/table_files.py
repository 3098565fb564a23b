"""Rows of tables: CSV, TSV and Parquet."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from ..log import get_logger
from .formats import KNOWN_KEYS, check_columns
from .json_files import not_utf8
from .record import Row, where
from .wording import shown

logger = get_logger(__name__)

_ROWS_PER_BATCH = 1024


def csv_rows(path: Path, file: BinaryIO) -> Iterator[Row]:
    undecodable: list[ValueError] = []  # in the lines of the row that is being read
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    reader = csv.reader(_decoded_lines(path, file, undecodable), delimiter=delimiter, strict=True)
    limit = csv.field_size_limit(2**31 - 1)  # the default, 131072 characters, is less than a long text
    try:
        header = _header(path, reader, undecodable, delimiter)
        number, line = 0, reader.line_num + 1
        for cells in _cells(path, reader):
            if cells:  # else a blank line
                number += 1
                yield Row(
                    line, number, undecodable[0] if undecodable else _table_row(path, line, number, header, cells)
                )
                undecodable.clear()
            line = reader.line_num + 1
    finally:
        csv.field_size_limit(limit)


def _decoded_lines(path: Path, file: BinaryIO, undecodable: list[ValueError]) -> Iterator[str]:
    offset = 0
    for number, raw in enumerate(file, start=1):
        try:
            line = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            undecodable.append(not_utf8(f"{path}:{number}", raw, error.start, offset + error.start))
            line = raw.decode("utf-8", "replace")
        yield line.removeprefix("\ufeff") if number == 1 else line
        offset += len(raw)


def _cells(path: Path, reader: Any) -> Iterator[list[str]]:
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise ValueError(
                f"{path}:{line}: malformed CSV in the row that begins here ({error}); put quotes around a cell with quotes, "
                'commas or newlines in it, and double its own quotes ("")'
            ) from None
        if cells is None:
            return
        yield cells


def _header(path: Path, reader: Any, undecodable: list[ValueError], delimiter: str) -> list[str]:
    names = [name.strip() for name in next((cells for cells in _cells(path, reader) if cells), [])]
    if undecodable:
        raise undecodable[0]
    place = f"{path}:{reader.line_num}"
    if len(names) == 1:
        for other, word in ((";", "semicolons"), ("\t", "tabs"), (",", "commas")):
            if other != delimiter and other in names[0]:
                meant = "commas (.csv)" if delimiter == "," else "tabs (.tsv)"
                raise ValueError(f"{place}: the columns are separated by {word}; separate them by {meant}")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{place}: the header has the column {twice!r} twice; rename one of them")
    if names:
        check_columns(names, f"{place}: the first line must be a header")
    return names


def _table_row(path: Path, line: int, number: int, header: list[str], cells: list[str]) -> dict[str, Any] | ValueError:
    place = where(str(path), line, number)
    if len(cells) != len(header):
        return ValueError(
            f"{place}: has {len(cells)} cells, but the header has {len(header)}; put quotes around cells with commas or "
            "newlines in them"
        )
    return dict(zip(header, cells, strict=True))


def parquet_rows(path: Path, file: BinaryIO) -> Iterator[Row]:
    import pyarrow  # it takes a while, and comes with datasets
    import pyarrow.parquet

    number = 0
    try:
        table = pyarrow.parquet.ParquetFile(file)
        names = table.schema_arrow.names
        check_columns(names, str(path))
        others = [name for name in names if name not in KNOWN_KEYS]
        if others:
            logger.warning("%s: ignoring the keys %s", path, shown(others))
        # Other columns are not even read: they may be embeddings or pictures.
        for batch in table.iter_batches(_ROWS_PER_BATCH, columns=[name for name in names if name in KNOWN_KEYS]):
            for content in _python_rows(batch):
                number += 1
                place = where(str(path), None, number)
                wrong = ValueError(f"{place}: text that is not valid UTF-8; correct or remove this record")
                yield Row(None, number, wrong if content is None else content)
    except (pyarrow.ArrowException, OSError) as error:
        after = f" after row {number}" if number else ""
        raise ValueError(
            f"{path}: a Parquet file that cannot be read{after} ({_first_line(error)}); write or download it anew"
        ) from None


def _python_rows(batch: Any) -> Iterator[dict[str, Any] | None]:
    """The rows of a batch, None for one whose text is not UTF-8."""
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:
        for index in range(batch.num_rows):
            try:
                yield from batch.slice(index, 1).to_pylist()
            except UnicodeDecodeError:
                yield None


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
