"""The memory of one training step, for any homes of its weights and any micro-batch.

Shape letters: B = samples of a step, S = tokens of a sample.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..log import get_logger
from ..optim.base import SIXTEEN_BIT
from ..weights.pool import slot_sizes
from .block_trace import BlockCall, WorkingSet, trace_block
from .fallback import untraced_step, untraced_working_set
from .footprint import Footprint, Unit, skeleton, sum_bytes
from .hardware import computes_bfloat16
from .left_out import left_out_flops
from .moments import StepTrace
from .step_trace import trace_step
from .tracing import HEAP_BELOW, KEPT, POOLS, STATE, WEIGHTS, WORKING, Bytes, added
from .updates import state_bytes, update_temporaries

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_logger = get_logger(__name__)

# As in weights/staging.py: between disk and an accelerator there are four buffers in pinned host memory.
STAGING_BYTES = 4 * 64 * 1024**2
_PAGE = 4096  # bytes; a slot begins and ends with a page, as direct I/O asks for
_TRIM_FROM_BYTES = 16 * 1024**2  # as in weights/home.py: around larger blocks free memory is given back

FindBlocks = Callable[[nn.Module], list[nn.Module]]


class UntraceableError(ValueError):
    """The model cannot be run on the meta device, and what is asked for cannot be estimated."""


class StepShape:
    """A training step of one model with one batch, of which the memory can be asked for different plans.

    Args:
        config: of the model.
        find_blocks: the decoder layers of a model, see ``lowtide.models.find_blocks``.
        dtype: of weights and computation.
        batch_size, seq_len: B and S of a step.
        optimizer: adalomo, lomo, adamw or sgd.
        rounding: of 16-bit weights, see :class:`lowtide.Lomo`.
        exact_clipping: by norm, in two passes.
        masked: sequences are padded or packed, as ``lowtide train`` makes them, so that there is an attention mask.
        device: "cpu" or "cuda".
        trust_remote_code: run Python code that comes with the config.

    Raises:
        ValueError: there is no such model, it has no blocks, or a number is out of range.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        *,
        find_blocks: FindBlocks,
        dtype: torch.dtype,
        batch_size: int,
        seq_len: int,
        optimizer: str = "lomo",
        rounding: str | None = None,
        exact_clipping: bool = False,
        masked: bool = True,
        device: str = "cpu",
        trust_remote_code: bool = False,
    ) -> None:
        if batch_size < 1 or seq_len < 2:
            raise ValueError(f"batch_size must be at least 1 and seq_len at least 2, got {batch_size}, {seq_len}")
        self.config, self.dtype = _with_sdpa(config), dtype
        self.batch_size, self.seq_len = batch_size, seq_len
        self.optimizer, self.rounding = optimizer, rounding
        self.exact_clipping, self.masked = exact_clipping, masked
        self.device = "cpu" if device == "cpu" else "cuda"
        self.gathered, self.num_kept = False, 0
        self.model = skeleton(self.config, dtype, trust_remote_code)
        self.blocks = find_blocks(self.model)
        if not self.blocks:
            raise ValueError(
                f"no blocks were found in {type(self.model).__name__}: only Hugging Face decoder models can be planned"
            )
        self._working: dict[Any, WorkingSet] = {}
        in_float32 = self.device == "cpu" and dtype in SIXTEEN_BIT and not computes_bfloat16()
        self.drops_attention = self.device == "cpu" and _attention_dropout(self.config) > 0
        self._trace_options: dict[str, Any] = {"heap_below": HEAP_BELOW[self.device], "float32_products": in_float32}

    @property
    def counts_all_activations(self) -> bool:
        """Whether what a block keeps for its backward pass is known well enough to keep it in many.

        Not where 16-bit products run in float32 slices, which blocks that are computed again do alone, nor with attention dropout on a
        CPU, where torch makes all scores and the stand-in for attention none.
        """
        return not (self._trace_options["float32_products"] or self.drops_attention)

    @property
    def recomputed(self) -> list[nn.Module]:
        """The blocks of which only the inputs are kept."""
        return self.blocks[: len(self.blocks) - self.num_kept]

    def keeping(self, num_blocks: int) -> StepShape:
        """The same step where the activations of so many blocks, the last ones, are kept; see ``keep_activations`` of :func:`lowtide.fuse`."""
        other = self.resized(batch_size=self.batch_size, seq_len=self.seq_len, gathered=self.gathered)
        other.num_kept, other._working = min(max(0, num_blocks), len(self.blocks)), self._working
        return other

    def resized(self, *, batch_size: int, seq_len: int, gathered: bool = False) -> StepShape:
        """The same model with another batch.

        Args:
            batch_size, seq_len: B and S.
            gathered: its weights are spread over ranks, and ``step`` has no updates: these are of a rank's rows, see ``sharded.py``.
        """
        other = copy.copy(self)
        for name in ("step", "step_in_slices", "left_out_flops", "largest_activations"):
            other.__dict__.pop(name, None)
        other.batch_size, other.seq_len, other._working, other.gathered = batch_size, seq_len, {}, gathered
        return other

    @cached_property
    def units(self) -> tuple[Unit, ...]:
        """Embedding, decoder layers and head, in the order of the forward pass."""
        names = {module: name for name, module in self.model.named_modules()}
        layers = [_unit(names[block], block, is_layer=True) for block in self.blocks]
        model: Any = self.model
        ends = [
            _unit(names[m], m, is_layer=False) for m in (model.get_input_embeddings(), model.get_output_embeddings())
        ]
        if model.get_output_embeddings().weight is model.get_input_embeddings().weight:
            ends.pop()
            return (*ends, *layers)
        return (ends[0], *layers, ends[1])

    @cached_property
    def weights_bytes(self) -> int:
        """Of all parameters; tied ones count once."""
        return sum_bytes(self.model.parameters())

    @cached_property
    def num_parameters(self) -> int:
        """Elements of all parameters; tied ones count once."""
        return sum(param.numel() for param in self.model.parameters())

    @cached_property
    def state_bytes(self) -> int:
        """Of the optimizer state, once every parameter was updated."""
        return sum(state_bytes(param, self.optimizer, self.rounding) for param in self.model.parameters())

    @cached_property
    def largest_parameter_bytes(self) -> int:
        """Of the gradient that plain LOMO holds."""
        return max(param.nbytes for param in self.model.parameters())

    @cached_property
    def step(self) -> StepTrace:
        """The step outside its blocks, with whole gradients of head and embedding."""
        return self._traced()

    @cached_property
    def left_out_flops(self) -> float:
        """Operations that one recompute of all blocks leaves out."""
        return left_out_flops(self.step.calls)

    @cached_property
    def step_in_slices(self) -> StepTrace:
        """The same where these gradients come in slices, as ``fuse(vocabulary_slices=None)`` chooses."""
        if self.gathered or self.optimizer not in ("lomo", "adalomo"):
            return self.step
        head = self.optimizer == "lomo" and self.dtype != torch.float16
        return self._traced(head_in_slices=head, embedding_in_rows=True)

    def _traced(self, **slices: bool) -> StepTrace:
        update = update_temporaries(self.optimizer, self.device) if not self.gathered else _nothing
        try:
            return trace_step(
                self.model,
                self.recomputed,
                batch_size=self.batch_size,
                seq_len=self.seq_len,
                masked=self.masked,
                two_passes=self.exact_clipping,
                update=update,
                keeps=self.num_kept > 0,
                **slices,
                **self._trace_options,
            )
        except Exception as error:  # whatever a model of someone else's does with tensors that have no memory
            _logger.warning("%s cannot be traced (%s): estimated instead", type(self.model).__name__, error)
            if self.num_kept:
                raise UntraceableError(
                    f"{type(self.model).__name__} cannot be traced with activations that are kept"
                ) from error
            return untraced_step(self.model, self.blocks, self.batch_size, self.seq_len, self.exact_clipping)

    @cached_property
    def largest_activations(self) -> int:
        """Bytes that a block holds at most when it takes the whole batch, gradients of weights aside."""
        largest = 0
        for call in {_signature(call): call for call in self.step.calls}.values():
            try:
                peak = trace_block(call, micro_batch_size=self.batch_size, update=_nothing).backward
            except Exception:  # said before, in working_sets
                peak = untraced_working_set(call, self.batch_size).backward
            largest = max(largest, peak.get(WORKING, 0))
        return largest

    def working_sets(self, micro_batch_size: int, *, applies: bool = True) -> list[WorkingSet]:
        """Of every block; blocks that are alike are traced once.

        Args:
            micro_batch_size: samples that go through a block at a time.
            applies: False for the first pass of exact clipping.
        """
        return [self._working_set(call, micro_batch_size, applies) for call in self.step_in_slices.calls]

    def gathered_working_sets(self, micro_batch_size: int, sums_dtype: torch.dtype | None) -> list[WorkingSet]:
        """Of every block where its weights are spread over ranks, once they have been gathered: all gradients of a block are in it.

        Args:
            micro_batch_size: samples that go through a block at a time.
            sums_dtype: in which gradients are added up over micro-batches; None for that of the weights.
        """
        return [self._gathered_working_set(call, micro_batch_size, sums_dtype) for call in self.step.calls]

    def _gathered_working_set(self, call: BlockCall, size: int, sums_dtype: torch.dtype | None) -> WorkingSet:
        key = (_signature(call), size, sums_dtype, "gathered")
        if key not in self._working:
            try:
                traced = trace_block(
                    call,
                    micro_batch_size=size,
                    update=_nothing,
                    gathered=True,
                    sums_dtype=sums_dtype,
                    **self._trace_options,
                )
            except Exception as error:  # as above
                _logger.warning("%s cannot be traced (%s): estimated instead", type(call.block).__name__, error)
                traced = untraced_working_set(call, size, gathered=True, sums_dtype=sums_dtype)
            self._working[key] = traced
        return self._working[key]

    def _working_set(self, call: BlockCall, size: int, applies: bool) -> WorkingSet:
        key = (_signature(call), size, applies)
        if key not in self._working:
            update = update_temporaries(self.optimizer, self.device)
            try:
                traced = trace_block(call, micro_batch_size=size, update=update, applies=applies, **self._trace_options)
            except Exception as error:  # as above
                _logger.warning("%s cannot be traced (%s): estimated instead", type(call.block).__name__, error)
                traced = untraced_working_set(call, size)
            self._working[key] = traced
        return self._working[key]

    def footprint(
        self,
        homes: Mapping[str, str] | str = "device",
        *,
        micro_batch_size: int | None = None,
        block_inputs: str = "device",
    ) -> Footprint:
        """Bytes by kind and place.

        Args:
            homes: of each unit by name: device, host or disk; or one for all of them. On a CPU host is the same as device.
            micro_batch_size: samples that go through a block at a time; None for the whole batch.
            block_inputs: device, or host: where the inputs of the blocks are kept from forward to backward.
        """
        size = min(micro_batch_size or self.batch_size, self.batch_size)
        of = {unit.name: homes if isinstance(homes, str) else homes[unit.name] for unit in self.units}
        if self.device == "cpu":  # host memory is where weights are computed on: nothing moves
            of = {name: "device" if home == "host" else home for name, home in of.items()}
        measure = self.working_sets(size, applies=False) if self.exact_clipping else ()
        device, host = self.step_in_slices.peak(self.working_sets(size), measure, trims_around(self)), Bytes()
        if block_inputs == "host" and self.device != "cpu":
            device, host = self._inputs_in_host_memory(device)
        weights = self._weights_by_home(of)
        pools = sum(self._pool_bytes(of, home) for home in ("host", "disk"))
        device = added(device, {WEIGHTS: weights["device"], STATE: self.state_bytes, POOLS: pools})
        host = added(host, {WEIGHTS: weights["host"]})
        if self.device != "cpu" and weights["disk"]:
            host = added(host, {POOLS: STAGING_BYTES})
        return Footprint(device, host, added({WEIGHTS: weights["disk"]}))

    def _pool_bytes(self, of: Mapping[str, str], home: str) -> int:
        streamed = [unit for unit in self.units if of[unit.name] == home]
        uses = list(range(len(streamed)))
        if streamed and not streamed[0].is_layer and self.units[-1].is_layer:  # tied: the head is the first again
            uses.append(0)
        return sum(slot_sizes([-(-unit.num_bytes // _PAGE) * _PAGE for unit in streamed], uses)) if streamed else 0

    def _inputs_in_host_memory(self, device: Bytes) -> tuple[Bytes, Bytes]:
        # As in weights/inputs.py: on the device there are then that of the block that runs and two that are on their way.
        visiting = min(self.step.kept_bytes, 3 * self.step.input_bytes)
        others = self.step.kept_bytes - self.step.input_bytes * len(self.recomputed)  # masks and positions stay
        kept = min(device.get(KEPT, 0), visiting + max(0, others))
        return added({**device, KEPT: kept}), {KEPT: self.step.input_bytes * len(self.recomputed)}

    def _weights_by_home(self, of: Mapping[str, str]) -> dict[str, int]:
        result = {"device": 0, "host": 0, "disk": 0}
        for unit in self.units:
            result[of[unit.name]] += unit.num_bytes
        # final norm and whatever else belongs to no unit
        result["device"] += self.weights_bytes - sum(unit.num_bytes for unit in self.units)
        return result


def footprint(
    config: PreTrainedConfig,
    *,
    homes: Mapping[str, str] | str = "device",
    micro_batch_size: int | None = None,
    block_inputs: str = "device",
    **shape: Any,
) -> Footprint:
    """Bytes by kind and place of a training step; see :class:`StepShape` for ``shape`` and its method for the rest."""
    step = StepShape(config, **shape)
    return step.footprint(homes, micro_batch_size=micro_batch_size, block_inputs=block_inputs)


def trims_around(shape: StepShape) -> list[bool]:
    """Of each block, whether it is so large that free memory is given back around it."""
    return [unit.num_bytes >= _TRIM_FROM_BYTES for unit in shape.units if unit.is_layer]


def _nothing(_: Tensor) -> Bytes:
    return {}


def _unit(name: str, module: nn.Module, *, is_layer: bool) -> Unit:
    params = list(module.parameters())
    return Unit(name, sum_bytes(params), sum(param.numel() for param in params), is_layer)


def _attention_dropout(config: PreTrainedConfig) -> float:
    names = ("attention_dropout", "attn_pdrop", "attn_dropout", "attention_probs_dropout_prob")
    return max((float(getattr(config, name, None) or 0.0) for name in names), default=0.0)


def _signature(call: BlockCall) -> Any:
    params = tuple((name, param.shape) for name, param in call.block.named_parameters())
    return type(call.block), params, tuple((tensor.shape, tensor.dtype) for tensor in call.tensors())


def _with_sdpa(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config without attention kernels that have to be installed: transformers then chooses what the model supports."""
    config = copy.deepcopy(config)
    if "flash" in (getattr(config, "_attn_implementation", None) or ""):
        config._attn_implementation = "sdpa"
    return config
