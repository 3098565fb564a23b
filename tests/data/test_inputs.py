"""What the arguments of --data stand for: files, directories with papers and splits in them, data sets of the hub."""

import json
import logging

import datasets
import pytest

from lowtide.data.inputs import find_inputs


def write(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"text": name}) + "\n")


def found(folder, **options):
    return [str(each.path.relative_to(folder)) for each in find_inputs(folder, **options)]


# Directories -------------------------------------------------------------------------------------------------------------


def test_papers_beside_structured_files_are_no_data(tmp_path, caplog):
    papers = ["CHANGELOG.txt", "LICENSE-MIT.txt", "README.md", "README.txt", "dataset_info.json", "docs/how.md"]
    write(tmp_path, *papers, ".hidden.jsonl", "chat.jsonl", "licensed.jsonl", "more/notes.txt")
    with caplog.at_level(logging.WARNING):
        assert found(tmp_path) == ["chat.jsonl", "licensed.jsonl", "more/notes.txt"]
    (line,) = [record.getMessage() for record in caplog.records]
    assert line == (
        f"{tmp_path}: left out 'CHANGELOG.txt', 'LICENSE-MIT.txt', 'README.md', 'README.txt', 'dataset_info.json', 'docs/how.md' "
        "(no data); a file that is named itself is taken anyway"
    )
    assert [each.name for each in find_inputs(tmp_path / "README.md")] == [str(tmp_path / "README.md")]


def test_where_all_is_text_all_of_it_is_data(tmp_path, caplog):
    write(tmp_path, "LICENSE.txt", "README.md", "book.txt")
    assert found(tmp_path) == ["LICENSE.txt", "README.md", "book.txt"]
    assert not caplog.records


@pytest.mark.parametrize(
    ("train", "others"),
    [
        (["train.jsonl"], ["dev.jsonl", "eval.jsonl", "test.jsonl", "val.csv", "valid.jsonl", "validation.json"]),
        (["train-00000-of-00002.parquet"], ["test-00000-of-00001.parquet", "validation-00000-of-00001.parquet"]),
        (["a/train_sft.jsonl", "b/Train.en.jsonl"], ["a/test_sft.jsonl", "b/TEST.en.jsonl"]),
        (["train/0001.jsonl"], ["test/0001.jsonl", "validation/more/0001.jsonl"]),
        (["chat.jsonl", "testimony.jsonl", "training.txt"], ["test.txt"]),
    ],
)
def test_of_files_named_after_splits_those_for_training(tmp_path, caplog, train, others):
    write(tmp_path, *train, *others)
    with caplog.at_level(logging.WARNING):
        assert found(tmp_path) == train
    (line,) = [record.getMessage() for record in caplog.records]
    shown = ", ".join(map(repr, others))
    assert line == (
        f"{tmp_path}: left out {shown} (of test or validation splits); a file that is named itself is taken anyway"
    )


def test_papers_and_splits_are_told_in_one_line(tmp_path, caplog):
    write(tmp_path, "README.md", "train.jsonl", "test.jsonl")
    find_inputs(tmp_path)
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path}: left out 'README.md' (no data) and 'test.jsonl' (of test or validation splits); a file that is named itself "
        "is taken anyway"
    ]


def test_files_of_other_formats_are_told(tmp_path, caplog):
    write(tmp_path, "part-00.jsonl", "part-01.jsonl.gz", "more.arrow", "logo.png", "script.py")
    assert found(tmp_path) == ["part-00.jsonl"]
    assert "left out 'more.arrow', 'part-01.jsonl.gz' (cannot be read: unpack or convert them)" in caplog.text
    with pytest.raises(FileNotFoundError, match=r"'a\.jsonl\.zst' cannot be read: unpack or convert them"):
        write(tmp_path / "b", "a.jsonl.zst")
        find_inputs(tmp_path / "b")


def test_what_datasets_saved_to_disk_is_not_taken_for_json(tmp_path):
    write(
        tmp_path, "dataset_dict.json", "train/data-00000-of-00001.arrow", "train/dataset_info.json", "train/state.json"
    )
    with pytest.raises(FileNotFoundError, match=r"data-00000-of-00001\.arrow' cannot be read"):
        find_inputs(tmp_path)
    write(tmp_path / "own", "state.json")
    assert found(tmp_path / "own") == ["state.json"]


def test_a_directory_without_training_files_is_refused(tmp_path):
    write(tmp_path, "test.jsonl", "validation.jsonl", "README.md")
    with pytest.raises(FileNotFoundError) as caught:
        find_inputs(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path}: holds test and validation files only ('test.jsonl', 'validation.jsonl'); name the files that are to be "
        "trained on, and they are taken all the same"
    )
    assert len(find_inputs([tmp_path / "test.jsonl"])) == 1


def test_for_evaluation_it_is_the_other_way_round(tmp_path, caplog):
    write(tmp_path, "test.jsonl", "validation.jsonl", "train.jsonl")
    assert found(tmp_path, held_out=True) == ["test.jsonl", "validation.jsonl"]
    assert "left out 'train.jsonl' (of the training split)" in caplog.text
    write(tmp_path, "extra.jsonl")  # of a directory that is given for both
    assert found(tmp_path, held_out=True) == ["test.jsonl", "validation.jsonl"]
    assert found(tmp_path) == ["extra.jsonl", "train.jsonl"]
    assert "left out 'extra.jsonl', 'train.jsonl' (not of a test or validation split)" in caplog.text
    write(tmp_path / "b", "train.jsonl")
    assert found(tmp_path / "b", held_out=True) == ["train.jsonl"]


# The hub -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch):
    """The calls of ``datasets.load_dataset``, which gives a row that says what was asked for."""
    calls = []

    def load_dataset(*args, split):
        calls.append((*args, split))
        return datasets.Dataset.from_list([{"text": " ".join((*args, split))}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


@pytest.mark.parametrize(
    ("text", "call"),
    [
        ("openai/gsm8k", ("openai/gsm8k", "train")),
        ("openai/gsm8k:main", ("openai/gsm8k", "main", "train")),
        ("HuggingFaceH4/ultrachat_200k@train_sft", ("HuggingFaceH4/ultrachat_200k", "train_sft")),
        ("a/b.c:2022.en-x@train[:10%]+test", ("a/b.c", "2022.en-x", "train[:10%]+test")),
    ],
)
def test_configuration_and_split_of_a_data_set(asked, text, call):
    (given,) = find_inputs([text])
    assert (given.name, given.path, asked) == (text, None, [])
    assert given.rows[0]["text"] == " ".join(call)
    assert asked == [call]


def test_splits_that_share_their_files_are_told_apart(monkeypatch, tmp_path):
    class Rows(list):
        cache_files = ({"filename": str(tmp_path / "all.arrow")},)

    (tmp_path / "all.arrow").write_bytes(b"rows")
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, split: Rows())
    texts = ["a/b", "a/b@train[:5]", "a/b@train[5:]", "a/b:x"]
    assert len({each.digest() for each in find_inputs(texts)}) == 4
    assert len({each.digest() for each in find_inputs(["a/b", "a/b@train"])}) == 1


@pytest.mark.parametrize(
    "text", ["a/b:", "a/b@", "a/b:@x", "a/b: c", "a:x/b", "a/b/c@train", "b@train", "a/b.jsonl@train"]
)
def test_other_forms_are_paths(asked, text):
    with pytest.raises(FileNotFoundError) as caught:
        find_inputs([text])
    assert str(caught.value) == f"{text}: no such file or directory"


def test_a_path_that_exists_goes_first(asked, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "org/name@train/a.jsonl", "org/other")
    assert [str(each.path) for each in find_inputs(["org/name@train"])] == ["org/name@train/a.jsonl"]
    for text in ("org/name", "org/name:main@train"):
        with pytest.raises(FileNotFoundError) as caught:
            find_inputs([text])
        assert str(caught.value).startswith(
            f"{text}: no such file or directory, and with a directory org here it is not looked for on the hub"
        )
    assert asked == []


# In the words of ``datasets`` (builder.py, arrow_reader.py).
NO_CONFIG = (
    "Config name is missing.\nPlease pick one among the available configs: ['main', 'socratic']\n"
    "Example of usage:\n\t`load_dataset('openai/gsm8k', 'main')`"
)
WRONG_CONFIG = "BuilderConfig 'mian' not found. Available: ['main', 'socratic']"
WRONG_SPLIT = "Unknown split \"train\". Should be one of ['train_sft', 'test_sft']."


@pytest.mark.parametrize(
    ("text", "error", "says"),
    [
        ("a/b", NO_CONFIG, "a/b: has several configurations; name one, as in a/b:CONFIG: main, socratic"),
        ("a/b@x", NO_CONFIG, "a/b: has several configurations; name one, as in a/b:CONFIG@x: main, socratic"),
        ("a/b:mian", WRONG_CONFIG, "a/b: has no configuration 'mian'; write a/b:CONFIG with one of: main, socratic"),
        ("a/b", WRONG_SPLIT, "a/b: has no split 'train'; write a/b@SPLIT with one of: train_sft, test_sft"),
        ("a/b:c@dev", WRONG_SPLIT, "a/b:c: has no split 'dev'; write a/b:c@SPLIT with one of: train_sft, test_sft"),
        (
            "a/b:c",
            "Bad split: train. Available splits: ['x']",
            "a/b:c: has no split 'train'; write a/b:c@SPLIT with one of: x",
        ),
    ],
)
def test_what_to_write_instead(monkeypatch, text, error, says):
    def load_dataset(*args, split):
        raise ValueError(error)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    (given,) = find_inputs(text)
    with pytest.raises(FileNotFoundError) as caught:
        _ = given.rows
    assert str(caught.value) == says


def test_the_library_says_it_in_these_words(tmp_path, monkeypatch):
    # A data set on the disk stands for one of the hub.
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    write(tmp_path, "d/a/train.jsonl")
    (tmp_path / "d/README.md").write_text(
        "---\nconfigs:\n"
        + "".join(
            f"- config_name: {name}\n  data_files:\n  - split: part\n    path: a/*.jsonl\n" for name in ("a", "b")
        )
        + "---\n"
    )
    from lowtide.data.hub_sets import HubSet

    for config, split, says in (
        (None, "part", f"{tmp_path}/d: has several configurations; name one, as in {tmp_path}/d:CONFIG@part: a, b"),
        ("c", "part", f"{tmp_path}/d: has no configuration 'c'; write {tmp_path}/d:CONFIG@part with one of: a, b"),
        ("a", "train", f"{tmp_path}/d:a: has no split 'train'; write {tmp_path}/d:a@SPLIT with one of: part"),
    ):
        with pytest.raises(FileNotFoundError) as caught:
            HubSet(f"{tmp_path}/d", config, split).load()
        assert str(caught.value) == says


def test_a_data_set_that_cannot_be_had(monkeypatch):
    def load_dataset(*args, split):
        raise ConnectionError("no network\nand many more lines")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    (given,) = find_inputs("org/name")
    with pytest.raises(FileNotFoundError) as caught:
        _ = given.rows
    assert str(caught.value) == (
        "org/name: neither an existing path nor a data set that the hub gave, in the spelling org/name[:config][@split] "
        "(ConnectionError: no network)"
    )
