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
        raise MemoryError(f"{reason}. {_what_needs_less(config)}{_what_became_of(config)}") from error


def _what_needs_less(config: TrainConfig) -> str:
    """Settings that are not at their smallest yet, those first that leave the result as it is."""
    same, other = [], []
    rows = config.batch_size if config.micro_batch_size is None else config.micro_batch_size
    if rows > 1:
        same.append(f"--micro-batch-size {rows // 2}")
    if config.keep_activations or (config.keep_activations is None and config.weights == "auto"):
        same.append("--keep-activations 0")
    if config.weights == "device" and not config.lora_rank:
        several = int(os.environ.get("WORLD_SIZE", "1")) > 1
        same.append("--weights cpu" if several else "--weights auto")
    if config.optimizer == "adamw" and not config.lora_only:
        other.append("--optimizer adalomo")
    if config.dtype == "float32":
        other.append("--dtype bfloat16")
    other.append("a smaller --max-seq-len")
    first = f"The same result with less: {', '.join(same)}. " if same else ""
    return f"{first}{'Or, with another result' if same else 'Less'}: {', '.join(other)}. lowtide plan says what fits."


def _what_became_of(config: TrainConfig) -> str:
    """Weights in memory may be half updated, so that nothing of them is saved."""
    output = Path(config.output)
    if any((output / "checkpoints").glob("*")):
        return " Checkpoints are as they were: --resume --allow-changes goes on from the last one with other settings."
    begun = (output / "metrics.jsonl").exists()
    return " Nothing was saved: begin again with another --output." if begun else ""
