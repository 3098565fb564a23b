"""Reads a config file, YAML or JSON, as keys and values that know their line."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import yaml


@dataclasses.dataclass(frozen=True)
class Entry:
    """One setting of a file; ``where`` is "file:line", for messages."""

    key: str
    value: Any
    where: str


def read_config_file(path: str | Path) -> list[Entry]:
    """The settings of a file, in its order. JSON by the ending .json, else YAML. An empty file has none.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not valid, not a mapping from names to values, or has a key twice.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"config file {path} does not exist")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    try:
        entries = _from_json(path, text) if path.suffix.lower() == ".json" else _from_yaml(path, text)
    except RecursionError:
        raise ValueError(f"{path}: lists within lists within lists, far too deep for settings") from None
    seen: dict[str, Entry] = {}
    for entry in entries:
        first = seen.setdefault(entry.key.replace("-", "_"), entry)
        if first is not entry:
            raise ValueError(f"{entry.where}: {entry.key} is there a second time (first: {first.where})")
    return entries


def _from_json(path: Path, text: str) -> list[Entry]:
    try:
        pairs = json.loads(text, object_pairs_hook=_Pairs)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from None
    if not isinstance(pairs, _Pairs):
        raise ValueError(f"{path}: expected an object of settings, {{...}}")
    return [Entry(key, dict(value) if isinstance(value, _Pairs) else value, str(path)) for key, value in pairs]


class _Pairs(list[tuple[str, Any]]):
    """A JSON object as its (key, value) pairs, so that a repeated key is seen."""


def _from_yaml(path: Path, text: str) -> list[Entry]:
    loader: yaml.SafeLoader | None = None
    try:
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
        if root is None:
            return []
        if not isinstance(root, yaml.MappingNode):
            raise ValueError(f"{path}: expected settings, one `name: value` a line")
        return [
            Entry(str(key.value), loader.construct_object(value, deep=True), f"{path}:{key.start_mark.line + 1}")
            for key, value in root.value
        ]
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise ValueError(f"{path}{line}: not valid YAML: {getattr(error, 'problem', None) or error}") from None
    finally:
        if loader is not None:
            loader.dispose()
