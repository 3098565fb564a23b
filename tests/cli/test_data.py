import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowtide.cli.demo_score import example_answers
from lowtide.data import Batches, encode_records, read_records, read_sources
from lowtide.data.formats import alpaca_prompt
from tiny_files import save_tiny_model, write_jsonl

RULE = "-" * 80
DOCS = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")


def examples_in(out):
    """Heading and text of every example that was printed."""
    parts = out.split(f"\n{RULE}\n")
    return [(parts[i].splitlines()[-1], parts[i + 1]) for i in range(0, len(parts) - 1, 2)]


def counts_in(out):
    return dict(re.findall(r"^(records|tokens|trained on|truncated|dropped|steps|padding) +(.+)$", out, re.MULTILINE))


@pytest.fixture
def chat_file(tmp_path):
    turns = [
        {"from": "human", "value": "Is it low?"},
        {"from": "gpt", "value": "yes, it is"},
        {"from": "human", "value": "Sure?"},
        {"from": "gpt", "value": "yes"},
    ]
    return write_jsonl(tmp_path / "chat.jsonl", [{"conversations": turns}, {"conversations": turns[2:]}])


def test_what_is_trained_on_stands_between_marks(lowtide, model_dir, chat_file, task):
    result = lowtide("data", "preview", "--data", chat_file, "--model", model_dir)
    assert (result.code, result.err) == (0, [])
    assert result.out.startswith(f"{chat_file}: sharegpt (JSON Lines), 2 records\n")
    ((heading, text),) = examples_in(result.out)
    assert text == (
        "<|user|>Is it low?<|end|><|assistant|>⟦yes, it is<|end|>⟧<|user|>Sure?<|end|><|assistant|>⟦yes<|end|>⟧"
    )
    assert heading == f"Example 1, from {chat_file}:1: 36 tokens, trained on the 15 between ⟦ and ⟧"
    result = lowtide("data", "preview", "--data", task, "--model", model_dir)
    ((_, text),) = examples_in(result.out)
    row = json.loads(task.read_text().splitlines()[0])
    assert text == f"{row['prompt']}⟦{row['completion']}<|end|>⟧"


def test_it_is_what_training_sees(lowtide, model_dir, chat_file):
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    examples, stats = encode_records(read_records(chat_file), tokenizer, 512)
    result = lowtide("data", "preview", "--data", chat_file, "--model", model_dir, "--num", 5)
    shown = [text.replace("⟦", "").replace("⟧", "") for _, text in examples_in(result.out)]
    assert [tokenizer(text, add_special_tokens=False)["input_ids"] for text in shown] == [
        example.input_ids for example in examples
    ]
    counts = counts_in(result.out)
    share = stats.num_trained_tokens / stats.num_tokens
    assert counts["records"] == "2"
    assert counts["tokens"] == str(stats.num_tokens)
    assert counts["trained on"] == f"{stats.num_trained_tokens} ({share:.1%} of the tokens)"
    assert counts["truncated"].startswith("0 ") and counts["dropped"].startswith("0 ")
    assert counts["steps"] == "1 in an epoch, 8 sequences each"
    longest = -(-max(len(example.input_ids) for example in examples) // 8) * 8
    assert counts["padding"] == f"{1 - stats.num_tokens / (2 * longest):.1%} of all positions (padded in batches of 8)"


def test_what_is_cut_off_and_left_out_is_counted(lowtide, model_dir, tmp_path):
    rows = [("x" * 40, "never"), ("a:", "much too long"), ("b:", "ok")]
    data = write_jsonl(tmp_path / "d.jsonl", [{"prompt": prompt, "completion": end} for prompt, end in rows])
    result = lowtide("data", "preview", "--data", data, "--model", model_dir, "--max-seq-len", 8, "--num", 2)
    assert [text for _, text in examples_in(result.out)] == ["a:⟦much t⟧", "b:⟦ok<|end|>⟧"]
    assert f"{data}:2: 8 tokens" in result.out  # the first one is dropped
    counts = counts_in(result.out)
    assert counts["truncated"] == "1 of the examples, at 8 tokens"
    assert counts["dropped"] == "1 of the examples, for having nothing to train on within 8 tokens"


def test_text_is_packed_as_in_training(lowtide, model_dir, tmp_path):
    data = write_jsonl(tmp_path / "d.jsonl", [{"text": "the tide is low " * n} for n in (1, 2, 3, 9)])
    result = lowtide("data", "preview", "--data", data, "--model", model_dir, "--max-seq-len", 40, "--num", 0)
    assert examples_in(result.out) == []
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    examples, stats = encode_records(read_records(data), tokenizer, 40)
    options = {"batch_size": 8, "max_seq_len": 40, "pad_token_id": 0, "seed": 0}
    waste = Batches(examples, packing=True, **options).packing_waste
    assert 0 < waste < 1
    assert counts_in(result.out)["padding"] == f"{waste:.1%} of all positions (packed into sequences of 40)"
    result = lowtide(
        "data", "preview", "--data", data, "--model", model_dir, "--max-seq-len", 40, "--no-packing", "--batch-size", 2
    )
    waste = Batches(examples, packing=False, **{**options, "batch_size": 2}).packing_waste
    assert counts_in(result.out)["padding"] == f"{waste:.1%} of all positions (padded in batches of 2)"
    assert stats.num_records == 4


def test_several_files_and_bad_records(lowtide, model_dir, chat_file, tmp_path):
    table = tmp_path / "t.csv"
    table.write_text('prompt,completion\n"a, b",c\nd,\n')
    arguments = ["data", "preview", "--data", chat_file, table, "--model", model_dir]
    result = lowtide(*arguments)
    assert result.code == 2
    assert result.err == [
        f"lowtide: error: {table}:3 (row 2): 'completion' is an empty string; correct or remove this record; "
        "--bad-records skip leaves such records out"
    ]
    result = lowtide(*arguments, "--bad-records", "skip")
    assert result.code == 0
    assert result.err == [
        f"lowtide: skipped: {table}:3 (row 2): 'completion' is an empty string; correct or remove this record",
        "lowtide: 1 of 4 records were skipped",
    ]
    assert f"\n{table}: prompt/completion (CSV), 1 record\n" in result.out
    assert counts_in(result.out)["records"] == "3, 1 skipped"


def test_weights_are_not_needed(lowtide, model_dir, chat_file, tmp_path, monkeypatch):
    directory = tmp_path / "tokenizer only"
    AutoTokenizer.from_pretrained(model_dir).save_pretrained(directory)
    assert not list(directory.glob("*.safetensors"))
    monkeypatch.setattr(torch.nn.Module, "__init__", None)  # whatever made a model would fail
    assert lowtide("data", "preview", "--data", chat_file, "--model", directory).code == 0


def test_colours_on_a_terminal(lowtide, model_dir, chat_file, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    ((heading, text),) = examples_in(lowtide("data", "preview", "--data", chat_file, "--model", model_dir).out)
    assert heading.endswith("trained on the 15 in colour")
    assert "⟦" not in text
    assert "\x1b[1;32myes, it is\x1b[0m\x1b[1;4;32m<|end|>\x1b[0m" in text
    assert "\x1b[2;4m<|user|>\x1b[0mIs it low?\x1b[2;4m<|end|><|assistant|>\x1b[0m" in text
    monkeypatch.setenv("NO_COLOR", "1")
    ((_, text),) = examples_in(lowtide("data", "preview", "--data", chat_file, "--model", model_dir).out)
    assert "⟦yes, it is<|end|>⟧" in text and "\x1b" not in text


def test_alpaca_without_a_chat_template(lowtide, tmp_path):
    model = save_tiny_model(tmp_path / "base", chat=False)
    data = tmp_path / "d.json"
    data.write_text('[{"instruction": "Add.", "input": "1, 2", "output": "3"}]')
    result = lowtide("data", "preview", "--data", data, "--model", model)
    ((_, text),) = examples_in(result.out)
    assert text.startswith("Below is an instruction that describes a task, paired with an input")
    assert text.endswith("### Instruction:\nAdd.\n\n### Input:\n1, 2\n\n### Response:\n⟦3<|end|>⟧")


def test_a_chat_template_of_ones_own(lowtide, chat_file, tmp_path):
    model = save_tiny_model(tmp_path / "base", chat=False)
    arguments = ["data", "preview", "--data", chat_file, "--model", model]
    result = lowtide(*arguments)
    assert result.code == 2 and "give a template with --chat-template FILE" in result.err[0]
    template = tmp_path / "own.jinja"
    template.write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}<|end|>{% endfor %}")
    result = lowtide(*arguments, "--chat-template", template)
    ((_, text),) = examples_in(result.out)
    assert text == ("user: Is it low?<|end|>⟦assistant: yes, it is<|end|>⟧user: Sure?<|end|>⟦assistant: yes<|end|>⟧")


def test_turns_of_weight_0_are_not_marked(lowtide, model_dir, tmp_path):
    turns = [("user", "Is it?", None), ("assistant", "no", 0), ("user", "Sure?", None), ("assistant", "yes", 1)]
    messages = [{"role": role, "content": content, "weight": weight} for role, content, weight in turns]
    data = write_jsonl(tmp_path / "d.jsonl", [{"messages": messages}])
    ((_, text),) = examples_in(lowtide("data", "preview", "--data", data, "--model", model_dir).out)
    assert text == "<|user|>Is it?<|end|><|assistant|>no<|end|><|user|>Sure?<|end|><|assistant|>⟦yes<|end|>⟧"


def test_the_demo_asks_a_model_without_a_template_in_alpacas_words(tmp_path):
    model = save_tiny_model(tmp_path / "base", chat=False, max_position_embeddings=512)
    data = tmp_path / "d.json"
    data.write_text('[{"instruction": "Add.", "input": "1, 2", "output": "3"}]')
    material = SimpleNamespace(choices=(), held_out=read_records(data))
    loaded = AutoModelForCausalLM.from_pretrained(model)
    (answer,) = example_answers(loaded, AutoTokenizer.from_pretrained(model), material)
    assert answer.prompt == alpaca_prompt("Add.", "1, 2")
    assert answer.expected == "3"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data"], "the following arguments are required: action, --data, --model"),
        (["data", "preview", "--model", "m"], "the following arguments are required: --data"),
        (["data", "preview", "--data", "no.csv", "--model", "m"], "no.csv: no such file or directory"),
        (
            ["data", "preview", "--data", "d", "--model", "m", "--num", "-1"],
            "argument --num: expected a whole number of",
        ),
        (["data", "show", "--data", "d", "--model", "m"], "argument action: invalid choice: 'show'"),
        (["data", "preview", "--data", "d", "--modle", "m"], "the following arguments are required: --model"),
    ],
)
def test_wrong_usage(lowtide, arguments, message):
    result = lowtide(*arguments)
    assert (result.code, result.out) == (2, "")
    assert len(result.err) == 1 and result.err[0].startswith(f"lowtide: error: {message}")


def test_training_says_what_it_read_and_others_do_not(lowtide, model_dir, chat_file, tmp_path, capfd):
    arguments = ["--model", model_dir, "--data", chat_file, "--output", tmp_path / "out", "--dtype", "float32"]
    result = lowtide("train", *arguments, "--max-steps", 1, "--eval-fraction", 0, "--device", "cpu", "--lr", 0.1)
    assert (result.code, result.err) == (0, [])
    assert result.out.startswith(f"{chat_file}: sharegpt (JSON Lines), 2 records\nFine-tuning all ")
    from lowtide.cli.quiet import quiet_libraries

    quiet_libraries()
    assert len(read_records(chat_file)) == 2
    assert capfd.readouterr().out == ""


def test_the_preview_in_the_documentation(lowtide, model_dir, chat_file, monkeypatch):
    monkeypatch.chdir(chat_file.parent)
    out = lowtide("data", "preview", "--data", chat_file.name, "--model", model_dir).out
    assert "".join(f"    {line}".rstrip() + "\n" for line in out.splitlines()) in DOCS


def test_records_in_the_documentation(lowtide, model_dir, tmp_path):
    rows = re.findall(r"^\| ([a-z/]+) \| `(\{.*?\})` \| ", DOCS, re.MULTILINE)
    assert [format for format, _ in rows] == ["text", "prompt/completion", "messages", "alpaca", "sharegpt"]
    for format, row in rows:
        path = tmp_path / "r.jsonl"
        path.write_text(row)
        assert read_sources(path)[0].format == format
    tables = re.findall(r"^    ((?:prompt,completion|messages)\n    .*\n)", DOCS, re.MULTILINE)
    assert len(tables) == 2
    for table in tables:
        path = tmp_path / "r.csv"
        path.write_text(table.replace("\n    ", "\n"))
        assert len(read_records(path)) == 1
    cut = re.search(r"`(\{[^`]*\})` is trained on as `(.*?)`", DOCS.replace("too\nlong", "too long"))
    path = write_jsonl(tmp_path / "cut.jsonl", [json.loads(cut[1])])
    out = lowtide("data", "preview", "--data", path, "--model", model_dir, "--max-seq-len", 8).out
    assert [text for _, text in examples_in(out)] == [cut[2]]
