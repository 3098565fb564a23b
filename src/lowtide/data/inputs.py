"""Inputs: the files and data sets of the hub that a user's arguments stand for, found before any of them is read."""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .rows import JSON_SUFFIXES, TABLE_SUFFIXES

TEXT_SUFFIXES = (".txt", ".md")
SUFFIXES = TEXT_SUFFIXES + JSON_SUFFIXES + TABLE_SUFFIXES


@dataclass
class Input:
    """A file, or a data set of the hub.

    Attributes:
        name: path or id.
        path: of a file, else None.
    """

    name: str
    path: Path | None = None

    @functools.cached_property
    def rows(self) -> Any:
        """Of a data set: its train split, loaded when this is first asked for.

        Raises:
            FileNotFoundError: it cannot be loaded.
        """
        return _load_from_hub(self.name)

    @property
    def num_bytes(self) -> int:
        """Size of the file; 0 for a data set."""
        return 0 if self.path is None else self.path.stat().st_size

    def digest(self) -> str:
        """Hash of the content, and of the file type, which decides how it is read."""
        if self.path is not None:
            with self.path.open("rb") as file:
                return f"{self.path.suffix.lower()}:{hashlib.file_digest(file, 'sha256').hexdigest()}"
        digest = hashlib.sha256()
        files = [Path(each["filename"]) for each in getattr(self.rows, "cache_files", [])]
        for path in files:
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        for row in [] if files else self.rows:
            digest.update(json.dumps(row, sort_keys=True, default=repr).encode())
        return f"rows:{digest.hexdigest()}"


def find_inputs(paths: str | Path | Sequence[str | Path]) -> list[Input]:
    """What one or more files, directories (searched with their subdirectories) or hub data set ids stand for.

    A string that is no existing path and looks like ``org/name`` is for ``datasets.load_dataset`` (its train split). The
    order is that of the arguments, then of the sorted file names.

    Raises:
        FileNotFoundError: a path does not exist, a directory holds no data file.
        ValueError: nothing is given, or a file is of an unknown type.
    """
    entries = [paths] if isinstance(paths, (str, Path)) else list(paths)
    if not entries:
        raise ValueError("no data files given")
    return [found for entry in entries for found in _inputs_of(entry)]


def _inputs_of(entry: str | Path) -> list[Input]:
    path = Path(entry).expanduser()
    if not str(entry):
        raise FileNotFoundError("the data path is empty; name a file, a directory or a hub data set")
    if path.is_dir():
        return [Input(str(file), file) for file in _data_files(path)]
    if path.exists():
        if path.suffix.lower() not in SUFFIXES:
            raise ValueError(f"{path}: unknown file type {path.suffix!r}; data files end in {', '.join(SUFFIXES)}")
        return [Input(str(path), path)]
    if isinstance(entry, str) and _looks_like_hub_id(entry):
        return [Input(entry)]
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


def _looks_like_hub_id(name: str) -> bool:
    """``org/name``, unless it is more likely a mistyped path: a data file's name, or inside an existing directory."""
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) is None:
        return False
    return Path(name).suffix.lower() not in SUFFIXES and not Path(name).parent.is_dir()


def _load_from_hub(name: str) -> Any:
    import datasets  # takes seconds, and most users read files

    try:
        return datasets.load_dataset(name, split="train")
    except Exception as error:  # datasets, huggingface_hub and requests each raise families of their own
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise FileNotFoundError(
            f"{name}: neither an existing path nor a data set that the hub gave ({type(error).__name__}: {reason})"
        ) from error
