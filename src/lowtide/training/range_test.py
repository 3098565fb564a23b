"""The learning-rate range test (Smith 2017, arXiv 1506.01186, section 3.3) on a run's own model and data.

Real fused steps are taken on the run's training batches while the rate rises exponentially from one that changes next
to nothing to one that breaks the model, where the test ends. What is looked at is not the loss of the batches: with
eight sequences that scatters more from batch to batch than a rate changes it. It is the loss of one fixed set of
sequences after every step, held-out ones if the run has any, else the first training batches, which are then not
trained on before their turn comes again. ``lr_curve.py`` says how a rate is read off the curve.

What the test cannot see: it is short, so it knows nothing of overfitting; and the moments of adamw still remember the
large gradients of its beginning when the rate is high, so there the rate is rather too high than too low.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..evaluation import evaluate_loss
from .config import TrainConfig
from .events import Listener, finite
from .interrupt import StopAfterStep
from .lr_curve import Reading, divergence, read_curve, sweep_rates
from .progress import ConsoleProgress
from .report import count_tokens
from .run import prepare
from .setup import check_output, existing_folder, resolve_device, without_cache
from .snapshot import restored_afterwards
from .trainer import outcome

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..data import Batches
    from .run import Run

# Lowest and highest rate of the sweep. The highest costs nothing, because the sweep ends where the loss diverges. Plain
# gradient steps are as long as the gradient, whose norm may be anything unless it is clipped; see ``default_range``.
_RANGES = {"adalomo": (1e-5, 1.0), "lomo": (1e-5, 100.0), "adamw": (1e-6, 1.0), "sgd": (1e-5, 100.0)}
_UNIT_NORM_RANGE = (1e-3, 100.0)
STEPS_PER_DECADE = 15
# Sequences whose loss is watched. More of them cost time in every step; the scatter of the curve comes from the weights.
_NUM_WATCHED = 16
# So many steps in a row that update nothing count as divergence; a few are usual while a loss scale is being found.
_MOST_SKIPPED = 5


@dataclasses.dataclass(frozen=True)
class LrPoint:
    """One step of the sweep.

    Attributes:
        lr: its learning rate.
        loss: of the watched sequences after the step, in nats per counted token; not-a-number or infinity is possible.
        smoothed: the same, smoothed over neighbouring rates.
        batch_loss: of the step's own batch, before its update.
        grad_norm: as the engine has it.
        skipped: nothing was updated.
    """

    lr: float
    loss: float
    smoothed: float
    batch_loss: float
    grad_norm: float | None
    skipped: bool


@dataclasses.dataclass(frozen=True)
class LrFinding:
    """What the range test found.

    Attributes:
        recommended: the highest rate of a schedule, for ``TrainConfig.lr``; None if the loss never fell.
        lr_lowest: rate at which the smoothed loss was lowest.
        lr_diverged: rate from which on the loss stayed above the first one; None if that did not happen.
        loss_before: loss of the watched sequences before the first step.
        warnings: why the recommendation deserves no trust, in sentences for people; empty if it does.
        points: the steps, in order.
        num_watched: sequences whose loss was watched.
        held_out: they are held-out data.
        config: the settings that were tested.
    """

    recommended: float | None
    lr_lowest: float
    lr_diverged: float | None
    loss_before: float
    warnings: list[str]
    points: list[LrPoint]
    num_watched: int
    held_out: bool
    config: TrainConfig

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON can hold them; a loss that is not finite is None."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values["config"] = self.config.to_dict()
        values["points"] = [dataclasses.asdict(point) for point in self.points]
        plain: dict[str, Any] = finite(values)
        return plain


def default_range(config: TrainConfig) -> tuple[float, float]:
    """The lowest and the highest rate that are tried."""
    norm = config.effective_clip_grad_norm
    if config.optimizer in ("lomo", "sgd") and norm is not None:
        lowest, highest = _UNIT_NORM_RANGE
        return lowest / norm, highest / norm
    return _RANGES[config.optimizer]


def find_lr(
    config: TrainConfig,
    *,
    model: PreTrainedModel | None = None,
    lr_range: tuple[float, float] | None = None,
    num_steps: int | None = None,
    on_event: Listener | None = None,
    show_progress: bool = True,
) -> LrFinding:
    """Recommend a learning rate for the run that ``config`` describes. Nothing is trained and nothing is written.

    Args:
        config: settings of the run. ``lr``, ``schedule``, ``max_steps``, ``epochs`` and what is evaluated when do not
            matter here.
        model: use this model, loaded from ``config.model``, on the device it is on, instead of loading one. Afterwards
            its weights are those from before, bit for bit, also after an error or Ctrl-C; they are kept in a temporary
            file beside ``config.output`` meanwhile. It must not be fused.
        lr_range: lowest and highest rate; default: ``default_range``.
        num_steps: steps in all, fewer if the loss diverges earlier; default: 15 for every factor of ten.
        on_event: called with every event of the sweep, as in ``train``; ``watched_loss`` is what ``LrPoint.loss`` is.
        show_progress: show a bar (on a terminal) or lines (elsewhere) on standard output.

    Raises:
        ValueError, FileNotFoundError, FileExistsError, MemoryError: as in ``train``.
        RuntimeError: the loss is not finite before anything is changed.
        OSError: the disk has no room for the weights of ``model``.
        KeyboardInterrupt: after Ctrl-C; the step that runs is finished first.
    """
    config.validate()
    if config.lora_rank:
        raise ValueError(
            "find_lr tries one learning rate, and with lora_rank the adapters have their own, lora_lr: leave lora_rank out"
        )
    start, end = lr_range or default_range(config)
    if not 0 < start < end < math.inf:
        raise ValueError(f"lr_range must be two numbers above 0, the lower one first, got {start}, {end}")
    if num_steps is None:
        num_steps = max(10, round(STEPS_PER_DECADE * math.log10(end / start)))
    if num_steps < 10:
        raise ValueError(f"num_steps must be at least 10, got {num_steps}")
    # Enough batches for the sweep, those that are watched included; the rate of every step is set below.
    changes: dict[str, Any] = {
        "lr": None, "epochs": None, "max_steps": num_steps + _NUM_WATCHED, "resume": None, "save_every": None, "on_bad_steps": "stop",
    }  # fmt: skip
    if model is not None and config.weights != "device":
        raise ValueError(
            f"find_lr with a model that is loaded already restores its weights on the device: weights must be device, got {config.weights}"
        )
    if model is not None:
        changes["device"] = str(next(model.parameters()).device)
    tested = dataclasses.replace(config, **changes)
    output = check_output(tested.output)
    device = resolve_device(tested.device)
    with ExitStack() as stack:
        stop = stack.enter_context(StopAfterStep())
        stack.enter_context(torch.random.fork_rng([device] if device.startswith("cuda") else []))
        stack.enter_context(
            nullcontext() if model is None else restored_afterwards(model, existing_folder(output.absolute().parent))
        )
        sweep = _Sweep(
            prepare(tested, output, model, show_progress=show_progress), sweep_rates(start, end, num_steps), stop
        )
        sweep.run.report.listeners.extend([] if on_event is None else [on_event])
        if show_progress:
            sweep.run.report.listeners.append(stack.enter_context(ConsoleProgress(log_every=config.log_every)))
        return sweep.result(config)


class _Sweep:
    """The steps of the test.

    Args:
        run: model, data, optimizer and engine, as for training.
        rates: of the steps.
        stop: asks to end with KeyboardInterrupt.
    """

    def __init__(self, run: Run, rates: Sequence[float], stop: StopAfterStep) -> None:
        self.run, self.rates, self.stop = run, rates, stop
        self.batches = iter(run.batches())
        self.held_out = run.data.held_out is not None
        if run.data.held_out is not None:
            self.watched = list(_spread(run.data.held_out, _NUM_WATCHED))
        else:
            self.watched = [batch for _, batch in itertools.islice(self.batches, _num_batches(run.data.train))]
        self.points: list[LrPoint] = []

    def result(self, config: TrainConfig) -> LrFinding:
        """Take the steps and read the curve. The engine is removed from the model in any case."""
        try:
            with without_cache(self.run.model):
                loss_before = self._watched_loss()
                if not math.isfinite(loss_before):
                    raise RuntimeError(
                        f"the loss of the untrained model is {loss_before}: try another dtype (float32 is safest), or "
                        "look at the data"
                    )
                self._take_steps(loss_before)
        finally:
            self.run.engine.remove()
            self.run.engine.home.discard()
        losses = [point.loss for point in self.points]
        reading: Reading = read_curve(self.rates[: len(losses)], losses, loss_before)
        return LrFinding(
            recommended=reading.recommended,
            lr_lowest=reading.lr_lowest,
            lr_diverged=reading.lr_diverged,
            loss_before=loss_before,
            warnings=reading.warnings,
            points=[
                dataclasses.replace(point, smoothed=loss)
                for point, loss in zip(self.points, reading.smoothed, strict=True)
            ],
            num_watched=sum(len(batch["input_ids"]) for batch in self.watched),
            held_out=self.held_out,
            config=config,
        )

    def _take_steps(self, loss_before: float) -> None:
        run, skipped_in_a_row = self.run, 0
        num_parameters = sum(param.numel() for param in run.model.parameters())
        run.report.config(num_steps=len(self.rates), num_parameters=num_parameters, device=run.device)
        for lr, (epoch, batch) in zip(self.rates, self.batches, strict=False):
            point = self._step(lr, batch)
            skipped_in_a_row = skipped_in_a_row + 1 if point.skipped else 0
            if skipped_in_a_row >= _MOST_SKIPPED or not math.isfinite(point.batch_loss):
                point = dataclasses.replace(point, loss=math.nan)
            self.points.append(point)
            facts = {"lr": lr, "epoch": epoch, "watched_loss": point.loss, **outcome(run.engine)}
            run.report.step(count_tokens(batch), point.batch_loss, **facts)
            if self.stop.requested:
                raise KeyboardInterrupt
            if divergence([point.loss for point in self.points], loss_before) is not None:
                break

    def _step(self, lr: float, batch: dict[str, Tensor]) -> LrPoint:
        (optimizer,), engine = self.run.optimizers, self.run.engine
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss = self.run.model(**batch).loss
        engine.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        watched = self._watched_loss()
        return LrPoint(lr, watched, math.nan, loss.item(), engine.grad_norm, engine.step_skipped)

    def _watched_loss(self) -> float:
        return evaluate_loss(self.run.model, self.watched).loss


def _num_batches(batches: Batches) -> int:
    """So many hold the sequences that are watched."""
    return max(1, min(len(batches), -(-_NUM_WATCHED // batches.batch_size)))


def _spread(batches: Batches, num_sequences: int) -> Iterator[dict[str, Any]]:
    """Batches from all over the data, which may be sorted."""
    wanted = _num_batches(batches)
    every = len(batches) // wanted
    return itertools.islice(batches.epoch(0), 0, wanted * every, every)
