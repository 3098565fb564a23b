"""A multiple-choice task in a training run: trained on answers, accuracy of what is held out, the reported files untouched."""

import dataclasses

import pytest
import torch

from lowtide.data import load_superglue, majority_share
from lowtide.evaluation import choice_accuracies
from lowtide.models import load_model, load_tokenizer
from lowtide.training import read_events, train
from lowtide.training.data import find_data
from superglue_files import OFFICIAL, write_rte
from tiny_files import write_jsonl


@pytest.fixture
def config(make_config, tmp_path):
    write_rte(tmp_path / "SuperGLUE")
    return make_config(
        task="superglue/rte",
        data=[str(tmp_path / "SuperGLUE")],
        max_steps=30,
        batch_size=8,
        max_seq_len=128,
        eval_every=10,
    )


def test_accuracy_of_held_out_examples_is_measured(config, tmp_path):
    result = train(config, show_progress=False)
    scores = read_events(result.output / "metrics.jsonl", "eval")
    assert [event["step"] for event in scores] == [0, 10, 20, 30]
    assert all(0 <= event[name] <= 1 for event in scores for name in ("accuracy_sum", "accuracy_per_token"))
    assert scores[-1]["loss"] < scores[0]["loss"]
    dev = load_superglue("rte", tmp_path / "SuperGLUE").dev
    model = load_model(str(result.model_dir), dtype=torch.float32, device="cpu")
    for name, found in choice_accuracies(model, load_tokenizer(str(result.model_dir)), dev).items():
        assert scores[-1][f"accuracy_{name}"] == found.accuracy
    # most training examples are answered with yes, which is what thirty steps teach; the model knew nothing of that
    assert scores[-1]["accuracy_sum"] == majority_share(dev) > scores[0]["accuracy_sum"]
    counted = read_events(result.output / "metrics.jsonl", "config")[0]["data_num_records"]
    assert counted == len(load_superglue("rte", tmp_path / "SuperGLUE").train)


def test_its_examples_follow_the_data_seed_alone(config, tmp_path):
    rows = [OFFICIAL["rte"] | {"premise": str(number)} for number in range(40)]
    write_jsonl(tmp_path / "SuperGLUE" / "RTE" / "train.jsonl", rows)
    one, two, other = (
        find_data(dataclasses.replace(config, seed=seed, data_seed=data_seed)).task
        for seed, data_seed in ((0, 0), (1, 0), (0, 1))
    )
    assert one == two == load_superglue("rte", tmp_path / "SuperGLUE")
    assert one.dev != other.dev and other == load_superglue("rte", tmp_path / "SuperGLUE", seed=1)


def test_progress_shows_the_accuracy(config, capsys):
    train(dataclasses.replace(config, max_steps=1), show_progress=True)
    assert "accuracy" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "rte"}, "task must be superglue/ and a name"),
        ({"task": "superglue/nothing"}, "superglue/nothing is no task"),
        ({"data": ["a", "b"]}, "task needs data to be one directory"),
        ({"eval_data": ["a"]}, "no eval_data"),
        ({"data": ["nowhere"]}, "holds no RTE/val.jsonl"),
    ],
)
def test_mistakes(config, changes, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train(dataclasses.replace(config, **changes), show_progress=False)
