"""Loading: a user's files become a token store, read and tokenised in one pass, or taken from the cache."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from ..log import get_logger
from ..units import format_bytes
from . import records
from .cache import TokenCache, content_key
from .chat import make_renderer
from .encoding import Encoder
from .inputs import Input
from .record import Record
from .records import Detected
from .store import StoreWriter, TokenStore

logger = get_logger(__name__)

_SHOWN_BAD = 10  # of the records that are left out, so many errors are kept


@dataclass(frozen=True)
class LoadProgress:
    """How far the loading is.

    Attributes:
        num_read: bytes of the files that have been read; from 0 again when they are tokenised after they have been hashed.
        num_bytes: of all files.
        num_tokens: so far.
        seconds: since it began.
        from_cache: nothing had to be tokenised.
        done: this is the last report.
        hashing: the content is hashed, to see whether its tokens are in the cache.
        kept: the tokens are in the cache now, for the next start.
    """

    num_read: int
    num_bytes: int
    num_tokens: int
    seconds: float
    from_cache: bool = False
    done: bool = False
    hashing: bool = False
    kept: bool = False


OnProgress = Callable[[LoadProgress], None]


def load_tokens(
    inputs: Sequence[Input],
    tokenizer: PreTrainedTokenizerBase,
    max_seq_len: int,
    *,
    skip_bad: bool = False,
    truncation: str = "end",
    cache: TokenCache | None = None,
    on_progress: OnProgress | None = None,
) -> TokenStore:
    """Read and tokenise files, directories or hub data sets.

    ``info`` of the store has "only_text", "first" (the source of the first record), "detected" (as :class:`Detected`), "num_bad", the
    number of records left out, and "bad", what was wrong with the first of them. With a cache, memory use does not grow with
    the size of the data but for about 50 bytes an example.

    Args:
        inputs: what to read, from :func:`find_inputs`.
        tokenizer: what encodes it.
        max_seq_len: tokens of an example at most.
        skip_bad: leave out records that cannot be used, and say so, instead of refusing the file.
        truncation: where prompts with completions and conversations are cut, as in :class:`Encoder`.
        cache: where the store is looked up and kept; None for a store in memory.
        on_progress: told now and then.

    Raises:
        FileNotFoundError: a data set of the hub cannot be loaded.
        ValueError: as :func:`read_records` and :func:`encode_records`.
        OSError: the disk of the cache is full.
    """
    encoder = Encoder(tokenizer, max_seq_len, truncation=truncation)
    loading = _Loading(inputs, on_progress)
    if cache is None:
        return loading.make(StoreWriter(), encoder, skip_bad)
    settings = {"max_seq_len": max_seq_len, "skip_bad": skip_bad, "truncation": truncation}
    key = content_key(inputs, tokenizer, on_read=loading.on_hashed, **settings)
    if key is None:
        logger.warning(
            "tokens are kept in memory and not for the next start: the tokenizer is a slow one, without a tokenizer.json"
        )
        return loading.make(StoreWriter(), encoder, skip_bad)
    found = cache.find(key)
    if found is not None:
        loading.tell_again(found)
        loading.report(loading.num_bytes, found.num_tokens, from_cache=True, done=True)
        return found
    try:
        folder = cache.new_folder()
    except OSError as error:
        logger.warning(
            "tokens are kept in memory and not for the next start: %s cannot be written (%s)", cache.folder, error
        )
        return loading.make(StoreWriter(), encoder, skip_bad)
    try:
        loading.make(StoreWriter(folder), encoder, skip_bad)
        return cache.keep(folder, key)
    finally:
        cache.discard(folder)


class _Loading:
    def __init__(self, inputs: Sequence[Input], on_progress: OnProgress | None) -> None:
        self.inputs = inputs
        self.num_bytes = sum(each.num_bytes for each in inputs)
        self.on_progress = on_progress
        self.start = time.perf_counter()
        self.bad: list[str] = []
        self.num_bad = 0
        self.detected: list[Detected] = []
        self.num_read = self.num_before = 0
        self.first = ""

    def make(self, writer: StoreWriter, encoder: Encoder, skip_bad: bool) -> TokenStore:
        """Read and tokenise into the writer."""
        warnings = _Warnings()
        package = logging.getLogger(__package__)
        package.addHandler(warnings)
        try:
            for encoded in encoder.encode(
                self._records(self._on_bad if skip_bad else _refuse, make_renderer(encoder.tokenizer))
            ):
                writer.add(encoded)
                self.report(self.num_read, writer.num_tokens)
            encoder.end(writer.num_examples)
            info = {
                "only_text": encoder.only_text,
                "first": self.first,
                "detected": [dataclasses.asdict(each) for each in self.detected],
                "num_bad": self.num_bad,
                "bad": self.bad,
                "warnings": warnings.lines,
            }
            store = writer.finish(info)
        except OSError as error:
            if writer.folder is None or error.filename is not None:
                raise
            raise OSError(
                f"{writer.folder.parent}: the tokens of the data cannot be kept there ({error.strerror or error}): free some space, name "
                "another folder with data_cache, or none"
            ) from error
        finally:
            package.removeHandler(warnings)
            writer.close()
        self.report(self.num_bytes, writer.num_tokens, done=True, kept=writer.folder is not None)
        return store

    def tell_again(self, store: TokenStore) -> None:
        """What was told when the store was made, with the names that the files have now."""
        info = store.info
        renamed = {each["name"]: given.name for each, given in zip(info["detected"], self.inputs, strict=True)}
        info = {
            **info,
            "first": renamed.get(info["first"], info["first"]),
            "detected": [{**each, "name": renamed[each["name"]]} for each in info["detected"]],
            "bad": [_renamed(line, renamed) for line in info["bad"]],
            "warnings": [(name, _renamed(line, renamed)) for name, line in info["warnings"]],
        }
        store.info = info
        for each in info["detected"]:
            records.logger.info("%s", Detected(**each))
        for name, line in info["warnings"]:
            logging.getLogger(name).warning("%s", line)

    def report(
        self, num_read: int, num_tokens: int, *, from_cache: bool = False, done: bool = False, kept: bool = False
    ) -> None:
        if self.on_progress is not None:
            seconds = time.perf_counter() - self.start
            self.on_progress(LoadProgress(num_read, self.num_bytes, num_tokens, seconds, from_cache, done, kept=kept))

    def on_hashed(self, num_read: int) -> None:
        if self.on_progress is not None:
            seconds = time.perf_counter() - self.start
            self.on_progress(LoadProgress(num_read, self.num_bytes, 0, seconds, hashing=True))

    def _records(self, on_bad: records.OnBad, prepare: records.Prepare) -> Iterator[Record]:
        for each in self.inputs:
            stream = records.stream_records(each, on_bad, self._on_read, prepare=prepare)
            while True:
                try:
                    record = next(stream)
                except StopIteration as end:
                    self.detected.append(end.value)
                    break
                self.first = self.first or record.source
                yield record
            self.num_before += each.num_bytes

    def _on_read(self, num_bytes: int) -> None:
        self.num_read = self.num_before + num_bytes

    def _on_bad(self, error: ValueError) -> None:
        self.num_bad += 1
        if len(self.bad) < _SHOWN_BAD:
            self.bad.append(str(error))


def _refuse(error: ValueError) -> None:
    raise ValueError(f"{error}; --bad-records skip leaves such records out") from error


def _renamed(line: str, names: dict[str, str]) -> str:
    """A message that begins with the name of a file and a colon, with the name of now."""
    for old, new in names.items():
        if line.startswith(f"{old}:"):
            return new + line[len(old) :]
    return line


class _Warnings(logging.Handler):
    """Keeps what is logged: logger and line."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[tuple[str, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append((record.name, record.getMessage()))


def tokens_of_records(
    records: Sequence[Record], tokenizer: PreTrainedTokenizerBase, max_seq_len: int, *, truncation: str = "end"
) -> TokenStore:
    """A store in memory of records that are there already; without ``info``.

    Raises:
        ValueError: as :func:`encode_records`.
    """
    encoder, writer = Encoder(tokenizer, max_seq_len, truncation=truncation), StoreWriter()
    for encoded in encoder.encode(records):
        writer.add(encoded)
    encoder.end(writer.num_examples)
    return writer.finish({"only_text": encoder.only_text})


def describe(progress: LoadProgress, cache: TokenCache | None) -> str:
    """The last report as a line."""
    if progress.from_cache:
        return f"data: {progress.num_tokens:,} tokens from the cache in {progress.seconds:.1f} s"
    rate = f", {format_bytes(round(progress.num_bytes / progress.seconds))}/s" if progress.num_bytes else ""
    kept = f"; kept in {cache.folder} for the next start" if cache is not None and progress.kept else ""
    return f"data: {progress.num_tokens:,} tokens in {progress.seconds:.1f} s{rate}{kept}"
