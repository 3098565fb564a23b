import hashlib
import os
import re
import types
from pathlib import Path

import pytest

from lowtide.data import TASKS, ChoiceItem, as_records, load_superglue, majority_share
from lowtide.data.choices import hold_out
from lowtide.data.superglue import read_file
from superglue_files import HUB, OFFICIAL, write_rte
from tiny_files import write_jsonl

DATA = Path(os.environ.get("LOWTIDE_DATA") or Path(__file__).parents[2] / "../shared/data") / "superglue"
# Rows of the official files: training, validation. BoolQ's training file is not part of the test data.
KNOWN = {
    "rte": (2490, 277), "copa": (400, 100), "wic": (5428, 638), "wsc": (554, 104), "multirc": (27243, 4848), "cb": (250, 56),
    "boolq": (None, 3270),
}  # fmt: skip
# Training and dev examples that are made of them.
SPLIT = {
    "rte": (1000, 1000), "copa": (320, 80), "wic": (1000, 1000), "wsc": (443, 111), "multirc": (1000, 1000), "cb": (200, 50), "boolq": (1000, 1000),
}  # fmt: skip
# Beginnings of SHA-256 of the prompts of train, dev and test with seed 0, on which the figures in docs/quality.md were measured.
MEASURED = {
    "rte": ["b9bcf9499cd9", "957b8d670315", "0e2c8651d691"],
    "cb": ["6080b1bb6bc8", "f751ff175128", "8995dc7cf899"],
    "wic": ["3f312d5c9df4", "20d71647d1cc", "e25818eb5593"],
    "copa": ["bee7a5d741b2", "440e5f6ba0bc", "2f5a05603bf5"],
}
# What rows of a task share.
SHARED = {"boolq": "passage", "wsc": "text", "multirc": "paragraph"}

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


def fake_hub(monkeypatch, **splits):
    monkeypatch.setitem(
        __import__("sys").modules, "datasets", types.SimpleNamespace(load_dataset=lambda repository, config: splits)
    )


def with_others(name, row, number):
    """The same row about another passage or text, where the task has one."""
    key = SHARED.get(name)
    return row | ({key: f"{row[key]} {number}"} if key else {})


@pytest.mark.parametrize("name", TASKS)
def test_the_hub_gives_the_same(name, monkeypatch):
    def load_dataset(repository, config):
        assert (repository, config) == ("aps/super_glue", name)
        train = [with_others(name, row, number) for number in range(10) for row in HUB[name]]
        return {"train": train, "validation": HUB[name], "test": None}

    monkeypatch.setitem(__import__("sys").modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    found = load_superglue(name)
    assert found.test == EXPECTED[name]
    assert len(found.train) + len(found.dev) == 10 * len(HUB[name])


def test_a_broken_row_of_the_hub_is_named(monkeypatch):
    fake_hub(monkeypatch, train=HUB["rte"] * 2 + [{"premise": None}], validation=HUB["rte"])
    with pytest.raises(ValueError, match=r"super_glue \(rte\), train: row 3: 'premise' is null, it must be a string"):
        load_superglue("rte")


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
        (b"{", "malformed JSON at column 2"),
        (b"[1]", "a JSON array, but every line must be one object"),
        (b"3", "a number instead of a JSON object; this is no line of RTE with answers"),
        (b'{"premise": "a\xff"}', "byte 14"),
        (b'{"premise": "a", "label": "entailment"}', "no key 'hypothesis'; this is no line of RTE"),
        (b'{"premise": "a", "hypothesis": "b"}', "no key 'label'; this is no line of RTE"),  # as in the official test files
        (b'{"premise": null, "hypothesis": 3, "label": 0}', "'premise' is null, it must be a string"),
        (b'{"premise": "a", "hypothesis": 3, "label": 0}', "'hypothesis' is a number, it must be a string"),
        (b'{"premise": " ", "hypothesis": "b", "label": 0}', "'premise' is blank"),
        (b'{"premise": "a\\ud800", "hypothesis": "b", "label": 0}', "'premise' has half a surrogate pair at character 1"),
        (b'{"premise": "a", "hypothesis": "b", "label": "maybe"}', "'label' is 'maybe', it must be one of 'entailment', 'not_entailment'"),
        (b'{"premise": "a", "hypothesis": "b", "label": -1}', "'label' is -1"),
        (b'{"premise": "a", "hypothesis": "b", "label": true}', "'label' is True"),
    ],
)  # fmt: skip
def test_broken_lines_are_named(line, message, tmp_path):
    write_rte(tmp_path)
    path = tmp_path / "RTE" / "val.jsonl"
    rows = path.read_bytes()
    path.write_bytes(rows + b"\n" + line + b"\n")
    if message == "byte 14":  # counted from the beginning of the file
        message = f"byte {len(rows) + 1 + 14} (0xff) is not valid UTF-8; save the file as UTF-8"
    with pytest.raises(ValueError, match=rf"^\S*val\.jsonl:22: {re.escape(message)}"):
        load_superglue("rte", tmp_path)


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("multirc", {"passage": "Tom ate."}, "'passage' is a string, it must be an object"),
        ("multirc", {"passage": {"text": "a", "questions": "b"}}, "'questions' is a string, it must be a list of objects"),
        ("multirc", {"passage": {"text": "a", "questions": [{"question": "b", "answers": ["c"]}]}}, "'answers' is a list, it must be a list of objects"),
        ("multirc", {"passage": {"text": "a", "questions": [{"question": "b", "answers": [{"text": 1, "label": 1}]}]}}, "'text' is a number"),
        ("wsc", {"text": "a", "target": None, "label": True}, "'target' is null, it must be an object"),
        ("boolq", OFFICIAL["boolq"] | {"label": "yes"}, "'label' is 'yes', it must be one of False, True"),
        ("copa", OFFICIAL["copa"] | {"question": ["cause"]}, "'question' is a list, it must be a string"),
        ("copa", OFFICIAL["copa"] | {"question": "why"}, "'question' is 'why', it must be 'cause' or 'effect'"),
    ],
)  # fmt: skip
def test_fields_must_be_what_the_task_needs(name, row, message, tmp_path):
    path = write_jsonl(tmp_path / "val.jsonl", [OFFICIAL[name], row])
    with pytest.raises(
        ValueError, match=rf"val\.jsonl:2: {re.escape(message)}.*this is no line of {TASKS[name].folder}"
    ):
        read_file(TASKS[name], path)


def test_an_answer_of_multirc_may_be_blank(tmp_path):
    row = {"passage": {"text": "a", "questions": [{"question": "b", "answers": [{"text": "", "label": 0}]}]}}
    assert len(read_file(TASKS["multirc"], write_jsonl(tmp_path / "val.jsonl", [row]))) == 1


def test_a_byte_order_mark_is_passed_over(tmp_path):
    path = write_jsonl(tmp_path / "val.jsonl", [OFFICIAL["rte"]])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert read_file(TASKS["rte"], path) == EXPECTED["rte"]


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


def test_the_draw_stays_what_published_figures_were_measured_with(tmp_path):
    (tmp_path / "RTE").mkdir()
    for name, count in (("train", 300), ("val", 50)):
        rows = [OFFICIAL["rte"] | {"premise": f"{index}"} for index in range(count)]
        write_jsonl(tmp_path / "RTE" / f"{name}.jsonl", rows)
    found = load_superglue("rte", tmp_path, num_train=3, num_dev=3, num_test=3)
    numbers = {name: [int(item.prompt.split()[0]) for item in found.split(name)] for name in ("train", "dev", "test")}
    assert numbers == {"train": [20, 199, 217], "dev": [32, 68, 291], "test": [24, 26, 48]}


def test_without_a_training_file_the_validation_file_is_split_and_it_is_said(tmp_path, caplog):
    write_jsonl(tmp_path / "val.jsonl", [OFFICIAL["boolq"] | {"passage": str(index)} for index in range(327)])
    found = load_superglue("boolq", tmp_path)
    assert len(found.train) + len(found.dev) == 250 and len(found.test) == 77
    assert "not comparable" in found.note and found.note in caplog.text
    assert not {item.prompt for item in found.train + found.dev} & {item.prompt for item in found.test}
    other = load_superglue("boolq", tmp_path, seed=1)  # what is tested follows no seed
    assert other.test == found.test and other.dev != found.dev


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", SHARED)
def test_rows_that_share_a_text_are_on_one_side(name, seed, tmp_path):
    """Thirty texts, of which each is there up to four times, not one after the other and not always written alike."""
    rows = []
    for number in range(90):
        key, row = ("passage" if name == "multirc" else SHARED[name]), OFFICIAL[name]
        text = f"Text  {number * number % 30}!" if number % 2 else f"text {number * number % 30}"
        rows.append(row | {key: (row[key] | {"text": text}) if name == "multirc" else text})
    write_jsonl(tmp_path / "val.jsonl", rows)
    if name != "boolq":
        write_jsonl(tmp_path / "train.jsonl", rows)
    found = load_superglue(name, tmp_path, seed=seed)
    texts = {
        part: {re.search(r"(?i)text +(\d+)", item.prompt)[1] for item in found.split(part)}
        for part in ("train", "dev", "test")
    }
    assert texts["train"] and texts["dev"] and not texts["train"] & texts["dev"]
    if name == "boolq":
        assert texts["test"] and not texts["test"] & (texts["train"] | texts["dev"])
    total = len(found.train) + len(found.dev)
    assert total == {"boolq": len(rows) - len(found.test), "wsc": 90, "multirc": 270}[name]
    assert 0.1 * total < len(found.dev) <= 0.2 * total


def test_dev_answers_of_multirc_are_of_many_passages(tmp_path):
    row = OFFICIAL["multirc"]
    rows = [row | {"passage": row["passage"] | {"text": f"Passage {number}."}} for number in range(100)]
    for name in ("train", "val"):
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
    found = load_superglue("multirc", tmp_path, num_train=30, num_dev=30)
    assert (len(found.train), len(found.dev)) == (30, 30)
    assert len({item.group for item in found.dev}) > 10 and not {i.group for i in found.dev} & {
        i.group for i in found.train
    }


def grouped(*sizes):
    return [
        ChoiceItem(f"{group} {each}", ["a"], 0, str(group)) for group, size in enumerate(sizes) for each in range(size)
    ]


def test_whole_groups_are_held_out():
    for seed in range(10):
        rest, held_out = hold_out(grouped(1, 2, 3, 4, 5, 6), 10, seed)
        assert not {item.group for item in rest} & {item.group for item in held_out}
        assert len(rest) + len(held_out) == 21 and 7 <= len(held_out) <= 10
    rest, held_out = hold_out(grouped(9, 3, 8), 2, 0)  # none is small enough
    assert [item.prompt for item in held_out] == ["1 0", "1 1", "1 2"] and len(rest) == 17
    assert hold_out(grouped(4), 2, 0) == ([], grouped(4))


@pytest.mark.parametrize(
    ("name", "train", "val", "message"),
    [
        ("boolq", None, ["a"], r"val\.jsonl: there is no train\.jsonl, and test, dev and training examples cannot be made of 1 example about 1 passage\(s\)"),
        ("boolq", None, ["a"] * 9, r"9 examples about 1 passage\(s\); add examples of another passage"),
        ("boolq", None, ["a", "b"], r"2 examples about 2 passage\(s\); add"),
        ("boolq", ["a"] * 9, ["b"], r"train\.jsonl: dev and training examples cannot be made of 9 examples about 1 passage\(s\)"),
        ("rte", ["a"], ["b"], r"train\.jsonl: dev and training examples cannot be made of 1 example; add examples"),
    ],
)  # fmt: skip
def test_too_few_to_be_split(name, train, val, message, tmp_path):
    key = "premise" if name == "rte" else "passage"
    for file, texts in (("train", train), ("val", val)):
        if texts is not None:
            write_jsonl(tmp_path / f"{file}.jsonl", [OFFICIAL[name] | {key: text} for text in texts])
    with pytest.raises(ValueError, match=message):
        load_superglue(name, tmp_path)


def test_records_hold_the_right_answer():
    record = as_records(EXPECTED["cb"], "cb")[0]
    assert record.prompt == EXPECTED["cb"][0].prompt and record.completion == " Maybe" and record.where == "cb:1"


def test_majority():
    assert majority_share([ChoiceItem("a", ["b", "c"], gold) for gold in (0, 1, 1, 1)]) == 0.75


def digest(items):
    return hashlib.sha256("\n".join(item.prompt for item in items).encode()).hexdigest()[:12]


needs_data = pytest.mark.skipif(
    not DATA.is_dir(), reason=f"needs the official SuperGLUE files (set LOWTIDE_DATA): {DATA}"
)


@needs_data
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", SHARED)
def test_real_splits_share_no_text(name, seed):
    found = load_superglue(name, DATA, num_test=10_000, seed=seed)
    groups = [{item.group for item in items} for items in (found.train, found.dev, found.test)]
    assert None not in groups[0]
    assert not (groups[0] & groups[1] or groups[0] & groups[2] or groups[1] & groups[2])


@needs_data
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
    assert (len(found.train), len(found.dev)) == SPLIT[name]
    if name in MEASURED:
        assert [digest(found.split(part)) for part in ("train", "dev", "test")] == MEASURED[name]
    # The paper's zero-shot scores of WSC with 7B, 13B and 30B (36.5 %) are those of one constant answer on its 104 examples.
    if name == "wsc":
        assert sum(item.gold == 1 for item in test) / len(test) == pytest.approx(0.365, abs=1e-3)
