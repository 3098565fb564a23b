"""Data sets of the hub: how one is named, and what is said where it cannot be had.

    org/name                the split "train" of the default configuration
    org/name:config@split   another configuration, another split; either may be left out

A split may be a slice in the words of ``datasets``: ``org/name@train[:1000]``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

SPELLING = "org/name[:config][@split]"
_NAMED = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?::([^\s@:]+))?(?:@(\S+))?")
_MOST_NAMES = 20  # of configurations or splits in an error


@dataclass(frozen=True)
class HubSet:
    """One split of a data set.

    Attributes:
        name: its id, ``org/name``.
        config: name of the configuration, None for the default one.
        split: name of the split, or a slice of it.
    """

    name: str
    config: str | None = None
    split: str = "train"

    @classmethod
    def parse(cls, text: str) -> HubSet | None:
        """What ``org/name[:config][@split]`` says; None for a text of another form."""
        found = _NAMED.fullmatch(text)
        return None if found is None else cls(found[1], found[2], found[3] or "train")

    def load(self) -> Any:
        """The rows, as a ``datasets.Dataset``.

        Raises:
            FileNotFoundError: there is no such data set, configuration or split, or the hub cannot be reached.
        """
        import datasets  # takes seconds, and most users read files

        try:
            return datasets.load_dataset(self.name, *([self.config] if self.config else []), split=self.split)
        except Exception as error:  # datasets, huggingface_hub and requests each raise families of their own
            raise FileNotFoundError(self._advice(str(error)) or self._other(error)) from error

    def _advice(self, message: str) -> str | None:
        """What to write instead, if the library's words are about a configuration or a split."""
        listed = re.search(r"\[.*\]", message)
        names = re.findall(r"'([^']+)'", listed[0]) if listed else []
        there = ", ".join(names[:_MOST_NAMES]) + (", ..." if len(names) > _MOST_NAMES else "")
        config = f":{self.config}" if self.config else ""
        split = f"@{self.split}" if self.split != "train" else ""
        if message.startswith("Config name is missing"):
            return f"{self.name}: has several configurations; name one, as in {self.name}:CONFIG{split}: {there}"
        if re.match("BuilderConfig .* not found", message):
            return f"{self.name}: has no configuration {self.config!r}; write {self.name}:CONFIG{split} with one of: {there}"
        if re.match("(Unknown|Bad) split", message):
            return f"{self.name}{config}: has no split {self.split!r}; write {self.name}{config}@SPLIT with one of: {there}"
        return None

    def _other(self, error: Exception) -> str:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        return (
            f"{self.name}: neither an existing path nor a data set that the hub gave, in the spelling {SPELLING} "
            f"({type(error).__name__}: {reason})"
        )
