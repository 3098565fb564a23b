"""Going on from a checkpoint: which one, whether the settings allow it, and everything back to where it was."""

from __future__ import annotations

import dataclasses
import importlib.metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml

from ..data.chat import date_of
from ..evaluation import LossResult
from ..log import get_logger
from ..optim.named_state import load_named_state, named_state, parameter_of
from ..weights.working_copy import make_way
from .checkpoint import (
    FOLDER,
    Checkpoint,
    CorruptCheckpointError,
    list_checkpoints,
    newest_checkpoint,
    read_checkpoint,
    remove_leftovers,
    set_aside,
    step_of,
)
from .config import ABOUT_RESUMING, FREE_TO_CHANGE, TrainConfig
from .rng import of_ranks, random_state, set_random_state

if TYPE_CHECKING:
    from torch import Tensor

    from .run import Run

_logger = get_logger(__name__)

# The saved state means nothing with other ones.
_NEVER_CHANGED = ("optimizer", "dtype", "lora_rank", "lora_targets", "lora_only")


def clean_up(config: TrainConfig, output: Path) -> None:
    """Remove what a killed process has left: files half written, and a torn working copy of the weights."""
    remove_leftovers(output)
    remove_leftovers(output / FOLDER)
    if config.weights not in ("device", "cpu"):
        for directory in (output / "weights", Path(config.weights).expanduser()):
            make_way(directory)


def find_checkpoint(config: TrainConfig, output: Path, *, ours: bool = False) -> Checkpoint | None:
    """The checkpoint that the settings ask for, checked; None to begin anew.

    Args:
        config: the settings.
        output: of the run.
        ours: the run in the output directory is this one, which was started again.

    Raises:
        FileNotFoundError: there is none.
        CorruptCheckpointError: the one that is named is not whole.
    """
    if config.resume not in ("latest", "auto"):
        assert config.resume is not None
        found: Checkpoint | None = read_checkpoint(Path(config.resume).expanduser())
        assert found is not None
        elsewhere = found.path.resolve().parent != (output / FOLDER).resolve()
        if elsewhere and not ours and (output / "config.yaml").exists():
            raise FileExistsError(
                f"{found.path} is a checkpoint of another run than the one in {output}: name a new output directory for it"
            )
        return found
    num_there = len(list_checkpoints(output / FOLDER))
    found = newest_checkpoint(output / FOLDER)
    if found is None and num_there:
        raise CorruptCheckpointError(
            f"none of the {num_there} checkpoints in {output / FOLDER} is whole; train anew into another output directory"
        )
    if found is None and config.resume == "latest":
        raise FileNotFoundError(
            f"there is no checkpoint in {(output / FOLDER).absolute()} to resume from. Paths in a config file are relative to where the command "
            "is typed: type it where the run was begun. Or begin anew, with --resume auto"
        )
    if found is None:
        _check_beginning(config, output)
    return found


def _check_beginning(config: TrainConfig, output: Path) -> None:
    """A run that was killed before its first checkpoint begins anew; what is another run, or has a model, is not touched."""
    saved = read_settings(output)
    if (output / "model").exists() or (saved is not None and changed_settings(config, saved)):
        raise FileExistsError(
            f"{output} holds a run with other settings and no checkpoint to go on from; nothing in it will be overwritten: name a "
            "new output directory"
        )


def read_settings(output: Path) -> dict[str, Any] | None:
    """The settings of the run in a directory; None if there are none that can be read."""
    try:
        found = yaml.safe_load((output / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return None
    return found if isinstance(found, dict) else None


def set_later_aside(output: Path, checkpoint: Checkpoint) -> None:
    """A run that goes back to an earlier checkpoint takes another course than the later ones: they get other names."""
    for path in list_checkpoints(output / FOLDER):
        if step_of(path) > checkpoint.step:
            _logger.info("%s is later than the checkpoint that is resumed: kept as %s", path, set_aside(path).name)


def check_settings(config: TrainConfig, checkpoint: Checkpoint) -> None:
    """See that the run will be the one that was begun.

    Raises:
        ValueError: a setting that would change it differs; the message names each.
    """
    changed = changed_settings(config, checkpoint.state["config"])
    refused = [text for name, text in changed.items() if name in _NEVER_CHANGED or not config.allow_changes]
    if refused:
        final = all(name in _NEVER_CHANGED for name in changed)
        hint = "" if final else "; set them back, or allow the change with --allow-changes"
        raise ValueError(
            f"{checkpoint.path} was written with other settings, and the run would not be the same: {', '.join(refused)}{hint}"
        )
    if changed:
        _logger.warning("resumed with other settings: %s", ", ".join(changed.values()))


def changed_settings(config: TrainConfig, saved: dict[str, Any]) -> dict[str, str]:
    """What differs and would change the run: by name, what was and what is."""
    now = config.to_dict()
    default = {field.name: field.default for field in dataclasses.fields(config)}
    if _split_itself(saved):  # where there is no data_seed yet, by the seed
        default["data_seed"] = saved.get("seed", default["seed"])
    return {
        name: f"{name} was {saved.get(name, default[name])!r} and is {value!r}"
        for name, value in now.items()
        if name not in FREE_TO_CHANGE and saved.get(name, default[name]) != value
    }


def micro_batch_size_of(config: TrainConfig, state: dict[str, Any]) -> int | None:
    """Of a run that goes on from a checkpoint: what it was, whoever had chosen it, unless the setting was changed since.

    Args:
        config: the settings now.
        state: of the checkpoint.
    """
    was = state["config"]
    if any(getattr(config, name) != was.get(name) for name in ("micro_batch_size", "batch_size")):
        return config.micro_batch_size
    found: int | None = state["micro_batch_size"]
    return found or config.batch_size


def _split_itself(saved: dict[str, Any]) -> bool:
    """Whether what the run held out was drawn by it."""
    return saved.get("task") is not None or (saved.get("eval_data") is None and saved.get("eval_fraction") != 0)


def state_of(run: Run, **more: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors of the optimizer state, everything else) of a run between two steps.

    Args:
        run: the run.
        more: entries of the state that the run does not know.
    """
    tensors: dict[str, Tensor] = {}
    plain: dict[str, dict[str, Any]] = {}
    for optimizer in run.optimizers:  # they share no parameter
        of_one = named_state(optimizer, _names(run))
        tensors |= of_one[0]
        plain |= of_one[1]
    config = run.config.to_dict()
    return tensors, {
        "step": run.report.num_steps,
        "num_batches": run.num_batches,
        "num_steps": run.num_steps,
        "micro_batch_size": run.placement.micro_batch_size,
        "data": {"fingerprint": run.data.train.fingerprint, "steps_per_epoch": len(run.data.train)},
        "optimizer": plain,
        "engine": run.engine.state_dict(),
        "report": run.report.state_dict(),
        "date": date_of(run.tokenizer).isoformat(),
        "random": random_state(),
        "random_of_ranks": of_ranks(run.ranks),
        "config": {name: value for name, value in config.items() if name not in ABOUT_RESUMING},
        "versions": versions(run.device),
        **more,
    }


def restore(run: Run, checkpoint: Checkpoint, skip_to_batch: int | None = None) -> None:
    """Put a run that was prepared with the checkpoint's model back to where it was.

    Args:
        run: before its first step.
        checkpoint: one that :func:`check_settings` has accepted.
        skip_to_batch: batches of the data up to this one are passed over.

    Raises:
        ValueError: the data is not the same, the run would have ended before, or the state is that of another model.
    """
    state = checkpoint.state
    fingerprint = run.data.train.fingerprint
    if state["data"]["fingerprint"] != fingerprint and not run.config.allow_changes:
        raise ValueError(
            f"the training data is not what {checkpoint.path} was written with (another content, order or tokenizer), so the run "
            "would not be the same; restore the data, or allow the change with --allow-changes"
        )
    was, now = state["data"]["steps_per_epoch"], len(run.data.train)
    if was != now and not run.config.allow_changes:
        raise ValueError(
            f"an epoch has {now} steps and had {was} in {checkpoint.path}: the examples go into other rows than then (packed or one a row), so "
            "the run would not be the same; begin anew, or allow the change with --allow-changes"
        )
    if state["step"] > run.num_steps:
        raise ValueError(
            f"{checkpoint.path} is that of step {state['step']}, and with these settings the whole run has {run.num_steps} "
            "(max_steps, epochs, batch_size, data): raise them, or take the checkpoint for the model that it is"
        )
    _load_optimizers(run, checkpoint)
    run.engine.load_state_dict(state["engine"])
    run.report.load_state_dict(state["report"])
    run.num_batches = max(state["num_batches"], skip_to_batch or 0)
    _set_schedule(run, state["step"])
    _tell_versions(state["versions"], versions(run.device))
    if run.ranks.is_first:
        set_random_state(state["random"])
    else:  # with another number of ranks some go on with what they were seeded with
        others = state.get("random_of_ranks", [])
        if run.ranks.rank - 1 < len(others):
            set_random_state(others[run.ranks.rank - 1])


def _load_optimizers(run: Run, checkpoint: Checkpoint) -> None:
    """Each optimizer gets the state of its own parameters; what is nobody's is given to the first, which refuses it."""
    names = _names(run)
    owner = {names[p]: o for o in run.optimizers for group in o.param_groups for p in group["params"]}
    tensors, plain, first = checkpoint.optimizer_tensors(), checkpoint.state["optimizer"], run.optimizers[0]
    for optimizer in run.optimizers:
        load_named_state(
            optimizer,
            {param: name for param, name in names.items() if owner.get(name) is optimizer},
            {key: load for key, load in tensors.items() if owner.get(parameter_of(key), first) is optimizer},
            {name: entries for name, entries in plain.items() if owner.get(name, first) is optimizer},
        )


def _set_schedule(run: Run, step: int) -> None:
    # The rate of a step follows from its number alone, so there is nothing else to restore.
    for optimizer, scheduler in zip(run.optimizers, run.schedulers, strict=True):
        scheduler.load_state_dict({**scheduler.state_dict(), "last_epoch": step, "_step_count": step + 1})
        rates = [base * factor(step) for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        scheduler.load_state_dict({**scheduler.state_dict(), "_last_lr": rates})


def saved_loss(state: dict[str, Any]) -> LossResult | None:
    """The held-out score before the first step, as a checkpoint keeps it."""
    found = state.get("loss_before")
    return None if found is None else LossResult(**found)


def versions(device: str) -> dict[str, str]:
    """What else decides the last bits of a result."""
    names = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    kind = torch.cuda.get_device_name(device) if device.startswith("cuda") else torch.backends.cpu.get_cpu_capability()
    return {**names, "device": kind, "threads": str(torch.get_num_threads())}


def _tell_versions(saved: dict[str, str], now: dict[str, str]) -> None:
    changed = [
        f"{name} was {saved.get(name)} and is {value}" for name, value in now.items() if saved.get(name) != value
    ]
    if changed:
        _logger.warning("the run goes on elsewhere, so its last bits may differ: %s", ", ".join(changed))


def _names(run: Run) -> dict[Tensor, str]:
    return {param: name for name, param in run.model.named_parameters()}
