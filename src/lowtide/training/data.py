"""What a run trains on and is evaluated on, from its settings: read, tokenised or taken from the cache, split, in batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..cache_folder import default_cache_folder
from ..data import Batches, ChoiceItem, Record, TokenStats, as_records, load_superglue
from ..data.cache import TokenCache
from ..data.held_out import split_numbers
from ..data.inputs import Input, find_inputs
from ..data.loading import load_tokens, tokens_of_records
from ..data.store import Selection, TokenStore
from ..data.superglue import HUB_ID, TaskData
from ..log import get_logger
from ..models.padding import padding_id
from .config import TrainConfig
from .data_progress import DataProgress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_logger = get_logger(__name__)


@dataclasses.dataclass(frozen=True)
class TrainData:
    """What a run trains on.

    Attributes:
        train: batches of the training sequences.
        held_out: batches of the held-out sequences, always in the same order; None when nothing is evaluated.
        stats: counts of the training data, with the passages that were held out of it, if any.
        choices: held-out questions of a task, of which the accuracy is measured, too.
        num_skipped: records that could not be used.
    """

    train: Batches
    held_out: Batches | None
    stats: TokenStats
    choices: Sequence[ChoiceItem] = ()
    num_skipped: int = 0

    @property
    def num_positions(self) -> int:
        """What positions of the model are needed."""
        return max(each.num_positions for each in (self.train, self.held_out) if each is not None)

    @property
    def shares_rows(self) -> bool:
        """Some row holds several examples."""
        return any(each.shares_rows for each in (self.train, self.held_out) if each is not None)

    def padded(self) -> TrainData:
        """The same with one example a row."""
        held_out = None if self.held_out is None else self.held_out.padded()
        return dataclasses.replace(self, train=self.train.padded(), held_out=held_out)


@dataclasses.dataclass(frozen=True)
class TrainInputs:
    """What there is to read, before it is read.

    Attributes:
        train: files and data sets; empty with a task.
        held_out: those of ``eval_data``.
        task: what there is of a task, which is small and has been read.
    """

    train: Sequence[Input]
    held_out: Sequence[Input]
    task: TaskData | None


def find_data(config: TrainConfig) -> TrainInputs:
    """See that the data is there.

    Raises:
        FileNotFoundError, ValueError, ConnectionError: a file is missing or of an unknown type, or there is no such task.
    """
    if config.task is not None:
        return TrainInputs((), (), read_task(config.task, config.data[0], config.data_seed))
    held_out = find_inputs(config.eval_data, held_out=True) if config.eval_data is not None else []
    return TrainInputs(find_inputs(config.data), held_out, None)


def read_task(task: str, data: str, data_seed: int) -> TaskData:
    """The items of a task such as superglue/rte, from a directory or the hub.

    Raises:
        ValueError, FileNotFoundError, ConnectionError: there is no such task, or its files are missing or malformed.
    """
    return load_superglue(task.removeprefix("superglue/"), None if data == HUB_ID else data, seed=data_seed)


def token_cache(config: TrainConfig) -> TokenCache | None:
    """Where tokens are kept, as the settings say."""
    if config.data_cache == "none":
        return None
    folder = default_cache_folder() if config.data_cache is None else Path(config.data_cache).expanduser()
    return TokenCache(folder, config.data_cache_size_bytes)


def load_data(
    config: TrainConfig,
    tokenizer: PreTrainedTokenizerBase,
    inputs: TrainInputs | None = None,
    *,
    show_progress: bool = False,
) -> TrainData:
    """The data of a run.

    Args:
        config: the settings.
        tokenizer: of the model.
        inputs: what :func:`find_data` said, if it has been asked.
        show_progress: show a bar while it takes long, and a line on how fast it was.

    Raises:
        FileNotFoundError, ConnectionError: data is missing.
        ValueError: data is malformed or empty, too little to hold a part out, or has nothing to train on or to evaluate; or the
            tokenizer cannot express it.
        OSError: the disk of the cache is full.
    """
    inputs = inputs or find_data(config)
    if inputs.task is not None:
        name = config.task or ""
        # Of a long prompt its end is kept, with the question and the answer.
        chosen, evaluated = (
            tokens_of_records(records, tokenizer, config.max_seq_len, truncation="start").all()
            for records in (as_records(inputs.task.train, name), as_records(inputs.task.dev, f"{name} (dev)"))
        )
        return _batches(config, tokenizer, chosen, evaluated, only_text=False, choices=inputs.task.dev)
    train = _load(config, tokenizer, inputs.train, show_progress)
    num_skipped = train.info["num_bad"]
    only_text = train.info["only_text"]
    if config.eval_data is not None:
        held_out = _load(config, tokenizer, inputs.held_out, show_progress)
        only_text = only_text and held_out.info["only_text"]
        chosen, evaluated = train.all(), held_out.all()
        return _batches(config, tokenizer, chosen, evaluated, only_text=only_text, num_skipped=num_skipped)
    if config.eval_fraction == 0:
        return _batches(config, tokenizer, train.all(), None, only_text=only_text, num_skipped=num_skipped)
    chosen, evaluated, stats = _split(config, train)
    return _batches(config, tokenizer, chosen, evaluated, only_text=only_text, stats=stats, num_skipped=num_skipped)


def batches_of_records(config: TrainConfig, records: Sequence[Record], tokenizer: PreTrainedTokenizerBase) -> Batches:
    """Records that are there already, as batches to be evaluated: always in the same order.

    Raises:
        ValueError: as :func:`encode_records`.
    """
    store = tokens_of_records(records, tokenizer, config.max_seq_len, truncation=config.truncation)
    found = _batches(config, tokenizer, store.all(), store.all(), only_text=store.info["only_text"]).held_out
    assert found is not None
    return found


def _load(
    config: TrainConfig, tokenizer: PreTrainedTokenizerBase, inputs: Sequence[Input], show_progress: bool
) -> TokenStore:
    cache = token_cache(config)
    with DataProgress(cache, shown=show_progress) as progress:
        store = load_tokens(
            inputs,
            tokenizer,
            config.max_seq_len,
            skip_bad=config.bad_records == "skip",
            truncation=config.truncation,
            cache=cache,
            on_progress=progress,
        )
    tell_skipped(store)
    return store


def tell_skipped(store: TokenStore) -> None:
    """Log which records were left out when the store was made: the first by name, and their number."""
    num_bad, shown = store.info["num_bad"], store.info["bad"]
    for error in shown:
        _logger.warning("skipped: %s", error)
    if num_bad:
        more = f" (the first {len(shown)} are named above)" if num_bad > len(shown) else ""
        _logger.warning("%d of %d records were skipped%s", num_bad, num_bad + store.num_records, more)


def _split(config: TrainConfig, store: TokenStore) -> tuple[Selection, Selection, TokenStats]:
    """Training examples, held-out ones, and the counts. Of texts that are few and long passages are held out, not whole texts."""
    first, num_records = store.info["first"], store.num_records
    # Texts too few for the wanted share of them: one whole book of three would be far more than 5 %.
    if store.info["only_text"] and num_records * config.eval_fraction < 1:
        whole = store.all()
        if len(whole) < 2:
            raise ValueError(
                f"{first} is too short to hold a part of it out: add data, give eval_data, set eval_fraction to 0 or lower max_seq_len"
            )
        chosen, held_out = split_numbers(len(whole), config.eval_fraction, config.data_seed)
        return whole.among(chosen), whole.among(held_out), whole.stats()
    if num_records < 2:
        raise ValueError(
            f"{first} has a single record, so none can be held out: add data, give eval_data, or set eval_fraction to 0"
        )
    train, evaluated = (
        store.of_records(records) for records in split_numbers(num_records, config.eval_fraction, config.data_seed)
    )
    for each, what in ((train, "train on"), (evaluated, "evaluate")):
        if not len(each):
            raise ValueError(
                f"{first}: none of the {each.num_records} records that were drawn to {what} has a token to train on within "
                f"{config.max_seq_len} tokens; raise --max-seq-len, add data or give eval_data"
            )
    return train, evaluated, train.stats()


def _batches(
    config: TrainConfig,
    tokenizer: PreTrainedTokenizerBase,
    train: Selection,
    held_out: Selection | None,
    *,
    only_text: bool,
    stats: TokenStats | None = None,
    choices: Sequence[ChoiceItem] = (),
    num_skipped: int = 0,
) -> TrainData:
    packing = only_text if config.packing is None else config.packing
    rows = config.rows_at_once(packing)

    def batches(chosen: Selection, batch_size: int, shuffle: bool) -> Batches:
        return Batches(
            chosen,
            batch_size=batch_size,
            max_seq_len=config.max_seq_len,
            pad_token_id=padding_id(tokenizer),
            packing=packing,
            seed=config.seed,
            shuffle=shuffle,
        )

    evaluated = None
    if held_out is not None:
        evaluated = batches(held_out, rows or config.batch_size, False)
    return TrainData(batches(train, config.batch_size, True), evaluated, stats or train.stats(), choices, num_skipped)
