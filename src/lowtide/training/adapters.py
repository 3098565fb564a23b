"""LoRA in a training run: adapters for the model, their optimizer, and what is saved of both.

    OUTPUT/model/      the trained model with its adapters merged, which plain transformers opens
    OUTPUT/adapter/    the adapters alone, as peft saves them
    OUTPUT/checkpoints/step-.../           the model's own weights
    OUTPUT/checkpoints/step-.../adapter/   the adapters

Nothing is merged in a checkpoint, because merging rounds: so a run goes on from it bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.optim import Optimizer

from ..models import Adapters, add_lora, save_model
from ..models.lora import ADAPTER_FOLDER
from ..models.saving import flush_tree, write_model, written_beside
from ..optim import PerParameter
from ..planning.updates import total_state_bytes
from .checkpoint import Checkpoint
from .config import TrainConfig
from .setup import make_optimizer
from .together import written_by_first

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..weights.layout import Part
    from .run import Run


def make_adapters(config: TrainConfig, model: PreTrainedModel, checkpoint: Checkpoint | None) -> Adapters | None:
    """The adapters that the settings ask for, with the values of a checkpoint if there is one; None without.

    Raises:
        ValueError: the model cannot have them; the message starts with the name of the setting.
    """
    if not config.lora_rank:
        return None
    try:
        adapters = add_lora(
            model,
            rank=config.lora_rank,
            alpha=config.lora_alpha,
            dropout=config.lora_dropout,
            targets=config.lora_targets,
            train_base=not config.lora_only,
        )
    except ValueError as error:
        raise ValueError(f"lora_{error}" if str(error).startswith("rank ") else f"lora_targets: {error}") from None
    if checkpoint is not None:
        adapters.load(checkpoint.path / ADAPTER_FOLDER)
    return adapters


def make_optimizers(config: TrainConfig, model: torch.nn.Module, adapters: Adapters | None) -> list[Optimizer]:
    """One for the model's own weights, if they are trained, and AdamW for the adapters, if there are any."""
    if adapters is None:
        return [make_optimizer(config, model)]
    base = [] if config.lora_only else [make_optimizer(config, model, adapters.base_parameters())]
    added = PerParameter(
        torch.optim.AdamW, adapters.parameters(), lr=config.lora_lr, weight_decay=config.weight_decay,
        rounding_seed=config.seed,
    )  # fmt: skip
    return [*base, added]


def optimizer_state_bytes(config: TrainConfig, model: torch.nn.Module, adapters: Adapters | None) -> int:
    """Of all optimizers after their first step."""
    if adapters is None:
        return total_state_bytes(model.parameters(), config.optimizer, config.rounding)
    base = total_state_bytes(adapters.base_parameters(), config.optimizer, config.rounding)
    return base + total_state_bytes(adapters.parameters(), "adamw", None)


def write_checkpoint_model(run: Run, directory: Path, parts: list[Part]) -> Mapping[str, str]:
    """The files of a checkpoint that are the model's, in an empty directory; returns the SHA-256 of those of weights."""
    digests = write_model(run.model, run.tokenizer, directory, parts)
    if run.adapters is not None:
        run.adapters.save(directory / ADAPTER_FOLDER, _base_model(run.config))
    return digests


def save_trained(run: Run, output: Path) -> Path:
    """Save what a run has come to; returns the directory of the model. Adapters are merged, after which the run is over.

    Raises:
        OSError: the disk is full or failed.
    """
    target = output / "model"
    if run.adapters is None:
        parts = run.engine.parts_of_model()
        written_by_first(
            run.ranks, parts, {}, lambda gathered, _: save_model(run.model, run.tokenizer, target, list(gathered))
        )
        return target
    with written_beside(output / ADAPTER_FOLDER) as temporary:
        run.adapters.save(temporary, _base_model(run.config))
        flush_tree(temporary)
    run.engine.remove()
    save_model(run.adapters.merge(), run.tokenizer, target)
    return target


def _base_model(config: TrainConfig) -> str:
    # Adapters that were trained together with the model's weights are of no use over the weights from before.
    return config.model if config.lora_only else ""
