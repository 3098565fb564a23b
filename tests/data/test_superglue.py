import os
import re
import types
from pathlib import Path

import pytest

from lowtide.data import ChoiceItem, as_records, load_superglue, majority_share
from lowtide.data.superglue import TASKS, read_file
from superglue_files import HUB, OFFICIAL, write_rte
from tiny_files import write_jsonl

DATA = Path(os.environ.get("LOWTIDE_DATA") or Path(__file__).parents[2] / "../shared/data") / "superglue"
# Rows of the official files: training, validation. BoolQ's training file is not part of the test data.
KNOWN = {
    "rte": (2490, 277), "copa": (400, 100), "wic": (5428, 638), "wsc": (554, 104), "multirc": (27243, 4848), "cb": (250, 56),
    "boolq": (None, 3270),
}  # fmt: skip

EXPECTED = {
    "rte": [ChoiceItem('It rains.\nDoes this mean that "It is wet." is true? Yes or No?\nAnswer:', [" Yes", " No"], 0)],
    "boolq": [ChoiceItem("The sea is salt. is the sea salt\nAnswer:", [" No", " Yes"], 1)],
    "wsc": [
        ChoiceItem(
            'Ann saw Bea when she left.\nIn the previous sentence, does the pronoun "she" refer to "Ann"? Yes or No?\nAnswer:',
            [" No", " Yes"], 0,
        )
    ],
    "wic": [
        ChoiceItem(
            'Does the word "bank" have the same meaning in these two sentences? Yes, No?\nA river bank.\nA bank note.\nAnswer:',
            [" No", " Yes"], 0,
        )
    ],
    "multirc": [
        ChoiceItem(f'Tom ate.\nQuestion: {question}\nI found this answer "{answer}". Is that correct? Yes or No?\nAnswer:', [" No", " Yes"], gold)
        for question, answer, gold in (("Who ate?", "Tom", 1), ("Who ate?", "Ann", 0), ("What did he do?", "eat", 1))
    ],
    "copa": [ChoiceItem("The ice melted. because", [" It was warm.", " It was cold."], 0)],
    "cb": [ChoiceItem('Maybe he came.\nDoes this mean that "He came." is true? Yes, No or Maybe?\nAnswer:', [" Yes", " No", " Maybe"], 2)],
}  # fmt: skip


@pytest.mark.parametrize("name", TASKS)
def test_the_prompts_are_those_of_the_paper(name, tmp_path):
    path = write_jsonl(tmp_path / "val.jsonl", [OFFICIAL[name]])
    assert read_file(TASKS[name], path) == EXPECTED[name]


@pytest.mark.parametrize("name", TASKS)
def test_the_hub_gives_the_same(name, monkeypatch):
    def load_dataset(repository, config):
        assert (repository, config) == ("aps/super_glue", name)
        return {"train": 10 * HUB[name], "validation": HUB[name], "test": None}

    monkeypatch.setitem(__import__("sys").modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    found = load_superglue(name)
    assert found.test == EXPECTED[name]
    assert len(found.train) + len(found.dev) == 10 * len(HUB[name])


def test_a_hub_that_cannot_be_reached(monkeypatch):
    def load_dataset(repository, config):
        raise OSError("no route to host")

    monkeypatch.setitem(__import__("sys").modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(ConnectionError, match=r"super_glue \(rte\).*no route to host.*name a directory"):
        load_superglue("rte")


def test_effect_and_cause():
    row = OFFICIAL["copa"] | {"question": "effect", "label": 1}
    assert list(TASKS["copa"].read(row)) == [ChoiceItem("The ice melted. so", [" It was warm.", " It was cold."], 1)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "Expecting"),
        ("[1]", "not a JSON object"),
        ('{"premise": "a", "label": "entailment"}', "no key 'hypothesis'"),
        ('{"premise": "a", "hypothesis": "b"}', "no key 'label'"),  # as in the official test files
        ('{"premise": "a", "hypothesis": "b", "label": "maybe"}', "'label' is 'maybe', it must be one of 'entailment', 'not_entailment'"),
        ('{"premise": "a", "hypothesis": "b", "label": -1}', "'label' is -1"),
    ],
)  # fmt: skip
def test_broken_lines_are_named(line, message, tmp_path):
    write_rte(tmp_path)
    path = tmp_path / "RTE" / "val.jsonl"
    path.write_text(path.read_text() + "\n" + line + "\n")
    with pytest.raises(ValueError, match=rf"val\.jsonl:22: {re.escape(message)}.*no line of RTE"):
        load_superglue("rte", tmp_path)


def test_other_mistakes(tmp_path):
    with pytest.raises(ValueError, match="superglue/record is no task; there are superglue/rte"):
        load_superglue("record", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"holds no RTE/val\.jsonl"):
        load_superglue("rte", tmp_path)
    with pytest.raises(ValueError, match="at least 1"):
        load_superglue("rte", tmp_path, num_test=0)
    (tmp_path / "val.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="empty"):
        load_superglue("rte", tmp_path)


def test_splits_do_not_overlap_and_follow_the_seed(tmp_path):
    (tmp_path / "RTE").mkdir()
    for name, count in (("train", 300), ("val", 50)):
        rows = [OFFICIAL["rte"] | {"premise": f"{name} {index}"} for index in range(count)]
        write_jsonl(tmp_path / "RTE" / f"{name}.jsonl", rows)
    one, again, other = (
        load_superglue("rte", tmp_path, num_train=100, num_dev=80, num_test=30, seed=seed) for seed in (0, 0, 1)
    )
    assert (len(one.train), len(one.dev), len(one.test)) == (100, 80, 30)
    assert one == again and one.train != other.train and one.test != other.test
    prompts = [{item.prompt for item in items} for items in (one.train, one.dev, one.test)]
    assert not (prompts[0] & prompts[1] or prompts[0] & prompts[2] or prompts[1] & prompts[2])
    assert all(item.prompt.startswith("val") for item in one.test)
    assert all(item.prompt.startswith("train") for item in one.train + one.dev)
    # from the folder of the task itself
    assert load_superglue("rte", tmp_path / "RTE", num_train=100, num_dev=80, num_test=30) == one
    small = load_superglue("rte", tmp_path)  # a fifth of a small training file is held out
    assert (len(small.train), len(small.dev), len(small.test)) == (240, 60, 50)


def test_without_a_training_file_the_validation_file_is_split_and_it_is_said(tmp_path, caplog):
    write_jsonl(tmp_path / "val.jsonl", [OFFICIAL["boolq"] | {"passage": str(index)} for index in range(327)])
    found = load_superglue("boolq", tmp_path)
    assert len(found.train) + len(found.dev) == 250 and len(found.test) == 77
    assert "not comparable" in found.note and found.note in caplog.text
    assert not {item.prompt for item in found.train + found.dev} & {item.prompt for item in found.test}


def test_records_hold_the_right_answer():
    record = as_records(EXPECTED["cb"], "cb")[0]
    assert record.prompt == EXPECTED["cb"][0].prompt and record.completion == " Maybe" and record.where == "cb:1"


def test_majority():
    assert majority_share([ChoiceItem("a", ["b", "c"], gold) for gold in (0, 1, 1, 1)]) == 0.75


@pytest.mark.skipif(not DATA.is_dir(), reason=f"needs the official SuperGLUE files (set LOWTIDE_DATA): {DATA}")
@pytest.mark.parametrize("name", TASKS)
def test_real_files_have_the_known_sizes(name):
    num_train, num_test = KNOWN[name]
    folder = DATA / TASKS[name].folder
    test = read_file(TASKS[name], folder / "val.jsonl")
    assert len(test) == num_test
    if num_train is not None:
        train = read_file(TASKS[name], folder / "train.jsonl")
        assert len(train) == num_train
        assert {item.gold for item in train} == set(range(len(train[0].choices)))
    found = load_superglue(name, DATA)
    assert len(found.test) == min(1000, num_test if num_train else 770)
    assert len(found.train) == min(1000, len(found.train)) and found.dev
    # The paper's zero-shot scores of WSC with 7B, 13B and 30B (36.5 %) are those of one constant answer on its 104 examples.
    if name == "wsc":
        assert sum(item.gold == 1 for item in test) / len(test) == pytest.approx(0.365, abs=1e-3)
