import logging
import shutil
import subprocess
import sys

import pytest
import torch
import transformers
from model_helpers import edit_config, one_line
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from helpers import VOCAB_SIZE, tiny_config
from lowtide.models import hub
from lowtide.models.hub import load_model, load_tokenizer, parse_dtype


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("float32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16), ("float16", torch.float16)],
)
def test_dtypes_by_name(name, dtype):
    assert parse_dtype(name) is dtype


def test_an_unknown_dtype_is_refused():
    with pytest.raises(ValueError, match=r"float8.*bfloat16"):
        parse_dtype("float8")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_loads_in_the_wanted_dtype(saved, dtype):
    directory, original = saved
    model = load_model(str(directory), dtype=dtype)
    assert {param.dtype for param in model.parameters()} == {dtype}
    assert not model.training
    for name, param in model.named_parameters():
        assert torch.equal(param, original.get_parameter(name).to(dtype))


def test_training_does_not_change_the_files_it_was_loaded_from(saved):
    directory, _ = saved
    before = (directory / "model.safetensors").read_bytes()
    model = load_model(str(directory), dtype=torch.bfloat16)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(1.0)
    assert (directory / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    "name", ["./nowhere", "/no/such/model", "a/b/c", "no such model", "~/nowhere/at-all", ".."[:1] + "/x"]
)
@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_a_path_that_does_not_exist(load, name):
    with pytest.raises(FileNotFoundError) as error:
        load(name)
    assert name in one_line(error) and "does not exist" in one_line(error)


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_an_empty_name_and_a_file_are_refused(load, tmp_path):
    (tmp_path / "weights.bin").write_text("x")
    with pytest.raises(ValueError, match="empty"):
        load("")
    with pytest.raises(ValueError, match=r"is a file.*\.gguf"):
        load(str(tmp_path / "weights.bin"))


def test_a_missing_tensor_is_refused_not_made_up(saved):
    directory, _ = saved
    tensors = load_file(directory / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError) as error:
        load_model(str(directory))
    assert "lacks 1 of the model's weights" in one_line(error) and "lm_head.weight" in one_line(error)


def test_a_tensor_of_the_wrong_shape_is_refused(saved):
    directory, _ = saved
    edit_config(directory, vocab_size=VOCAB_SIZE + 1)
    with pytest.raises(ValueError) as error:
        load_model(str(directory))
    assert str(directory) in one_line(error)


def test_a_tensor_too_many_is_mentioned(saved, caplog):
    directory, _ = saved
    tensors = load_file(directory / "model.safetensors") | {"score.weight": torch.zeros(2, 32)}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    with caplog.at_level(logging.WARNING, "lowtide"):
        load_model(str(directory))
    assert "score.weight" in caplog.text


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (transformers.T5Config(num_layers=1), "t5"),
        (transformers.BertConfig(num_hidden_layers=1, architectures=["BertForMaskedLM"]), "BertForMaskedLM"),
        (transformers.ViTConfig(num_hidden_layers=1), "vit"),
        (tiny_config(architectures=["LlamaForSequenceClassification"]), "LlamaForSequenceClassification"),
    ],
)
def test_what_is_no_causal_language_model_is_refused(tmp_path, config, kind):
    config.save_pretrained(tmp_path)
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError) as error:
        load_model(str(tmp_path))
    assert f"{kind}, not a causal language model" in one_line(error)


def test_an_unknown_model_type_is_refused(saved):
    directory, _ = saved
    edit_config(directory, model_type="brand-new")
    with pytest.raises(ValueError) as error:
        load_model(str(directory))
    assert "brand-new" in one_line(error)


def test_a_config_that_is_no_json_is_refused(saved):
    directory, _ = saved
    (directory / "config.json").write_text("{")
    with pytest.raises(ValueError) as error:
        load_model(str(directory))
    assert "config" in one_line(error)


def test_quantised_weights_are_refused(saved):
    directory, _ = saved
    edit_config(directory, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(ValueError) as error:
        load_model(str(directory))
    assert "quantised (gptq)" in one_line(error)


CUSTOM_CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
(Path(__file__).parent / "ran").touch()
class CustomConfig(LlamaConfig):
    model_type = "custom"
class CustomModel(LlamaForCausalLM):
    config_class = CustomConfig
"""


def test_code_of_the_model_runs_only_when_allowed(saved, monkeypatch, tmp_path):
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "cache"))
    directory, _ = saved
    (directory / "custom.py").write_text(CUSTOM_CODE)
    auto_map = {"AutoConfig": "custom.CustomConfig", "AutoModelForCausalLM": "custom.CustomModel"}
    edit_config(directory, model_type="custom", architectures=["CustomModel"], auto_map=auto_map)
    with pytest.raises(ValueError) as error:
        load_model(str(directory))
    assert "trust_remote_code" in one_line(error)
    assert not list(tmp_path.rglob("ran"))
    model = load_model(str(directory), trust_remote_code=True)
    assert type(model).__name__ == "CustomModel"
    assert list(tmp_path.rglob("ran"))


def test_weights_that_do_not_fit_are_refused_before_they_are_read(saved, monkeypatch):
    directory, model = saved
    needed = sum(param.nbytes for param in model.parameters())
    monkeypatch.setattr(hub, "_load_weights", lambda *args: pytest.fail("weights were loaded"))
    monkeypatch.setattr(hub, "device_available_bytes", lambda device: needed - 1)
    with pytest.raises(MemoryError) as error:
        load_model(str(directory), dtype=torch.bfloat16)
    assert "for the weights in bfloat16" in one_line(error) and "smaller model" in one_line(error)
    monkeypatch.setattr(hub, "device_available_bytes", lambda device: 2 * needed - 1)
    with pytest.raises(MemoryError, match="or bfloat16"):
        load_model(str(directory), dtype=torch.float32)


def test_weights_that_just_fit_are_loaded(saved, monkeypatch):
    directory, model = saved
    needed = sum(param.nbytes for param in model.parameters())
    monkeypatch.setattr(hub, "device_available_bytes", lambda device: needed)
    assert load_model(str(directory), dtype=torch.bfloat16) is not None


def test_a_directory_without_tokenizer(tmp_path, saved):
    directory, _ = saved
    for path in directory.glob("*token*"):
        path.unlink()
    with pytest.raises(FileNotFoundError) as error:
        load_tokenizer(str(directory))
    assert "has no tokenizer" in one_line(error)


def test_a_damaged_tokenizer_is_one_line(saved):
    directory, _ = saved
    (directory / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError) as error:
        load_tokenizer(str(directory))
    assert "tokenizer" in one_line(error)


MEASURE = """
import sys, torch
torch.set_num_threads(1)
import accelerate
from transformers.models.llama import modeling_llama
from lowtide.models.hub import load_model, parse_dtype
from lowtide.planning import peak_resident_bytes
base = peak_resident_bytes()
model = load_model(sys.argv[1], dtype=parse_dtype(sys.argv[2]))
with torch.no_grad():
    for param in model.parameters():
        param.add_(0)  # every page is really there
weights = sum(param.nbytes for param in model.parameters())
print((peak_resident_bytes() - base) / weights)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A 200 MB model in bfloat16."""
    config = transformers.LlamaConfig(
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=5,
        num_attention_heads=16,
        vocab_size=20000,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    directory = tmp_path_factory.mktemp("large")
    weights = {name: torch.full(tensor.shape, 0.01, dtype=tensor.dtype) for name, tensor in model.state_dict().items()}
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(directory)
    yield directory
    shutil.rmtree(directory)


@pytest.mark.parametrize(
    ("dtype", "bound"),
    # float32 holds half its size more: the pages of the file it is read from
    [("bfloat16", 1.35), ("float32", 1.7)],
)
def test_the_peak_while_loading_is_bounded(large, dtype, bound):
    done = subprocess.run([sys.executable, "-c", MEASURE, large, dtype], capture_output=True, text=True, check=True)
    assert 0.95 < float(done.stdout) < bound


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_loads_straight_onto_cuda(saved):
    directory, original = saved
    model = load_model(str(directory), dtype=torch.bfloat16, device="cuda")
    assert {param.device.type for param in model.parameters()} == {"cuda"}
    assert torch.equal(model.lm_head.weight.cpu(), original.lm_head.weight)
