"""The training run. ``_run_steps`` is the whole algorithm (LOMO, arXiv 2306.09782); the rest prepares and reports.

Order of things: settings, output directory, checkpoint, data, model. So what can be refused at once is refused before anything
that takes long is loaded, and the output directory is made only when training can begin. In it:

    config.yaml    the settings, all of them; ``lowtide train --config`` takes it again
    metrics.jsonl  one event a line (see ``events.py``)
    checkpoints/   what the run goes on from after an interruption (see ``checkpoint.py``)
    model/         the trained model, which plain transformers opens
    trackers/      with ``track``: what a tracker keeps of the run (see ``trackers.py``)
    adapter/       with LoRA: the adapters alone, which are merged into the model (see ``adapters.py``)
"""

from __future__ import annotations

import gc
import os
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

from ..evaluation import LossResult
from ..fusing import Engine
from ..log import get_logger
from ..models.lora import ADAPTER_FOLDER
from ..ranks import Ranks
from ..weights.direct_io import flush_directory
from .adapters import save_trained
from .bad_steps import MAX_ROLLBACKS, RollBack, SpikeGuard, TooManyBadStepsError, too_many
from .beginning import before_bad_steps, begin, same_checkpoint
from .checkpoint import Checkpoint, set_aside
from .config import ABOUT_RESUMING, TrainConfig
from .config_checks import check_for_ranks
from .events import EventLog, Listener
from .progress import ConsoleProgress
from .report import peak_memory_bytes
from .result import TrainResult
from .resume import (
    restore,
    saved_loss,
    set_later_aside,
)
from .run import Run, prepare
from .samples import take_samples
from .saver import Saver
from .setup import without_cache
from .together import joined, note_launch, on_first, same_everywhere
from .trackers import Trackers

_logger = get_logger(__name__)


def train(config: TrainConfig, *, on_event: Listener | None = None, show_progress: bool = True) -> TrainResult:
    """Fine-tune a model as ``config`` says, all its parameters unless that says otherwise, and save it to ``config.output``.

    Same settings, same machine, same number of threads: the same losses and weights bit for bit on the CPU, in one go or resumed
    from checkpoints. Sets torch's global random seed, and its number of threads if ``config.threads`` is given.

    Started by ``torchrun`` on several processes, or where a process group is there already, they share the run: see
    ``docs/multi-gpu.md``. The output directory must be one that all of them see.

    Args:
        config: the settings.
        on_event: called with every event (see ``events.py``), before the progress display.
        show_progress: show a bar (on a terminal) or lines (elsewhere) on standard output.

    Raises:
        ValueError: the settings or the data cannot work, or are not those of the checkpoint.
        FileNotFoundError: there is no such data, model or checkpoint.
        FileExistsError: the output directory is not empty.
        MemoryError: the weights do not fit in memory.
        OSError: the disk is full or failed.
        ModuleNotFoundError: there are to be adapters, and peft is not installed; or a tracker is not.
        RuntimeError: the loss stayed not finite for many steps. No model is saved then. Or another process of the run is gone or
            has failed (``RankLostError``, ``OtherRankError``).
    """
    config.validate()
    with joined(config) as ranks, ExitStack() as stack:
        check_for_ranks(config, ranks.size)
        shared = {
            name: value for name, value in config.to_dict().items() if name != "data_cache"
        }  # each machine may have its own
        same_everywhere(ranks, "settings", shared)
        output = Path(config.output).expanduser()
        config, log, checkpoint, finished = begin(config, output, ranks, stack)
        if finished is not None:
            return finished
        listener = on_event if ranks.is_first else None
        skip_to: int | None = None
        for rollbacks_left in range(MAX_ROLLBACKS, -1, -1):
            try:
                return _run(config, output, ranks, log, checkpoint, skip_to, listener, show_progress and ranks.is_first)
            except RollBack as asked:
                checkpoint, skip_to = (
                    same_checkpoint(ranks, partial(before_bad_steps, asked, output)),
                    asked.num_batches,
                )
                if checkpoint is None or not rollbacks_left:
                    raise TooManyBadStepsError(str(asked)) from None
                _logger.warning("%s; back to step %d, and on behind the bad data", asked, checkpoint.step)
                log = EventLog(output / "metrics.jsonl", existing=True) if ranks.is_first else None
            gc.collect()  # the model that was given up is in circles of references
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    raise AssertionError("unreachable")


def _run(
    config: TrainConfig,
    output: Path,
    ranks: Ranks,
    log: EventLog | None,
    checkpoint: Checkpoint | None,
    skip_to: int | None,
    on_event: Listener | None,
    show_progress: bool,
) -> TrainResult:
    """One run, from the beginning or from a checkpoint, to its end or an interruption.

    Args:
        log: of a run that is resumed.
        skip_to: after a rollback, the batch of the data to go on with; what the log has of the bad steps stays there.
        others: as in :func:`train`.
    """
    run = prepare(config, output, checkpoint=checkpoint, show_progress=show_progress, ranks=ranks)
    with ExitStack() as stack:
        first_step = 0 if checkpoint is None else checkpoint.step

        def remove_engine(kind: type[BaseException] | None, *_: object) -> None:
            # After an error the working copy may be all that is left of the weights; a rollback has a checkpoint, and before the
            # first step they are still where they were loaded from.
            run.engine.remove(keep_copy=kind not in (None, RollBack) and run.report.num_steps > first_step)

        stack.push(remove_engine)
        guard = SpikeGuard(config.spike_factor, checkpoint.state["recent_losses"] if checkpoint else ())
        if checkpoint is not None:
            restore(run, checkpoint, skip_to)

        def make_ready() -> EventLog:
            if checkpoint is not None:
                set_later_aside(output, checkpoint)
            output.mkdir(parents=True, exist_ok=True)
            for saved in (output / "model", output / ADAPTER_FOLDER):
                if saved.exists():  # of this run, before it was continued with more steps
                    set_aside(saved)
            note_launch(output, ranks)
            _write_settings(config, output)
            opened = log or EventLog(output / "metrics.jsonl", existing=config.resume is not None)
            stack.callback(opened.close)
            if skip_to is None:
                opened.cut(0 if checkpoint is None else checkpoint.state["metrics_bytes"])
            listeners = run.report.listeners
            listeners.append(opened)
            if on_event is not None:
                listeners.append(on_event)
            if config.track:
                listeners.append(stack.enter_context(Trackers(config.track, output)))
            if show_progress:
                listeners.append(stack.enter_context(ConsoleProgress(log_every=config.log_every)))
            return opened

        log = on_first(ranks, make_ready)
        saver = Saver(run, output, log, guard)
        if show_progress:
            run.stop.notice = "Stopping when this step is done and saved. Once more stops now, and loses what came after the last checkpoint."
        stack.enter_context(run.stop)
        before, after, stopped = _evaluate_train_evaluate(run, saver, checkpoint)
        model_dir = saver.save(interrupted=True) if stopped else save_trained(run, output)
        result = TrainResult(
            num_steps=run.report.num_steps,
            num_skipped=run.report.num_skipped,
            loss_before=before,
            loss_after=after,
            peak_memory_bytes=peak_memory_bytes(run.device),
            output=output,
            model_dir=model_dir,
            wall_s=run.report.seconds(),
            interrupted=stopped,
            signal_number=run.stop.signal_number,
        )
        run.report.end(result)
    return result


def _evaluate_train_evaluate(
    run: Run, saver: Saver, checkpoint: Checkpoint | None
) -> tuple[LossResult | None, LossResult | None, bool]:
    """(both scores, of which the second is None if the run was interrupted in its steps; whether it was interrupted)."""
    if run.ranks.is_first:
        run.report.config(**run.facts())
    with without_cache(run.model):
        if checkpoint is None:
            saver.loss_before = run.evaluate()
            take_samples(run)
        else:
            saver.loss_before = saved_loss(checkpoint.state)
            run.report.resume(str(checkpoint.path), run.num_batches)
            if checkpoint.state["owes_evaluation"]:
                run.evaluate()
        _run_steps(run, saver)
        if run.asked()[0]:
            return saver.loss_before, None, True
        loss_after = run.evaluate()
        take_samples(run)
        return saver.loss_before, loss_after, run.asked()[0]


def _run_steps(run: Run, saver: Saver) -> None:
    """The training loop."""
    model, engine, report = run.model, run.engine, run.report
    for epoch, batch in run.batches():
        rates = run.rates()
        with run.memory_of_step() as trace:
            loss = model(**batch).loss
            value = run.value_of(loss)
            spike = saver.guard.is_spike(value)
            if spike:
                loss = loss.detach()  # so that its graph is gone before the next one is made
            else:
                engine.backward(loss)  # every parameter is updated as its gradient completes
            run.close_step()
        report.step(run.num_tokens, value, **rates, epoch=epoch, **(SPIKE if spike else outcome(engine)))
        if trace is not None:
            report.memory(trace.to_event(), batch["input_ids"].numel())
        stop, save = run.asked(saver.is_due())
        _look_at(run, saver, value, stop)
        if stop:
            break
        if run.evaluation_is_due():
            run.evaluate()
        if save:
            saver.save_or_go_on()


def _look_at(run: Run, saver: Saver, loss: float, stop: bool) -> None:
    """After a step: whether too many in a row were bad. A run that is to stop is not rolled back: if the next step is bad, too, that is done when it is resumed.

    Raises:
        RollBack, TooManyBadStepsError: they were.
    """
    num_bad = run.report.num_skipped_in_a_row
    if num_bad == 0:
        saver.guard.took(loss)
    if num_bad < run.config.max_bad_steps or (stop and run.config.on_bad_steps == "rollback"):
        return
    newest = saver.newest()
    message = too_many(run.config, run.report.num_steps, num_bad, None if newest is None else str(newest))
    if run.config.on_bad_steps == "rollback":
        raise RollBack(run.num_batches, run.report.num_steps - num_bad, message)
    raise TooManyBadStepsError(message)


def outcome(engine: Engine) -> dict[str, Any]:
    """What the engine says of the step just taken."""
    return {
        "grad_norm": engine.grad_norm,
        "skipped": engine.step_skipped,
        "partial": engine.step_partial,
        "loss_scale": engine.loss_scale and engine.loss_scale.scale,
        "lost_updates": engine.lost_update_share,
        "spike": False,
    }


# The same of a step that was not taken, because its loss was a spike.
SPIKE = {
    "grad_norm": None,
    "skipped": True,
    "partial": False,
    "loss_scale": None,
    "lost_updates": None,
    "spike": True,
}


def _write_settings(config: TrainConfig, output: Path) -> None:
    settings = {name: value for name, value in config.to_dict().items() if name not in ABOUT_RESUMING}
    temporary = output / ".config.yaml.tmp"
    with temporary.open("w", encoding="utf-8") as file:
        yaml.safe_dump(settings, file, sort_keys=False, allow_unicode=True)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, output / "config.yaml")
    flush_directory(output)
