"""Samples of a run: when they are taken, what is reported, and that the run is the same without them."""

import signal

import pytest
from transformers import AutoConfig, AutoTokenizer

from lowtide.training import read_events, samples, train
from tiny_files import save_tiny_model, write_jsonl


@pytest.fixture
def make_config(make_config, tmp_path):
    """Four different prompts, half of all records held out."""
    rows = [{"prompt": f"say {letter}:", "completion": f" {letter * 2}"} for letter in "abcd" * 16]
    data = str(write_jsonl(tmp_path / "letters.jsonl", rows))
    return lambda **changes: make_config(**{"data": [data], "eval_fraction": 0.5, **changes})


def run(config, stop_after=None):
    def interrupt(event):
        if event["event"] == "train" and event["step"] == stop_after:
            signal.raise_signal(signal.SIGINT)

    return train(config, on_event=interrupt, show_progress=False)


def taken(result):
    return read_events(result.output / "metrics.jsonl", "samples")


def test_before_and_after(make_config):
    before, after = taken(run(make_config(samples=None, max_steps=60)))
    assert (before["step"], after["step"]) == (0, 60)
    assert len(before["samples"]) == len(after["samples"]) == 3
    for one, two in zip(before["samples"], after["samples"], strict=True):
        assert (one["prompt"], one["expected"]) == (two["prompt"], two["expected"])
        assert one["answer"] != one["expected"] and two["answer"] == two["expected"]
        assert two["expected"] == f" {two['prompt'][-2] * 2}"


def test_as_many_as_asked_for(make_config):
    assert [len(event["samples"]) for event in taken(run(make_config(samples=1, max_steps=1)))] == [1, 1]


@pytest.mark.parametrize("changes", [{"samples": 0}, {"samples": None, "eval_fraction": 0.0}])
def test_none(make_config, changes):
    assert taken(run(make_config(max_steps=1, **changes))) == []


def test_weights_on_disk_answer_only_if_asked(make_config, tmp_path):
    for name, count, expected in (("one", None, 0), ("two", 2, 2)):
        config = make_config(
            samples=count, max_steps=1, weights=str(tmp_path / f"copy-{name}"), output=str(tmp_path / name)
        )
        assert len(taken(run(config))) == expected


def test_adapters(make_config):
    events = taken(run(make_config(samples=2, max_steps=2, lora_rank=2, lr=None, lora_lr=1e-2)))
    assert [len(event["samples"]) for event in events] == [2, 2]


@pytest.mark.parametrize("changes", [{}, {"dtype": "bfloat16", "optimizer": "lomo", "micro_batch_size": 3}])
def test_they_change_nothing(make_config, tmp_path, changes):
    found = []
    for count in (0, 3):
        result = run(make_config(samples=count, output=str(tmp_path / str(count)), eval_every=2, **changes))
        events = read_events(result.output / "metrics.jsonl")
        losses = [event["loss"] for event in events if event["event"] in ("train", "eval")]
        found.append((losses, {path.name: path.read_bytes() for path in result.model_dir.glob("*.safetensors")}))
    assert found[0] == found[1]


def test_a_resumed_run_has_both_and_is_the_same(make_config, tmp_path):
    whole = run(make_config(samples=3, output=str(tmp_path / "whole")))
    interrupted = run(make_config(samples=3, output=str(tmp_path / "parts")), stop_after=3)
    assert [event["step"] for event in taken(interrupted)] == [0]
    parts = run(make_config(samples=3, output=str(tmp_path / "parts"), resume="latest"))
    assert [event["samples"] for event in taken(parts)] == [event["samples"] for event in taken(whole)]
    assert [event["step"] for event in taken(parts)] == [0, 6]
    names = [path.name for path in whole.model_dir.glob("*.safetensors")]
    assert names and all((whole.model_dir / n).read_bytes() == (parts.model_dir / n).read_bytes() for n in names)


def test_a_model_that_cannot_generate_trains_all_the_same(make_config, monkeypatch, caplog):
    def fail(*arguments):
        raise NotImplementedError("made up")

    monkeypatch.setattr(samples, "answer_samples", fail)
    result = run(make_config(samples=2, max_steps=2))
    assert result.num_steps == 2 and taken(result) == []
    assert "no samples, the training goes on: NotImplementedError: made up" in caplog.text


def test_a_disk_that_fails_is_not_passed_over(make_config, monkeypatch):
    def fail(*arguments):
        raise OSError("made up")

    monkeypatch.setattr(samples, "answer_samples", fail)
    with pytest.raises(OSError, match="made up"):
        run(make_config(samples=2, max_steps=2))


def test_a_padding_token_outside_of_the_embedding_is_not_used(make_config, tmp_path):
    """Some tokenizers have one more token than their model."""
    directory = save_tiny_model(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.add_special_tokens({"pad_token": "<|filler|>"})
    assert tokenizer.pad_token_id == AutoConfig.from_pretrained(directory).vocab_size
    tokenizer.save_pretrained(directory)
    rows = [{"prompt": f"say {letter}:", "completion": f" {letter * n}"} for letter in "ab" for n in range(1, 9)]
    data = str(write_jsonl(tmp_path / "lengths.jsonl", rows))
    result = run(make_config(model=str(directory), data=[data], samples=None, max_steps=3))
    assert result.num_steps == 3 and len(taken(result)) == 2
