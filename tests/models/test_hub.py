import json
import logging
import shutil
import subprocess
import sys

import huggingface_hub.errors
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from helpers import VOCAB_SIZE, tiny_config, tiny_model
from lowtide.models import checkpoint, hub, saving
from lowtide.models.hub import load_model, load_tokenizer, parse_dtype, save_model

TEMPLATE = "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{% endfor %}"


def tiny_tokenizer():
    words = ["<pad>", "<s>", "</s>", *(f"w{index}" for index in range(VOCAB_SIZE - 3))]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture
def saved(tmp_path):
    """A saved model and what it was saved from."""
    model = tiny_model("llama", torch.bfloat16, tie_word_embeddings=False)
    save_model(model, tiny_tokenizer(), tmp_path / "model")
    return tmp_path / "model", model


def one_line(error):
    text = str(error.value)
    assert "\n" not in text and len(text) < 500
    return text


def edit_config(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("float32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16), ("float16", torch.float16)],
)
def test_dtypes_by_name(name, dtype):
    assert parse_dtype(name) is dtype


def test_an_unknown_dtype_is_refused():
    with pytest.raises(ValueError, match="float8.*bfloat16"):
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


def test_everything_is_flushed_to_the_disk_before_the_rename(tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr(saving, "_flush", lambda path: flushed.append((path, (tmp_path / "model").exists())))
    save_model(tiny_model(), tiny_tokenizer(), tmp_path / "model")
    before = {path.name for path, renamed in flushed if not renamed}
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= before
    assert flushed[-1] == (tmp_path, True)


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"temperature": 0.6, "top_p": 0.9}, {"do_sample": True, "temperature": 0.6}),
        ({"num_beams": 1, "num_return_sequences": 3}, {}),
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


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_the_hub_cannot_be_reached(load):
    with pytest.raises(ConnectionError) as error:
        load("nobody/no-such-model")
    assert "nobody/no-such-model" in one_line(error) and "give a local directory" in one_line(error)


class _Response:
    headers: dict = {}
    status_code = 404
    request = None


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

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", answer)
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


def test_first_line_is_never_empty():
    assert checkpoint.first_line(ValueError("\n  what.\nmore")) == "what"
    assert checkpoint.first_line(KeyError()) == "KeyError"


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
