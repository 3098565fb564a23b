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
from .store_files import (
    COLUMNS,
    FORMAT,
    META,
    PIECE,
    TOKENS,
    map_column,
    marked_numbers,
    pieces,
    read_meta,
    smallest_ints,
    write_header,
)
from .tokens import IGNORED, Example

Ints = NDArray[numpy.integer[Any]]

_CODES = {"lengths": "i", "trained": "i", "records": "q", "truncated": "b", "dropped": "i"}
_STRIDE = 64  # the beginning of every 64th example is kept; it divides PIECE
_SPILLED = 2**14  # examples or records that a writer keeps in memory


class TokenStore:
    """Examples as arrays; E of them, from R records.

    Attributes:
        tokens: int32, the ids, inverted where they are not trained on.
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
        # Plain arrays are quicker to take single examples from than mapped ones are.
        self.tokens, self.lengths = tokens.view(numpy.ndarray), columns["lengths"].view(numpy.ndarray)
        self.trained, self.records = columns["trained"], columns["records"]
        self.truncated, self.dropped = columns["truncated"], columns["dropped"]
        sums = [
            numpy.add.reduceat(piece, numpy.arange(0, len(piece), _STRIDE), dtype=numpy.int64)
            for piece in pieces(self.lengths)
        ]
        self._starts: Ints = numpy.cumsum(numpy.concatenate([[0], *sums]), dtype=numpy.int64)
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
        columns = {name: map_column(folder, name) for name in COLUMNS}
        if len({len(columns[name]) for name in ("lengths", "trained", "records", "truncated")}) != 1:
            raise ValueError(f"{folder}: the columns are not of one length")
        num_records = len(columns["dropped"])
        if any(piece.min() < 0 or piece.max() >= num_records for piece in pieces(columns["records"])):
            raise ValueError(f"{folder}: an example of a record that is not there")
        path = folder / TOKENS
        store = cls(numpy.memmap(path, numpy.int32, mode="r"), columns, meta["digest"], meta["info"], folder)
        if len(store.tokens) != store.num_tokens:
            raise ValueError(f"{path} is {path.stat().st_size} bytes long, which does not agree with its lengths")
        return store

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

    @property
    def num_tokens(self) -> int:
        """Of all examples."""
        return int(self._starts[-1])

    def __len__(self) -> int:
        """E."""
        return len(self.lengths)

    def span(self, index: int) -> slice:
        """Where an example lies in ``tokens``."""
        block = index // _STRIDE
        before = self.lengths[block * _STRIDE : index].sum(dtype=numpy.int64)
        start = int(self._starts[block] + before)
        return slice(start, start + int(self.lengths[index]))

    def all(self) -> Selection:
        """Every example."""
        num_dropped = sum(int(piece.sum(dtype=numpy.int64)) for piece in pieces(self.dropped))
        return Selection(self, None, self.num_records, num_dropped)

    def of_records(self, records: Sequence[int] | Ints) -> Selection:
        """The examples of some records, in their order in the store."""
        numbers = numpy.asarray(records)
        chosen = numpy.zeros(self.num_records, dtype=numpy.bool_)
        for piece in pieces(numbers):
            chosen[piece] = True
        indices = marked_numbers((chosen[piece] for piece in pieces(self.records)), len(self))
        num_dropped = sum(int(piece.sum(dtype=numpy.int64)) for piece in pieces(self.dropped, numbers))
        return Selection(self, indices, len(numbers), num_dropped)


class Selection:
    """Some examples of a store.

    Args:
        store: the store.
        indices: [E'] numbers of the examples; None for all of them.
        num_records: that they are of; those count, too, of which nothing was left.
        num_dropped: examples of these records that were left out.

    Attributes:
        lengths: int32 [E'], tokens of every example.
        others: as above.
    """

    def __init__(self, store: TokenStore, indices: Ints | None, num_records: int, num_dropped: int) -> None:
        self.store, self.num_records, self.num_dropped = store, num_records, num_dropped
        if indices is None:
            self.indices: Ints = numpy.arange(len(store), dtype=smallest_ints(len(store)))
            self.lengths: Ints = store.lengths
            return
        self.indices, self.lengths = indices, numpy.empty(len(indices), numpy.int32)
        for start, piece in zip(range(0, len(indices), PIECE), pieces(store.lengths, indices), strict=True):
            self.lengths[start : start + PIECE] = piece

    def __len__(self) -> int:
        """E'."""
        return len(self.indices)

    def among(self, numbers: Sequence[int] | Ints) -> Selection:
        """Those that have these numbers here. Their records are all of the records."""
        return Selection(self.store, self.indices[numpy.asarray(numbers)], self.num_records, self.num_dropped)

    def tokens(self, number: int) -> Ints:
        """Of example ``number``: ids, inverted where they are not trained on."""
        return self.store.tokens[self.store.span(int(self.indices[number]))]

    def stats(self) -> TokenStats:
        """Counts over these examples and records."""
        return TokenStats(
            num_records=self.num_records,
            num_tokens=sum(int(piece.sum(dtype=numpy.int64)) for piece in pieces(self.lengths)),
            num_trained_tokens=self._sum(self.store.trained),
            num_truncated=self._sum(self.store.truncated),
            num_dropped=self.num_dropped,
        )

    def digest(self) -> str:
        """Tells other examples, or another choice or order of them: 16 hexadecimal digits."""
        digest = hashlib.sha256(self.store.digest.encode())
        for piece in pieces(self.indices):
            digest.update(numpy.ascontiguousarray(piece, dtype="<i8").data)
        return digest.hexdigest()[:16]

    def _sum(self, column: NDArray[Any]) -> int:
        return sum(int(piece.sum(dtype=numpy.int64)) for piece in pieces(column, self.indices))


class StoreWriter:
    """Makes a store, example by example.

    Args:
        folder: a new directory, which is made; default: the store is in memory.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self.num_tokens = self.num_examples = self.num_records = 0
        self._digest = hashlib.sha256()
        self._columns = {name: array.array(code) for name, code in _CODES.items()}  # what is not in the files yet
        self._in_memory = bytearray()
        self._files: dict[str, BinaryIO] = {}
        if folder is not None:
            folder.mkdir(parents=True, mode=0o700)
            self._files[TOKENS] = (folder / TOKENS).open("wb", buffering=2**20)
            for name, kind in COLUMNS.items():
                self._files[name] = (folder / f"{name}.npy").open("wb")
                write_header(self._files[name], kind, 0)

    def add(self, encoded: Encoded) -> None:
        """Append what one record came to, the next one; of a long text, what one piece did."""
        columns = self._columns
        if encoded.record == self.num_records:
            columns["dropped"].append(0)
            self.num_records += 1
        assert encoded.record == self.num_records - 1
        columns["dropped"][-1] += encoded.num_dropped
        for example, truncated in zip(encoded.examples, encoded.truncated, strict=True):
            ids = numpy.array(example.input_ids, dtype=numpy.int32)
            trained = numpy.array(example.labels, dtype=numpy.int32) != IGNORED
            trained[:1] = False  # nothing in its own example precedes a first token
            stored = numpy.where(trained, ids, ~ids).tobytes()
            self._digest.update(stored)
            if self.folder is None:
                self._in_memory += stored
            else:
                self._files[TOKENS].write(stored)
            columns["lengths"].append(len(ids))
            columns["trained"].append(int(trained.sum()))
            columns["records"].append(encoded.record)
            columns["truncated"].append(truncated)
            self.num_tokens += len(ids)
            self.num_examples += 1
        if self.folder is not None and max(len(columns["lengths"]), len(columns["dropped"])) >= _SPILLED:
            self._spill()

    def finish(self, info: dict[str, Any] | None = None) -> TokenStore:
        """The store. One on disk is there for good once this returns."""
        if self.folder is None:
            columns: dict[str, NDArray[Any]] = {
                name: numpy.asarray(self._columns[name]).view(kind) for name, kind in COLUMNS.items()
            }
            tokens = numpy.frombuffer(self._in_memory, dtype=numpy.int32)
            return TokenStore(tokens, columns, self._digest_with(columns["lengths"]), info or {})
        self._spill(num_kept=0)
        for name, file in self._files.items():
            if name in COLUMNS:
                file.seek(0)
                write_header(file, COLUMNS[name], self.num_records if name == "dropped" else self.num_examples)
            _flush(file)
            file.close()
        found = self._digest_with(map_column(self.folder, "lengths"))
        with (self.folder / META).open("wb") as file:
            file.write(json.dumps({"format": FORMAT, "digest": found, "info": info or {}}, indent=1).encode())
            _flush(file)
        flush_directory(self.folder)
        return TokenStore.open(self.folder)

    def close(self) -> None:
        """Give up: nothing more is written. What is there stays."""
        for file in self._files.values():
            with contextlib.suppress(OSError):  # the disk is full: that has been told
                file.close()

    def _spill(self, num_kept: int = 1) -> None:
        """Write to the files what is in memory, but for the count of the last record, which may grow."""
        for name, column in self._columns.items():
            end = len(column) - (num_kept if name == "dropped" else 0)
            column[:end].tofile(self._files[name])
            del column[:end]

    def _digest_with(self, lengths: NDArray[Any]) -> str:
        digest = self._digest.copy()
        for piece in pieces(lengths):
            digest.update(piece.data)
        return digest.hexdigest()


def _flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
