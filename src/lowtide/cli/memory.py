"""What a training run that ran out of memory says: what would need less, and what became of the run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..training import TrainConfig


def lacks_memory(error: BaseException) -> bool:
    """Whether that is why it failed: torch raises a ``RuntimeError`` of its own for a GPU, and a plain one where malloc fails."""
    words = ("can't allocate memory", "not enough memory")
    by_type = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return by_type or (isinstance(error, RuntimeError) and any(each in str(error) for each in words))


@contextmanager
def advice_when_memory_lacks(config: TrainConfig) -> Iterator[None]:
    """Add it to the error of torch. The planner's own ``MemoryError`` says it already.

    Raises:
        MemoryError: torch got no memory.
    """
    try:
        yield
    except RuntimeError as error:
        if not lacks_memory(error):
            raise
        reason = str(error).strip().partition("\n")[0].partition(" If reserved")[0].rstrip(".")
        output = Path(config.output).expanduser()
        goes_on = any((output / "checkpoints").glob("*"))
        raise MemoryError(f"{reason}. {_what_needs_less(config, goes_on)}{_what_became_of(output, goes_on)}") from error


def _what_needs_less(config: TrainConfig, goes_on: bool) -> str:
    """Settings that are not at their smallest yet, those first that leave the result as it is.

    Args:
        config: the settings.
        goes_on: from a checkpoint, which has the state of its optimizer in its dtype.
    """
    num_ranks = int(os.environ.get("WORLD_SIZE", "1"))
    same, other = [], []
    one_by_one = "flash" in (config.attention or "")  # as packed sequences go then
    if config.micro_batch_size != 1 and config.batch_size > num_ranks and not one_by_one:
        same.append("--micro-batch-size 1")
    if config.keep_activations or (config.keep_activations is None and config.weights == "auto"):
        same.append("--keep-activations 0")
    if config.weights == "device" and not config.lora_rank:
        same.append("--weights cpu" if num_ranks > 1 else "--weights auto")
    if config.optimizer == "adamw" and not (config.lora_only or goes_on):
        other.append("--optimizer adalomo")
    if config.dtype == "float32" and not goes_on:
        other.append("--dtype bfloat16")
    other.append("a smaller --max-seq-len")
    first = f"The same result with less: {', '.join(same)}. " if same else ""
    return f"{first}{'Or, with another result' if same else 'Less'}: {', '.join(other)}. lowtide plan says what fits."


def _what_became_of(output: Path, goes_on: bool) -> str:
    """Weights in memory may be half updated, so that nothing of them is saved."""
    if goes_on:
        return " Checkpoints are as they were: --resume --allow-changes goes on from the last one with these settings."
    begun = (output / "metrics.jsonl").exists()
    return " Nothing was saved: begin again with another --output." if begun else ""
