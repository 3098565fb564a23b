"""``lowtide train`` on several ranks: the same run as in one process, and the same checkpoints."""

import dataclasses

import jobs
import pytest
import torch
from safetensors.torch import load_file

from lowtide.training import read_events, train
from lowtide.training.checkpoint import list_checkpoints
from superglue_files import write_rte
from tiny_files import save_tiny_model, write_task
from tiny_run import make_config, model_dir  # noqa: F401

NUM_STEPS = 6


def weights(directory):
    return {
        name: value for path in sorted(directory.glob("model*.safetensors")) for name, value in load_file(path).items()
    }


def difference(first, second):
    a, b = weights(first), weights(second)
    assert a.keys() == b.keys() and a
    return max((a[name].float() - b[name].float()).abs().max().item() for name in a)


def steps_of(output):
    wanted = ("event", "step", "loss", "lr", "epoch", "num_tokens", "grad_norm", "skipped")
    events = read_events(output / "metrics.jsonl")
    return [{name: event.get(name) for name in wanted} for event in events if event["event"] in ("train", "eval")]


def close(first, second, relative=1e-5):
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        for name in a:
            assert a[name] == (pytest.approx(b[name], rel=relative) if isinstance(b[name], float) else b[name]), (a, b)


@pytest.fixture
def make(make_config, tmp_path):  # noqa: F811
    def make(name, **changes):
        defaults = {
            "max_steps": NUM_STEPS,
            "output": str(tmp_path / name),
            "eval_every": 4,
            "batch_size": 7,
            "lr": 0.02,
        }
        return make_config(**{**defaults, **changes})

    return make


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "adalomo"},
        {"optimizer": "lomo", "micro_batch_size": 1, "lr": 0.5},
        {"optimizer": "adamw", "packing": True, "lr": 1e-3, "clip_grad_norm": 0.5},
    ],
    ids=lambda changes: changes["optimizer"],
)
def test_the_same_settings_are_the_same_run(pools, make, tmp_path, size, changes):
    """Seven rows on two and four ranks, and a last batch of an epoch with fewer rows than ranks."""
    alone = train(make("alone", **changes), show_progress=False)
    found = pools(size).run(jobs.train_run, make("ranks", **changes).to_dict())
    assert all(each["steps"] == NUM_STEPS and not each["interrupted"] for each in found)
    close(steps_of(tmp_path / "ranks"), steps_of(tmp_path / "alone"))
    assert difference(tmp_path / "ranks" / "model", alone.model_dir) < 2e-6
    assert len({each["after"] for each in found}) == 1


@pytest.mark.parametrize("optimizer", ["lomo", "adalomo", "adamw"])
def test_a_checkpoint_goes_from_four_ranks_to_two_to_one(pools, make, tmp_path, optimizer):
    changes = {"optimizer": optimizer, "lr": {"lomo": 0.5, "adalomo": 0.02, "adamw": 1e-3}[optimizer]}
    alone = train(make("alone", **changes), show_progress=False)
    # Saved right behind an evaluation, which ends with a forward pass.
    config = make("moved", save_every="4", **changes)
    assert all(each["interrupted"] for each in pools(4).run(jobs.train_run, config.to_dict(), stop_after=2))
    saved = list_checkpoints(tmp_path / "moved" / "checkpoints")[0]
    resumed = dataclasses.replace(config, resume="latest")
    assert all(each["interrupted"] for each in pools(2).run(jobs.train_run, resumed.to_dict(), stop_after=4))
    last = train(resumed, show_progress=False)
    close(steps_of(tmp_path / "moved"), steps_of(tmp_path / "alone"))
    assert difference(last.model_dir, alone.model_dir) < 2e-6

    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32).state_dict()
    for name, value in weights(saved).items():
        assert torch.equal(plain[name], value)


@pytest.mark.parametrize(
    "changes", [{"dtype": "bfloat16"}, {"dtype": "bfloat16", "rounding": "compensated"}, {}], ids=str
)
def test_resumed_on_as_many_ranks_it_ends_bit_for_bit_the_same(pools, make, tmp_path, changes):
    model = save_tiny_model(tmp_path / "dropout", attention_dropout=0.2)
    changes = {"model": str(model), "optimizer": "adalomo", "batch_size": 8, "micro_batch_size": 1, **changes}
    pools(4).run(jobs.train_run, make("whole", **changes).to_dict())
    config = make("parts", **changes)
    pools(4).run(jobs.train_run, config.to_dict(), stop_after=3)
    pools(4).run(jobs.train_run, dataclasses.replace(config, resume="latest").to_dict())
    assert steps_of(tmp_path / "parts") == steps_of(tmp_path / "whole")
    assert difference(tmp_path / "parts" / "model", tmp_path / "whole" / "model") == 0


def test_a_batch_that_cannot_be_shared_is_refused(pools, make):
    with pytest.raises(AssertionError, match="cannot be shared by 4"):
        pools(4).run(jobs.train_run, make("refused", batch_size=3).to_dict())
    with pytest.raises(AssertionError, match="a disk home needs one process"):
        pools(2).run(jobs.train_run, make("refused", weights="./disk").to_dict())


def test_what_fails_on_the_first_rank_ends_all(pools, make, tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "something").write_text("mine")
    with pytest.raises(AssertionError) as raised:
        pools(2).run(jobs.train_run, make("taken").to_dict())
    assert "is not empty" in str(raised.value) and "rank 1 ends because rank 0 has failed" in str(raised.value)


def test_a_loss_of_the_models_own_is_the_mean_over_all_tokens(pools, make, tmp_path):
    changes = {"optimizer": "lomo", "lr": 0.5}
    alone = train(make("alone", **changes), show_progress=False)
    pools(2).run(jobs.train_with_own_loss, make("ranks", **changes).to_dict())
    close(steps_of(tmp_path / "ranks"), steps_of(tmp_path / "alone"))
    assert difference(tmp_path / "ranks" / "model", alone.model_dir) < 2e-6


def test_a_task_is_trained_and_scored_as_in_one_process(pools, make, tmp_path):
    write_rte(tmp_path / "SuperGLUE")
    changes = {"task": "superglue/rte", "data": [str(tmp_path / "SuperGLUE")], "max_seq_len": 128, "max_steps": 4}
    train(make("alone", **changes), show_progress=False)
    pools(2).run(jobs.train_run, make("ranks", **changes).to_dict())
    scores = [
        [
            (event["accuracy_sum"], event["accuracy_per_token"])
            for event in read_events(tmp_path / name / "metrics.jsonl", "eval")
        ]
        for name in ("alone", "ranks")
    ]
    assert scores[0] == scores[1] and len(scores[0]) == 2


def test_a_checkpoint_that_cannot_be_written_leaves_nobody_waiting(pools, make, tmp_path):
    """The first process fails in the middle of a checkpoint; training goes on, or ends, on all of them."""
    for name, on_error in (("goes on", "continue"), ("ends", "stop")):
        settings = make(name, save_every="2", on_save_error=on_error).to_dict()
        if on_error == "stop":
            with pytest.raises(AssertionError, match="training stopped"):
                pools(2).run(jobs.train_with_full_disk, settings)
            continue
        found = pools(2).run(jobs.train_with_full_disk, settings)
        assert all(each["steps"] == NUM_STEPS for each in found)
        events = read_events(tmp_path / name / "metrics.jsonl", "checkpoint")
        assert ["error" in event for event in events] == [True, False]  # of step 2, and of step 4


@pytest.mark.parametrize(
    ("by_rank", "message"),
    [
        ([{}, {"lr": 0.03}], "lr is 0.03 here and 0.02 there"),
        ([{}, {"data": "other"}], "of rank 1 are not those of rank 0"),
    ],
    ids=["settings", "data"],
)
def test_ranks_that_would_do_different_things_are_refused(pools, make, tmp_path, by_rank, message):
    if "data" in by_rank[1]:
        by_rank = [{}, {"data": [str(write_task(tmp_path / "other.jsonl", 40))]}]
    with pytest.raises(AssertionError) as raised:
        pools(2).run(jobs.train_with_other_settings, make("different").to_dict(), by_rank)
    assert message in str(raised.value) and "rank 0 ends because rank 1 has failed" in str(raised.value)
    assert not (tmp_path / "different").exists()


@pytest.mark.parametrize("when", ["after the ranks have agreed", "in the last evaluation"])
def test_a_signal_at_a_bad_moment_stops_all_ranks_alike(pools, make, tmp_path, when):
    found = pools(2).run(jobs.stopped_late, make("stopped").to_dict(), when)
    steps = {each["steps"] for each in found}
    assert steps == ({3} if when == "after the ranks have agreed" else {NUM_STEPS})
    assert all(each["interrupted"] for each in found)
    assert list_checkpoints(tmp_path / "stopped" / "checkpoints")[0].name == f"step-{steps.pop():08}"
