"""Packing that is exact, or none: a model that lets documents of a row see each other gets one document a row."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..evaluation import keeps_documents_apart
from ..log import get_logger
from ..ranks import ALONE, Ranks
from .config import TrainConfig
from .data import TrainData

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_logger = get_logger(__name__)


def exact_rows(
    config: TrainConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: TrainData,
    ranks: Ranks = ALONE,
) -> TrainData:
    """The data as it is, or one example a row if the model would mix those of a row. Costs one short forward pass if it is packed.

    Args:
        config: the settings.
        model: as it will be trained, its engine included.
        tokenizer: of the model.
        data: of the run.
        ranks: that share it; each calls this, and all do the same.

    Raises:
        ValueError: the model would mix them, and packing was asked for.
    """
    if not data.shares_rows:
        return data
    one_row = "flash" in (config.attention or "")
    if ranks.all(keeps_documents_apart(model, tokenizer, one_row_at_a_time=one_row)):
        return data
    name = type(model).__name__
    if config.packing:
        raise ValueError(
            f"packing: {name} does not keep the documents of a row apart (what is in one changes what the model says in the next), so a "
            "packed run would learn something else: leave packing out, or set it to false"
        )
    _logger.warning(
        "%s does not keep the documents of a packed row apart, so every document gets a row of its own (packing is off)",
        name,
    )
    return data.padded()
