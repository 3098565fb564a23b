import json

import pytest
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowtide.training import read_events
from tiny_files import save_tiny_model, write_jsonl

SETTINGS = {"optimizer": "adalomo", "lr": 0.2, "max-steps": 40, "dtype": "float32", "max-seq-len": 32, "device": "cpu"}


def flags(**settings):
    return [part for name, value in settings.items() for part in (f"--{name}", str(value))]


def test_trains_saves_and_says_what_it_did(lowtide, model_dir, task, tmp_path):
    output = tmp_path / "out"
    arguments = ["--model", model_dir, "--data", task, "--output", output, *flags(**SETTINGS)]
    result = lowtide("train", *arguments, "--micro-batch-size", "2", "--eval-every", "20", "--eval-fraction", "0.1")
    assert result.code == 0, result.err
    assert result.err == []
    assert "Fine-tuning all 26.9k parameters" in result.out
    assert "40 steps" in result.out
    assert "8 sequences, at most 256 tokens a step, through each layer 2 at a time." in result.out
    assert "step 10/40  loss " in result.out
    assert "step 20: held-out loss " in result.out
    assert "Done: 40 steps in " in result.out
    assert "Held-out loss " in result.out
    assert f"lowtide generate --model {output / 'model'}" in result.out

    losses = [event["loss"] for event in read_events(output / "metrics.jsonl", "train")]
    assert losses[-1] < 0.1 * losses[0]
    scores = [event["loss"] for event in read_events(output / "metrics.jsonl", "eval")]
    assert len(scores) == 3
    assert scores[-1] < 0.1 * scores[0]

    model = AutoModelForCausalLM.from_pretrained(output / "model")
    tokenizer = AutoTokenizer.from_pretrained(output / "model")
    generated = model.generate(**tokenizer("say b:", return_tensors="pt"), max_new_tokens=8, do_sample=False)
    assert tokenizer.decode(generated[0], skip_special_tokens=True) == "say b: bb"


def test_a_config_file_with_flags_over_it(lowtide, model_dir, task, tmp_path):
    output = tmp_path / "out"
    config = tmp_path / "run.json"
    settings = {**SETTINGS, "model": str(model_dir), "data": str(task), "output": str(output), "max-steps": 9}
    config.write_text(json.dumps(settings))
    result = lowtide("train", "--config", config, "--max-steps", "2", "--eval-fraction", "0")
    assert result.code == 0, result.err
    assert "Done: 2 steps" in result.out
    assert "Held-out" not in result.out


def test_what_a_run_wrote_starts_the_same_run_again(lowtide, model_dir, task, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    arguments = ["--model", model_dir, "--data", task, "--output", first, *flags(**SETTINGS | {"max-steps": 3})]
    assert lowtide("train", *arguments).code == 0
    assert lowtide("train", "--config", first / "config.yaml", "--output", second).code == 0
    losses = [[e["loss"] for e in read_events(path / "metrics.jsonl", "train")] for path in (first, second)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("kind", ["text file", "text", "messages"])
def test_every_kind_of_data(lowtide, model_dir, tmp_path, kind):
    if kind == "text file":
        data = tmp_path / "book.txt"
        data.write_text("the tide is low and the boat is on the sand\n" * 40)
    elif kind == "text":
        data = write_jsonl(tmp_path / "d.jsonl", [{"text": "the tide is low"}] * 20)
    else:
        turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
        data = write_jsonl(tmp_path / "d.jsonl", [{"messages": turns}] * 20)
    arguments = ["--model", model_dir, "--data", data, "--output", tmp_path / "out"]
    result = lowtide("train", *arguments, *flags(**SETTINGS | {"max-steps": 10}))
    assert result.code == 0, result.err
    before, after = (event["loss"] for event in read_events(tmp_path / "out" / "metrics.jsonl", "eval"))
    assert after < before


def _missing_data(tmp_path, model_dir, task):
    return ["--model", model_dir, "--data", tmp_path / "nope.jsonl"], ["nope.jsonl"]


def _malformed_line(tmp_path, model_dir, task):
    with task.open("a") as file:
        file.write('{"prompt": "x", "completion"\n')
    return ["--model", model_dir, "--data", task], ["task.jsonl:65", "JSON"]


def _empty_data(tmp_path, model_dir, task):
    task.write_text("")
    return ["--model", model_dir, "--data", task], ["task.jsonl", "no records"]


def _unknown_model(tmp_path, model_dir, task):
    return ["--model", tmp_path / "no-model", "--data", task], ["no-model"]


def _unknown_hub_model(tmp_path, model_dir, task):
    return ["--model", "no-such-organisation/no-such-model", "--data", task], ["no-such-organisation/no-such-model"]


def _too_big_model(tmp_path, model_dir, task):
    """All files of a real model, but a config that asks for petabytes."""
    big = save_tiny_model(tmp_path / "big")
    config = json.loads((big / "config.json").read_text())
    config |= {"hidden_size": 2**20, "intermediate_size": 2**22, "num_hidden_layers": 1000}
    (big / "config.json").write_text(json.dumps(config))
    return ["--model", big, "--data", task], ["memory", "big"]


def _unknown_key(tmp_path, model_dir, task):
    (tmp_path / "run.yaml").write_text("# settings\nmodle: x\n")
    return ["--config", tmp_path / "run.yaml"], ["run.yaml:2", "'modle'", "did you mean model?"]


def _wrong_type(tmp_path, model_dir, task):
    (tmp_path / "run.yaml").write_text("batch_size: many\n")
    return ["--config", tmp_path / "run.yaml"], ["run.yaml:1", "batch_size", "a whole number", "'many'"]


def _out_of_range(tmp_path, model_dir, task):
    return ["--model", model_dir, "--data", task, "--batch-size", "0"], ["batch_size must be at least 1, got 0"]


def _nothing_to_learn(tmp_path, model_dir, task):
    return ["--model", model_dir, "--data", task, "--max-seq-len", "3"], ["task.jsonl", "--max-seq-len"]


BAD = [
    _missing_data,
    _malformed_line,
    _empty_data,
    _unknown_model,
    _unknown_hub_model,
    _too_big_model,
    _unknown_key,
    _wrong_type,
    _out_of_range,
    _nothing_to_learn,
]


@pytest.mark.parametrize("prepare", BAD, ids=lambda prepare: prepare.__name__.strip("_"))
def test_bad_input_is_one_clear_line_and_nothing_is_written(lowtide, model_dir, task, tmp_path, prepare):
    arguments, expected = prepare(tmp_path, model_dir, task)
    result = lowtide("train", *arguments, "--output", tmp_path / "out")
    assert result.code in (1, 2)
    assert len(result.err) == 1, result.err
    assert result.err[0].startswith("lowtide: error: ")
    assert [word for word in expected if word not in result.err[0]] == [], result.err[0]
    assert "Traceback" not in result.out
    assert not (tmp_path / "out").exists()


def test_an_output_directory_that_is_not_empty_is_left_alone(lowtide, model_dir, task, tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    (output / "model").write_text("precious")
    result = lowtide("train", "--model", model_dir, "--data", task, "--output", output)
    assert result.code == 2
    assert len(result.err) == 1
    assert f"{output} is not empty" in result.err[0]
    assert [(path.name, path.read_text()) for path in output.iterdir()] == [("model", "precious")]


def test_trackers_are_one_flag(lowtide, model_dir, task, tmp_path):
    output = tmp_path / "out"
    arguments = (
        "train",
        "--model",
        model_dir,
        "--data",
        task,
        "--output",
        output,
        "--dtype",
        "float32",
        "--max-steps",
        "1",
    )
    done = lowtide(*arguments, "--device", "cpu", "--max-seq-len", "32", "--track", "tensorboard")
    assert done.code == 0 and len(list((output / "trackers" / "tensorboard").iterdir())) == 1
    assert yaml.safe_load((output / "config.yaml").read_text())["track"] == ["tensorboard"]
    wrong = lowtide(*arguments, "--track", "tensorboard", "wandbb")
    assert wrong.code == 2 and "did you mean wandb?" in wrong.err[-1]
