"""The token store: all examples of a data set behind one another, in memory or in memory-mapped files.

Five bytes a token would do for an id and whether it is trained on. It is four: ids of tokens that are not trained on are stored
inverted (``~id``, which is negative), so that there is one array and no second one to keep beside it.

A store on disk is a directory:

    tokens.bin    int32, the tokens of all examples
    lengths.npy   int32 [E], tokens of every example
    trained.npy   int32 [E], those of them that are trained on
    records.npy   int64 [E], number of the record that an example comes from
    truncated.npy bool [E], whether it was cut at its end
    dropped.npy   int32 [R], examples of every record that were left out
    meta.json     the rest, written last: a directory without it is not a store
"""

from __future__ import annotations

import array
import contextlib
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy
from numpy.typing import NDArray

from ..weights.direct_io import flush_directory
from .encoding import Encoded, TokenStats
from .store_files import COLUMNS, FORMAT, META, TOKENS, read_meta
from .tokens import IGNORED, Example

Ints = NDArray[numpy.integer[Any]]

_CODES = {"lengths": "i", "trained": "i", "records": "q", "truncated": "b", "dropped": "i"}


class TokenStore:
    """Examples as arrays; E of them, from R records.

    Attributes:
        tokens: int32, the ids, inverted where they are not trained on.
        starts: int64 [E + 1], where every example begins in ``tokens``.
        lengths, trained, records, truncated: [E], as above.
        dropped: [R], as above.
        digest: of the examples, the same wherever they are stored.
        info: what else the writer noted, as JSON has it.
        folder: of a store on disk.
    """

    def __init__(
        self,
        tokens: Ints,
        columns: dict[str, NDArray[Any]],
        digest: str,
        info: dict[str, Any],
        folder: Path | None = None,
    ) -> None:
        self.tokens = tokens
        self.lengths, self.trained, self.records = columns["lengths"], columns["trained"], columns["records"]
        self.truncated, self.dropped = columns["truncated"], columns["dropped"]
        self.starts: Ints = numpy.concatenate([[0], numpy.cumsum(self.lengths, dtype=numpy.int64)])
        self.digest = digest
        self.info = info
        self.folder = folder

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Map a store from disk.

        Raises:
            ValueError, OSError: it is not there, or not whole.
        """
        meta = read_meta(folder)
        columns = {name: numpy.load(folder / f"{name}.npy") for name in COLUMNS}
        path = folder / TOKENS
        if path.stat().st_size != 4 * int(columns["lengths"].sum(dtype=numpy.int64)):
            raise ValueError(f"{path} is {path.stat().st_size} bytes long, which does not agree with its lengths")
        if len({len(columns[name]) for name in ("lengths", "trained", "records", "truncated")}) != 1:
            raise ValueError(f"{folder}: the columns are not of one length")
        if len(columns["records"]) and not 0 <= columns["records"].min() <= columns["records"].max() < len(
            columns["dropped"]
        ):
            raise ValueError(f"{folder}: an example of a record that is not there")
        return cls(numpy.memmap(path, numpy.int32, mode="r"), columns, meta["digest"], meta["info"], folder)

    @classmethod
    def of_examples(cls, examples: Sequence[Example]) -> TokenStore:
        """Examples in memory, each taken for a record of its own."""
        writer = StoreWriter()
        for index, example in enumerate(examples):
            writer.add(Encoded(index, [example]))
        return writer.finish()

    @property
    def num_records(self) -> int:
        """R."""
        return len(self.dropped)

    def __len__(self) -> int:
        """E."""
        return len(self.lengths)

    def all(self) -> Selection:
        """Every example."""
        return Selection(self, numpy.arange(len(self)), numpy.arange(self.num_records))

    def of_records(self, records: Sequence[int]) -> Selection:
        """The examples of some records, in their order in the store."""
        chosen = numpy.asarray(records, dtype=numpy.int64)
        return Selection(self, numpy.flatnonzero(numpy.isin(self.records, chosen)), chosen)


class Selection:
    """Some examples of a store.

    Attributes:
        store: the store.
        indices: [E'] numbers of the examples.
        records: numbers of the records that they are of; those count, too, of which nothing was left.
    """

    def __init__(self, store: TokenStore, indices: Ints, records: Ints) -> None:
        self.store, self.indices, self.records = store, indices, records
        self.lengths: Ints = store.lengths[indices]

    def __len__(self) -> int:
        """E'."""
        return len(self.indices)

    def among(self, numbers: Sequence[int]) -> Selection:
        """Those that have these numbers here. Their records are all of the records."""
        return Selection(self.store, self.indices[numpy.asarray(numbers, dtype=numpy.int64)], self.records)

    def tokens(self, number: int) -> Ints:
        """Of example ``number``: ids, inverted where they are not trained on."""
        index = self.indices[number]
        return self.store.tokens[self.store.starts[index] : self.store.starts[index + 1]]

    def stats(self) -> TokenStats:
        """Counts over these examples and records."""
        return TokenStats(
            num_records=len(self.records),
            num_tokens=int(self.lengths.sum(dtype=numpy.int64)),
            num_trained_tokens=int(self.store.trained[self.indices].sum(dtype=numpy.int64)),
            num_truncated=int(self.store.truncated[self.indices].sum()),
            num_dropped=int(self.store.dropped[self.records].sum(dtype=numpy.int64)),
        )

    def digest(self) -> str:
        """Tells other examples, or another choice or order of them: 16 hexadecimal digits."""
        digest = hashlib.sha256(self.store.digest.encode())
        digest.update(numpy.ascontiguousarray(self.indices, dtype="<i8").data)
        return digest.hexdigest()[:16]


class StoreWriter:
    """Makes a store, example by example.

    Args:
        folder: a new directory, which is made; default: the store is in memory.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self.num_tokens = 0
        self.num_examples = 0
        self._digest = hashlib.sha256()
        self._columns = {name: array.array(code) for name, code in _CODES.items()}
        self._in_memory = bytearray()
        self._file: BinaryIO | None = None
        if folder is not None:
            folder.mkdir(parents=True, mode=0o700)
            self._file = (folder / TOKENS).open("wb", buffering=2**20)

    def add(self, encoded: Encoded) -> None:
        """Append what one record came to; of a long text, what one piece did."""
        columns = self._columns
        if encoded.record == len(columns["dropped"]):
            columns["dropped"].append(0)
        columns["dropped"][encoded.record] += encoded.num_dropped
        for example in encoded.examples:
            ids = numpy.array(example.input_ids, dtype=numpy.int32)
            trained = numpy.array(example.labels, dtype=numpy.int32) != IGNORED
            trained[:1] = False  # nothing in its own example precedes a first token
            stored = numpy.where(trained, ids, ~ids).tobytes()
            self._digest.update(stored)
            if self._file is None:
                self._in_memory += stored
            else:
                self._file.write(stored)
            columns["lengths"].append(len(ids))
            columns["trained"].append(int(trained.sum()))
            columns["records"].append(encoded.record)
            columns["truncated"].append(encoded.num_truncated > 0)
            self.num_tokens += len(ids)
            self.num_examples += 1

    def finish(self, info: dict[str, Any] | None = None) -> TokenStore:
        """The store. One on disk is there for good once this returns."""
        columns: dict[str, NDArray[Any]] = {
            name: numpy.frombuffer(self._columns[name], dtype=numpy.dtype(self._columns[name].typecode)).astype(kind)
            if len(self._columns[name])
            else numpy.zeros(0, kind)
            for name, kind in COLUMNS.items()
        }
        digest = self._digest.copy()
        digest.update(columns["lengths"].tobytes())
        info, found = info or {}, digest.hexdigest()
        if self.folder is None or self._file is None:
            return TokenStore(numpy.frombuffer(self._in_memory, dtype=numpy.int32), columns, found, info)
        _flush(self._file)
        self._file.close()
        for name, column in columns.items():
            with (self.folder / f"{name}.npy").open("wb") as file:
                numpy.save(file, column)
                _flush(file)
        with (self.folder / META).open("wb") as file:
            file.write(json.dumps({"format": FORMAT, "digest": found, "info": info}, indent=1).encode())
            _flush(file)
        flush_directory(self.folder)
        return TokenStore.open(self.folder)

    def close(self) -> None:
        """Give up: nothing more is written. What is there stays."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # the disk is full: that has been told
                self._file.close()


def _flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
