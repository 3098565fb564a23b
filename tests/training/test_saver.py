"""Checkpoints that cannot be written, and steps that should not be taken."""

import contextlib
import errno
import os
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lowtide.training import TrainConfig, read_events, train
from lowtide.training.checkpoint import list_checkpoints, read_checkpoint, remove_leftovers
from lowtide.weights import safetensors_file


def names(output):
    return [path.name for path in list_checkpoints(output / "checkpoints")]


@pytest.fixture
def full_disk(monkeypatch):
    """The n-th file of weights that is written finds the disk full."""

    def fill(at):
        count, original = [0], safetensors_file.reserve

        def reserve(path, num_bytes, mode):
            count[0] += 1
            if count[0] in at:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            original(path, num_bytes, mode)

        monkeypatch.setattr(safetensors_file, "reserve", reserve)

    return fill


def test_a_full_disk_costs_one_checkpoint(make_config, full_disk, caplog):
    full_disk({3})  # two files a checkpoint: the second one fails
    result = train(make_config(save_every="2", keep_checkpoints=9, max_steps=8), show_progress=False)
    assert names(result.output) == ["step-00000006", "step-00000002"]
    assert "the checkpoint of step 4 could not be written" in caplog.text and "No space left" in caplog.text
    assert "the last whole one is" in caplog.text and "step-00000002" in caplog.text
    assert [e.get("error", "")[:24] for e in read_events(result.output / "metrics.jsonl", "checkpoint")] == [
        "",
        "the checkpoint of step 4",
        "",
    ]
    assert result.num_steps == 8 and result.model_dir.is_dir()
    assert not list((result.output / "checkpoints").glob(".*")), "nothing half written is left"


def test_or_stops_the_run(make_config, full_disk, tmp_path):
    config = make_config(save_every="2", max_steps=8, on_save_error="stop")
    whole = train(make_config(max_steps=8, output=str(tmp_path / "whole")), show_progress=False)
    full_disk({4})
    with pytest.raises(OSError, match="step 4 could not be written: .*No space left.*step-00000002; training stopped"):
        train(config, show_progress=False)
    assert names(tmp_path / "out") == ["step-00000002"]
    full_disk(set())
    result = train(TrainConfig(**{**config.to_dict(), "resume": "latest"}), show_progress=False)
    expected, found = (load_file(r.model_dir / "model.safetensors") for r in (whole, result))
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of 1 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    if (
        os.name != "posix"
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True).returncode
    ):
        pytest.skip("needs to be allowed to mount a file system")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_disk_that_really_fills_up(make_config, small_disk, caplog, monkeypatch):
    """Somebody else fills the disk during training; room that is given back is used again."""
    monkeypatch.setattr("lowtide.training.run.check_disk", lambda *args: None)
    ballast = small_disk / "ballast"

    def others(event):
        if event["event"] == "train" and event["step"] == 3:
            free = os.statvfs(small_disk)
            ballast.write_bytes(b"x" * max(0, (free.f_bavail - 2) * free.f_bsize))
        if event["event"] == "train" and event["step"] == 5:
            ballast.unlink()

    config = make_config(save_every="2", keep_checkpoints=1, max_steps=8, output=str(small_disk / "out"))
    result = train(config, on_event=others, show_progress=False)
    assert "the checkpoint of step 4 could not be written" in caplog.text and "No space left on device" in caplog.text
    assert names(result.output) == ["step-00000006"]
    read_checkpoint(result.output / "checkpoints" / "step-00000006")
    assert (result.model_dir / "model.safetensors").is_file()


def test_the_log_outlives_a_full_disk(make_config, small_disk, caplog, monkeypatch):
    """Not even a line fits for some steps; nothing of it is missing in the end."""
    monkeypatch.setattr("lowtide.training.run.check_disk", lambda *args: None)
    ballast = small_disk / "ballast"

    def others(event):
        if event["event"] == "train" and event["step"] == 3:
            with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
                while file.write(b"x" * 4096):
                    pass
        if event["event"] == "train" and event["step"] == 60:
            ballast.unlink()

    config = make_config(save_every="20", max_steps=64, output=str(small_disk / "out"), lr=0.01)
    result = train(config, on_event=others, show_progress=False)
    assert "metrics.jsonl cannot be written" in caplog.text and "of step 20 could not be written" in caplog.text
    steps = [event["step"] for event in read_events(result.output / "metrics.jsonl", "train")]
    assert steps == list(range(1, 65)) and names(result.output) == ["step-00000060"]


def test_no_room_is_said_before_training(make_config, monkeypatch):
    import shutil
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 0, 100_000))
    with pytest.raises(OSError, match="the trained model and 3 checkpoints take .* keep fewer checkpoints"):
        train(make_config(save_every="2"), show_progress=False)


def broken_between(monkeypatch, first, last):
    """The loss is not finite in these batches of the data, whatever the weights."""
    from lowtide.training.run import Run

    original = Run.batches

    def batches(self):
        for epoch, batch in original(self):
            if first <= self.num_batches <= last:
                hook = self.model.register_forward_hook(
                    lambda module, args, output: setattr(output, "loss", output.loss * float("nan")) or output
                )
                yield epoch, batch
                hook.remove()
            else:
                yield epoch, batch

    monkeypatch.setattr(Run, "batches", batches)


def test_stopping_names_the_last_good_checkpoint(make_config, monkeypatch):
    broken_between(monkeypatch, 5, 99)
    with pytest.raises(
        RuntimeError, match=r"in 3 steps in a row, up to step 7; .*the last good checkpoint is .*step-00000004"
    ):
        train(make_config(save_every="2", max_steps=20, max_bad_steps=3), show_progress=False)


def test_rolling_back_goes_on_behind_the_bad_data(make_config, monkeypatch, caplog):
    broken_between(monkeypatch, 6, 9)
    config = make_config(save_every="4", max_steps=12, max_bad_steps=3, on_bad_steps="rollback")
    result = train(config, show_progress=False)
    assert result.num_steps == 12 and result.model_dir.is_dir()
    assert "back to step 4, and on behind the bad data" in caplog.text
    events = read_events(result.output / "metrics.jsonl")
    resumed = next(e for e in events if e["event"] == "resume")
    assert (resumed["step"], resumed["num_batches"]) == (4, 8)
    steps = [(e["step"], e["skipped"]) for e in events if e["event"] == "train"]
    assert steps[:8] == [(1, False), (2, False), (3, False), (4, False), (5, False), (6, True), (7, True), (8, True)]
    assert steps[8:10] == [(5, True), (6, False)], "batch 9 is bad, too, and skipped"
    assert steps[-1] == (12, False)


def test_a_signal_in_the_step_that_would_be_rolled_back_stops_the_run(make_config, monkeypatch):
    broken_between(monkeypatch, 6, 8)
    config = make_config(save_every="4", max_steps=12, max_bad_steps=3, on_bad_steps="rollback", keep_checkpoints=1)

    def interrupt(event):
        if event["event"] == "train" and event["step"] == 8:
            signal.raise_signal(signal.SIGTERM)

    stopped = train(config, on_event=interrupt, show_progress=False)
    assert stopped.interrupted and stopped.num_steps == 8
    assert names(stopped.output) == ["step-00000008", "step-00000004"]  # the good one is there still
    result = train(TrainConfig(**{**config.to_dict(), "resume": "latest"}), show_progress=False)
    assert result.num_steps == 12 and result.num_skipped == 3


def test_rolling_back_again_and_again_ends(make_config, monkeypatch):
    broken_between(monkeypatch, 3, 10**6)
    with pytest.raises(RuntimeError, match="the last good checkpoint is"):
        train(make_config(save_every="2", max_steps=30, max_bad_steps=2, on_bad_steps="rollback"), show_progress=False)


def test_a_spike_is_not_learnt(make_config, monkeypatch):
    from lowtide.training.run import Run

    original, before = Run.batches, {}

    def batches(self):
        for epoch, batch in original(self):
            if self.num_batches == 25:
                before.update({name: value.clone() for name, value in self.model.state_dict().items()})
                hook = self.model.register_forward_hook(
                    lambda module, args, output: setattr(output, "loss", output.loss * 50) or output
                )
                yield epoch, batch
                hook.remove()
                assert all(torch.equal(value, before[name]) for name, value in self.model.state_dict().items())
            else:
                yield epoch, batch

    monkeypatch.setattr(Run, "batches", batches)
    result = train(make_config(max_steps=28, spike_factor=5.0, lr=0.01), show_progress=False)
    events = read_events(result.output / "metrics.jsonl", "train")
    assert before and [e["step"] for e in events if e["spike"]] == [25] and result.num_skipped == 1


def test_leftovers_of_killed_processes_are_removed_and_nothing_else(tmp_path):
    for name in (
        ".step-00000004.17.tmp",
        ".step-00000002.17.old",
        ".model.3.tmp",
        ".mine",
        "step-00000008",
        ".step-note.tmp",
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("x")
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".mine", ".step-note.tmp", "step-00000008"]


def test_a_checkpoint_is_durable_before_an_older_one_goes(make_config, monkeypatch):
    """keep_checkpoints deletes only when the new one has its name."""
    from lowtide.training import saver

    seen, original = [], saver.keep_newest

    def keep(folder, count):
        seen.append([path.name for path in list_checkpoints(folder)])
        original(folder, count)

    monkeypatch.setattr(saver, "keep_newest", keep)
    train(make_config(save_every="2", keep_checkpoints=1, max_steps=8), show_progress=False)
    assert seen == [["step-00000002"], ["step-00000004", "step-00000002"], ["step-00000006", "step-00000004"]]


@pytest.mark.parametrize(("changes", "message"), [
    ({"save_every": "0"}, "save_every must be at least one step"),
    ({"save_every": "soon"}, "save_every: 'soon' is not a time; write it like 90s, 15m or 2h"),
    ({"on_bad_steps": "rollback"}, "needs checkpoints to go back to: set save_every"),
    ({"spike_factor": 0.5}, "spike_factor must be a number above 1"),
    ({"keep_checkpoints": 0}, "keep_checkpoints must be at least 1"),
    ({"on_save_error": "panic"}, "on_save_error must be one of continue, stop"),
])  # fmt: skip
def test_settings_that_cannot_work(changes, message, make_config):
    with pytest.raises(ValueError, match=message):
        make_config(**changes).validate()


def test_nothing_is_saved_in_the_middle_of_bad_steps(make_config, monkeypatch):
    """Checkpoints of doubtful weights would push the good ones out."""
    broken_between(monkeypatch, 5, 99)
    config = make_config(save_every="1", max_steps=20, max_bad_steps=5)
    with pytest.raises(RuntimeError, match="the last good checkpoint is .*step-00000004"):
        train(config, show_progress=False)
    assert names(Path(config.output)) == ["step-00000004", "step-00000003"]


def test_a_checkpoint_behind_which_nothing_is_good_is_not_gone_back_to_again(make_config, monkeypatch, caplog):
    """Its weights may be the reason: it is set aside, and the one before is used."""
    from lowtide.training.saver import Saver

    poisoned = []

    def is_due(self):
        if self.run.report.num_steps == 4 and not poisoned:
            poisoned.append(True)
            with torch.no_grad():
                self.run.model.model.norm.weight.fill_(float("nan"))
        return self.run.report.num_steps in (2, 4)

    monkeypatch.setattr(Saver, "is_due", is_due)
    config = make_config(save_every="2", max_steps=8, max_bad_steps=2, on_bad_steps="rollback")
    result = train(config, show_progress=False)
    assert "no step after" in caplog.text and "step-00000004.suspect" in caplog.text and "back to step 2" in caplog.text
    assert result.num_steps == 8 and all(
        torch.isfinite(v).all() for v in load_file(result.model_dir / "model.safetensors").values()
    )


def test_a_spike_leaves_no_graph_behind(make_config, monkeypatch):
    """The step after it would otherwise keep the gradients of the whole model."""
    from lowtide.training import trainer
    from lowtide.training.bad_steps import SpikeGuard

    monkeypatch.setattr(SpikeGuard, "is_spike", lambda self, loss: len(shared) == 3)
    shared, look = [], trainer._look_at

    def look_at(*args):
        shared.append(sum(slot.shared and not slot.always_shared for slot in args[0].engine._slots.values()))
        look(*args)

    monkeypatch.setattr(trainer, "_look_at", look_at)
    train(make_config(max_steps=6, spike_factor=9.0), show_progress=False)
    assert len(shared) == 6 and not any(shared)


def test_room_for_a_checkpoint_is_needed_in_any_case(make_config, monkeypatch):
    """An interrupted run writes one, with the optimizer state."""
    import shutil
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    size = 4 * 26_900
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 0, 2 * size))
    with pytest.raises(OSError, match="the disk of the output directory"):
        train(make_config(optimizer="adamw"), show_progress=False)
    train(make_config(optimizer="lomo"), show_progress=False)


def test_counts_of_a_gpu_that_is_gone_begin_anew():
    from lowtide.optim.lost_updates import LostUpdates

    counts = LostUpdates()
    counts.load_state_dict({"calls": 5, "counts": {"cuda:63": [1.0, 2.0], "cpu": [1.0, 4.0]}})
    assert counts.share() == 0.25
