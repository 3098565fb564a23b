"""Inputs: the files and data sets of the hub that a user's arguments stand for, found before any of them is read."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .folders import SUFFIXES, TEXT_SUFFIXES, data_files
from .hub_sets import HubSet

_HASHED_AT_ONCE = 2**22  # bytes

__all__ = ["SUFFIXES", "TEXT_SUFFIXES", "Input", "find_inputs"]


@dataclass
class Input:
    """A file, or a data set of the hub.

    Attributes:
        name: path, or what the user has written for the data set.
        path: of a file, else None.
        hub: the data set, else None.
    """

    name: str
    path: Path | None = None
    hub: HubSet | None = None

    @functools.cached_property
    def rows(self) -> Any:
        """Of a data set, loaded when this is first asked for.

        Raises:
            FileNotFoundError: it cannot be loaded.
        """
        assert self.hub is not None
        return self.hub.load()

    @property
    def num_bytes(self) -> int:
        """Size of the file; 0 for a data set."""
        return 0 if self.path is None else self.path.stat().st_size

    def digest(self, on_read: Callable[[int], None] | None = None) -> str:
        """Hash of the content, and of the file type, which decides how it is read.

        Args:
            on_read: told now and then how many bytes of the file have been read.
        """
        if self.path is not None:
            return f"{self.path.suffix.lower()}:{_file_digest(self.path, on_read)}"
        # Splits and slices of them may share their files.
        digest = hashlib.sha256(repr(self.hub and (self.hub.config, self.hub.split)).encode())
        files = [Path(each["filename"]) for each in getattr(self.rows, "cache_files", [])]
        for path in files:
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        for row in [] if files else self.rows:
            digest.update(json.dumps(row, sort_keys=True, default=repr).encode())
        return f"rows:{digest.hexdigest()}"


def _file_digest(path: Path, on_read: Callable[[int], None] | None) -> str:
    digest, piece, num_read = hashlib.sha256(), memoryview(bytearray(_HASHED_AT_ONCE)), 0
    with path.open("rb", buffering=0) as file:
        while length := file.readinto(piece):
            digest.update(piece[:length])
            num_read += length
            if on_read is not None:
                on_read(num_read)
    return digest.hexdigest()


def find_inputs(paths: str | Path | Sequence[str | Path], *, held_out: bool = False) -> list[Input]:
    """What one or more files, directories (searched with their subdirectories) or data sets of the hub stand for.

    A path that exists is one. Any other string of the form ``org/name[:config][@split]`` is for ``datasets.load_dataset``;
    without a split it means ``train``. The order is that of the arguments, then of the sorted file names.

    Args:
        paths: what was given.
        held_out: it is for evaluation, which decides which files of a directory are meant; see :func:`data_files`.

    Raises:
        FileNotFoundError: a path does not exist, a directory holds no data file.
        ValueError: nothing is given, or a file is of an unknown type.
    """
    entries = [paths] if isinstance(paths, (str, Path)) else list(paths)
    if not entries:
        raise ValueError("no data files given")
    return [found for entry in entries for found in _inputs_of(entry, held_out)]


def _inputs_of(entry: str | Path, held_out: bool) -> list[Input]:
    path = Path(entry).expanduser()
    if not str(entry):
        raise FileNotFoundError("the data path is empty; name a file, a directory or a hub data set")
    if path.is_dir():
        return [Input(str(file), file) for file in data_files(path, held_out=held_out)]
    if path.exists():
        if path.suffix.lower() not in SUFFIXES:
            raise ValueError(f"{path}: unknown file type {path.suffix!r}; data files end in {', '.join(SUFFIXES)}")
        return [Input(str(path), path)]
    hub = HubSet.parse(entry) if isinstance(entry, str) else None
    if hub is None or Path(hub.name).suffix.lower() in SUFFIXES:
        raise FileNotFoundError(f"{entry}: no such file or directory")
    if Path(hub.name).parent.is_dir():  # more likely a mistyped path
        folder = Path(hub.name).parent
        raise FileNotFoundError(
            f"{entry}: no such file or directory, and with a directory {folder} here it is not looked for on the hub; for a data "
            "set of the hub start elsewhere"
        )
    return [Input(str(entry), hub=hub)]
