"""The files of a token store on disk: how they are told from those of others, removed, and read without staying in memory.

A store lies in a folder that a user has named. So nothing is deleted that is not known by its name and kind, and no link is followed.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import re
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy
from numpy.typing import DTypeLike, NDArray

TOKENS, META = "tokens.bin", "meta.json"
COLUMNS = {
    "lengths": numpy.int32,
    "trained": numpy.int32,
    "records": numpy.int64,
    "truncated": numpy.bool_,
    "dropped": numpy.int32,
}
FORMAT = "lowtide token store 1"
PIECE = 2**16  # numbers of a column that are looked at together
_NAMES = frozenset({TOKENS, META, *(f"{name}.npy" for name in COLUMNS)})


def read_meta(folder: Path) -> dict[str, Any]:
    """What ``meta.json`` of a store says.

    Raises:
        ValueError, OSError: it is not there, or not that of a store.
    """
    path = folder / META
    meta = json.loads(path.read_text(encoding="utf-8"))
    # Those of the first versions name no format.
    if not isinstance(meta, dict) or meta.get("format", FORMAT) != FORMAT or not isinstance(meta.get("info"), dict):
        raise ValueError(f"{path} is not that of a token store")
    if re.fullmatch("[0-9a-f]{64}", str(meta.get("digest"))) is None:
        raise ValueError(f"{path} has no digest of the tokens")
    return meta


def holds_nothing_else(folder: Path) -> bool:
    """Whether this is a folder, and no link to one, without any files but those of a store. Some of these may be missing."""
    if folder.is_symlink() or not folder.is_dir():
        return False
    with os.scandir(folder) as found:
        return all(each.name in _NAMES and each.is_file(follow_symlinks=False) for each in found)


def is_store(folder: Path) -> bool:
    """Whether a store was written here, to its end, and nothing else was put beside its files."""
    try:
        return holds_nothing_else(folder) and bool(read_meta(folder))
    except (OSError, ValueError):
        return False


def remove_store(folder: Path) -> None:
    """Delete the files of a store, and the folder, which stays if there is anything else in it."""
    if folder.is_symlink():
        return
    for name in _NAMES:
        path = folder / name
        with contextlib.suppress(OSError):
            if stat.S_ISREG(path.lstat().st_mode):
                path.unlink()
    with contextlib.suppress(OSError):
        folder.rmdir()


def write_header(file: BinaryIO, kind: DTypeLike, length: int) -> None:
    """What a file ``.npy`` of one dimension begins with: 128 bytes, whatever the length, so that it can be written anew."""
    facts = {"descr": numpy.dtype(kind).str, "fortran_order": False, "shape": (length,)}
    numpy.lib.format.write_array_header_1_0(file, facts)
    assert file.tell() == 128


def map_column(folder: Path, name: str) -> NDArray[Any]:
    """A column of a store, read from its file where it is looked at.

    Raises:
        ValueError, OSError: it is not there, or not whole.
    """
    path = folder / f"{name}.npy"
    column: NDArray[Any] = numpy.load(path, mmap_mode="r")
    if column.ndim != 1 or column.dtype != COLUMNS[name]:
        raise ValueError(
            f"{path} holds {column.dtype} {list(column.shape)} instead of {numpy.dtype(COLUMNS[name])} [E]"
        )
    return column


def pieces(column: NDArray[Any], indices: NDArray[Any] | None = None) -> Iterator[NDArray[Any]]:
    """A column, or the numbers at some indices of it, piece by piece. Of a mapped one, no more is in memory at a time."""
    for start in range(0, len(column if indices is None else indices), PIECE):
        where = slice(start, start + PIECE)
        yield column[where] if indices is None else column[indices[where]]
        _let_go(column)


def marked_numbers(marks: Iterable[NDArray[numpy.bool_]], number: int) -> NDArray[Any]:
    """The numbers of what is marked.

    Args:
        marks: one for everything, piece by piece.
        number: of the marks. It decides whether 4 or 8 bytes are taken for each number that is found.
    """
    kind = smallest_ints(number)
    found, start = [numpy.zeros(0, kind)], 0
    for piece in marks:
        found.append((numpy.flatnonzero(piece) + start).astype(kind))
        start += len(piece)
    return numpy.concatenate(found)


def smallest_ints(number: int) -> type[numpy.int32] | type[numpy.int64]:
    """What the numbers below ``number`` fit in."""
    return numpy.int32 if number <= 2**31 else numpy.int64


def _let_go(column: NDArray[Any]) -> None:
    """Take the pages of a mapped column out of the resident set; they are read again when they are needed."""
    base: Any = column.base
    while isinstance(base, numpy.ndarray):
        base = base.base
    if isinstance(base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        base.madvise(mmap.MADV_DONTNEED)
