"""What happens before the first step: the output directory, the device, the optimizer; ``data.py`` has the data."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from ..optim import AdaLomo, Lomo, PerParameter
from ..units import format_bytes
from ..weights.working_copy import MARKER
from .checkpoint import FOLDER, list_checkpoints
from .config import TrainConfig

LAUNCH = ".launch"  # file in the output directory: which launch of torchrun its run belongs to
_OWN_CACHE = "_lowtide_own_use_cache"  # attribute of a model whose cache is switched off


def check_output(output: str | Path, *, resumed: bool = False) -> Path:
    """The output directory, if it is new or empty and can be made. Nothing is made yet.

    Args:
        output: the directory.
        resumed: it may hold a run of lowtide, which is gone on with.

    Raises:
        FileExistsError: it is a file, or it holds something.
        PermissionError: it could not be created or written.
    """
    path = Path(output).expanduser()
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"output {path} is a file; name a new or empty directory")
    if path.is_dir() and any(not _is_leftover(each) for each in path.iterdir()):
        is_run = (path / "config.yaml").is_file()
        if not (resumed and is_run):
            what = "name a new one or empty it"
            if is_run:
                what = "name a new one, or go on with the run that is in it with --resume (resume latest)"
            elif resumed:
                what = "there is no run of lowtide in it to go on with"
            raise FileExistsError(
                f"output directory {path} is not empty, and nothing in it will be overwritten; {what}"
            )
    existing = existing_folder(path)
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise PermissionError(f"output directory {path} cannot be made: {existing} is not a directory you may write to")
    return path


def _is_leftover(path: Path) -> bool:
    """Of a run that was killed before it began."""
    return path.name in (".config.yaml.tmp", LAUNCH) or (
        path.name == "weights" and ((path / MARKER).is_file() or not any(path.iterdir()))
    )


def check_disk(
    output: Path,
    model: torch.nn.Module,
    working_copy: Path | None = None,
    num_checkpoints: int = 0,
    state_bytes: int = 0,
) -> None:
    """Refuse to train for hours towards a model that cannot be saved.

    Args:
        output: where the model will be saved, as large as its weights.
        model: with its weights, or stand-ins for them.
        working_copy: a directory that will hold the weights, too.
        num_checkpoints: on the disk at a time.
        state_bytes: of the optimizer state, which is in every checkpoint beside the weights.

    Raises:
        OSError: the disk of the output directory has too little room.
    """
    existing = existing_folder(output)
    weights = sum(param.numel() * param.element_size() for param in model.parameters())
    shares = working_copy is not None and existing_folder(working_copy).stat().st_dev == existing.stat().st_dev
    there = len(list_checkpoints(output / FOLDER))
    checkpoint = weights + state_bytes  # one is written where the run is interrupted, in place of the model
    needed = weights * shares + max(weights + checkpoint * max(0, num_checkpoints - there), checkpoint)
    free = shutil.disk_usage(existing).free
    if free < needed:
        parts = ["the trained model", *(["its working copy"] if shares else [])]
        parts += [f"{num_checkpoints} checkpoints"] if num_checkpoints else []
        what = f"{', '.join(parts[:-1])} and {parts[-1]} take" if len(parts) > 1 else f"{parts[0]} takes"
        raise OSError(
            f"{what} {format_bytes(needed)}, but the disk of the output directory {output} has {format_bytes(free)} left: free "
            "some or choose another output" + (", or keep fewer checkpoints" if num_checkpoints else "")
        )


def existing_folder(path: Path) -> Path:
    """The path itself, or the nearest folder above it that exists."""
    return next(folder for folder in (path, *path.absolute().parents) if folder.exists())


@contextmanager
def without_cache(model: torch.nn.Module) -> Iterator[None]:
    """Switch off the model's cache of keys and values for as long as this is entered.

    Training has no use for it, and with one transformers (5.23) ignores the restarting position_ids of packed
    documents, which would then attend to each other.
    """
    config = getattr(model, "config", None)
    kept = getattr(config, "use_cache", None)
    if kept is not None:
        config.use_cache = False  # type: ignore[union-attr]
        setattr(model, _OWN_CACHE, kept)
    try:
        yield
    finally:
        if kept is not None:
            config.use_cache = kept  # type: ignore[union-attr]
            delattr(model, _OWN_CACHE)


@contextmanager
def with_own_cache(model: torch.nn.Module) -> Iterator[None]:
    """Inside :func:`without_cache`: the config as the model's makers set it, to be saved."""
    config = getattr(model, "config", None)
    own = getattr(model, _OWN_CACHE, None)
    if own is None:
        yield
        return
    config.use_cache = own  # type: ignore[union-attr]
    try:
        yield
    finally:
        config.use_cache = False  # type: ignore[union-attr]


def resolve_device(name: str) -> str:
    """The torch device that "auto", "cpu", "cuda" or "cuda:N" stands for on this machine.

    Raises:
        ValueError: there is no such GPU.
    """
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return "cuda" if num_gpus else "cpu"
    kind, _, index = name.partition(":")
    if kind == "cuda" and int(index or 0) >= num_gpus:
        raise ValueError(f"device {name} is not there: torch sees {num_gpus} GPUs on this machine; use cpu or auto")
    return name


def count_steps(config: TrainConfig, steps_per_epoch: int) -> int:
    """Steps in the whole run: of all epochs, or ``max_steps`` if that comes first or stands alone."""
    if config.epochs is None and config.max_steps is not None:
        return config.max_steps
    of_epochs = (config.epochs or 1) * steps_per_epoch
    return of_epochs if config.max_steps is None else min(of_epochs, config.max_steps)


def make_optimizer(
    config: TrainConfig, model: torch.nn.Module, params: Sequence[torch.nn.Parameter] | None = None
) -> torch.optim.Optimizer:
    """The optimizer over all trainable parameters; weight decay applies to those of two and more dimensions only.

    Args:
        config: the settings.
        model: what is trained.
        params: some of its parameters, instead of all.
    """
    trainable = [param for param in (model.parameters() if params is None else params) if param.requires_grad]
    groups = [
        {"params": [param for param in trainable if param.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [param for param in trainable if param.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    lr, rounding, seed = config.effective_lr, config.rounding, config.seed
    if config.optimizer == "lomo":
        return Lomo(groups, lr=lr, rounding=rounding, rounding_seed=seed)
    if config.optimizer == "adalomo":
        return AdaLomo(groups, lr=lr, rounding=rounding, rounding_seed=seed)
    optimizer_class = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.SGD
    return PerParameter(optimizer_class, groups, lr=lr, rounding=rounding, rounding_seed=seed)
