"""Packing with models that keep documents apart, and with such that do not; rows that are longer than a model's context."""

import logging
import signal

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GptOssConfig

from lowtide.training import train
from lowtide.training.events import read_events
from tiny_files import write_jsonl

TEXTS = [{"text": "the tide is low " * n} for n in (1, 2, 1, 3, 1, 2)]


def save(config, model_dir, folder):
    """A random model with the tokenizer of the tiny one."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    config.vocab_size, config.eos_token_id, config.bos_token_id, config.pad_token_id = len(tokenizer), 1, None, 0
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def mixing_model(model_dir, tmp_path):
    config = GptOssConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_local_experts=2,
        num_experts_per_tok=1, sliding_window=16,
    )  # fmt: skip
    return save(config, model_dir, tmp_path / "gpt-oss")


@pytest.fixture
def short_model(model_dir, tmp_path):
    return save(GPT2Config(n_embd=32, n_head=4, n_layer=2, n_positions=32), model_dir, tmp_path / "gpt2")


@pytest.fixture
def run(make_config, tmp_path):
    data = write_jsonl(tmp_path / "texts.jsonl", TEXTS)

    def run(name, **changes):
        settings = {
            "data": [str(data)], "output": str(tmp_path / name), "eval_fraction": 0, "batch_size": 6, "max_seq_len": 128, "max_steps": 1,
        }  # fmt: skip
        return train(make_config(**settings | changes), show_progress=False)

    return run


def losses(result):
    return [event["loss"] for event in read_events(result.output / "metrics.jsonl", "train")]


def test_a_model_that_mixes_documents_is_not_packed(run, mixing_model, caplog):
    with caplog.at_level(logging.WARNING):
        result = run("default", model=str(mixing_model))
    assert "GptOssForCausalLM does not keep the documents of a packed row apart" in caplog.text
    assert losses(result) == losses(run("padded", model=str(mixing_model), packing=False))


def test_to_pack_for_it_is_refused_and_nothing_is_written(run, mixing_model, tmp_path):
    with pytest.raises(ValueError, match="GptOssForCausalLM does not keep the documents of a row apart") as caught:
        run("out", model=str(mixing_model), packing=True)
    assert "leave packing out, or set it to false" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_padding_asks_nothing(run, mixing_model, monkeypatch):
    monkeypatch.setattr("lowtide.training.packing.keeps_documents_apart", None)
    run("out", model=str(mixing_model), packing=False)


@pytest.mark.parametrize("on_disk", [False, True], ids=["device", "disk"])
def test_asking_leaves_no_trace(run, tmp_path, monkeypatch, on_disk):
    """A run that was asked is the one that was not, also where blocks are fetched for it."""
    runs = []
    for name in ("asked", "not-asked"):
        runs.append(losses(run(name, weights=str(tmp_path / f"copy-{name}") if on_disk else "device", max_steps=3)))
        monkeypatch.setattr("lowtide.training.packing.keeps_documents_apart", lambda *_, **__: True)
    assert runs[0] == runs[1]


def test_rows_beyond_learned_positions_are_refused(run, short_model, tmp_path):
    wanted = r"rows of 49 tokens are longer than the context of the model, 32 tokens .*: set max_seq_len \(--max-seq-len\) to 32"
    with pytest.raises(ValueError, match=wanted):
        run("out", model=str(short_model))
    assert not (tmp_path / "out").exists()
    run("shorter", model=str(short_model), max_seq_len=32)


def test_short_rows_need_no_setting(run, short_model, tmp_path):
    """What counts is how long the rows are, not how long they might be."""
    data = write_jsonl(tmp_path / "short.jsonl", [{"prompt": "a", "completion": "b"}] * 6)
    run("out", model=str(short_model), data=[str(data)])


def test_positions_of_packed_rows_are_those_of_their_documents(run, short_model, tmp_path):
    """A row of 64 tokens with documents of at most 32 needs no position beyond the 32nd, in its padding neither."""
    data = write_jsonl(tmp_path / "short.jsonl", [{"text": "the tide is low"}] * 3)
    run("out", model=str(short_model), data=[str(data)], max_seq_len=64)


def test_other_positions_are_warned_of(run, model_dir, tmp_path, caplog):
    data = write_jsonl(tmp_path / "long.jsonl", [{"text": "the tide is low " * 20}])
    with caplog.at_level(logging.WARNING):
        run("within", data=[str(data)], max_seq_len=128)
        assert "context" not in caplog.text
        run("beyond", data=[str(data)], max_seq_len=136)
    assert "rows of 136 tokens are longer than the context of the model, 128 tokens" in caplog.text


def test_a_run_that_was_packed_does_not_go_on_padded(make_config, tmp_path, monkeypatch):
    """An old checkpoint of a model that mixes documents, or another transformers."""
    data = write_jsonl(tmp_path / "texts.jsonl", TEXTS)
    settings = {"data": [str(data)], "eval_fraction": 0, "batch_size": 1, "max_seq_len": 128, "max_steps": 4}

    def interrupt(event):
        if event["event"] == "train" and event["step"] == 2:
            signal.raise_signal(signal.SIGINT)

    assert train(make_config(**settings), on_event=interrupt, show_progress=False).interrupted
    monkeypatch.setattr("lowtide.training.packing.keeps_documents_apart", lambda *_, **__: False)
    with pytest.raises(ValueError, match=r"an epoch has 6 steps and had 2 in .*begin anew, or allow the change"):
        train(make_config(**settings, resume="latest"), show_progress=False)
    result = train(make_config(**settings, resume="latest", allow_changes=True), show_progress=False)
    assert result.num_steps == 4 and not result.interrupted
