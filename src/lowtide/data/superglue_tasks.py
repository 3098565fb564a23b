"""The prompts of SuperGLUE's tasks: those of the LOMO paper (arXiv 2306.09782, section 4.2), and CB's in their manner.

A row is a line of the official files (super.gluebenchmark.com) or a row of the Hugging Face hub, whose layout differs for WSC and MultiRC.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from .choices import ChoiceItem
from .formats import type_name

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Task:
    """How the rows of one task become multiple choice.

    Attributes:
        name: as in ``superglue/NAME``.
        folder: of its official files.
        read: what one row gives; MultiRC has many answers in one row. Raises ValueError where a row is not what the task has.
        shared: what several rows have in common, so that splits are made by it; empty where every row is for itself.
    """

    name: str
    folder: str
    read: Callable[[Row], Iterable[ChoiceItem]]
    shared: str = ""


def _answered(question: str, choices: tuple[str, ...], gold: int, group: str | None = None) -> list[ChoiceItem]:
    # The paper's "Answer: " and "Yes" are the same text, but a blank before a word belongs to the word's token.
    return [ChoiceItem(f"{question}\nAnswer:", [f" {choice}" for choice in choices], gold, group)]


_NO_YES, _YES_NO = ("No", "Yes"), ("Yes", "No")


def _boolq(row: Row) -> list[ChoiceItem]:
    passage = _text(row, "passage")
    return _answered(f"{passage} {_text(row, 'question')}", _NO_YES, _truth(row), _words(passage))


def _rte(row: Row) -> list[ChoiceItem]:
    question = f'{_text(row, "premise")}\nDoes this mean that "{_text(row, "hypothesis")}" is true? Yes or No?'
    return _answered(question, _YES_NO, _index(row, ("entailment", "not_entailment")))


def _cb(row: Row) -> list[ChoiceItem]:
    question = f'{_text(row, "premise")}\nDoes this mean that "{_text(row, "hypothesis")}" is true? Yes, No or Maybe?'
    return _answered(question, ("Yes", "No", "Maybe"), _index(row, ("entailment", "contradiction", "neutral")))


def _wic(row: Row) -> list[ChoiceItem]:
    question = (
        f'Does the word "{_text(row, "word")}" have the same meaning in these two sentences? Yes, No?\n'
        f"{_text(row, 'sentence1')}\n{_text(row, 'sentence2')}"
    )
    return _answered(question, _NO_YES, _truth(row))


def _wsc(row: Row) -> list[ChoiceItem]:
    text = _text(row, "text")
    spans = _object(row, "target") if "target" in row else row  # the hub has both spans in the row itself
    question = (
        f'{text}\nIn the previous sentence, does the pronoun "{_text(spans, "span2_text")}" refer to '
        f'"{_text(spans, "span1_text")}"? Yes or No?'
    )
    return _answered(question, _NO_YES, _truth(row), _words(text))


def _multirc(row: Row) -> Iterator[ChoiceItem]:
    if "paragraph" in row:  # the hub has a row for every answer
        yield from _multirc_answer(_text(row, "paragraph"), _text(row, "question"), _answer(row, "answer"), row)
        return
    passage = _object(row, "passage")
    text = _text(passage, "text")
    for question in _objects(passage, "questions"):
        asked = _text(question, "question")
        for answer in _objects(question, "answers"):
            yield from _multirc_answer(text, asked, _answer(answer, "text"), answer)


def _multirc_answer(paragraph: str, question: str, answer: str, row: Row) -> list[ChoiceItem]:
    text = f'{paragraph}\nQuestion: {question}\nI found this answer "{answer}". Is that correct? Yes or No?'
    return _answered(text, _NO_YES, _truth(row), _words(paragraph))


def _copa(row: Row) -> list[ChoiceItem]:
    joined, question = {"effect": "so", "cause": "because"}, _text(row, "question")
    if question not in joined:
        raise ValueError(f"'question' is {question!r}, it must be 'cause' or 'effect'")
    choices = [f" {_text(row, key)}" for key in ("choice1", "choice2")]
    return [ChoiceItem(f"{_text(row, 'premise')} {joined[question]}", choices, _index(row, (0, 1)))]


TASKS = {
    task.name: task
    for task in (
        Task("rte", "RTE", _rte),
        Task("boolq", "BoolQ", _boolq, "passage"),
        Task("wsc", "WSC", _wsc, "text"),
        Task("wic", "WiC", _wic),
        Task("multirc", "MultiRC", _multirc, "passage"),
        Task("copa", "COPA", _copa),
        Task("cb", "CB", _cb),
    )
}


def _words(text: str) -> str:
    """The words of a text alone, so that copies that differ in blanks, punctuation or capitals are the same."""
    return " ".join(re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold()))


def _value(row: Row, key: str) -> Any:
    if key not in row:
        raise ValueError(f"no key {key!r}")
    return row[key]


def _text(row: Row, key: str) -> str:
    value = _answer(row, key)
    if not value.strip():
        raise ValueError(f"{key!r} is blank, it must be a text")
    return value


def _answer(row: Row, key: str) -> str:
    """A text that may be blank, as three of MultiRC's answers are."""
    value = _value(row, key)
    if not isinstance(value, str):
        raise ValueError(f"{key!r} is {type_name(value)}, it must be a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{key!r} has half a surrogate pair at character {error.start}") from None
    return value


def _object(row: Row, key: str) -> Row:
    value = _value(row, key)
    if not isinstance(value, Mapping):
        raise ValueError(f"{key!r} is {type_name(value)}, it must be an object")
    return value


def _objects(row: Row, key: str) -> list[Row]:
    value = _value(row, key)
    if not isinstance(value, list) or not all(isinstance(each, Mapping) for each in value):
        raise ValueError(f"{key!r} is {type_name(value)}, it must be a list of objects")
    return value


def _truth(row: Row) -> int:
    """0 or 1, from true and false or the hub's numbers."""
    return _index(row, (False, True))


def _index(row: Row, values: tuple[Any, ...]) -> int:
    """Which of the values the label is, by itself (official files) or by its number (the hub)."""
    label = _value(row, "label")
    for index, value in enumerate(values):
        if type(label) is type(value) and label == value:
            return index
    if type(label) is int and 0 <= label < len(values):  # a boolean is no number here
        return label
    raise ValueError(f"'label' is {label!r}, it must be one of {', '.join(map(repr, values))}")
