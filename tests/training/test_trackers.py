"""Trackers of a run: TensorBoard's files read back, the others against small stand-ins of their packages."""

import dataclasses
import json
import sys

import pytest

import lowtide.training.run as run_module
from lowtide.training import train
from lowtide.training.events import read_events
from lowtide.training.trackers import Trackers, numbers_of, require_trackers

# What each package is asked for, written to $CALLS as it happens.
NOTE = """
import json, os
def note(*call):
    with open(os.environ["CALLS"], "a") as file:
        file.write(json.dumps(call, default=str) + "\\n")
"""
WANDB = """
class _Config:
    def update(self, values, allow_val_change): note("config", values)
class _Run:
    def __init__(self, id): self.id, self.config = id or "made-up", _Config()
    def log(self, numbers, step): note("log", numbers, step)
    def finish(self, exit_code): note("finish", exit_code)
def init(project, name, dir, id, resume):
    note("init", id, name)
    return _Run(id)
"""
TRACKIO = """
def init(project, name, resume, config):
    note("init", name, resume)
    note("config", config)
def log(numbers, step): note("log", numbers, step)
def finish(): note("finish", 0)
"""
MLFLOW = """
from types import SimpleNamespace
def set_tracking_uri(uri): note("uri", uri)
class MlflowClient:
    def get_experiment_by_name(self, name): return None
    def create_experiment(self, name): return "0"
    def create_run(self, experiment, run_name):
        note("init", None, run_name)
        return SimpleNamespace(info=SimpleNamespace(run_id="made-up"))
    def update_run(self, run, status): note("init", run, status)
    def log_dict(self, run, values, path): note("config", values)
    def log_metric(self, run, name, value, step): note("log", {name: value}, step)
    def set_terminated(self, run, status): note("finish", int(status == "FAILED"))
"""
PACKAGES = {"wandb": WANDB, "trackio": TRACKIO, "mlflow": MLFLOW}


@pytest.fixture
def calls(tmp_path, monkeypatch):
    """Stand-ins for the packages on the path; returns what they were asked for."""
    folder = tmp_path / "packages"
    folder.mkdir()
    for name, source in PACKAGES.items():
        (folder / f"{name}.py").write_text(NOTE + source)
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    yield lambda: [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]
    for name in PACKAGES:
        sys.modules.pop(name, None)


def scalars(folder):
    """{tag: {step: value}} as TensorBoard shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0}).Reload()
    numbers = {tag: {each.step: each.value for each in found.Scalars(tag)} for tag in found.Tags()["scalars"]}
    counts = {tag: len(found.Scalars(tag)) for tag in numbers}
    assert counts == {tag: len(by_step) for tag, by_step in numbers.items()}  # every step once
    text = found.Tensors("config")[-1].tensor_proto.string_val[0].decode()
    return numbers, text


def test_tensorboard_has_what_the_event_file_has(make_config):
    config = make_config(track=["tensorboard"], eval_every=3)
    output = train(config, show_progress=False).output
    numbers, text = scalars(output / "trackers" / "tensorboard")
    events = read_events(output / "metrics.jsonl", "train")
    for name in ("loss", "lr", "grad_norm", "tokens_per_s", "memory_bytes"):
        expected = {event["step"]: event[name] for event in events}
        assert numbers[f"train/{name}"] == pytest.approx(expected, rel=1e-6), name
    assert set(numbers["eval/loss"]) == set(numbers["eval/perplexity"]) == {0, 3, 6}
    assert "max_steps: 6" in text and "optimizer: adalomo" in text


@pytest.mark.parametrize("first", [["tensorboard"], []], ids=["from the beginning", "only then"])
def test_a_resumed_run_goes_on_in_tensorboard(first, make_config):
    """Steps behind the checkpoint, which are made again, are there once. Trackers may change on resume."""
    config = make_config(track=["tensorboard"], save_every="4")

    class Cut(Exception):
        pass

    def cut(event):
        if event["event"] == "train" and event["step"] == 6:
            raise Cut

    with pytest.raises(Cut):
        train(dataclasses.replace(config, track=first), on_event=cut, show_progress=False)
    output = train(dataclasses.replace(config, resume="latest"), show_progress=False).output
    numbers, _ = scalars(output / "trackers" / "tensorboard")
    expected = {event["step"]: event["loss"] for event in read_events(output / "metrics.jsonl", "train")}
    assert sorted(expected) == [1, 2, 3, 4, 5, 6]
    expected = {step: loss for step, loss in expected.items() if first or step > 4}  # the checkpoint's step
    assert numbers["train/loss"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", PACKAGES)
def test_a_tracker_gets_settings_numbers_and_an_end_and_finds_its_run_again(name, make_config, calls):
    config = make_config(track=[name], save_every="2", max_steps=4)
    train(config, show_progress=False)
    made = calls()
    first = next(call for call in made if call[0] == "init")
    assert made[-1] == ["finish", 0] and sum(call[0] == "finish" for call in made) == 1
    assert next(call[1] for call in made if call[0] == "config")["max_steps"] == 4
    logged = {(key, call[2]) for call in made if call[0] == "log" for key in call[1]}
    assert {("train/loss", step) for step in range(1, 5)} | {("eval/perplexity", 0), ("eval/loss", 4)} <= logged
    train(dataclasses.replace(config, resume="latest", max_steps=6, allow_changes=True), show_progress=False)
    again = [call for call in calls() if call[0] == "init"][-1]
    assert again[1] == (first[1] if name == "trackio" else "made-up")


def test_trackers_are_closed_after_an_error(make_config, calls):
    def fail(event):
        if event["event"] == "train":
            raise OSError("made up")

    with pytest.raises(OSError, match="made up"):
        train(make_config(track=["wandb", "mlflow"]), on_event=fail, show_progress=False)
    assert [call for call in calls() if call[0] == "finish"] == [["finish", 1]] * 2


@pytest.mark.parametrize("broken", ["init", "log", "finish"])
def test_a_tracker_that_fails_is_left_out(broken, make_config, calls, monkeypatch, caplog):
    import wandb

    def fail(*args, **options):
        raise ConnectionError("the network is down")

    monkeypatch.setattr(*((wandb, "init") if broken == "init" else (wandb._Run, broken)), fail)
    result = train(make_config(track=["wandb", "trackio"]), show_progress=False)
    assert result.num_steps == 6 and (result.model_dir / "config.json").exists()
    assert sum("wandb failed" in record.message for record in caplog.records) == 1
    assert ["finish", 0] in calls()  # the other goes on


def test_a_package_that_is_missing_is_refused_before_anything_is_loaded(make_config, monkeypatch):
    config = make_config(track=["wandb"])
    monkeypatch.setattr("lowtide.training.trackers.importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(run_module, "tokenizer_of", lambda *args, **options: pytest.fail("the tokenizer was loaded"))
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'lowtide\[wandb\]'"):
        train(config, show_progress=False)
    with pytest.raises(ModuleNotFoundError):
        require_trackers(["mlflow"])
    require_trackers([])


def test_numbers_that_are_not_finite_or_not_known_are_left_out():
    event = {
        "event": "train",
        "step": 1,
        "loss": float("nan"),
        "grad_norm": None,
        "lr": 0.5,
        "skipped": True,
        "time": 1.0,
    }
    assert numbers_of(event) == {"train/lr": 0.5, "train/skipped": 1.0}
    assert numbers_of({"event": "checkpoint", "step": 1, "loss": 1.0}) == {}


def test_nothing_is_made_without_a_tracker(make_config):
    assert not (train(make_config(max_steps=1), show_progress=False).output / "trackers").exists()


def test_an_interruption_closes_the_tracker(tmp_path, calls):
    with pytest.raises(KeyboardInterrupt), Trackers(["wandb"], tmp_path):
        raise KeyboardInterrupt
    assert calls()[-1] == ["finish", 1]
