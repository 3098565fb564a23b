import json
import math
import signal
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from lowtide.training import find_lr, range_test
from lowtide.training.range_test import default_range


def find(config, **options):
    return find_lr(config, show_progress=False, **({"num_steps": 24} | options))


@pytest.fixture
def model(model_dir):
    return AutoModelForCausalLM.from_pretrained(model_dir).eval()


def copy_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def is_unchanged(model, before):
    return all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("optimizer", "changes"),
    [("adalomo", {}), ("lomo", {"clip_grad_norm": 1.0}), ("adamw", {}), ("adalomo", {"eval_fraction": 0})],
)
def test_the_rate_lies_in_the_range_and_below_divergence(make_config, optimizer, changes):
    config = make_config(optimizer=optimizer, **changes)
    events = []
    finding = find(config, on_event=events.append)
    lowest, highest = default_range(config)
    assert lowest < finding.recommended < highest
    assert finding.recommended < (finding.lr_diverged or highest)
    rates = [point.lr for point in finding.points]
    assert rates == sorted(rates)
    assert rates[0] == lowest
    assert finding.points[0].loss == pytest.approx(finding.loss_before, rel=0.05)
    assert min(point.smoothed for point in finding.points) < 0.9 * finding.loss_before
    assert finding.held_out is (config.eval_fraction > 0)
    assert [event["watched_loss"] for event in events if event["event"] == "train"] == [p.loss for p in finding.points]
    assert not Path(config.output).exists()
    assert finding.config == config
    json.dumps(finding.to_dict(), allow_nan=False)


def test_it_ends_early_when_the_loss_diverges(make_config):
    finding = find(make_config(optimizer="lomo", clip_grad_norm=1.0))
    assert finding.lr_diverged is not None
    assert len(finding.points) < 24
    assert finding.points[-1].lr < 100


def test_same_settings_same_finding_and_the_random_state_is_left_alone(make_config):
    state = torch.get_rng_state()
    one, two = (find(make_config(), num_steps=10) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert [point.loss for point in one.points] == [point.loss for point in two.points]


def test_a_given_model_is_as_before(make_config, model, tmp_path):
    before = copy_of(model)
    finding = find(make_config(device="auto"), model=model, num_steps=12)
    assert finding.recommended is not None
    assert is_unchanged(model, before)
    assert model.training is False
    assert model.config.use_cache is True
    assert all(param.grad is None for param in model.parameters())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["task.jsonl"]
    # not fused any more, and the same test on it says the same
    again = find(make_config(), model=model, num_steps=12)
    assert [point.loss for point in again.points] == [point.loss for point in finding.points]


class Broken(Exception):
    pass


@pytest.mark.parametrize("error", [Broken, KeyboardInterrupt, "in the backward", "ctrl-c"])
def test_a_given_model_is_as_before_also_after_an_error(make_config, model, tmp_path, error):
    before, calls, handler = copy_of(model), [], signal.getsignal(signal.SIGINT)

    def fail(event):
        if event["event"] == "train" and event["step"] == 5:
            assert not is_unchanged(model, before)
            if error == "ctrl-c":
                signal.raise_signal(signal.SIGINT)
            elif error != "in the backward":
                raise error

    def fail_in_backward(grad):
        calls.append(1)
        if len(calls) == 5:
            raise Broken

    if error == "in the backward":
        model.model.layers[0].mlp.up_proj.weight.register_hook(fail_in_backward)
    with pytest.raises(KeyboardInterrupt if error in (KeyboardInterrupt, "ctrl-c") else Broken):
        find(make_config(), model=model, on_event=fail, num_steps=12)
    assert is_unchanged(model, before)
    assert all(param.grad is None for param in model.parameters())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["task.jsonl"]
    assert signal.getsignal(signal.SIGINT) is handler  # whatever it was: a job in the background ignores it
    assert not hasattr(model, "_lowtide_engine")


def test_rates_that_change_nothing_never_fall_and_never_diverge(make_config):
    finding = find(make_config(), lr_range=(1e-9, 1e-8), num_steps=10)
    assert finding.recommended is None
    assert finding.lr_diverged is None
    assert "never fell" in finding.warnings[0]


def test_a_range_that_ends_early_is_not_trusted(make_config):
    finding = find(make_config(), lr_range=(1e-4, 1e-2))
    assert finding.recommended <= 1e-2
    assert "never diverged up to 0.01" in finding.warnings[0]


def test_a_loss_that_stops_being_finite_has_diverged(make_config, model, monkeypatch):
    monkeypatch.setattr(range_test, "evaluate_loss", _losses(iter([5.0, 4.0, 3.0, float("nan")])))
    finding = find(make_config(), model=model)
    assert len(finding.points) == 3
    assert finding.lr_diverged == finding.points[-1].lr
    assert math.isnan(finding.points[-1].smoothed)
    assert finding.to_dict()["points"][-1]["loss"] is None


def test_a_model_that_is_broken_before_is_refused(make_config, model, monkeypatch):
    monkeypatch.setattr(range_test, "evaluate_loss", _losses(iter([float("nan")])))
    with pytest.raises(RuntimeError, match="untrained model is nan: try another dtype"):
        find(make_config(), model=model)
    assert not hasattr(model, "_lowtide_engine")


def _losses(values):
    from lowtide.evaluation import LossResult

    return lambda model, batches: LossResult(next(values), 1.0, 1)


@pytest.mark.parametrize(
    "options", [{"lr_range": (1e-2, 1e-3)}, {"lr_range": (0, 1)}, {"lr_range": (1e-3, math.inf)}, {"num_steps": 3}]
)
def test_wrong_options(make_config, options):
    with pytest.raises(ValueError, match="lr_range must|num_steps must"):
        find(make_config(), **options)


def test_what_a_run_would_refuse_is_refused(make_config, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "keep").write_text("precious")
    with pytest.raises(FileExistsError):
        find(make_config())


def test_clipping_sets_the_range(make_config):
    assert default_range(make_config(optimizer="lomo", clip_grad_norm=2.0)) == (5e-4, 50.0)
    assert default_range(make_config(optimizer="sgd", clip_grad_norm=1.0)) == (1e-3, 100.0)
    assert default_range(make_config(optimizer="adalomo", clip_grad_norm=1.0)) == (1e-5, 1.0)
