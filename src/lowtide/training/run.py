"""A run before its first step: model, data, optimizer and engine, made in order of their cost."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import version
from pathlib import Path
from platform import python_version
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from ..data.chat import date_of, fix_date
from ..data.tokens import IGNORED
from ..evaluation import LossResult, choice_accuracies, evaluate_loss
from ..fusing import fuse
from ..log import get_logger
from ..models import Adapters, ChunkedLoss, load_model, parse_dtype, set_attention
from ..models.context import check_context
from ..models.lora import require_peft
from ..models.padding import padding_id
from ..planning import computes_bfloat16
from ..ranks import ALONE, Ranks
from ..sharding import shard
from ..weights.sharding import make_mesh
from .adapters import make_adapters, make_optimizers, optimizer_state_bytes
from .checkpoint import Checkpoint
from .config import TrainConfig
from .data import TrainData, TrainInputs, find_data, load_data
from .interrupt import StopAfterStep
from .memory_trace import TRACED_STEP, MemoryTrace
from .packing import exact_rows
from .planned import Placement, place_as_set, plan_placement, predicted_by_kind
from .report import Reporter, count_tokens, program_bytes
from .resume import micro_batch_size_of, versions
from .schedule import make_schedule
from .setup import check_disk, count_steps, resolve_device
from .together import on_all, on_first, one_after_another, own_rows, random_seed, same_everywhere
from .tokenizer import tokenizer_of
from .trackers import require_trackers

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..fusing import Engine

_logger = get_logger(__name__)


@dataclasses.dataclass(kw_only=True)
class Run:
    """What the loop works with, once all of it is there.

    Attributes:
        adapters: of LoRA, if the settings ask for them.
        optimizers: of the model's weights, and of the adapters; together they hold all that is trained.
        schedulers: one for each of them, with the same schedule.
        ranks: the processes that share the run; each has its rows of every batch.
        num_batches: batches of the data that have been used, those that were passed over included.
        num_tokens: of the last one, over all ranks.
        others: as named.
    """

    config: TrainConfig
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    data: TrainData
    placement: Placement
    device: str
    adapters: Adapters | None
    optimizers: list[Optimizer]
    engine: Engine
    schedulers: list[LambdaLR]
    num_steps: int
    report: Reporter
    stop: StopAfterStep
    ranks: Ranks
    num_batches: int = 0
    num_tokens: int = 0

    def batches(self) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """(epoch, this rank's rows of the batch, on the device) of every step that is left, epoch after epoch."""
        per_epoch = len(self.data.train)
        first, skipped = divmod(self.num_batches, per_epoch)
        endless = (
            (epoch, batch)
            for epoch in itertools.count(first)
            for batch in self.data.train.epoch(epoch, skipped if epoch == first else 0)
        )
        for epoch, batch in itertools.islice(endless, self.num_steps - self.report.num_steps):
            self.num_batches += 1
            self.num_tokens = count_tokens(batch)
            own = batch if self.ranks.size == 1 else own_rows(batch, self.ranks)
            own = {name: value.to(self.device) for name, value in own.items()}
            if self.ranks.size > 1 and self.engine.chunked_loss is None:
                # The model's own loss, divided so that the mean over ranks is that over all counted tokens.
                num_counted = int((batch["labels"][:, 1:] != IGNORED).sum())
                own["num_items_in_batch"] = torch.tensor(num_counted / self.ranks.size, device=self.device)
            yield epoch, own

    def value_of(self, loss: Tensor) -> float:
        """What the loss of this rank's rows, which the model has returned, says of the whole batch; the same on every rank."""
        value = loss.item()
        if self.ranks.size > 1 and self.engine.chunked_loss is None:
            return self.ranks.sum([value])[0] / self.ranks.size
        return value

    def asked(self, save_is_due: bool = False) -> tuple[bool, bool]:
        """(To stop, to save): what any rank was told, and what the first rank's clock says. All ranks call this and get the same."""
        if self.ranks.size == 1:
            return self.stop.requested, save_is_due
        stop, save = self.ranks.sum([float(self.stop.requested), float(save_is_due and self.ranks.is_first)])
        self.stop.requested |= stop > 0  # a signal that came meanwhile counts, after the next step
        return stop > 0, save > 0

    def close_step(self) -> None:
        """After the backward pass, which has updated everything: the next step may begin, with the next learning rates."""
        for optimizer in self.optimizers:
            optimizer.step()
        for scheduler in self.schedulers:
            scheduler.step()
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def memory_of_step(self) -> AbstractContextManager[MemoryTrace | None]:
        """Around a step: follows its memory if it is the one that is to be shown."""
        if not self.ranks.is_first or self.report.num_steps + 1 != min(TRACED_STEP, self.num_steps):
            return nullcontext()
        return MemoryTrace(self.engine, self.optimizers, self.device)()

    def rates(self) -> dict[str, float]:
        """The learning rates of the next step: ``lr``, and ``lora_lr`` if adapters have one of their own."""
        return dict(zip(("lr", "lora_lr"), (float(each.get_last_lr()[0]) for each in self.schedulers), strict=False))

    def evaluation_is_due(self) -> bool:
        """After the step just taken; after the last one there is an evaluation anyway."""
        every, step = self.config.eval_every, self.report.num_steps
        return every is not None and step % every == 0 and step < self.num_steps

    def evaluate(self) -> LossResult | None:
        """Score the held-out data, if there is any, and report it."""
        if self.data.held_out is None:
            return None
        batches = self.data.held_out.epoch(0)
        own = batches if self.ranks.size == 1 else (own_rows(batch, self.ranks) for batch in batches)
        result = evaluate_loss(self.model, own, self.ranks)
        found = choice_accuracies(self.model, self.tokenizer, self.data.choices) if self.data.choices else {}
        self.report.evaluation(result, {name: each.accuracy for name, each in found.items()})
        return result

    def facts(self) -> dict[str, Any]:
        """What the settings come to, for the first event."""
        stats, added = self.data.stats, [] if self.adapters is None else self.adapters.parameters()
        return {
            "config": self.config.to_dict(),
            "num_parameters": sum(param.numel() for param in self.model.parameters()),
            "num_adapter_parameters": sum(param.numel() for param in added),
            "num_steps": self.num_steps,
            "steps_per_epoch": len(self.data.train),
            "lr": self.config.effective_lr,
            "device": self.device,
            "num_ranks": self.ranks.size,
            "clip_grad_norm": self.config.effective_clip_grad_norm,
            "plan": None if self.placement.plan is None else self.placement.plan.to_dict(),
            "predicted_memory": predicted_by_kind(
                self.config, self.device, self.placement, self.model.config, self.ranks.size
            ),
            "program_bytes": program_bytes(self.model, self.device),
            "versions": {"lowtide": version("lowtide"), "python": python_version(), **versions(self.device)},
            **{f"data_{name}": value for name, value in dataclasses.asdict(stats).items()},
        }


def prepare(
    config: TrainConfig,
    output: Path,
    model: PreTrainedModel | None = None,
    *,
    checkpoint: Checkpoint | None = None,
    show_progress: bool = False,
    ranks: Ranks = ALONE,
) -> Run:
    """Everything that can be refused, in order of its cost; nothing is written yet but a working copy of the weights.

    Args:
        config: the settings, which have been validated.
        output: where the model will be saved.
        model: saves loading it.
        checkpoint: where to load model and tokenizer from, instead of what the settings say.
        show_progress: of the data, while it is read and tokenised.
        ranks: that share the run; each of them calls this.

    Raises:
        What ``train`` raises before its first step.
    """
    device = resolve_device(config.device)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    loaded = config
    if (
        checkpoint is not None
    ):  # a planner with other free memory must not choose other micro-batches: their sums differ
        loaded = dataclasses.replace(
            config, model=str(checkpoint.path), micro_batch_size=micro_batch_size_of(config, checkpoint.state)
        )
    trusted = config.trust_remote_code

    def look() -> tuple[TrainInputs, PreTrainedTokenizerBase]:
        if config.lora_rank:
            require_peft()
        require_trackers(config.track or ())
        return find_data(config), tokenizer_of(loaded, checkpoint)

    found, tokenizer = on_all(ranks, look)
    began = None if checkpoint is None else checkpoint.state.get("date")
    fix_date(tokenizer, ranks.broadcast(began or date_of(tokenizer).isoformat()))
    data = one_after_another(ranks, lambda: load_data(config, tokenizer, found, show_progress=show_progress))
    # The settings of the run stay as they are: they are compared when it is resumed.
    loaded = dataclasses.replace(loaded, micro_batch_size=loaded.rows_at_once(data.train.packing))
    sharded = ranks.size > 1
    planned = config.weights == "auto" and not sharded
    placement = plan_placement(loaded, device, output) if planned else place_as_set(loaded, sharded=sharded)
    dtype = parse_dtype(config.dtype)
    if model is None:
        lazy = placement.streamed or sharded
        model = on_all(
            ranks,
            lambda: load_model(
                loaded.model, dtype=dtype, device="cpu" if lazy else device, trust_remote_code=trusted, lazy=lazy,
                merge_adapters=checkpoint is None,
            ),
        )  # fmt: skip
    if config.attention is not None:
        set_attention(model, config.attention)
    for batches in (data.train, data.held_out):
        if batches is not None:
            batches.pad_token_id = padding_id(tokenizer, model)
    check_context(model, data.num_positions, "set max_seq_len (--max-seq-len) to {limit}")
    torch.manual_seed(random_seed(config.seed, ranks.rank))  # here: it must not depend on what loading the model drew
    adapters = make_adapters(config, model, checkpoint)
    state = optimizer_state_bytes(config, model, adapters)
    on_first(ranks, lambda: check_disk(output, model, placement.directory, config.num_checkpoints_at_once, state))
    if sharded:
        _shard(config, model, device)
    if dtype == torch.bfloat16 and not computes_bfloat16(device):
        _logger.warning(
            "this processor has no instructions for bfloat16: products are computed in float32 and rounded, so steps take longer "
            "than with dtype float32, which takes twice the memory"
        )
    optimizers = make_optimizers(config, model.train(), adapters)
    engine = fuse(
        model,
        optimizers,
        micro_batch_size=placement.micro_batch_size,
        clip_grad_norm=config.effective_clip_grad_norm,
        clip_grad_value=config.clip_grad_value,
        clip=config.clip,
        clip_warmup_steps=config.clip_warmup_steps,
        clip_memory_bytes=placement.clip_memory_bytes,
        keep_activations=placement.keep_activations,
        weights=placement.weights,
        device=device if placement.streamed else None,
        block_inputs=placement.block_inputs,
    )
    try:
        data = exact_rows(config, model, tokenizer, data, ranks)
    except BaseException:
        engine.remove(keep_copy=False)  # nothing has been trained yet
        raise
    num_steps = count_steps(config, len(data.train))
    if sharded:
        same_everywhere(
            ranks,
            "data and steps",
            {"data": data.train.fingerprint, "steps": num_steps, "steps per epoch": len(data.train)},
        )
    schedule = make_schedule(config.schedule, num_steps, config.warmup_ratio)
    return Run(
        config=config,
        model=model,
        tokenizer=tokenizer,
        data=data,
        placement=placement,
        device=device,
        adapters=adapters,
        optimizers=optimizers,
        engine=engine,
        schedulers=[LambdaLR(optimizer, schedule) for optimizer in optimizers],
        num_steps=num_steps,
        report=Reporter(device),
        stop=StopAfterStep(),
        ranks=ranks,
    )


def _shard(config: TrainConfig, model: PreTrainedModel, device: str) -> None:
    """Spread the weights over all ranks.

    Raises:
        ValueError: the model has a loss of its own that cannot be a mean over the tokens of all ranks.
    """
    shard(
        model,
        make_mesh("cuda" if device.startswith("cuda") else "cpu", config.ranks_per_node),
        reduce_dtype="auto" if config.reduce_dtype == "float32" else None,
        offload=config.weights == "cpu",
    )
    if ChunkedLoss.of(model) is None and not getattr(model, "accepts_loss_kwargs", True):
        raise ValueError(
            f"{type(model).__name__} computes a loss of its own that cannot be told how many tokens all processes have: train it in one "
            "process"
        )
