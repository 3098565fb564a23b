"""transformers' ``Trainer``, and what derives from it such as TRL's ``SFTTrainer``, on the fused engine.

    trainer = Trainer(model=model, args=args, train_dataset=dataset)
    fuse_trainer(trainer, "adalomo")
    trainer.train()

Methods of this one trainer are replaced; no class is changed. What its loop does stays as it is, but:

    create_optimizer         makes lowtide's optimizer and fuses the model
    accelerator.backward     is ``engine.backward``, so every parameter is updated here
    clip_grad_norm_          was done there: it returns the norm that was measured (``max_grad_norm`` is the engine's)
    gradient accumulation    becomes one batch whose rows go through the layers in micro-batches: the same sums, one update
    optimizer state          is saved and loaded by the trainer; what the engine itself remembers is in a file beside it
"""

from __future__ import annotations

import copy
import functools
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from transformers import Trainer

from ..fusing import Engine, fuse
from ..log import get_logger
from ..optim import AdaLomo, Lomo, PerParameter

__all__ = ["fuse_trainer"]

_logger = get_logger(__name__)

OPTIMIZERS = ("adalomo", "lomo", "adamw", "sgd")
ENGINE_FILE = "lowtide_engine.json"
_DEFAULT_LR_OF_ARGUMENTS = 5e-5
_DEFAULT_NORM_OF_ARGUMENTS = 1.0
_USUAL_LR = {"adalomo": 1e-3, "lomo": 0.1}


def fuse_trainer(
    trainer: Trainer,
    optimizer: str | Callable[[list[dict[str, Any]]], Optimizer] | None = None,
    *,
    micro_batch_size: int | None = None,
    rounding: str | None = None,
    **options: Any,
) -> None:
    """Make a trainer update every parameter inside the backward pass. To be called before ``trainer.train()``.

    ``max_grad_norm`` is kept by exact clipping (0 turns it off), ``gradient_accumulation_steps`` becomes micro-batches with the same
    result, ``gradient_checkpointing`` is switched off because blocks are recomputed anyway. ``grad_norm`` in the logs is the norm
    of the whole gradient.

    Args:
        trainer: a ``Trainer`` or ``SFTTrainer``, one process on one device.
        optimizer: "adalomo", "lomo", "adamw" or "sgd", with ``learning_rate``, ``weight_decay`` and (adamw) the betas and epsilon of the
            arguments; or what makes one of lowtide's optimizers from parameter groups. None: the one that the trainer was
            given, or what ``TrainingArguments.optim`` says if that is "lomo" or "adalomo", or adalomo.
        micro_batch_size: rows that go through a layer at once; default: ``per_device_train_batch_size`` if there is gradient accumulation,
            else the whole batch.
        rounding: of 16-bit weights: "stochastic" (the default), "compensated" or "nearest".
        options: others of :func:`lowtide.fuse`: ``clip``, ``clip_memory_bytes``, ``clip_grad_value``, ``chunked_loss``, ``blocks``, ...

    Raises:
        ValueError: the trainer does something that the fused update cannot, or an argument is unknown; the message says what to do.
    """
    if isinstance(optimizer, str) and optimizer not in OPTIMIZERS:
        raise ValueError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, got {optimizer!r}")
    if "weights" in options or "device" in options:
        raise ValueError(
            "the Trainer moves the whole model to the device, so weights cannot live elsewhere: use lowtide train --weights for that"
        )
    if isinstance(trainer.train, _Training):
        raise ValueError("this trainer is on the fused engine already")
    if trainer.optimizer is not None and optimizer is not None:
        raise ValueError(
            f"the Trainer was given {type(trainer.optimizer).__name__} and fuse_trainer {optimizer!r}: leave one of them out"
        )
    if "clip_grad_norm" in options:
        raise ValueError("clip_grad_norm is TrainingArguments.max_grad_norm here: set it there")
    _check(trainer)
    trainer.args = copy.copy(trainer.args)  # what is changed below is not changed for others that have them
    _without_checkpointing(trainer)
    own_loss = type(trainer).compute_loss is not Trainer.compute_loss
    rows = _accumulate_in_micro_batches(trainer, own_loss)
    options = {"micro_batch_size": micro_batch_size or rows, **options}
    if own_loss:
        options.setdefault("chunked_loss", False)  # it may look at the logits; TRL has a fused head of its own
    _Fused(trainer, optimizer, rounding, options).install()


def _check(trainer: Any) -> None:
    args, accelerator = trainer.args, trainer.accelerator
    if args.world_size > 1 or args.n_gpu > 1:
        raise ValueError(
            f"the Trainer runs on {max(args.world_size, args.n_gpu)} devices, and lowtide's engine on one: set CUDA_VISIBLE_DEVICES=0, "
            "and start one process"
        )
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        raise ValueError("DeepSpeed and FSDP shard what the fused update works on: leave them out")
    if getattr(accelerator, "scaler", None) is not None:
        raise ValueError(
            "fp16=True scales the loss in a way of its own: use bf16=True, or load the model in torch.float16, for which lowtide scales it"
        )
    for name in ("torch_compile", "auto_find_batch_size"):
        if getattr(args, name, False):
            raise ValueError(f"{name}=True and the fused update do not go together: set it to False")
    if trainer.optimizer is not None and not hasattr(trainer.optimizer, "update_param"):
        raise ValueError(
            f"the Trainer was given {type(trainer.optimizer).__name__}, which cannot update in the backward pass: leave optimizers= out, or "
            "give it one of lowtide's (Lomo, AdaLomo, PerParameter)"
        )
    if args.dataloader_drop_last and args.gradient_accumulation_steps > 1:
        raise ValueError(
            "dataloader_drop_last=True would drop whole steps, because the batches of a step become one: set it to False, or "
            "gradient_accumulation_steps=1 with a larger per_device_train_batch_size"
        )


def _without_checkpointing(trainer: Any) -> None:
    names = (
        "activation_checkpointing",
        "gradient_checkpointing",
    )  # the name of today, and that before transformers 5.20
    if any(getattr(trainer.args, name, False) for name in names):
        _logger.info("gradient checkpointing is switched off: blocks recompute their activations anyway")
    for name in names:
        if hasattr(trainer.args, name):
            setattr(trainer.args, name, False)
    if any(getattr(module, "gradient_checkpointing", False) for module in trainer.model.modules()):
        disable = next(
            (f for name in names if (f := getattr(trainer.model, f"{name}_disable", None)) is not None), None
        )
        if disable is not None:
            disable()


def _accumulate_in_micro_batches(trainer: Any, own_loss: bool) -> int | None:
    """One batch in place of several; returns how many rows each of them had, None for no accumulation.

    Args:
        trainer: the trainer.
        own_loss: it computes its loss by itself.
    """
    args = trainer.args
    number, rows = args.gradient_accumulation_steps, args.per_device_train_batch_size
    if number <= 1:
        return None
    if getattr(trainer, "padding_free", False) or getattr(trainer.data_collator, "padding_free", False):
        raise ValueError(
            f"without padding all sequences are one row, which cannot go through the layers in {number} parts: set padding_free=False (with "
            f"packing, packing_strategy='wrapped'), or gradient_accumulation_steps=1 with per_device_train_batch_size={rows * number}"
        )
    args.per_device_train_batch_size, args.gradient_accumulation_steps = rows * number, 1
    trainer._train_batch_size = args.train_batch_size
    trainer.accelerator.gradient_accumulation_steps = 1
    is_trl = type(trainer).__module__.startswith("trl.")
    if trainer.label_smoother is not None or trainer.compute_loss_func is not None or (own_loss and not is_trl):
        _logger.warning(
            "the loss is not the model's own: it gets all %d rows of a step at once, with all of their logits, and a mean over a batch is one over "
            "the step. If that takes too much memory, lower gradient_accumulation_steps",
            rows * number,
        )
    _logger.info("%d batches of %d rows become one of %d in micro-batches of %d", number, rows, rows * number, rows)
    return int(rows)


class _Fused:
    """The engine of one trainer.

    Args:
        trainer: the trainer.
        kind: as ``optimizer`` of :func:`fuse_trainer`.
        rounding: as there.
        options: of :func:`lowtide.fuse`.
    """

    def __init__(self, trainer: Any, kind: Any, rounding: str | None, options: dict[str, Any]) -> None:
        self.trainer, self.kind, self.rounding, self.options = trainer, kind, rounding, options
        self.engine: Engine | None = None
        self._state: dict[str, Any] | None = None  # of an engine that has been removed
        self._accelerator: Any = None
        self._load = trainer._load_optimizer_and_scheduler
        self._save = trainer._save_optimizer_and_scheduler

    def install(self) -> None:
        """Put the methods below in the place of the trainer's."""
        trainer = self.trainer
        trainer.create_optimizer = self.create_optimizer
        trainer.train = _Training(trainer.train, self)
        trainer._load_optimizer_and_scheduler = self.load
        trainer._save_optimizer_and_scheduler = self.save
        self._take_over_accelerator()

    def _take_over_accelerator(self) -> None:
        """A hyperparameter search makes a new one for every trial."""
        accelerator = self.trainer.accelerator
        if accelerator is not self._accelerator:
            self._accelerator = accelerator
            self._backward, self._clip = accelerator.backward, accelerator.clip_grad_norm_
            accelerator.backward, accelerator.clip_grad_norm_ = self.backward, self.clip_grad_norm

    def create_optimizer(self, model: Any = None) -> Optimizer:
        """The optimizer, over the fused model."""
        trainer = self.trainer
        self.remove()
        self._take_over_accelerator()
        model = trainer.model if model is None else model
        made = getattr(trainer.optimizer, "optimizer", trainer.optimizer)  # accelerate wraps it
        if made is None:
            made, self._state = (
                self._make(model),
                None,
            )  # what was remembered is of another model: that of an earlier trial
        trainer.optimizer = made
        self.engine = fuse(model, made, clip_grad_norm=trainer.args.max_grad_norm or None, **self.options)
        if self._state is not None:
            self.engine.load_state_dict(self._state)
        return made

    def _make(self, model: Any) -> Optimizer:
        args, trainer = self.trainer.args, self.trainer
        decayed = set(trainer.get_decay_parameter_names(model))
        named = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
        groups = [
            {"params": [p for name, p in named if name in decayed], "weight_decay": args.weight_decay},
            {"params": [p for name, p in named if name not in decayed], "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        if callable(self.kind):
            return self.kind(groups)
        asked = str(getattr(args.optim, "value", args.optim))
        name = self.kind or (asked if asked in ("lomo", "adalomo") else "adalomo")
        if self.kind is None and asked != name and not asked.startswith("adamw_torch"):
            _logger.warning(
                "optim=%s is not used: the optimizer is adalomo, unless fuse_trainer is told another", asked
            )
        if args.learning_rate == _DEFAULT_LR_OF_ARGUMENTS and name in _USUAL_LR:
            _logger.warning(
                "learning_rate is TrainingArguments' default of 5e-5, which is one for AdamW: %s usually wants about %g",
                name,
                _USUAL_LR[name],
            )
        if name == "adalomo" and args.max_grad_norm == _DEFAULT_NORM_OF_ARGUMENTS and self._clips_in_two_passes():
            _logger.warning(
                "max_grad_norm is TrainingArguments' default of 1: clipping by it takes a second backward pass in every step, and adalomo, "
                "which bounds its own steps, does not need it; max_grad_norm=0 spares it"
            )
        rounded: dict[str, Any] = {"lr": args.learning_rate, "rounding": self.rounding, "rounding_seed": args.seed}
        if name in ("lomo", "adalomo"):
            return (Lomo if name == "lomo" else AdaLomo)(groups, **rounded)
        if name == "sgd":
            return PerParameter(torch.optim.SGD, groups, **rounded)
        betas = (args.adam_beta1, args.adam_beta2)
        return PerParameter(torch.optim.AdamW, groups, betas=betas, eps=args.adam_epsilon, **rounded)

    def _clips_in_two_passes(self) -> bool:
        return self.options.get("clip", "exact") == "exact" and not self.options.get("clip_memory_bytes")

    def backward(self, loss: Tensor, **kwargs: Any) -> None:
        """In the place of ``Accelerator.backward``."""
        if self.engine is None:
            self._backward(loss, **kwargs)
        else:
            self.engine.backward(loss)

    def clip_grad_norm(self, parameters: Iterable[Tensor], max_norm: float, norm_type: float = 2) -> Any:
        """In the place of ``Accelerator.clip_grad_norm_``: the norm before clipping."""
        if self.engine is None:
            return self._clip(parameters, max_norm, norm_type)
        return torch.tensor(float("nan") if self.engine.grad_norm is None else self.engine.grad_norm)

    def save(self, output_dir: str) -> None:
        """What the trainer saves of the optimizer, and the engine's own state."""
        self._save(output_dir)
        if self.engine is not None:
            path = Path(output_dir) / ENGINE_FILE
            temporary = path.with_suffix(".tmp")
            temporary.write_text(json.dumps(self.engine.state_dict()), encoding="utf-8")
            os.replace(temporary, path)

    def load(self, checkpoint: str | None) -> None:
        """The same back."""
        optimizer = getattr(self.trainer.optimizer, "optimizer", self.trainer.optimizer)
        settings = {name for group in optimizer.param_groups for name in group}
        self._load(checkpoint)
        missing = sorted(settings.difference(*(group for group in optimizer.param_groups)))
        if missing:
            raise ValueError(
                f"{checkpoint} has the state of another optimizer than {type(optimizer).__name__} (it lacks {', '.join(missing)}): resume with the optimizer "
                "of the run, or train from its model"
            )
        path = Path(checkpoint or ".") / ENGINE_FILE
        if checkpoint is not None and self.engine is not None and path.is_file():
            self.engine.load_state_dict(json.loads(path.read_text(encoding="utf-8")))

    def remove(self) -> None:
        """Model and optimizer are ordinary again; what the engine remembers is kept for the next time."""
        if self.engine is not None:
            self._state = self.engine.state_dict()
            model = self.engine.model
            self.engine.remove()
            self.engine = None
            model.__dict__.pop("_original_forward", None)  # accelerate's, of a forward that is gone with the engine


class _Training:
    """``trainer.train``, after which the model is an ordinary one, also after an error or Ctrl-C."""

    def __init__(self, train: Callable[..., Any], fused: _Fused) -> None:
        functools.update_wrapper(self, train)
        self._train, self._fused = train, fused

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return self._train(*args, **kwargs)
        finally:
            self._fused.remove()
