"""The files of a token store on disk: how they are told from those of others, and removed.

A store lies in a folder that a user has named. So nothing is deleted that is not known by its name and kind, and no link is followed.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import stat
from pathlib import Path
from typing import Any

import numpy

TOKENS, META = "tokens.bin", "meta.json"
COLUMNS = {
    "lengths": numpy.int32,
    "trained": numpy.int32,
    "records": numpy.int64,
    "truncated": numpy.bool_,
    "dropped": numpy.int32,
}
FORMAT = "lowtide token store 1"
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
