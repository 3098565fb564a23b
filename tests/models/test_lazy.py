"""Models whose weights stay in their files until a home takes them in."""

import pytest
import torch
from model_helpers import tiny_tokenizer

import lowtide
from helpers import same_weights, tiny_batch, tiny_model
from lowtide.models import load_model
from lowtide.models.saving import save_model

FAMILIES = ["llama", "qwen3", "gemma3", "gpt_neox", "gpt2"]


def saved_model(family, directory, dtype=torch.float32, **changes):
    model = tiny_model(family, dtype=dtype, **changes)
    save_model(model, tiny_tokenizer(), directory)
    return model


def train(model, **options):
    optimizer = lowtide.Lomo(model.parameters(), lr=0.05)
    engine = lowtide.fuse(model.train(), optimizer, **options)
    for step in range(2):
        engine.backward(model(**tiny_batch(step)).loss)
        optimizer.step()
    return engine


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_as_loaded(family, tmp_path):
    saved_model(family, tmp_path / "model")
    lazy = load_model(tmp_path / "model", dtype=torch.float32, lazy=True)
    loaded = load_model(tmp_path / "model", dtype=torch.float32)
    assert hasattr(lazy, "lowtide_source"), "it was loaded"
    assert all(param.untyped_storage().nbytes() <= 4 for param in lazy.parameters())
    assert lazy.generation_config.to_dict() == loaded.generation_config.to_dict()
    train(loaded).remove()
    train(lazy, weights=tmp_path / "weights").remove()
    assert same_weights(loaded, lazy)
    buffers = zip(loaded.named_buffers(), lazy.named_buffers(), strict=True)
    assert all(a == b and torch.equal(x, y) for (a, x), (b, y) in buffers)


def test_in_another_dtype_and_without_a_home(tmp_path):
    saved_model("llama", tmp_path / "model")
    loaded = load_model(tmp_path / "model", dtype=torch.bfloat16)
    lazy = load_model(tmp_path / "model", dtype=torch.bfloat16, lazy=True)
    train(loaded).remove()
    train(lazy).remove()
    assert same_weights(loaded, lazy)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_converted_checkpoints_are_loaded(family, tmp_path):
    saved_model(family, tmp_path / "model")
    model = load_model(tmp_path / "model", dtype=torch.float32, lazy=True)
    assert not hasattr(model, "lowtide_source")
    assert same_weights(model, load_model(tmp_path / "model", dtype=torch.float32))


def test_several_files_and_a_streamed_save(tmp_path):
    model = tiny_model(tie_word_embeddings=False)
    model.save_pretrained(tmp_path / "model", max_shard_size="20KB")
    lazy = load_model(tmp_path / "model", dtype=torch.float32, lazy=True)
    engine = train(lazy, weights=tmp_path / "weights")
    save_model(lazy, tiny_tokenizer(), tmp_path / "out", engine.parts_of_model())
    engine.remove()
    assert same_weights(lazy, load_model(tmp_path / "out", dtype=torch.float32))


def test_a_file_that_shrinks(tmp_path):
    import os

    saved_model("llama", tmp_path / "model")
    lazy = load_model(tmp_path / "model", dtype=torch.float32, lazy=True)
    path = tmp_path / "model" / "model.safetensors"
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(OSError, match=r"model\.safetensors was truncated"):
        train(lazy, weights=tmp_path / "weights")
    assert not (tmp_path / "weights").exists()
