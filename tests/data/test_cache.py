"""The token cache: it hashes what it is asked for, and deletes what it has written itself and nothing else."""

import hashlib
import json
import os
import shutil
import time
from pathlib import Path

import pytest

from lowtide.data import cache as cache_module
from lowtide.data.cache import TokenCache
from lowtide.data.encoding import Encoded
from lowtide.data.inputs import Input, find_inputs
from lowtide.data.store import StoreWriter
from lowtide.data.store_files import is_store
from lowtide.data.tokens import IGNORED, Example

KEYS = [f"{number:032x}" for number in range(10)]
NEW = "f" * 32


def write_store(folder, num_tokens=100):
    writer = StoreWriter(folder)
    writer.add(Encoded(0, [Example([1] * num_tokens, [IGNORED, *[1] * (num_tokens - 1)])]))
    return writer.finish({"n": num_tokens})


def keep(cache, key=NEW):
    folder = cache.new_folder()
    write_store(folder)
    try:
        return cache.keep(folder, key)
    finally:
        cache.discard(folder)


def age(path, days=2.0):
    """Make all of a folder old, itself last."""
    for each in [*path.rglob("*"), path]:
        os.utime(each, (time.time() - days * 24 * 3600,) * 2, follow_symlinks=False)


def tree(folder):
    """Every path with what it is: the bytes of a file, where a link leads to."""
    return {
        path.relative_to(folder): os.readlink(path) if path.is_symlink() else path.is_file() and path.read_bytes()
        for path in folder.rglob("*")
    }


def a_file(folder, name="precious.bin", content=b"x" * 1000):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)


def a_store_with(change):
    def make(folder):
        write_store(folder)
        change(folder)

    return make


def linked(folder):
    """A link to a store that lies elsewhere, by the name of an entry."""
    write_store(folder.parent.parent / "elsewhere")
    folder.symlink_to(folder.parent.parent / "elsewhere")


def file_is_link(folder):
    (folder / "tokens.bin").rename(folder.parent.parent / "mine.bin")
    (folder / "tokens.bin").symlink_to(folder.parent.parent / "mine.bin")


FOREIGN = {
    "a folder with another name": ("wiki", a_file),
    "a store with another name": ("wiki", write_store),
    "a name like a key's in capitals": ("A" * 32, write_store),
    "a folder with a key's name": (KEYS[0], a_file),
    "a file of ours alone": (KEYS[0], lambda folder: a_file(folder, "tokens.bin")),
    "meta.json of another program": (KEYS[0], lambda folder: a_file(folder, "meta.json", b'{"digest": 1, "info": {}}')),
    "meta.json that is no object": (KEYS[0], lambda folder: a_file(folder, "meta.json", b"[]")),
    "a store of a later format": (KEYS[0], a_store_with(lambda folder: set_format(folder, "lowtide token store 9"))),
    "a store with a file beside": (KEYS[0], a_store_with(a_file)),
    "a store with a folder beside": (KEYS[0], a_store_with(lambda folder: a_file(folder / "notes"))),
    "a store with a folder by the name of a file": (
        KEYS[0],
        a_store_with(lambda f: swap_for_folder(f / "trained.npy")),
    ),
    "a store whose file is a link": (KEYS[0], a_store_with(file_is_link)),
    "a link to a store": (KEYS[0], linked),
    "a leftover with another name": (".unfinished-wiki", lambda folder: write_store(folder / "store")),
    "a leftover with a file": (".unfinished-12345678", a_file),
    "a leftover with another folder": (".unfinished-12345678", lambda folder: a_file(folder / "data", "tokens.bin")),
    "a leftover with a file in its store": (".unfinished-12345678", lambda folder: a_file(folder / "store")),
    "a link to a leftover": (".unfinished-12345678", linked),
    "a leftover with a link": (".unfinished-12345678", lambda f: (f.mkdir(), linked_below(f))),
}


def set_format(folder, name):
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps({**meta, "format": name}))


def swap_for_folder(path):
    path.unlink()
    a_file(path)


def linked_below(folder):
    write_store(folder.parent.parent / "elsewhere")
    (folder / "store").symlink_to(folder.parent.parent / "elsewhere")


@pytest.mark.parametrize("kind", FOREIGN)
def test_what_is_not_its_own_is_never_touched(tmp_path, kind):
    name, make = FOREIGN[kind]
    folder = tmp_path / "tokens"
    folder.mkdir()
    make(folder / name)
    age(tmp_path)
    before = tree(tmp_path)
    cache = TokenCache(tmp_path, limit_bytes=0)
    for key in (KEYS[1], KEYS[2]):
        assert len(keep(cache, key)) == 1
    shutil.rmtree(folder / KEYS[2])  # the newest one; the other has been removed for it
    assert tree(tmp_path) == before


def test_what_is_not_its_own_does_not_count(tmp_path):
    a_file(tmp_path / "tokens" / "wiki", content=b"x" * 100_000)
    cache = TokenCache(tmp_path, limit_bytes=10_000)
    for key in KEYS[:2]:
        keep(cache, key)
    assert [is_store(cache.folder / key) for key in KEYS[:2]] == [True, True]


def test_entries_and_leftovers_of_its_own_go(tmp_path):
    cache = TokenCache(tmp_path, limit_bytes=0)
    keep(cache, KEYS[0])
    meta = json.loads((cache.folder / KEYS[0] / "meta.json").read_text())
    del meta["format"]  # as the first versions wrote it
    (cache.folder / KEYS[0] / "meta.json").write_text(json.dumps(meta))
    leftover = cache.folder / ".unfinished-0_abcdef"
    write_store(leftover / "store")
    for name in ("damaged", "removed"):
        a_file(leftover / name, "tokens.bin")
    age(cache.folder)
    keep(cache)
    assert sorted(path.name for path in cache.folder.iterdir()) == ["CACHEDIR.TAG", NEW]


def test_a_link_in_the_place_of_an_entry_is_not_followed(tmp_path, caplog):
    cache = TokenCache(tmp_path)
    cache.folder.mkdir()
    linked(cache.folder / NEW)
    before = tree(tmp_path)
    assert cache.find(NEW) is None
    assert "it is a link, and those are not followed" in caplog.text
    assert len(keep(cache)) == 1
    assert tree(tmp_path) == before


def test_a_damaged_entry_with_a_file_of_somebody_else_stays(tmp_path):
    cache = TokenCache(tmp_path)
    keep(cache)
    (cache.folder / NEW / "meta.json").unlink()
    a_file(cache.folder / NEW)
    before = tree(tmp_path)
    assert cache.find(NEW) is None
    store = keep(cache)
    assert store.all().tokens(0).tolist() == [-2] + [1] * 99  # mapped still
    assert tree(tmp_path) == before


def test_a_folder_that_it_makes_is_marked_as_a_cache(tmp_path):
    keep(TokenCache(tmp_path / "new"))
    assert (
        (tmp_path / "new" / "tokens" / "CACHEDIR.TAG")
        .read_bytes()
        .startswith(b"Signature: 8a477f597d28d172789f06886806bc55\n")
    )
    (tmp_path / "old" / "tokens").mkdir(parents=True)
    keep(TokenCache(tmp_path / "old"))
    assert [path.name for path in (tmp_path / "old" / "tokens").iterdir()] == [NEW]


def test_files_are_hashed_whole_and_it_is_told_how_far(tmp_path, monkeypatch):
    monkeypatch.setattr("lowtide.data.inputs._HASHED_AT_ONCE", 1000)
    for name, size in (("a.txt", 2500), ("b.JSONL", 1000), ("c.txt", 0)):
        (tmp_path / name).write_bytes(os.urandom(size))
    inputs = [*find_inputs(tmp_path), Input("org/name")]
    inputs[-1].rows = [{"text": "a"}]  # of a data set of the hub
    told = []
    found = cache_module._digests(inputs, told.append)
    for digest, name in zip(found, ("a.txt", "b.JSONL", "c.txt"), strict=False):
        content = hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
        assert digest == f"{Path(name).suffix.lower()}:{content}"
    assert found == [each.digest() for each in inputs]
    assert told == [1000, 2000, 2500, 3500]
