"""The training run. ``_run_steps`` is the whole algorithm (LOMO, arXiv 2306.09782); the rest prepares and reports.

Order of things: settings, output directory, data, model. So what can be refused at once is refused before anything
that takes long is loaded, and the output directory is made only when training can begin. In it:

    config.yaml    the settings, all of them; ``lowtide train --config`` takes it again
    metrics.jsonl  one event a line (see ``events.py``)
    model/         the trained model, which plain transformers opens
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ..evaluation import LossResult, evaluate_loss
from ..fusing import fuse
from ..log import get_logger
from ..models import load_model, load_tokenizer, parse_dtype, save_model
from ..planning import computes_bfloat16
from .config import TrainConfig
from .events import EventLog, Listener
from .interrupt import StopAfterStep
from .planned import Placement, place_as_set, plan_placement
from .progress import ConsoleProgress
from .report import Reporter, peak_memory_bytes
from .schedule import make_schedule
from .setup import (
    TrainData,
    check_disk,
    check_output,
    count_steps,
    encode_data,
    make_optimizer,
    read_data,
    resolve_device,
    without_cache,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..fusing import Engine

_logger = get_logger(__name__)

# So many steps without a finite loss in a row do not pass by themselves: the weights or the data are broken.
_MAX_SKIPPED_IN_A_ROW = 10


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    Attributes:
        num_steps: steps taken, skipped ones included.
        num_skipped: steps that updated nothing, because their loss or gradient norm was not finite.
        loss_before: held-out score before the first step; None when nothing is evaluated.
        loss_after: held-out score after the last step; None when nothing is evaluated or the run was interrupted.
        peak_memory_bytes: largest resident set of the process so far, or most CUDA memory allocated in the run.
        output: the output directory.
        model_dir: the saved model, inside ``output``.
        wall_s: seconds from the first evaluation to the saved model.
        interrupted: Ctrl-C ended the run early; the model was saved all the same.
    """

    num_steps: int
    num_skipped: int
    loss_before: LossResult | None
    loss_after: LossResult | None
    peak_memory_bytes: int
    output: Path
    model_dir: Path
    wall_s: float
    interrupted: bool


def train(config: TrainConfig, *, on_event: Listener | None = None, show_progress: bool = True) -> TrainResult:
    """Fine-tune all parameters of a model as ``config`` says and save it to ``config.output``.

    Same settings, same machine, same number of threads: the same losses and weights bit for bit on the CPU. Sets
    torch's global random seed, and its number of threads if ``config.threads`` is given.

    Args:
        config: the settings.
        on_event: called with every event (see ``events.py``), before the progress display.
        show_progress: show a bar (on a terminal) or lines (elsewhere) on standard output.

    Raises:
        ValueError: the settings or the data cannot work.
        FileNotFoundError: there is no such data or model.
        FileExistsError: the output directory is not empty.
        MemoryError: the weights do not fit in memory.
        RuntimeError: the loss stayed not finite for many steps. No model is saved then.
    """
    config.validate()
    output = check_output(config.output)
    run = prepare(config, output)
    output.mkdir(parents=True, exist_ok=True)
    (output / "config.yaml").write_text(yaml.safe_dump(config.to_dict(), sort_keys=False, allow_unicode=True))
    with ExitStack() as stack:
        stack.callback(run.engine.remove)
        listeners = run.report.listeners
        listeners.append(stack.enter_context(EventLog(output / "metrics.jsonl")))
        if on_event is not None:
            listeners.append(on_event)
        if show_progress:
            listeners.append(stack.enter_context(ConsoleProgress(log_every=config.log_every)))
        stack.enter_context(run.stop)
        loss_before, loss_after = _evaluate_train_evaluate(run)
        away = run.engine.state_dict_of_model() if run.engine.home.streamed else None
        save_model(run.model, run.tokenizer, output / "model", away)
        del away
        result = TrainResult(
            num_steps=run.report.num_steps,
            num_skipped=run.report.num_skipped,
            loss_before=loss_before,
            loss_after=loss_after,
            peak_memory_bytes=peak_memory_bytes(run.device),
            output=output,
            model_dir=output / "model",
            wall_s=run.report.seconds(),
            interrupted=run.stop.requested,
        )
        run.report.end(result)
        run.engine.remove()
        run.engine.home.discard()
    return result


def prepare(config: TrainConfig, output: Path, model: PreTrainedModel | None = None) -> _Run:
    """Everything that can be refused, in order of its cost; nothing is written yet. ``model`` saves loading it."""
    device = resolve_device(config.device)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    records, held_out = read_data(config)
    tokenizer = load_tokenizer(config.model, trust_remote_code=config.trust_remote_code)
    data = encode_data(config, records, held_out, tokenizer)
    placement = plan_placement(config, device, output) if config.weights == "auto" else place_as_set(config)
    dtype, trusted = parse_dtype(config.dtype), config.trust_remote_code
    if model is None:
        where = "cpu" if placement.streamed else device
        model = load_model(config.model, dtype=dtype, device=where, trust_remote_code=trusted, lazy=placement.streamed)
    check_disk(output, model, placement.directory)
    if dtype == torch.bfloat16 and not computes_bfloat16(device):
        _logger.warning(
            "this processor has no instructions for bfloat16: products are computed in float32 and rounded, so steps take longer "
            "than with dtype float32, which takes twice the memory"
        )
    torch.manual_seed(config.seed)  # here, so that it does not depend on what loading the model drew
    optimizer = make_optimizer(config, model.train())
    engine = fuse(
        model,
        optimizer,
        micro_batch_size=placement.micro_batch_size,
        clip_grad_norm=config.effective_clip_grad_norm,
        clip_grad_value=config.clip_grad_value,
        clip=config.clip,
        clip_warmup_steps=config.clip_warmup_steps,
        clip_memory_bytes=placement.clip_memory_bytes,
        weights=placement.weights,
        device=device if placement.streamed else None,
        block_inputs=placement.block_inputs,
    )
    num_steps = count_steps(config, len(data.train))
    schedule = make_schedule(config.schedule, num_steps, config.warmup_ratio)
    return _Run(
        config=config,
        model=model,
        tokenizer=tokenizer,
        data=data,
        placement=placement,
        device=device,
        optimizer=optimizer,
        engine=engine,
        scheduler=torch.optim.lr_scheduler.LambdaLR(optimizer, schedule),
        num_steps=num_steps,
        report=Reporter(device),
        stop=StopAfterStep(),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Run:
    """What the loop works with, once all of it is there."""

    config: TrainConfig
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    data: TrainData
    placement: Placement
    device: str
    optimizer: Optimizer
    engine: Engine
    scheduler: LRScheduler
    num_steps: int
    report: Reporter
    stop: StopAfterStep

    def batches(self) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """(epoch, batch on the device) of every step, epoch after epoch."""
        endless = ((epoch, batch) for epoch in itertools.count() for batch in self.data.train.epoch(epoch))
        for epoch, batch in itertools.islice(endless, self.num_steps):
            yield epoch, {name: value.to(self.device) for name, value in batch.items()}

    def evaluation_is_due(self) -> bool:
        """After the step just taken; after the last one there is an evaluation anyway."""
        every, step = self.config.eval_every, self.report.num_steps
        return every is not None and step % every == 0 and step < self.num_steps

    def evaluate(self) -> LossResult | None:
        """Score the held-out data, if there is any, and report it."""
        if self.data.held_out is None:
            return None
        result = evaluate_loss(self.model, self.data.held_out.epoch(0))
        self.report.evaluation(result)
        return result


def _evaluate_train_evaluate(run: _Run) -> tuple[LossResult | None, LossResult | None]:
    """Both scores; the second is None if the run was interrupted."""
    run.report.config(**_facts(run))
    with without_cache(run.model):
        before = run.evaluate()
        _run_steps(run)
        return before, None if run.stop.requested else run.evaluate()


def _run_steps(run: _Run) -> None:
    """The training loop."""
    model, engine, optimizer, scheduler, report = run.model, run.engine, run.optimizer, run.scheduler, run.report
    for epoch, batch in run.batches():
        lr = scheduler.get_last_lr()[0]
        loss = model(**batch).loss
        engine.backward(loss)  # every parameter is updated as its gradient completes
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        report.step(batch, loss.item(), lr=lr, epoch=epoch, **outcome(engine))
        if report.num_skipped_in_a_row >= _MAX_SKIPPED_IN_A_ROW:
            raise RuntimeError(_broken(run))
        if run.stop.requested:
            break
        if run.evaluation_is_due():
            run.evaluate()


def outcome(engine: Engine) -> dict[str, Any]:
    """What the engine says of the step just taken."""
    return {
        "grad_norm": engine.grad_norm,
        "skipped": engine.step_skipped,
        "partial": engine.step_partial,
        "loss_scale": engine.loss_scale and engine.loss_scale.scale,
        "lost_updates": engine.lost_update_share,
    }


def _facts(run: _Run) -> dict[str, Any]:
    """What the settings come to, for the first event."""
    stats = run.data.stats
    return {
        "config": run.config.to_dict(),
        "num_parameters": sum(param.numel() for param in run.model.parameters()),
        "num_steps": run.num_steps,
        "steps_per_epoch": len(run.data.train),
        "lr": run.config.effective_lr,
        "device": run.device,
        "plan": None if run.placement.plan is None else run.placement.plan.to_dict(),
        **{f"data_{name}": value for name, value in dataclasses.asdict(stats).items()},
    }


def _broken(run: _Run) -> str:
    return (
        f"the loss or the gradient was not finite in {_MAX_SKIPPED_IN_A_ROW} steps in a row, up to step "
        f"{run.report.num_steps}; training stopped and no model was saved. Try a lower lr than "
        f"{run.config.effective_lr:g}, or clip_grad_norm 1"
    )
