"""The scores of ``lowtide eval`` as a JSON file that is whole after every part of an evaluation."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class ScoresFile:
    """Written anew after every part, into a file beside it that takes its place; ``complete`` is true in it when all are there.

    Args:
        path: of the file, which must not exist; None to write nothing.

    Raises:
        FileExistsError: there is such a file.
        FileNotFoundError: there is no directory for it.
    """

    def __init__(self, path: str | None) -> None:
        self._path = None if path is None else Path(path).expanduser()
        self._settings: dict[str, Any] = {}
        self._scores: dict[str, Any] = {}
        self._begun = False
        self._check()

    def _check(self) -> None:
        if self._path is None or self._begun:
            return
        if os.path.lexists(self._path):
            raise FileExistsError(f"--output {self._path} exists, and nothing is overwritten: name a new file")
        parent = self._path.absolute().parent
        if not parent.is_dir():
            raise FileNotFoundError(f"--output {self._path}: there is no directory {parent}")

    def begin(self, settings: Mapping[str, Any]) -> None:
        """What the scores depend on, kept above them; nothing is written yet."""
        self._settings = dict(settings)

    def add(self, name: str, score: Any) -> None:
        """One more part, written at once."""
        self._scores[name] = score
        self._write(complete=False)

    def complete(self) -> None:
        """All parts are there."""
        self._write(complete=True)

    def _write(self, *, complete: bool) -> None:
        if self._path is None:
            return
        self._check()  # somebody else may have written it while the model was computing
        temporary = self._path.with_name(f".{self._path.name}.{os.getpid()}.tmp")
        content = {**self._settings, "complete": complete, "scores": self._scores}
        try:
            temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")
            os.replace(temporary, self._path)
        finally:
            temporary.unlink(missing_ok=True)
        self._begun = True
