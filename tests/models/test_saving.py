import os
from pathlib import Path

import pytest
import torch
from model_helpers import TEMPLATE, tiny_tokenizer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from helpers import tiny_model
from lowtide.models.hub import load_model, save_model


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "gpt_neox", "gpt2", "mixtral", "qwen3_moe"])
def test_families_survive_saving_and_loading(tmp_path, family):
    original = tiny_model(family).eval()
    save_model(original, tiny_tokenizer(), tmp_path / "model")
    model = load_model(str(tmp_path / "model"), dtype=torch.float32)
    tokens = torch.arange(3, 13).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, original(tokens).logits)


def test_plain_transformers_opens_what_was_saved(saved):
    directory, original = saved
    model = AutoModelForCausalLM.from_pretrained(directory)
    assert model.dtype == torch.bfloat16
    assert model.generation_config.eos_token_id == 2
    assert torch.equal(model.lm_head.weight, original.lm_head.weight)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert tokenizer.chat_template == TEMPLATE
    assert tokenizer("w1 w2")["input_ids"] == [4, 5]
    assert tokenizer.eos_token == "</s>"


def test_tied_embeddings_are_not_missing_and_stay_tied(tmp_path):
    save_model(tiny_model("llama", tie_word_embeddings=True), tiny_tokenizer(), tmp_path / "model")
    assert "lm_head.weight" not in load_file(tmp_path / "model/model.safetensors")
    model = load_model(str(tmp_path / "model"))
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_saving_refuses_a_directory_that_holds_something(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/mine.txt").write_text("keep")
    with pytest.raises(FileExistsError, match="not an empty directory"):
        save_model(tiny_model(), tiny_tokenizer(), tmp_path / "model")
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "mine.txt"]


def test_saving_refuses_a_file(tmp_path):
    (tmp_path / "model").write_text("keep")
    with pytest.raises(FileExistsError):
        save_model(tiny_model(), tiny_tokenizer(), tmp_path / "model")
    assert (tmp_path / "model").read_text() == "keep"


def test_saving_into_an_empty_directory_and_below_new_ones(tmp_path):
    (tmp_path / "empty").mkdir()
    for target in (tmp_path / "empty", tmp_path / "a/b/c"):
        save_model(tiny_model(), tiny_tokenizer(), target)
        assert (target / "model.safetensors").is_file()
        assert {path.name for path in target.parent.iterdir()} <= {"empty", "a", "c"}


def test_a_save_that_fails_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(self, directory):
        raise OSError("No space left on device")

    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", fail)
    with pytest.raises(OSError, match="No space left"):
        save_model(tiny_model(), tiny_tokenizer(), tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs Linux to tell which file is flushed")
def test_everything_is_flushed_to_the_disk_before_the_rename(tmp_path, monkeypatch):
    flushed, original = [], os.fsync

    def fsync(descriptor):
        original(descriptor)
        flushed.append((Path(os.readlink(f"/proc/self/fd/{descriptor}")), (tmp_path / "model").exists()))

    monkeypatch.setattr(os, "fsync", fsync)
    save_model(tiny_model(), tiny_tokenizer(), tmp_path / "model")
    before = {path.name for path, renamed in flushed if not renamed}
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= before
    assert flushed[-1] == (tmp_path, True)


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"temperature": 0.6, "top_p": 0.9}, {"do_sample": True, "temperature": 0.6}),
        ({"num_beams": 1, "num_return_sequences": 3}, {"do_sample": True, "num_return_sequences": 3}),
        ({"cache_implementation": "nonsense", "temperature": 0.6}, {"cache_implementation": None}),
    ],
)
def test_a_generation_config_that_contradicts_itself_does_not_stop_the_save(tmp_path, settings, kept):
    model = tiny_model()
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    before = model.generation_config
    save_model(model, tiny_tokenizer(), tmp_path / "model")
    assert model.generation_config is before
    loaded = load_model(str(tmp_path / "model")).generation_config
    assert loaded.eos_token_id == 2
    assert {name: getattr(loaded, name) for name in kept} == kept
