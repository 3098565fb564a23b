"""Saving a model as a directory that plain transformers opens again."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ..log import get_logger
from .checkpoint import first_line

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

_logger = get_logger(__name__)

_SHARD_BYTES = 1024**3  # of weights that are streamed from their home to the saved files


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    directory: str | Path,
    state_dict: dict[str, Tensor] | None = None,
) -> None:
    """Write a directory that plain transformers opens again: weights, configs, tokenizer and chat template.

    Everything is written beside it first and renamed when it is on the disk, so that the directory is never half there.

    Args:
        model: on any device.
        tokenizer: of this model.
        directory: new or empty; directories above it are made.
        state_dict: the weights, where they are not in the model (``engine.state_dict_of_model()``). They are written in
            pieces, so that those on disk never come into memory together.

    Raises:
        FileExistsError: the directory holds something, or is a file.
    """
    target = Path(directory).expanduser()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target} exists and is not an empty directory; nothing in it will be overwritten")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / f".{target.name}.{os.getpid()}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        with _saveable_generation_config(model):
            if state_dict is None:
                model.save_pretrained(temporary)
            else:
                model.save_pretrained(temporary, state_dict=state_dict, max_shard_size=_SHARD_BYTES)
        tokenizer.save_pretrained(temporary)
        for path in [*temporary.rglob("*"), temporary]:
            _flush(path)
        if target.exists():
            target.rmdir()
        temporary.rename(target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _flush(target.parent)


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


def _flush(path: Path) -> None:
    """Make sure that a file or directory is on the disk."""
    if path.is_dir() and os.name == "nt":  # Windows cannot open directories
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
