"""Which settings of a training run cannot work, each with a message that starts with the field's name."""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Sequence

from .choices import (
    ADAPTERS,
    ATTENTIONS,
    BAD_RECORDS,
    CLIPS,
    DTYPES,
    ON_BAD_STEPS,
    ON_SAVE_ERROR,
    OPTIMIZERS,
    REDUCE_DTYPES,
    ROUNDINGS,
    SCHEDULES,
    TRACKERS,
    TRUNCATIONS,
)
from .config import TrainConfig


def check(config: TrainConfig) -> None:
    """Check every field on its own and the combinations.

    Raises:
        ValueError: a value that cannot work.
    """
    for each in (_check_present, _check_task, _check_choices, _check_ranges, _check_adapters, _check_combinations):
        each(config)


def _check_combinations(config: TrainConfig) -> None:
    if config.micro_batch_size is not None and config.micro_batch_size > config.batch_size:
        raise ValueError(
            f"micro_batch_size must not be larger than batch_size ({config.batch_size}), got {config.micro_batch_size}"
        )
    if config.samples and config.eval_fraction == 0 and config.eval_data is None and config.task is None:
        raise ValueError(
            "samples are answers to held-out prompts: give eval_data or an eval_fraction above 0, or leave them out"
        )
    if config.save_every is not None and (config.save_steps == 0 or config.save_seconds == 0):
        raise ValueError("save_every must be at least one step, or a time above 0")
    if config.on_bad_steps == "rollback" and config.save_every is None:
        raise ValueError("on_bad_steps rollback needs checkpoints to go back to: set save_every")
    if config.rounding in ("stochastic", "compensated") and config.dtype in ("float32", "fp32"):
        raise ValueError(
            f"rounding {config.rounding} is for 16-bit weights and means nothing for dtype float32: leave it out"
        )
    if config.clip == "adaptive" and config.effective_clip_grad_norm is None:
        raise ValueError("clip adaptive needs clip_grad_norm, the bound of its first steps: 1 is usual")
    _ = config.data_cache_size_bytes  # raises if it is no size
    if config.rank_timeout_seconds <= 0:
        raise ValueError(f"rank_timeout must be a time above 0, got {config.rank_timeout!r}")
    if config.keep_activations and (config.micro_batch_size or config.batch_size) < config.batch_size:
        raise ValueError(
            "keep_activations keeps those of the whole batch, and micro_batch_size is for want of memory: leave one of them out"
        )
    if config.keep_activations and config.weights not in ("device", "auto"):
        raise ValueError(
            f"keep_activations is for layers whose weights stay on the device, and weights is {config.weights}: leave one of them out"
        )
    if config.clip_memory_bytes and (config.effective_clip_grad_norm is None or config.clip == "adaptive"):
        raise ValueError("clip_memory is for clip exact with a clip_grad_norm: leave it out")


def _check_present(config: TrainConfig) -> None:
    for name in ("model", "output"):
        if not getattr(config, name):
            raise ValueError(f"{name} must not be empty")
    if config.chat_template == "":
        raise ValueError("chat_template must name a file, or be left out")
    for name in ("data", "eval_data", "lora_targets", "track"):
        paths = getattr(config, name)
        if isinstance(paths, str):
            setattr(config, name, [paths])
        elif paths is not None and name != "track" and not all(paths):
            raise ValueError(f"{name} must not contain an empty {'name' if name == 'lora_targets' else 'path'}")
    if not config.data:
        raise ValueError("data must name at least one file")
    if config.eval_data is not None and not config.eval_data:
        raise ValueError("eval_data must name at least one file, or be left out")
    if config.lora_targets is not None and not config.lora_targets:
        raise ValueError("lora_targets must name at least one layer, or be left out")


def _check_task(config: TrainConfig) -> None:
    if config.task is None:
        return
    if not config.task.startswith("superglue/"):
        raise ValueError(f"task must be superglue/ and a name, as in superglue/rte, got {config.task!r}")
    if len(config.data) != 1 or config.eval_data is not None:
        raise ValueError("task needs data to be one directory, and no eval_data: what is held out is part of the task")


def _check_choices(config: TrainConfig) -> None:
    for name, allowed in (
        ("optimizer", OPTIMIZERS),
        ("schedule", SCHEDULES),
        ("dtype", DTYPES),
        ("clip", CLIPS),
        ("bad_records", BAD_RECORDS),
        ("truncation", TRUNCATIONS),
        ("on_save_error", ON_SAVE_ERROR),
        ("on_bad_steps", ON_BAD_STEPS),
        ("reduce_dtype", REDUCE_DTYPES),
        ("rounding", (*ROUNDINGS, None)),
        ("attention", (*ATTENTIONS, None)),
    ):
        _check_choice(name, getattr(config, name), allowed)
    for value in config.track or ():
        _check_choice("track", value, TRACKERS)
    places = ("device", "cpu", "auto")
    if config.weights not in places and os.sep not in config.weights and not os.path.isdir(config.weights):
        raise ValueError(
            f"weights must be device, cpu, auto, or a directory with a separator in its name, as ./{config.weights or 'NAME'}, got "
            f"{config.weights!r}"
        )
    kind, _, index = config.device.partition(":")
    if not (config.device in ("auto", "cpu", "cuda") or (kind == "cuda" and index.isdigit())):
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {config.device!r}")


def _check_choice(name: str, value: str | None, allowed: Sequence[str | None]) -> None:
    if value not in allowed:
        words = [word for word in allowed if word is not None]
        nearest = difflib.get_close_matches(str(value), words, n=1)
        hint = f" (did you mean {nearest[0]}?)" if nearest else ""
        raise ValueError(f"{name} must be one of {', '.join(words)}, got {value!r}{hint}")


def _check_ranges(config: TrainConfig) -> None:
    counts = (
        "batch_size",
        "micro_batch_size",
        "max_steps",
        "epochs",
        "eval_every",
        "log_every",
        "threads",
        "clip_warmup_steps",
        "keep_checkpoints",
        "max_bad_steps",
        "lora_alpha",
        "ranks_per_node",
    )
    for name, least in [
        *((name, 1) for name in counts),
        ("max_seq_len", 2),
        ("seed", 0),
        ("data_seed", 0),
        ("lora_rank", 0),
        ("keep_activations", 0),
        ("samples", 0),
    ]:
        value = getattr(config, name)
        if value is not None and value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    norm = config.clip_grad_norm
    if norm is not None and not 0 <= norm < float("inf"):
        raise ValueError(f"clip_grad_norm must be a number above 0, or 0 for no limit, got {norm}")
    for name in ("lr", "lora_lr", "clip_grad_value"):
        value = getattr(config, name)
        # written so that NaN fails too
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"{name} must be a number above 0, got {value}")
    if config.spike_factor is not None and not 1 < config.spike_factor < float("inf"):
        raise ValueError(f"spike_factor must be a number above 1, got {config.spike_factor}")
    if not 0 <= config.weight_decay < float("inf"):
        raise ValueError(f"weight_decay must be 0 or more, got {config.weight_decay}")
    for name in ("eval_fraction", "warmup_ratio", "lora_dropout"):
        if not 0 <= getattr(config, name) < 1:
            raise ValueError(f"{name} must be at least 0 and less than 1, got {getattr(config, name)}")


def _check_adapters(config: TrainConfig) -> None:
    if not config.lora_rank:
        for field in dataclasses.fields(config):
            if field.metadata["group"] == ADAPTERS and getattr(config, field.name) != field.default:
                raise ValueError(f"{field.name} means nothing without adapters: set lora_rank")
        return
    if config.weights != "device":
        raise ValueError(
            f"lora_rank needs weights device, got {config.weights!r}: neither other homes nor the planner know adapters"
        )
    if config.lora_only:
        for name in ("lr", "rounding"):
            if getattr(config, name) is not None:
                instead = "; the rate of the adapters is lora_lr" if name == "lr" else ""
                raise ValueError(
                    f"{name} is of the model's own weights, which lora_only freezes: leave it out{instead}"
                )


def check_for_ranks(config: TrainConfig, num_ranks: int) -> None:
    """What several processes cannot do.

    Raises:
        ValueError: a value that works in one process only.
    """
    if num_ranks == 1:
        return
    if config.keep_activations:
        raise ValueError(f"keep_activations needs one process, and {num_ranks} take part: leave it out")
    if config.batch_size < num_ranks:
        raise ValueError(
            f"batch_size is that of all processes together, and {config.batch_size} cannot be shared by {num_ranks}: raise it, or start fewer"
        )
    if config.weights not in ("device", "cpu", "auto"):
        raise ValueError(
            f"weights must be device, or cpu for host memory, where {num_ranks} processes share a model, got {config.weights!r}: a disk "
            "home needs one process"
        )
    if config.device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu or cuda where every process has its own GPU, got {config.device!r}")
    if config.ranks_per_node is not None and num_ranks % config.ranks_per_node:
        raise ValueError(
            f"{num_ranks} processes cannot be divided into groups of ranks_per_node {config.ranks_per_node}"
        )
    if config.samples:
        raise ValueError(f"samples need one process, and {num_ranks} take part: leave them out")
    if config.lora_rank:
        raise ValueError(f"lora_rank needs one process, and {num_ranks} take part: adapters cannot be sharded yet")
