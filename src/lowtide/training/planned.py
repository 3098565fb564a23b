"""What the planner decides for a run: homes of the weights, micro-batch, and whether spare memory makes clipping cheaper."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..log import get_logger
from ..models import find_blocks, load_config, parse_dtype
from ..planning import (
    Footprint,
    Limits,
    Plan,
    Speeds,
    StepShape,
    available_host_bytes,
    device_available_bytes,
    find_speeds,
    sharded_footprint,
)
from .config import TrainConfig
from .rng import random_state, set_random_state
from .setup import existing_folder

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_logger = get_logger(__name__)

# Of the memory that is free now: what else the machine does, and what a prediction may be off by.
_USABLE = 0.9
# Of what a plan leaves free, for gradients that exact clipping keeps between its passes.
_FOR_CLIPPING = 0.5
_GRADIENTS = 1.02  # all of them, in bytes of the weights: there is one pass then


@dataclasses.dataclass(frozen=True)
class Placement:
    """How ``fuse`` is called.

    Attributes:
        weights: its argument.
        micro_batch_size: its argument.
        block_inputs: its argument.
        clip_memory_bytes: its argument.
        keep_activations: its argument.
        directory: of the working copy, if there is one.
        plan: what the planner said; None if the settings name the home.
    """

    weights: Any
    micro_batch_size: int | None
    block_inputs: str
    clip_memory_bytes: int
    keep_activations: int
    directory: Path | None
    plan: Plan | None = None

    @property
    def streamed(self) -> bool:
        """Some weights live elsewhere, so that they must not be loaded as a whole."""
        return self.weights != "device"


def place_as_set(config: TrainConfig, sharded: bool = False) -> Placement:
    """The home that the settings name; of weights that are spread over ranks the device, whatever they name."""
    directory = None if sharded or config.weights in ("device", "cpu") else Path(config.weights).expanduser()
    weights = "device" if sharded else directory or config.weights
    kept = config.keep_activations or 0
    micro = config.micro_batch_size
    if kept and micro is not None:
        if (
            micro < config.batch_size
        ):  # not as set, which was checked: packed rows of flash attention, or a checkpoint's
            raise ValueError(
                f"keep_activations needs the whole batch in a layer at once, and in this run it is {micro} at a time (packed sequences with "
                "flash attention, or the checkpoint's micro-batches): leave it out"
            )
        micro = None
    if micro is not None and micro >= config.batch_size:
        micro = None
    return Placement(weights, micro, "device", config.clip_memory_bytes, kept, directory)


def step_shape(config: TrainConfig, device: str, model_config: PreTrainedConfig | None = None) -> StepShape:
    """The largest step of a run, for the planner."""
    exact = config.effective_clip_grad_norm is not None and config.clip == "exact"
    if model_config is None:
        model_config = load_config(config.model, trust_remote_code=config.trust_remote_code)
        if config.attention == "eager":  # which makes all scores
            model_config._attn_implementation = "eager"
    return StepShape(
        model_config,
        find_blocks=find_blocks,
        dtype=parse_dtype(config.dtype),
        batch_size=config.batch_size,
        seq_len=config.max_seq_len,
        optimizer=config.optimizer,
        rounding=config.rounding,
        exact_clipping=exact or config.clip == "adaptive",  # whose first steps are exact
        device=device,
        trust_remote_code=config.trust_remote_code,
    )


def plan_placement(config: TrainConfig, device: str, output: Path) -> Placement:
    """The fastest plan that fits in what is free now. A working copy would be made in the output directory.

    Raises:
        MemoryError: nothing fits; the message says what would.
        ValueError, FileNotFoundError, ConnectionError: there is no such model.
    """
    shape = step_shape(config, device)
    existing = existing_folder(output)
    limits = Limits(
        device=int(_USABLE * device_available_bytes(device)),
        host=int(_USABLE * available_host_bytes()),
        disk=max(0, int(_USABLE * shutil.disk_usage(existing).free) - shape.weights_bytes),  # the trained model, too
    )
    speeds = find_speeds(dtype=shape.dtype, device=device, directory=existing)  # measured in a second or two
    plan = find_plan(shape, config, limits, speeds)
    clip_memory = config.clip_memory_bytes
    wants_memory = shape.exact_clipping and config.clip == "exact" and not clip_memory
    all_gradients = int(_GRADIENTS * shape.weights_bytes)
    if wants_memory and plan.keep_activations and config.keep_activations is None:
        # One pass instead of two spares more than activations do.
        plain = find_plan(shape, dataclasses.replace(config, keep_activations=0), limits, speeds)
        if all_gradients <= _FOR_CLIPPING * (limits.device - plain.footprint.totals()["device"]):
            less = dataclasses.replace(limits, device=limits.device - all_gradients)
            plan = find_plan(shape, config, less, speeds)
    directory = output / "weights"
    homes = {name: {"device": "device", "host": "cpu", "disk": os.fspath(directory)}[home] for name, home in plan.homes}
    moves = set(homes.values()) != {"device"}
    micro = plan.micro_batch_size if plan.micro_batch_size < config.batch_size else None
    if wants_memory:
        clip_memory = max(0, int(_FOR_CLIPPING * (limits.device - plan.footprint.totals()["device"])))
    return Placement(
        weights=homes if moves else "device",
        micro_batch_size=micro,
        block_inputs="cpu" if plan.block_inputs == "host" else "device",
        clip_memory_bytes=clip_memory,
        keep_activations=plan.keep_activations,
        directory=directory if os.fspath(directory) in homes.values() else None,
        plan=plan,
    )


def find_plan(shape: StepShape, config: TrainConfig, limits: Limits, speeds: Speeds) -> Plan:
    """The plan alone."""
    from ..planning import make_plan

    return make_plan(
        shape,
        limits=limits,
        speeds=speeds,
        micro_batch_size=config.micro_batch_size,
        keep_activations=config.keep_activations,
    )


def predicted(
    config: TrainConfig,
    device: str,
    placement: Placement,
    model_config: PreTrainedConfig | None = None,
    num_ranks: int = 1,
) -> Footprint:
    """What the planner says of a placement, chosen by it or not; of one of several ranks that share the model."""
    if num_ranks > 1:
        return sharded_footprint(
            step_shape(config, device, model_config),
            num_ranks,
            micro_batch_size=placement.micro_batch_size,
            ranks_per_node=config.ranks_per_node,
            reduce_dtype="auto" if config.reduce_dtype == "float32" else "weights",
            offload=config.weights == "cpu",
        )
    if placement.plan is not None:
        return placement.plan.footprint
    home = "disk" if placement.directory is not None else {"cpu": "host"}.get(config.weights, config.weights)
    shape = step_shape(config, device, model_config).keeping(placement.keep_activations)
    return shape.footprint(home, micro_batch_size=placement.micro_batch_size)


def predicted_by_kind(
    config: TrainConfig, device: str, placement: Placement, model_config: PreTrainedConfig, num_ranks: int = 1
) -> dict[str, int] | None:
    """Bytes on the device by kind, for the record of a run; None where the planner has no answer, which never stops a run.

    Args:
        config: the settings.
        device: where the run computes.
        placement: of its weights.
        model_config: of the model that was loaded, which saves reading it again.
        num_ranks: that share the model; the bytes are then those of one of them.
    """
    if config.lora_rank:  # adapters are not planned for
        return None
    random = random_state()
    try:
        return dict(predicted(config, device, placement, model_config, num_ranks).device)
    except Exception as error:
        _logger.debug("no prediction of the memory: %s", error)
        return None
    finally:
        set_random_state(random)
