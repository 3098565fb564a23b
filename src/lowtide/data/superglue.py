"""SuperGLUE as multiple choice: the six tasks of the LOMO paper (arXiv 2306.09782, section 4.2), with its prompts, and CB.

Read from the official files (``RTE/train.jsonl``, ``RTE/val.jsonl``; super.gluebenchmark.com) or from the Hugging Face hub. The official
test files have no answers, so what is reported is measured on the validation file, as in the paper. Rates and steps are to be
chosen on ``dev``, a part of the training file that is not trained on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..log import get_logger
from .choices import ChoiceItem, sample

_logger = get_logger(__name__)

HUB_ID = "aps/super_glue"
SPLITS = ("train", "dev", "test")
# Of the training file, held out for choosing settings where it is small.
_DEV_SHARE = 0.2
# BoolQ's training file is missing in some copies: then this share of its validation file is trained on.
_TRAIN_SHARE = 2500 / 3270

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Task:
    """How the rows of one task become multiple choice.

    Attributes:
        name: as in ``superglue/NAME``.
        folder: of its official files.
        read: what one row of the official layout, or of the hub's, gives; MultiRC has many answers in one row.
    """

    name: str
    folder: str
    read: Callable[[Row], Iterable[ChoiceItem]]


@dataclass(frozen=True)
class TaskData:
    """The items of a task.

    Attributes:
        train: to train on.
        dev: of the training file, to choose settings with; not trained on.
        test: of the validation file, to report.
        note: what is unusual about them, or nothing.
    """

    train: list[ChoiceItem]
    dev: list[ChoiceItem]
    test: list[ChoiceItem]
    note: str = ""

    def split(self, name: str) -> list[ChoiceItem]:
        """One of ``SPLITS``."""
        found: list[ChoiceItem] = getattr(self, name)
        return found


def _answered(question: str, choices: tuple[str, ...], gold: int) -> list[ChoiceItem]:
    # The paper's "Answer: " and "Yes" are the same text, but a blank before a word belongs to the word's token.
    return [ChoiceItem(f"{question}\nAnswer:", [f" {choice}" for choice in choices], gold)]


_NO_YES, _YES_NO = ("No", "Yes"), ("Yes", "No")


def _boolq(row: Row) -> list[ChoiceItem]:
    return _answered(f"{row['passage']} {row['question']}", _NO_YES, _truth(row["label"]))


def _rte(row: Row) -> list[ChoiceItem]:
    question = f'{row["premise"]}\nDoes this mean that "{row["hypothesis"]}" is true? Yes or No?'
    return _answered(question, _YES_NO, _index(row["label"], ("entailment", "not_entailment")))


def _cb(row: Row) -> list[ChoiceItem]:
    question = f'{row["premise"]}\nDoes this mean that "{row["hypothesis"]}" is true? Yes, No or Maybe?'
    gold = _index(row["label"], ("entailment", "contradiction", "neutral"))
    return _answered(question, ("Yes", "No", "Maybe"), gold)


def _wic(row: Row) -> list[ChoiceItem]:
    question = (
        f'Does the word "{row["word"]}" have the same meaning in these two sentences? Yes, No?\n'
        f"{row['sentence1']}\n{row['sentence2']}"
    )
    return _answered(question, _NO_YES, _truth(row["label"]))


def _wsc(row: Row) -> list[ChoiceItem]:
    spans = row.get("target", row)  # the hub has both spans in the row itself
    question = (
        f'{row["text"]}\nIn the previous sentence, does the pronoun "{spans["span2_text"]}" refer to '
        f'"{spans["span1_text"]}"? Yes or No?'
    )
    return _answered(question, _NO_YES, _truth(row["label"]))


def _multirc(row: Row) -> Iterator[ChoiceItem]:
    if "paragraph" in row:  # the hub has a row for every answer
        yield from _multirc_answer(row["paragraph"], row["question"], row["answer"], row["label"])
        return
    passage = row["passage"]
    for question in passage["questions"]:
        for answer in question["answers"]:
            yield from _multirc_answer(passage["text"], question["question"], answer["text"], answer["label"])


def _multirc_answer(paragraph: str, question: str, answer: str, label: Any) -> list[ChoiceItem]:
    text = f'{paragraph}\nQuestion: {question}\nI found this answer "{answer}". Is that correct? Yes or No?'
    return _answered(text, _NO_YES, _truth(label))


def _copa(row: Row) -> list[ChoiceItem]:
    joined = {"effect": "so", "cause": "because"}
    if row["question"] not in joined:
        raise ValueError(f"'question' is {row['question']!r}, it must be 'cause' or 'effect'")
    prompt = f"{row['premise']} {joined[row['question']]}"
    return [ChoiceItem(prompt, [f" {row['choice1']}", f" {row['choice2']}"], _index(row["label"], (0, 1)))]


TASKS = {
    task.name: task
    for task in (
        Task("rte", "RTE", _rte),
        Task("boolq", "BoolQ", _boolq),
        Task("wsc", "WSC", _wsc),
        Task("wic", "WiC", _wic),
        Task("multirc", "MultiRC", _multirc),
        Task("copa", "COPA", _copa),
        Task("cb", "CB", _cb),
    )
}


def load_superglue(
    name: str,
    source: str | Path | None = None,
    *,
    num_train: int = 1000,
    num_dev: int = 1000,
    num_test: int = 1000,
    seed: int = 0,
) -> TaskData:
    """Training, development and test items of one task.

    Args:
        name: a key of ``TASKS``.
        source: a directory with the official files of the task, or with one folder a task; None for the hub.
        num_train, num_dev, num_test: at most so many, drawn by the seed; the paper's are 1000 and 1000.
        seed: of the draw.

    Raises:
        ValueError: there is no such task, a number is below 1, or a file is not in the official layout; with file and line.
        FileNotFoundError: there are no such files.
        ConnectionError: the hub cannot be reached.
    """
    if name not in TASKS:
        raise ValueError(f"superglue/{name} is no task; there are {', '.join(f'superglue/{task}' for task in TASKS)}")
    if min(num_train, num_dev, num_test) < 1:
        raise ValueError(f"the numbers of examples must be at least 1, got {num_train}, {num_dev} and {num_test}")
    task, note = TASKS[name], ""
    trained, tested = _from_hub(task) if source is None else _from_files(task, Path(source).expanduser())
    if not trained:
        everything = tested
        trained = sample(everything, round(_TRAIN_SHARE * len(everything)), seed)
        chosen = {id(item) for item in trained}
        tested = [item for item in everything if id(item) not in chosen]
        note = (
            f"{task.folder} has no training file here: {len(trained)} rows of its validation file are trained on and the other "
            f"{len(tested)} tested, which is not comparable with published figures"
        )
        _logger.warning("%s", note)
    dev = sample(trained, min(num_dev, max(1, round(_DEV_SHARE * len(trained)), len(trained) - num_train)), seed + 1)
    held_out = {id(item) for item in dev}
    train = sample([item for item in trained if id(item) not in held_out], num_train, seed)
    return TaskData(train, dev, sample(tested, num_test, seed), note)


def _from_files(task: Task, folder: Path) -> tuple[list[ChoiceItem], list[ChoiceItem]]:
    """Items of the training file (empty if there is none) and of the validation file."""
    found = next((each for each in (folder / task.folder, folder) if (each / "val.jsonl").is_file()), None)
    if found is None:
        raise FileNotFoundError(
            f"{folder} holds no {task.folder}/val.jsonl and no val.jsonl: name the directory with SuperGLUE's official files"
        )
    train = found / "train.jsonl"
    return read_file(task, train) if train.is_file() else [], read_file(task, found / "val.jsonl")


def read_file(task: Task, path: Path) -> list[ChoiceItem]:
    """All items of one official file.

    Raises:
        ValueError: a line is not what the task has, or nothing is left; with file and line.
    """
    items: list[ChoiceItem] = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError("not a JSON object")
                items += _items_of(task, row)
            except (ValueError, TypeError) as error:
                raise ValueError(f"{path}:{number}: {error}; this is no line of {task.folder} with answers") from None
    if not items:
        raise ValueError(f"{path}: no examples (the file is empty)")
    return items


def _items_of(task: Task, row: Row) -> list[ChoiceItem]:
    try:
        return list(task.read(row))
    except KeyError as error:
        raise ValueError(f"no key {error}") from None


def _from_hub(task: Task) -> tuple[list[ChoiceItem], list[ChoiceItem]]:
    from datasets import load_dataset

    try:
        found = load_dataset(HUB_ID, task.name)
    except Exception as error:  # datasets raises whatever its storage raises
        raise ConnectionError(
            f"{HUB_ID} ({task.name}) cannot be loaded from the Hugging Face hub: {str(error).splitlines()[0] if str(error) else error!r}; "
            "name a directory with the official files"
        ) from error
    train, test = ([item for row in found[split] for item in _items_of(task, row)] for split in ("train", "validation"))
    return train, test


def _truth(label: Any) -> int:
    """0 or 1, from true and false or the hub's numbers."""
    return _index(label, (False, True))


def _index(label: Any, values: tuple[Any, ...]) -> int:
    """Which of the values a label is, by itself (official files) or by its number (the hub)."""
    if label in values:
        return values.index(label)
    if isinstance(label, int) and 0 <= label < len(values):
        return label
    raise ValueError(f"'label' is {label!r}, it must be one of {', '.join(map(repr, values))}")
