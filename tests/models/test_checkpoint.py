import huggingface_hub
import huggingface_hub.errors
import pytest
import torch
import transformers
from model_helpers import one_line

from helpers import tiny_model
from lowtide.models import checkpoint
from lowtide.models.hub import load_model, load_tokenizer


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_the_hub_cannot_be_reached(load):
    with pytest.raises(ConnectionError) as error:
        load("nobody/no-such-model")
    assert "nobody/no-such-model" in one_line(error) and "give a local directory" in one_line(error)


@pytest.mark.parametrize(
    ("cause", "expected", "text"),
    [
        ("RepositoryNotFoundError", FileNotFoundError, "no such public model"),
        ("GatedRepoError", PermissionError, "hf auth login"),
    ],
)
def test_what_the_hub_answers_is_said_in_one_line(monkeypatch, cause, expected, text):
    def answer(*args, **kwargs):
        error = getattr(huggingface_hub.errors, cause)
        raise OSError("nobody/x is not a valid model identifier\nmany\nmore lines") from error.__new__(error)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", answer)
    with pytest.raises(expected) as error:
        load_model("nobody/x")
    assert text in one_line(error)


def test_a_directory_without_config(tmp_path, saved):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(FileNotFoundError) as error:
        load_model(str(empty))
    assert "has no config.json" in one_line(error)
    with pytest.raises(FileNotFoundError) as error:
        load_model(str(tmp_path))
    assert f"did you mean {tmp_path / 'model'}?" in one_line(error)
    (empty / "adapter_config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="adapter"):
        load_model(str(empty))


def test_a_directory_with_a_gguf_file_names_it(tmp_path):
    (tmp_path / "small.gguf").write_bytes(b"GGUF")
    with pytest.raises(FileNotFoundError, match=r"did you mean the file .*small\.gguf"):
        load_model(str(tmp_path))


def test_pickled_weights_are_refused_with_the_reason(saved):
    directory, model = saved
    (directory / "model.safetensors").unlink()
    torch.save(model.state_dict(), directory / "pytorch_model.bin")
    with pytest.raises(ValueError) as error:
        load_model(str(directory))
    assert "pickle" in one_line(error) and "run any code" in one_line(error) and "save_pretrained" in one_line(error)


def test_no_weights_at_all(saved):
    directory, _ = saved
    (directory / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError) as error:
        load_model(str(directory))
    assert "has no weights" in one_line(error)


@pytest.mark.parametrize("damage", ["cut", "garbage"])
def test_a_damaged_weight_file_is_named(saved, damage):
    directory, _ = saved
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100] if damage == "cut" else b"not a safetensors file at all")
    with pytest.raises(ValueError) as error:
        load_model(str(directory))
    assert str(path) in one_line(error) and "damaged or incomplete" in one_line(error)


def test_a_missing_shard_is_named(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1
    assert load_model(str(tmp_path), dtype=torch.float32) is not None
    shards[0].unlink()
    with pytest.raises(FileNotFoundError) as error:
        load_model(str(tmp_path))
    assert shards[0].name in one_line(error)


def test_a_damaged_index_is_named(saved):
    directory, _ = saved
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(ValueError, match=r"index\.json is damaged"):
        load_model(str(directory))


def test_first_line_is_never_empty():
    assert checkpoint.first_line(ValueError("\n  what.\nmore")) == "what"
    assert checkpoint.first_line(KeyError()) == "KeyError"


def test_the_hub_is_asked_before_transformers_tries_again_and_again(monkeypatch):
    class StrangeError(Exception):
        """Of an HTTP library, so no OSError."""

    def unreachable(*args, **kwargs):
        raise StrangeError("Name or service not known")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unreachable)
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", lambda *args, **kwargs: pytest.fail("asked"))
    with pytest.raises(ConnectionError) as error:
        load_model("nobody/x")
    assert "Name or service not known" in one_line(error)


def test_a_model_that_was_downloaded_before_is_not_asked_for(monkeypatch, saved):
    directory, original = saved
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda name, file: str(directory / file))
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *args, **kwargs: pytest.fail("asked"))
    opened = transformers.AutoConfig.from_pretrained
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", lambda name, **kwargs: opened(directory, **kwargs))
    loaded = transformers.AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(
        transformers.AutoModelForCausalLM, "from_pretrained", lambda name, **kwargs: loaded(directory, **kwargs)
    )
    assert torch.equal(load_model("nobody/x").lm_head.weight, original.lm_head.weight)


def test_running_out_of_device_memory_is_not_called_a_bad_model():
    with pytest.raises(torch.OutOfMemoryError), checkpoint.clear_errors("x", "x", "model"):
        raise torch.OutOfMemoryError("CUDA out of memory")
