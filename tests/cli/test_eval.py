import json
import shutil
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GptOssConfig

from lowtide.cli.scores_file import ScoresFile
from superglue_files import OFFICIAL, write_rte
from tiny_files import CHAT_TEMPLATE, save_tiny_model, write_jsonl


@pytest.fixture
def superglue(tmp_path):
    return write_rte(tmp_path / "SuperGLUE")


def test_a_task_is_scored_both_ways_and_written(lowtide, model_dir, superglue, tmp_path):
    path = tmp_path / "scores.json"
    result = lowtide(
        "eval",
        "--model",
        model_dir,
        "--task",
        "superglue/rte",
        "--data",
        superglue,
        "--dtype",
        "float32",
        "--output",
        path,
    )
    assert (result.code, result.err) == (0, [])
    assert "superglue/rte: accuracy" in result.out and "per token" in result.out and "20 examples of test" in result.out
    written = json.loads(path.read_text())
    assert written["complete"] is True and written["dtype"] == "float32"
    scores = written["scores"]["superglue/rte"]
    right = sum(guess == gold for guess, gold in zip(scores["predictions"], scores["gold"], strict=True))
    assert scores["accuracy"] == scores["accuracy_per_token"] == right / 20 == pytest.approx(scores["accuracy"])
    assert scores["majority"] == pytest.approx(13 / 20) and 0 <= scores["accuracy_sum"] <= 1


def test_splits_scoring_and_limit(lowtide, model_dir, superglue):
    arguments = ["eval", "--model", model_dir, "--task", "superglue/rte", "--data", superglue, "--dtype", "float32"]
    result = lowtide(*arguments, "--split", "dev", "--scoring", "sum", "--limit", 5)
    assert result.code == 0 and "(sum; per token" in result.out and "5 examples of dev" in result.out


@pytest.mark.parametrize("data_seed", [0, 1])
@pytest.mark.parametrize("split", ["train", "dev", "test"])
def test_few_examples_are_of_the_split_that_training_makes(
    lowtide, model_dir, superglue, tmp_path, monkeypatch, split, data_seed
):
    from lowtide import evaluation
    from lowtide.data import load_superglue

    rows = [OFFICIAL["rte"] | {"premise": str(number)} for number in range(40)]
    write_jsonl(superglue / "RTE" / "train.jsonl", rows)
    scored, score = [], evaluation.choice_accuracies
    monkeypatch.setattr(
        evaluation,
        "choice_accuracies",
        lambda model, tokenizer, items: scored.extend(items) or score(model, tokenizer, items),
    )
    arguments = ["eval", "--model", model_dir, "--task", "superglue/rte", "--data", superglue, "--dtype", "float32"]
    path = tmp_path / "scores.json"
    more = ["--split", split, "--limit", 5, "--data-seed", data_seed, "--output", path]
    assert lowtide(*arguments, *more).code == 0
    assert json.loads(path.read_text())["data_seed"] == data_seed
    trained = load_superglue("rte", superglue, seed=data_seed)  # as lowtide train has it
    assert len(scored) == 5 and all(item in trained.split(split) for item in scored)
    if split == "dev":
        assert not any(item in trained.train for item in scored)


@pytest.mark.parametrize(
    ("settings", "given", "expected"),
    [
        ("data_seed: 3\nseed: 5\n", [], 3),
        ("seed: 5\n", [], 5),  # of a run before --data-seed, whose seed decided the splits
        ("data_seed: 3\n", ["--data-seed", 0], 0),
        ("data_seed: a\n", [], 0),
        ("[1]", [], 0),
        (None, [], 0),
    ],
)
def test_splits_are_those_of_the_run_whose_model_it_is(
    lowtide, model_dir, superglue, tmp_path, settings, given, expected
):
    run, path = tmp_path / "run", tmp_path / "scores.json"
    shutil.copytree(model_dir, run / "model")
    if settings is not None:
        (run / "metrics.jsonl").write_text("")
        (run / "config.yaml").write_text(settings)
    arguments = ["--task", "superglue/rte", "--data", superglue, "--dtype", "float32", "--limit", 2, *given]
    result = lowtide("eval", "--model", run / "model", *arguments, "--output", path)
    assert (result.code, result.err) == (0, [])
    assert json.loads(path.read_text())["data_seed"] == expected
    told = f"--data-seed {expected}, as in {run / 'config.yaml'}"
    assert (told in result.out) == (expected > 0)


def test_text_is_scored_as_in_training(lowtide, model_dir, tmp_path):
    from lowtide.data import Batches, encode_records, read_records
    from lowtide.evaluation import evaluate_loss
    from lowtide.models import load_model, load_tokenizer

    path = write_jsonl(
        tmp_path / "held-out.jsonl", [{"prompt": "ab", "completion": "abab"}, {"prompt": "c", "completion": "cc"}]
    )
    result = lowtide("eval", "--model", model_dir, "--data", path, "--dtype", "float32")
    assert (result.code, result.err) == (0, [])
    tokenizer = load_tokenizer(str(model_dir))
    examples, stats = encode_records(read_records(path), tokenizer, 512)
    batches = Batches(examples, batch_size=1, max_seq_len=512, pad_token_id=0, packing=False, seed=0)
    expected = evaluate_loss(load_model(str(model_dir), dtype=torch.float32, device="cpu"), batches.epoch(0))
    assert (
        f"loss {expected.loss:.4f}, perplexity {expected.perplexity:.2f} ({stats.num_trained_tokens} tokens)"
        in result.out
    )


def test_a_chat_template_and_bad_records(lowtide, model_dir, tmp_path):
    template = tmp_path / "own.jinja"
    template.write_text(
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{{ m.content }}<|end|>{% endfor %}"
    )
    chat = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "abab"}]
    rows = [{"messages": each} for each in (chat, [{"role": "system", "content": "x"}, *chat])]
    path = write_jsonl(tmp_path / "held-out.jsonl", rows)
    arguments = ["eval", "--model", model_dir, "--data", path, "--dtype", "float32", "--chat-template", template]
    result = lowtide(*arguments)
    assert result.code == 2 and result.err[0].startswith(
        f"lowtide: error: {path}:2: the chat template refuses messages"
    )
    assert result.err[0].endswith("; --bad-records skip leaves such records out")
    result = lowtide(*arguments, "--bad-records", "skip")
    assert result.code == 0
    assert result.out.startswith("1 records, 5 tokens that count\n")
    assert result.err[0].startswith(f"lowtide: skipped: {path}:2: the chat template refuses")
    assert result.err[1:] == ["lowtide: 1 of 2 records were skipped"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to evaluate: give --task, --data or --lm-eval"),
        (["--task", "rte"], "a task is superglue/ and a name"),
        (["--task", "superglue/rt", "--data", "."], "superglue/rt is no task"),
        (["--task", "superglue/rte", "--data", "a", "b"], "--task takes one directory"),
        (["--task", "superglue/rte", "--data", "nowhere"], "holds no RTE/val.jsonl"),
        (["--data", "x.jsonl", "--scoring", "sum"], "--scoring is for --task"),
        (["--data", "x.jsonl", "--data-seed", "3"], "--data-seed is for --task"),
        (["--task", "superglue/rte", "--data-seed", "-1"], "whole number of at least 0"),
        (["--data", "x.jsonl", "--num-fewshot", "0"], "--num-fewshot is for --lm-eval"),
        (["--data", "x.jsonl", "--apply-chat-template"], "--apply-chat-template is for --lm-eval"),
        (["--data", "x.jsonl", "--limit", "3"], "--limit is for --task and --lm-eval"),
        (["--data", "x.jsonl", "--lm-eval-include", "."], "--lm-eval-include is for --lm-eval"),
        (["--data", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["--lm-eval", "x", "--chat-template", "x"], "--chat-template is for --data without --task"),
        (["--task", "superglue/rte", "--bad-records", "skip"], "--bad-records is for --data without --task"),
        (["--task", "superglue/rte", "--limit", "0"], "whole number of at least 1"),
    ],
)
def test_mistakes_are_one_line(lowtide, model_dir, arguments, message):
    result = lowtide("eval", "--model", model_dir, *arguments)
    assert result.code == 2 and len(result.err) == 1 and message in result.err[0]


def test_nothing_is_overwritten(lowtide, model_dir, superglue, tmp_path):
    path = tmp_path / "scores.json"
    path.write_text("mine")
    arguments = ["eval", "--model", model_dir, "--task", "superglue/rte", "--data", superglue]
    result = lowtide(*arguments, "--output", path)
    assert result.code == 2 and "nothing is overwritten" in result.err[0] and path.read_text() == "mine"
    assert lowtide(*arguments, "--output", tmp_path / "no" / "x.json").code == 2


def test_a_file_that_appears_meanwhile_is_not_overwritten(tmp_path):
    path = tmp_path / "scores.json"
    scores = ScoresFile(str(path))
    path.write_text("another's")
    with pytest.raises(FileExistsError, match="nothing is overwritten"):
        scores.add("a", 1)
    assert path.read_text() == "another's" and list(tmp_path.iterdir()) == [path]


def test_the_file_is_whole_after_every_part_and_stays_so_when_writing_fails(tmp_path):
    path = tmp_path / "scores.json"
    scores = ScoresFile(str(path))
    scores.begin({"model": "m"})
    assert not path.exists()
    scores.add("a", 1)
    before = {"model": "m", "complete": False, "scores": {"a": 1}}
    assert json.loads(path.read_text()) == before
    with pytest.raises(TypeError):
        scores.add("b", object())
    assert json.loads(path.read_text()) == before and list(tmp_path.iterdir()) == [path]
    scores.add("b", 2)
    scores.complete()
    assert json.loads(path.read_text()) == {"model": "m", "complete": True, "scores": {"a": 1, "b": 2}}


# The harness, offline: a task file over data that lies on this disk ------------------------------------------------------


TASK = """\
task: letters
dataset_path: json
dataset_kwargs:
  data_files:
    test: {path}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: ["yes", "no"]
doc_to_target: "{{{{label}}}}"
target_delimiter: " "
metric_list:
  - metric: acc
"""


@pytest.fixture
def own_task(tmp_path):
    rows = [{"question": f"Is {index} even?", "label": index % 2} for index in range(8)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "letters.yaml").write_text(TASK.format(path=path))
    return folder, rows


def test_the_harness_agrees_with_our_own_scoring(lowtide, model_dir, own_task, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval", reason="needs the extra eval (make test installs it)")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    from lowtide.evaluation import ChoiceItem, choice_accuracy
    from lowtide.models import load_model, load_tokenizer

    folder, rows = own_task
    path = tmp_path / "scores.json"
    result = lowtide(
        "eval",
        "--model",
        model_dir,
        "--lm-eval",
        "letters",
        "--lm-eval-include",
        folder,
        "--dtype",
        "float32",
        "--output",
        path,
    )
    assert result.code == 0, result.err
    found = json.loads(path.read_text())["scores"]["lm_eval"]["letters"]
    items = [ChoiceItem(row["question"], [" yes", " no"], row["label"]) for row in rows]
    model = load_model(str(model_dir), dtype=torch.float32, device="cpu")
    expected = choice_accuracy(model, load_tokenizer(str(model_dir)), items, normalize="sum").accuracy
    assert found["acc"] == pytest.approx(expected) and f"letters: acc {expected:.4f}" in result.out


def test_an_unknown_task_of_the_harness_is_known_before_anything_is_loaded(lowtide, own_task, superglue):
    pytest.importorskip("lm_eval", reason="needs the extra eval (make test installs it)")
    arguments = ["--task", "superglue/rte", "--data", superglue, "--lm-eval-include", own_task[0]]
    result = lowtide("eval", "--model", "nowhere", *arguments, "--lm-eval", "letters", "leters")
    assert result.code == 2 and "no task 'leters' (did you mean letters?)" in result.err[-1] and result.out == ""


def test_examples_in_front_and_the_chat_template_reach_the_harness(lowtide, model_dir, own_task, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval", reason="needs the extra eval (make test installs it)")
    from lm_eval.models.huggingface import HFLM

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    asked, answer = [], HFLM.loglikelihood

    def loglikelihood(self, requests, **options):
        asked.extend(request.args[0] for request in requests)
        return answer(self, requests, **options)

    monkeypatch.setattr(HFLM, "loglikelihood", loglikelihood)
    arguments = ["--lm-eval", "letters", "--lm-eval-include", own_task[0], "--dtype", "float32", "--limit", 1]
    assert lowtide("eval", "--model", model_dir, *arguments).code == 0
    assert set(asked) == {"Is 0 even?"}
    asked.clear()
    path = tmp_path / "scores.json"
    more = ["--num-fewshot", 1, "--apply-chat-template", "--output", path]
    result = lowtide("eval", "--model", model_dir, *arguments, *more)
    assert result.code == 0, result.err
    assert all(text.count(" even?") == 2 and text.count("<|user|>") for text in asked) and asked
    written = json.loads(path.read_text())
    assert (written["num_fewshot"], written["apply_chat_template"], written["limit"]) == (1, True, 1)


def test_a_model_without_a_chat_template(lowtide, tmp_path, monkeypatch):
    from lowtide.evaluation import harness

    monkeypatch.setattr(harness, "find_harness_tasks", lambda *_: None)
    model = save_tiny_model(tmp_path / "plain", chat=False)
    result = lowtide("eval", "--model", model, "--lm-eval", "letters", "--apply-chat-template")
    assert result.code == 2 and "plain has no chat template; leave the flag out" in result.err[-1]


def test_scores_are_kept_when_a_later_part_fails(lowtide, model_dir, superglue, tmp_path, monkeypatch):
    from lowtide.evaluation import harness

    def evaluate(model, tokenizer, tasks, **options):
        if tasks == ["second"]:
            raise ConnectionError("the data of second cannot be loaded")
        return {name: {"acc": 0.5} for name in tasks}

    monkeypatch.setattr(harness, "find_harness_tasks", lambda *_: None)
    monkeypatch.setattr(harness, "evaluate_with_harness", evaluate)
    path = tmp_path / "scores.json"
    arguments = ["--task", "superglue/rte", "--data", superglue, "--limit", 2, "--lm-eval", "first", "second"]
    result = lowtide("eval", "--model", model_dir, *arguments, "--dtype", "float32", "--output", path)
    assert result.code == 1 and "the data of second cannot be loaded" in result.err[-1]
    written = json.loads(path.read_text())
    assert written["complete"] is False and written["scores"]["lm_eval"] == {"first": {"acc": 0.5}}
    assert written["scores"]["superglue/rte"]["num_items"] == 2
    assert not [each for each in tmp_path.iterdir() if each.suffix == ".tmp"]


def test_without_the_harness(lowtide, model_dir, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    result = lowtide("eval", "--model", model_dir, "--lm-eval", "letters")
    assert result.code == 2 and "pip install 'lowtide[eval]'" in result.err[-1]


def test_texts_that_a_model_would_mix_get_a_row_each(lowtide, model_dir, tmp_path):
    from lowtide.data import Batches, encode_records, read_records
    from lowtide.evaluation import evaluate_loss

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    config = GptOssConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, num_local_experts=2, num_experts_per_tok=1, sliding_window=16, bos_token_id=None, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    folder = tmp_path / "mixing"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    data = write_jsonl(tmp_path / "d.jsonl", [{"text": "the tide is low " * n} for n in (1, 2, 1, 3)])
    result = lowtide("eval", "--model", folder, "--data", data, "--dtype", "float32")
    examples, _ = encode_records(read_records(data), tokenizer, 512)
    batches = Batches(examples, batch_size=1, max_seq_len=512, pad_token_id=0, packing=False, seed=0)
    assert f"loss {evaluate_loss(model, batches.epoch(0)).loss:.4f}" in result.out


def test_texts_longer_than_learned_positions_are_refused(lowtide, model_dir, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    folder = tmp_path / "short"
    AutoModelForCausalLM.from_config(
        GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_head=4, n_layer=1, n_positions=32)
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    data = write_jsonl(tmp_path / "d.jsonl", [{"text": "the tide is low " * 9}])
    arguments = ["eval", "--model", folder, "--data", data, "--dtype", "float32"]
    result = lowtide(*arguments)
    assert result.code == 2
    assert (
        "longer than the context of the model, 32 tokens" in result.err[-1] and "--max-seq-len to 32" in result.err[-1]
    )
    assert lowtide(*arguments, "--max-seq-len", 32).code == 0


def test_short_texts_need_no_long_context(lowtide, model_dir, tmp_path):
    """Rows of 512 tokens, in which no document is longer than the model's 32 positions."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    folder = tmp_path / "short"
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_head=4, n_layer=1, n_positions=32)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    data = write_jsonl(tmp_path / "d.jsonl", [{"text": "the tide is low"}] * 4)
    result = lowtide("eval", "--model", folder, "--data", data, "--dtype", "float32")
    assert (result.code, result.err) == (0, [])


def test_the_scores_of_data_say_how_they_were_made(lowtide, model_dir, tmp_path):
    data, template, path = tmp_path / "d.jsonl", tmp_path / "t.jinja", tmp_path / "scores.json"
    write_jsonl(data, [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}])
    template.write_text(CHAT_TEMPLATE)
    arguments = ["--data", data, "--max-seq-len", 64, "--truncation", "start", "--chat-template", template]
    result = lowtide("eval", "--model", model_dir, *arguments, "--dtype", "float32", "--output", path)
    assert (result.code, result.err) == (0, [])
    written = json.loads(path.read_text())
    assert (written["data"], written["max_seq_len"], written["truncation"]) == ([str(data)], 64, "start")
    assert (written["bad_records"], written["chat_template"]) == ("refuse", str(template))


def test_a_chat_template_is_for_records_and_for_the_harness(lowtide, model_dir, superglue):
    arguments = ["eval", "--model", model_dir, "--chat-template", "t.jinja"]
    result = lowtide(*arguments, "--task", "superglue/rte", "--data", superglue)
    assert result.code == 2 and "--chat-template is for --data without --task" in result.err[-1]
    result = lowtide(*arguments, "--task", "superglue/rte", "--data", superglue, "--lm-eval", "arc_easy")
    assert result.code == 2 and "and for --apply-chat-template" in result.err[-1]
