"""The tokenizer of a run: the model's, with the chat template that the settings name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..data.chat_template import set_chat_template
from ..log import get_logger
from ..models import load_tokenizer
from .checkpoint import Checkpoint
from .config import TrainConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_logger = get_logger(__name__)


def tokenizer_of(config: TrainConfig, checkpoint: Checkpoint | None = None) -> PreTrainedTokenizerBase:
    """Load it.

    Args:
        config: the settings, whose ``model`` is the directory of the checkpoint if there is one.
        checkpoint: what the run goes on from.

    Raises:
        FileNotFoundError, ConnectionError, ValueError: as ``load_tokenizer`` and ``set_chat_template``; or the template is not the
            one that the checkpoint was written with.
    """
    tokenizer = load_tokenizer(config.model, trust_remote_code=config.trust_remote_code)
    if config.chat_template is None:
        if checkpoint is not None and checkpoint.state["config"].get("chat_template") is not None:
            _logger.warning(
                "chat_template: the one that %s was written with stays, since the model's own is not there; to go back to that, name a "
                "file with it",
                checkpoint.path,
            )
        return tokenizer
    before = tokenizer.chat_template
    set_chat_template(tokenizer, config.chat_template)
    if checkpoint is not None and tokenizer.chat_template != before and not config.allow_changes:
        raise ValueError(
            f"chat_template {config.chat_template} is not what {checkpoint.path} was written with, so the run would not be the same; "
            "restore the file, or allow the change with --allow-changes"
        )
    return tokenizer
