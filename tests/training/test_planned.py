"""``weights: auto`` and ``--dry-run``: the planner decides, and what it says is held against what is measured."""

import json
from pathlib import Path

import pytest

from lowtide import planning
from lowtide.training import dry_run, planned, train
from lowtide.training.events import read_events
from tiny_files import save_tiny_model


@pytest.fixture
def machine(monkeypatch):
    """A machine with as much memory as a test wants."""

    def with_memory(num_bytes, disk=10**9):
        monkeypatch.setattr(planned, "device_available_bytes", lambda device: num_bytes)
        monkeypatch.setattr(planned, "available_host_bytes", lambda: num_bytes)
        usage = planned.shutil.disk_usage("/")
        monkeypatch.setattr(planned.shutil, "disk_usage", lambda path: usage._replace(free=disk))

    speeds = planning.Speeds(1e11, 1e10, 1e10, 1e9, 1e9, dict.fromkeys(("flops",), "given"))
    monkeypatch.setattr(planned, "find_speeds", lambda **options: speeds)
    return with_memory


def smallest(config, home):
    """Bytes that a step takes at least with all weights there."""
    shape = planned.step_shape(config, "cpu")
    return shape.footprint(home, micro_batch_size=1).totals()["device"]


def run(config):
    return train(config, show_progress=False)


def test_what_fits_stays_in_memory(make_config, machine, tmp_path):
    config = make_config(weights="auto")
    machine(10**9)
    placement = planned.plan_placement(config, "cpu", tmp_path / "out")
    assert placement.weights == "device" and placement.directory is None and placement.micro_batch_size is None
    run(config)


def test_what_does_not_fit_goes_to_the_disk(make_config, machine, tmp_path, monkeypatch):
    model = str(save_tiny_model(tmp_path / "deep", num_hidden_layers=12, hidden_size=64, intermediate_size=256))
    config = make_config(model=model, weights="auto", output=str(tmp_path / "auto"), max_steps=2)
    monkeypatch.setattr(planned, "_USABLE", 1.0)
    on_device, on_disk = smallest(config, "device"), smallest(config, "disk")
    assert on_disk < 0.9 * on_device
    machine((on_device + on_disk) // 2)
    result = run(config)
    plan = read_events(result.output / "metrics.jsonl")[0]["plan"]
    assert {home for _, home in plan["homes"]} >= {"disk"}
    assert not (result.output / "weights").exists()
    machine(10**9)
    other = run(
        make_config(model=model, output=str(tmp_path / "here"), max_steps=2, micro_batch_size=plan["micro_batch_size"])
    )
    assert other.loss_after.loss == pytest.approx(result.loss_after.loss, rel=1e-5)  # evaluated in other batches


def test_nothing_fits(make_config, machine, tmp_path):
    machine(1000)
    with pytest.raises(MemoryError, match=r"no plan fits: .* this would fit"):
        run(make_config(weights="auto"))
    assert not (tmp_path / "out").exists()


def test_spare_memory_makes_clipping_cheaper(make_config, machine, tmp_path):
    machine(10**9)
    config = make_config(weights="auto", clip_grad_norm=1.0)
    assert planned.plan_placement(config, "cpu", tmp_path / "out").clip_memory_bytes > 10**8
    assert planned.plan_placement(make_config(weights="auto"), "cpu", tmp_path / "out").clip_memory_bytes == 0
    given = make_config(weights="auto", clip_grad_norm=1.0, clip_memory="1MiB")
    assert planned.plan_placement(given, "cpu", tmp_path / "out").clip_memory_bytes == 2**20


@pytest.mark.parametrize("where", ["device", "disk"])
def test_a_dry_run_measures_and_leaves_nothing(make_config, tmp_path, where):
    before = sorted(path.name for path in tmp_path.iterdir())
    weights = "device" if where == "device" else str(tmp_path / "weights")
    config = make_config(weights=weights, optimizer="adamw", lr=1e-3)
    tied = json.loads((Path(config.model) / "config.json").read_text())["tie_word_embeddings"]
    found = dry_run(config)
    assert len(found.losses) == 2 and found.losses[1] < found.losses[0] and found.step_s > 0
    assert found.measured.keys() == found.predicted.keys()
    # These are counted on both sides: the planner must know them to the byte, or nearly.
    for kind in ("weights", "pools", "optimizer state"):
        assert found.measured[kind] == pytest.approx(found.predicted[kind], rel=0.05, abs=5000), kind
    assert found.measured["kept block inputs"] > 0 and found.measured["gradients"] > 0
    assert found.homes == ({"device": 2} if where == "device" else {"disk": 2 + (1 if tied else 2)})
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted({*before, "task.jsonl"})


def test_the_command_shows_the_table(make_config, tmp_path, capsys):
    from lowtide.cli import main

    config = make_config()
    arguments = ["train", "--model", config.model, "--data", *config.data, "--output", config.output]
    arguments += ["--dtype", "float32", "--max-seq-len", "32", "--max-steps", "3", "--dry-run", "--device", "cpu"]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert "predicted" in shown and "kept block inputs" in shown and "A step took" in shown
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("changes", [{}, {"optimizer": "lomo", "micro_batch_size": 2}, {"weights": "cpu"}])
def test_a_run_records_what_the_planner_says(make_config, changes):
    config = make_config(max_steps=1, **changes)
    result = run(config)
    event = read_events(result.output / "metrics.jsonl")[0]
    said = planned.predicted(config, "cpu", planned.place_as_set(config))
    assert event["predicted_memory"] == said.device and event["predicted_memory"]["weights"] > 0
    assert event["program_bytes"] > 10**7 and event["versions"]["torch"]


def test_a_prediction_that_fails_stops_nothing(make_config, monkeypatch):
    def broken(*args):
        raise RuntimeError("broken")

    monkeypatch.setattr(planned, "predicted", broken)
    result = run(make_config(max_steps=1))
    assert result.num_steps == 1
    assert read_events(result.output / "metrics.jsonl")[0]["predicted_memory"] is None


def test_of_several_processes_the_prediction_is_that_of_one_of_them(make_config):
    config = make_config(reduce_dtype="weights", ranks_per_node=2)
    placement = planned.place_as_set(config, sharded=True)
    model_config = planned.load_config(config.model)
    alone, shared = (planned.predicted_by_kind(config, "cpu", placement, model_config, size) for size in (1, 4))
    assert shared["weights"] == pytest.approx(alone["weights"] / 2, rel=0.05)
    expected = planning.sharded_footprint(
        planned.step_shape(config, "cpu"), 4, ranks_per_node=2, reduce_dtype="weights"
    )
    assert shared == expected.device


def test_room_for_all_gradients_goes_before_activations(make_config, machine, tmp_path, monkeypatch):
    """One pass instead of two is worth more than a forward pass that is spared."""
    monkeypatch.setattr(planned, "_USABLE", 1.0)
    config = make_config(weights="auto", clip_grad_norm=1.0)
    shape = planned.step_shape(config, "cpu")
    used, gradients = shape.footprint().totals()["device"], int(planned._GRADIENTS * shape.weights_bytes)

    def placement(num_bytes):
        machine(num_bytes)
        return planned.plan_placement(config, "cpu", tmp_path / "out")

    enough = placement(used + 2 * gradients)
    assert enough.clip_memory_bytes >= gradients
    assert enough.plan.footprint.totals()["device"] + gradients <= used + 2 * gradients
    plenty = placement(10**9)
    assert plenty.clip_memory_bytes >= gradients and plenty.keep_activations == 2


def test_attention_that_makes_all_scores_is_counted(make_config):
    fused, eager = (planned.step_shape(make_config(attention=kind), "cpu") for kind in (None, "eager"))
    assert eager.config._attn_implementation == "eager"
    longer = [shape.resized(batch_size=8, seq_len=512).keeping(2) for shape in (fused, eager)]
    assert longer[1].footprint().totals()["device"] > 2 * longer[0].footprint().totals()["device"]


def test_keep_activations_where_rows_go_one_by_one(make_config):
    config = make_config(keep_activations=1)
    config.micro_batch_size = 1  # as packed rows of flash attention do, after the settings were checked
    with pytest.raises(ValueError, match=r"1 at a time .*leave it out"):
        planned.place_as_set(config)


def test_spare_memory_keeps_activations(make_config, machine, tmp_path):
    machine(10**9)
    planned_for = make_config(weights="auto", output=str(tmp_path / "auto"))
    placement = planned.plan_placement(planned_for, "cpu", tmp_path / "auto")
    assert placement.keep_activations == placement.plan.keep_activations > 0
    result = run(planned_for)
    plan = read_events(result.output / "metrics.jsonl")[0]["plan"]
    assert plan["keep_activations"] == placement.keep_activations
    others = [
        run(make_config(output=str(tmp_path / "none"))),
        run(make_config(output=str(tmp_path / "two"), keep_activations=2, micro_batch_size=8)),
        run(make_config(weights="auto", output=str(tmp_path / "one"), keep_activations=1)),
    ]
    for other in others:
        assert other.loss_after.loss == result.loss_after.loss


def test_kept_activations_may_change_when_a_run_goes_on(make_config, tmp_path):
    whole = run(make_config(output=str(tmp_path / "whole")))
    first = make_config(output=str(tmp_path / "parts"), max_steps=6, save_every="3", keep_activations=2)
    run(first)
    step_3 = next(path for path in sorted((tmp_path / "parts").rglob("*")) if path.is_dir() and path.name.endswith("3"))
    again = run(make_config(output=str(tmp_path / "again"), save_every="3", resume=str(step_3)))
    assert again.loss_after.loss == whole.loss_after.loss
