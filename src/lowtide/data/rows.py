"""Rows: what the file types have in common, an object for each record, whatever its keys mean.

    .jsonl          JSON Lines: an object a line
    .json           an array of objects, an object with one such list under "data" or "train", or JSON Lines
    .csv, .tsv      a header and rows; the cells of conversations hold JSON
    .parquet        columns, nested ones included

A row that cannot be read is reported in its place and the next one is read all the same. Where the syntax of a whole file is
broken (JSON in one piece, CSV with an open quote, a damaged Parquet file) nobody knows where the next row begins, so the
file is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from .json_files import is_one_document, json_document_rows, json_line_rows
from .record import Row
from .table_files import csv_rows, parquet_rows

JSON_SUFFIXES = (".jsonl", ".json")
TABLE_SUFFIXES = (".csv", ".tsv", ".parquet")


def read_rows(path: Path, file: BinaryIO) -> tuple[str, Iterator[Row]]:
    """The name of a file's type, and its rows.

    Args:
        path: whose ending says what it is.
        file: the same, opened; it must stay so while the rows are read.

    Raises (also while the rows are read):
        ValueError: the file as a whole is malformed, or has no columns of use.
    """
    suffix = path.suffix.lower()
    if suffix == ".json" and is_one_document(path):
        return "JSON", json_document_rows(path, file)
    readers: dict[str, tuple[str, Callable[[Path, BinaryIO], Iterator[Row]]]] = {
        ".csv": ("CSV", csv_rows),
        ".tsv": ("TSV", csv_rows),
        ".parquet": ("Parquet", parquet_rows),
    }
    name, reader = readers.get(suffix, ("JSON Lines", json_line_rows))
    return name, reader(path, file)
