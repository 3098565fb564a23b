"""Trackers: the numbers of a run in TensorBoard, Trackio, Weights & Biases or MLflow, beside ``metrics.jsonl``.

A tracker listens to the events of a run (see ``events.py``): the configuration at the start, the numbers of every step and every
evaluation with their step. None of these packages is imported before it is asked for. What one keeps, or the id by which it
finds its run again when that is resumed, is in the output directory under ``trackers/``. A tracker that fails is left out, with
one warning; the training goes on.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from ..log import get_logger
from .choices import TRACKERS
from .events import Event

_logger = get_logger(__name__)

FOLDER = "trackers"
# Of an event of each kind: those that are numbers are logged as "train/loss" and so on.
_TRAIN = ("loss", "lr", "lora_lr", "grad_norm", "tokens_per_s", "memory_bytes", "epoch", "skipped", "loss_scale")
_EVAL = ("loss", "perplexity", "accuracy_sum", "accuracy_per_token")


class Tracker(Protocol):
    """What one package takes. Its constructor begins its run, or goes on with it."""

    def log_config(self, config: Mapping[str, Any]) -> None:
        """Keep the settings of the run."""

    def log_numbers(self, numbers: Mapping[str, float], step: int) -> None:
        """Keep finite numbers by name, of a step that is not before the last one that was logged."""

    def close(self, failed: bool) -> None:
        """Write what is left, and end the run."""


def require_trackers(names: Sequence[str]) -> None:
    """See that the packages of these trackers are there, without importing them.

    Raises:
        ModuleNotFoundError: one is not; the message says what to type.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ModuleNotFoundError(
                f"track {name} needs the package {name}: pip install 'lowtide[{name}]'", name=name
            )


class Trackers:
    """Listens to a run for several trackers, as a context around it.

    Args:
        names: of them, see ``TRACKERS``.
        output: directory of the run, which exists.
    """

    def __init__(self, names: Sequence[str], output: Path) -> None:
        self._names, self._output = names, output
        self._trackers: dict[str, Tracker] = {}

    def __enter__(self) -> Self:
        for name in self._names:
            try:
                self._trackers[name] = _open(name, self._output)
            except Exception as error:  # whatever it is, the training does not need it
                self._leave_out(name, error)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name, tracker in list(self._trackers.items()):
            try:
                tracker.close(failed=kind is not None)
            except Exception as problem:
                self._leave_out(name, problem)
        self._trackers = {}

    def __call__(self, event: Event) -> None:
        """Take one event; those that have no numbers for a tracker are passed over."""
        numbers = numbers_of(event)
        for name, tracker in list(self._trackers.items()):
            try:
                if event["event"] == "config":
                    tracker.log_config(event["config"])
                elif numbers:
                    tracker.log_numbers(numbers, event["step"])
            except Exception as error:
                self._leave_out(name, error)

    def _leave_out(self, name: str, error: Exception) -> None:
        self._trackers.pop(name, None)
        text = " ".join(str(error).split())[:300]
        _logger.warning(
            "%s failed and is left out from here on, the training goes on: %s: %s", name, type(error).__name__, text
        )


def numbers_of(event: Event) -> dict[str, float]:
    """The finite numbers of an event that trackers draw, by name, as ``train/loss``; none for other kinds of events."""
    wanted = {"train": _TRAIN, "eval": _EVAL}.get(event["event"], ())
    found = {f"{event['event']}/{name}": event.get(name) for name in wanted}
    return {name: float(value) for name, value in found.items() if value is not None and math.isfinite(value)}


def _open(name: str, output: Path) -> Tracker:
    folder = output / FOLDER
    folder.mkdir(exist_ok=True)
    return _MAKERS[name](folder, output.resolve().name)


def _run_id(folder: Path, name: str) -> str | None:
    """By which a tracker finds its run again; None in a new run."""
    path = folder / f"{name}.id"
    return path.read_text(encoding="utf-8").strip() if path.exists() else None


def _keep_run_id(folder: Path, name: str, run_id: str) -> None:
    (folder / f"{name}.id").write_text(run_id + "\n", encoding="utf-8")


class _TensorBoard:
    """Event files in ``trackers/tensorboard``. After a resume a new file hides the steps that are made again."""

    def __init__(self, folder: Path, run_name: str) -> None:
        from tensorboard.compat.proto.event_pb2 import Event as Record
        from tensorboard.compat.proto.event_pb2 import SessionLog
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._record, self._start = Record, SessionLog(status=SessionLog.START)
        directory = folder / "tensorboard"
        self._purged = not directory.exists()
        self._writer = EventFileWriter(str(directory))

    def _add(self, step: int, **content: Any) -> None:
        import time

        self._writer.add_event(self._record(wall_time=time.time(), step=step, **content))

    def log_config(self, config: Mapping[str, Any]) -> None:
        import yaml
        from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
        from tensorboard.compat.proto.tensor_pb2 import TensorProto
        from tensorboard.compat.proto.types_pb2 import DT_STRING

        text = "".join(f"    {line}\n" for line in yaml.safe_dump(dict(config), sort_keys=False).splitlines())
        tensor = TensorProto(dtype=DT_STRING, string_val=[text.encode()])
        metadata = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))
        self._add(0, summary=Summary(value=[Summary.Value(tag="config", tensor=tensor, metadata=metadata)]))

    def log_numbers(self, numbers: Mapping[str, float], step: int) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        if not self._purged:  # TensorBoard drops what earlier files have from this step on
            self._add(step, session_log=self._start)
            self._purged = True
        values = [Summary.Value(tag=name, simple_value=value) for name, value in numbers.items()]
        self._add(step, summary=Summary(value=values))

    def close(self, failed: bool) -> None:
        self._writer.close()


class _Wandb:
    """A run of Weights & Biases; its files are in ``trackers/wandb``. Project, login and offline mode by its own variables."""

    def __init__(self, folder: Path, run_name: str) -> None:
        import os

        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "lowtide"),
            name=run_name,
            dir=str(folder),
            id=_run_id(folder, "wandb"),
            resume="allow",
        )
        _keep_run_id(folder, "wandb", self._run.id)

    def log_config(self, config: Mapping[str, Any]) -> None:
        self._run.config.update(dict(config), allow_val_change=True)

    def log_numbers(self, numbers: Mapping[str, float], step: int) -> None:
        self._run.log(dict(numbers), step=step)

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class _Trackio:
    """A run of Trackio, which keeps it in its own directory (``TRACKIO_DIR``); the output directory has the run's name."""

    def __init__(self, folder: Path, run_name: str) -> None:
        import os
        import uuid

        import trackio

        name = _run_id(folder, "trackio") or f"{run_name}-{uuid.uuid4().hex[:6]}"
        _keep_run_id(folder, "trackio", name)
        self._trackio, self._config = trackio, dict[str, Any]()
        self._begin = {"project": os.environ.get("TRACKIO_PROJECT", "lowtide"), "name": name, "resume": "allow"}
        self._begun = False

    def log_config(self, config: Mapping[str, Any]) -> None:
        self._trackio.init(config=dict(config), **self._begin)  # which takes the settings at the start only
        self._begun = True

    def log_numbers(self, numbers: Mapping[str, float], step: int) -> None:
        self._trackio.log(dict(numbers), step=step)

    def close(self, failed: bool) -> None:
        if self._begun:
            self._trackio.finish()


class _Mlflow:
    """A run of MLflow, in ``trackers/mlflow`` unless ``MLFLOW_TRACKING_URI`` says where."""

    def __init__(self, folder: Path, run_name: str) -> None:
        import os

        import mlflow

        if not os.environ.get("MLFLOW_TRACKING_URI"):
            os.environ.setdefault(
                "MLFLOW_ALLOW_FILE_STORE", "true"
            )  # MLflow 3 asks for it; a database needs more packages
            mlflow.set_tracking_uri((folder / "mlflow").resolve().as_uri())
        self._client = mlflow.MlflowClient()
        self._run = _run_id(folder, "mlflow")
        if self._run is None:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "lowtide")
            known = self._client.get_experiment_by_name(name)
            experiment = self._client.create_experiment(name) if known is None else known.experiment_id
            self._run = self._client.create_run(experiment, run_name=run_name).info.run_id
            _keep_run_id(folder, "mlflow", self._run)
        else:
            self._client.update_run(self._run, status="RUNNING")

    def log_config(self, config: Mapping[str, Any]) -> None:
        self._client.log_dict(self._run, dict(config), "config.json")  # a parameter cannot be changed by a resume

    def log_numbers(self, numbers: Mapping[str, float], step: int) -> None:
        for name, value in numbers.items():
            self._client.log_metric(self._run, name, value, step=step)

    def close(self, failed: bool) -> None:
        self._client.set_terminated(self._run, status="FAILED" if failed else "FINISHED")


_MAKERS: dict[str, Any] = {"tensorboard": _TensorBoard, "trackio": _Trackio, "wandb": _Wandb, "mlflow": _Mlflow}
assert tuple(_MAKERS) == TRACKERS
