"""The token cache: what was tokenised once is there at the next start, found by what it was made of.

The key of an entry is a hash over the content of the data, the tokenizer with its chat template, and every setting that changes the
examples. So an entry is never out of date; one that is not used any more is removed when the cache grows over its limit.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import re
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..log import get_logger
from ..units import GIB
from .chat import date_of, writes_date
from .inputs import Input
from .store import TokenStore
from .store_files import holds_nothing_else, is_store, remove_store

_logger = get_logger(__name__)

_KEY = re.compile("[0-9a-f]{32}")
_UNFINISHED = ".unfinished-"
_UNFINISHED_NAME = re.compile(r"\.unfinished-[a-z0-9_]{8}")  # as tempfile makes it
_NEW, _DAMAGED, _REMOVED = "store", "damaged", "removed"  # what may lie in such a folder, stores all of them
UNREADABLE = (ValueError, KeyError, TypeError, EOFError, OSError)  # what a damaged store may raise
_STALE_S = 24 * 3600.0  # an unfinished entry as old as this belongs to no living process
_TAG = """Signature: 8a477f597d28d172789f06886806bc55
# Tokens that lowtide keeps for the next start. They can be made again, so programs for backups may pass this folder over.
# See https://bford.info/cachedir/
"""


def content_key(
    inputs: Sequence[Input],
    tokenizer: PreTrainedTokenizerBase,
    *,
    on_read: Callable[[int], None] | None = None,
    **settings: Any,
) -> str | None:
    """Hash of everything that decides what examples are made; None for a slow tokenizer, which is code that cannot be hashed.

    Args:
        inputs: the data, of which every byte is read.
        tokenizer: what encodes it.
        on_read: told now and then how many bytes of the files have been read, of all of them together.
        settings: the rest, plain values.
    """
    if not tokenizer.is_fast:
        return None
    parts: dict[str, Any] = {
        "data": _digests(inputs, on_read),
        "tokenizer": _tokenizer_facts(tokenizer),
        "code": _digest_of_code(),
        "versions": [version(name) for name in ("transformers", "tokenizers")],
        **settings,
    }
    if writes_date(tokenizer):
        parts["date"] = date_of(tokenizer).isoformat()
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=repr).encode()).hexdigest()[:32]


def _digests(inputs: Sequence[Input], on_read: Callable[[int], None] | None) -> list[str]:
    """Of each, with a word on how far it is."""
    found, num_before = [], 0

    def tell(num_read: int) -> None:
        if on_read is not None:
            on_read(num_before + num_read)

    for each in inputs:
        found.append(each.digest(tell))
        num_before += each.num_bytes
    return found


@functools.cache
def _digest_of_code() -> str:
    """Of the modules that make examples of files: another version may make others."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _tokenizer_facts(tokenizer: PreTrainedTokenizerBase) -> list[Any]:
    backend = tokenizer.backend_tokenizer.to_str()
    settings = {
        name: value for name, value in tokenizer.init_kwargs.items() if not name.endswith(("_file", "name_or_path"))
    }
    return [type(tokenizer).__name__, backend, tokenizer.chat_template, tokenizer.special_tokens_map, settings]


class TokenCache:
    """Token stores of earlier starts, in a folder that any number of processes may use at once.

    Nothing in it is ever deleted but entries and leftovers that it has written itself, as their names and all of their files show.

    Args:
        folder: where; ``tokens`` in it is made when something is kept.
        limit_bytes: entries used longest ago are removed until the rest, the newest one aside, fits.
    """

    def __init__(self, folder: Path, limit_bytes: int = 20 * GIB) -> None:
        self.folder = folder / "tokens"
        self.limit_bytes = limit_bytes

    def find(self, key: str) -> TokenStore | None:
        """The store of this key, if it is there and whole."""
        folder = self.folder / key
        if not folder.is_dir():
            return None
        try:
            store = _open_entry(folder)
        except UNREADABLE as error:
            _logger.warning("%s cannot be used (%s); the data is tokenised anew", folder, error)
            return None
        with contextlib.suppress(OSError):  # the cache may be read-only
            os.utime(folder)  # used now
        return store

    def new_folder(self) -> Path:
        """Where a store can be written before it is kept; not made yet.

        Raises:
            OSError: the folder of the cache cannot be written.
        """
        try:
            self.folder.mkdir(parents=True, mode=0o700)
        except FileExistsError:
            self._remove_stale()
        else:
            (self.folder / "CACHEDIR.TAG").write_text(_TAG, encoding="utf-8")
        return Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=self.folder)) / _NEW

    def keep(self, written: Path, key: str) -> TokenStore:
        """Take in what was written in :meth:`new_folder`; removes what has not been used for longest, if there is too much."""
        folder = self.folder / key
        for _ in range(2):
            with contextlib.suppress(OSError):  # there is one, by another process meanwhile, or a damaged one
                written.rename(folder)
            with contextlib.suppress(*UNREADABLE):
                store = _open_entry(folder)
                break
            # Moved away first: at any moment what has the name is whole, or is this one.
            with contextlib.suppress(OSError):
                if holds_nothing_else(folder):
                    folder.rename(written.parent / _DAMAGED)
        else:
            store = TokenStore.open(written)  # mapped, so that it may be removed
        self._shrink(folder, written.parent / _REMOVED)
        return store

    def discard(self, written: Path) -> None:
        """Remove what was written in :meth:`new_folder`."""
        _remove_unfinished(written.parent)

    def _shrink(self, newest: Path, doomed: Path) -> None:
        sizes, used = {}, {}
        for path in self.folder.iterdir():
            if _KEY.fullmatch(path.name) and is_store(path):
                with contextlib.suppress(OSError):  # another process has removed it meanwhile
                    used[path], sizes[path] = path.stat().st_mtime, sum(each.stat().st_size for each in path.iterdir())
        total = sum(sizes.values())
        for path in sorted(sizes, key=used.__getitem__):
            if total <= self.limit_bytes:
                return
            if path == newest:
                continue
            with contextlib.suppress(OSError):
                path.rename(doomed)  # so that no process meets a half of it
                # A process that has it mapped keeps it: the files are gone when it lets go of them.
                _logger.info("removing %s from the cache of tokens", path)
                remove_store(doomed)
                total -= sizes[path]

    def _remove_stale(self) -> None:
        for path in self.folder.glob(f"{_UNFINISHED}*"):
            with contextlib.suppress(OSError):
                if _is_unfinished(path) and time.time() - _last_written(path) > _STALE_S:
                    _remove_unfinished(path)


def _open_entry(folder: Path) -> TokenStore:
    """A store of the cache, whose folder is a folder: none that somebody has put a link to there."""
    if folder.is_symlink():
        raise ValueError("it is a link, and those are not followed")
    return TokenStore.open(folder)


def _is_unfinished(path: Path) -> bool:
    """Whether this is a folder that :meth:`TokenCache.new_folder` has made, and nothing else was put into it."""
    if not _UNFINISHED_NAME.fullmatch(path.name) or path.is_symlink() or not path.is_dir():
        return False
    return all(each.name in (_NEW, _DAMAGED, _REMOVED) and holds_nothing_else(each) for each in path.iterdir())


def _last_written(path: Path) -> float:
    """When anything in it was, in seconds since 1970: a file that grows is as young as its last bytes."""
    return max(each.lstat().st_mtime for each in (path, *path.glob("*"), *path.glob("*/*")))


def _remove_unfinished(path: Path) -> None:
    for name in (_NEW, _DAMAGED, _REMOVED):
        remove_store(path / name)
    with contextlib.suppress(OSError):  # it holds something else, which stays
        path.rmdir()
