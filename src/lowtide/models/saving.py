"""Saving a model as a directory that plain transformers opens again."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ..log import get_logger
from ..weights.direct_io import flush_directory
from .checkpoint import first_line
from .shards import write_weights

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

    from ..weights.layout import Part

_logger = get_logger(__name__)


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    directory: str | Path,
    parts: Sequence[Part] | None = None,
) -> None:
    """Write a directory that plain transformers opens again: weights, configs, tokenizer and chat template.

    Everything is written beside it first and renamed when it is on the disk, so that the directory is never half there.

    Args:
        model: on any device.
        tokenizer: of this model.
        directory: new or empty; directories above it are made.
        parts: the weights, where they are not in the model (``engine.parts_of_model()``); they come into memory one by one.

    Raises:
        FileExistsError: the directory holds something, or is a file.
        OSError: the disk is full or failed. Nothing is left behind.
    """
    target = Path(directory).expanduser()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target} exists and is not an empty directory; nothing in it will be overwritten")
    target.parent.mkdir(parents=True, exist_ok=True)
    with written_beside(target) as temporary:
        write_model(model, tokenizer, temporary, parts)
        flush_tree(temporary)
        if target.exists():
            target.rmdir()


def write_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    parts: Sequence[Part] | None = None,
) -> dict[str, str]:
    """The files of :func:`save_model` in an empty directory. Returns the SHA-256 of the files of weights, by name."""
    with _saveable_generation_config(model), _without_progress_bar():
        model.save_pretrained(directory, state_dict={})  # configs, and code that came with the model
    for path in directory.glob("*.safetensors*"):  # of no weights at all
        path.unlink()
    tokenizer.save_pretrained(directory)
    return write_weights(model, directory, parts)


@contextmanager
def _without_progress_bar() -> Iterator[None]:
    """transformers would show one of zero shards."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@contextmanager
def written_beside(target: Path) -> Iterator[Path]:
    """An empty directory that becomes ``target`` at the end, for good; if there is an error it is removed instead."""
    temporary = target.parent / f".{target.name}.{os.getpid()}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        temporary.rename(target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    flush_directory(target.parent)


def flush_tree(directory: Path) -> None:
    """Make sure that a directory and all that is in it is on the disk."""
    for path in [*directory.rglob("*"), directory]:
        if path.is_dir():
            flush_directory(path)
        else:
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


@contextmanager
def _saveable_generation_config(model: PreTrainedModel) -> Iterator[None]:
    """transformers refuses to save a generation config that contradicts itself, as some on the hub do; mend it then."""
    original = getattr(model, "generation_config", None)
    if original is None:
        yield
        return
    model.generation_config = _mended(original)
    try:
        yield
    finally:
        model.generation_config = original


def _mended(original: GenerationConfig) -> GenerationConfig:
    mended = copy.deepcopy(original)
    try:
        mended.validate(strict=True)
    except ValueError:
        # Nearly always a temperature or top_p without do_sample, which was meant.
        mended.do_sample = True
        try:
            mended.validate(strict=True)
        except ValueError as error:
            _logger.warning(
                "the generation config contradicts itself, so only its tokens are saved: %s", first_line(error)
            )
            from transformers import GenerationConfig

            names = ("bos_token_id", "eos_token_id", "pad_token_id")
            mended = GenerationConfig(**{name: getattr(original, name, None) for name in names})
    return mended
