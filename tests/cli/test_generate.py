import io

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowtide.cli.generate import Speaker
from tiny_files import save_tiny_model


@pytest.fixture(scope="session")
def base_dir(tmp_path_factory):
    """A model without a chat template."""
    return save_tiny_model(tmp_path_factory.mktemp("base") / "model", chat=False)


@pytest.fixture
def piped(monkeypatch):
    return lambda text: monkeypatch.setattr("sys.stdin", io.StringIO(text))


def continuation(model_dir, text, max_new_tokens):
    """What plain transformers says, greedily."""
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, do_sample=False)
    return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)


def same(out, expected):
    # a random model writes bytes that are no characters and control characters; the terminal gets them with a newline
    return out.removesuffix("\n").split() == expected.split()


def test_a_prompt_goes_through_the_chat_template(lowtide, model_dir):
    result = lowtide("generate", "--model", model_dir, "--prompt", "hi", "--max-new-tokens", 12, "--dtype", "float32")
    assert (result.code, result.err) == (0, [])
    assert same(result.out, continuation(model_dir, "<|user|>hi<|end|><|assistant|>", 12))


def test_a_system_message_comes_first(lowtide, model_dir):
    arguments = ["--prompt", "hi", "--system", "be kind", "--max-new-tokens", 12, "--dtype", "float32"]
    result = lowtide("generate", "--model", model_dir, *arguments)
    expected = continuation(model_dir, "<|system|>be kind<|end|><|user|>hi<|end|><|assistant|>", 12)
    assert same(result.out, expected)


def test_raw_continues_the_text_as_it_is(lowtide, model_dir):
    arguments = ["--prompt", "hi", "--raw", "--max-new-tokens", 12, "--dtype", "float32"]
    result = lowtide("generate", "--model", model_dir, *arguments)
    assert same(result.out, continuation(model_dir, "hi", 12))


def test_the_prompt_may_come_from_standard_input(lowtide, base_dir, piped):
    piped("once upon\n")
    result = lowtide("generate", "--model", base_dir, "--max-new-tokens", 12, "--dtype", "float32")
    assert (result.code, result.err) == (0, [])
    assert same(result.out, continuation(base_dir, "once upon", 12))


def test_a_chat_remembers_what_was_said(lowtide, model_dir, piped, monkeypatch):
    said = []

    def answer(self, messages):
        said.append([dict(message) for message in messages])
        return f"answer {len(said)}"

    monkeypatch.setattr(Speaker, "answer", answer)
    piped("one\n\n  two  \n")
    result = lowtide("generate", "--model", model_dir, "--chat", "--system", "s", "--max-new-tokens", 20)
    assert (result.code, result.out, result.err) == (0, "", [])
    system, one = {"role": "system", "content": "s"}, {"role": "user", "content": "one"}
    two = {"role": "user", "content": "two"}
    assert said == [[system, one], [system, one, {"role": "assistant", "content": "answer 1"}, two]]


def test_a_long_chat_forgets_its_oldest_turns_and_survives_a_line_that_is_too_long(lowtide, model_dir, piped):
    # the context has 128 tokens, of which 28 are left for the answer
    piped("a" * 60 + "\n" + "b" * 60 + "\n" + "c" * 120 + "\n" + "d\n")
    result = lowtide("generate", "--model", model_dir, "--chat", "--max-new-tokens", 28)
    assert result.code == 0
    assert len(result.err) == 1
    assert "the prompt has 123 tokens" in result.err[0]
    assert "room for 100" in result.err[0]


def test_sampling_is_decided_by_the_seed(lowtide, model_dir):
    def sample(seed):
        arguments = ["--prompt", "hi", "--temperature", 1.5, "--seed", seed, "--max-new-tokens", 20]
        return lowtide("generate", "--model", model_dir, *arguments).out

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "x", "--chat"], "not allowed with"),
        (["--chat", "--raw"], "--chat needs the chat template"),
        (["--prompt", " "], "the prompt is empty"),
        (["--prompt", "x" * 200], "the prompt has 203 tokens; with --max-new-tokens 256"),
        (["--prompt", "x", "--max-new-tokens", "0"], "expected a whole number of at least 1, got '0'"),
        (["--prompt", "x", "--temperature", "-1"], "expected a number of at least 0, got '-1'"),
        (["--prompt", "x", "--temprature", "1"], "unknown flag --temprature (did you mean --temperature?)"),
        (["--prompt", "x", "--dtype", "int4"], "invalid choice: 'int4'"),
        (["--prompt", "x", "--device", "cuda:99"], "device cuda:99 is not there"),
    ],
)
def test_bad_usage_is_one_line(lowtide, model_dir, arguments, message):
    result = lowtide("generate", "--model", model_dir, *arguments)
    assert (result.code, result.out) == (2, "")
    assert len(result.err) == 1
    assert message in result.err[0]


def test_bad_models_are_one_line(lowtide, base_dir, tmp_path):
    for arguments, message in (
        (["--model", tmp_path / "none", "--prompt", "x"], "none"),
        (["--model", base_dir, "--chat"], "has no chat template, so --chat cannot work"),
        (["--model", base_dir, "--prompt", "x", "--system", "y"], "has no chat template, so --system cannot work"),
    ):
        result = lowtide("generate", *arguments)
        assert result.code in (1, 2)
        assert len(result.err) == 1
        assert message in result.err[0]


def test_a_template_that_refuses_is_one_line(lowtide, tmp_path):
    directory = save_tiny_model(tmp_path / "model")
    template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}x"
    (directory / "chat_template.jinja").write_text(template)
    result = lowtide("generate", "--model", directory, "--prompt", "a", "--system", "b", "--device", "cpu")
    assert result.code == 2 and len(result.err) == 1
    assert "refuses these messages (system, user): System role not supported; leave out --system" in result.err[0]
