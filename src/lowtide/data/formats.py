"""Formats: which keys a row of data has, and the record that they make.

Five formats are known, told from their keys alone:

    text                {"text": "..."}
    messages            {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
    prompt/completion   {"prompt": "...", "completion": "..."}
    alpaca              {"instruction": "...", "input": "...", "output": "..."}, the input optional
    sharegpt            {"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}

The last two become ``messages``. Every error is one line that names the place and says what to do.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .record import Record
from .record import where as where_of
from .turns import messages_of, sharegpt_messages
from .wording import checked_text, hint, shown, type_name


@dataclass(frozen=True)
class Format:
    """A format of rows: the keys that it needs, and those that it may have."""

    name: str
    keys: tuple[str, ...]
    optional: tuple[str, ...] = ()


FORMATS = (
    Format("text", ("text",)),
    Format("messages", ("messages",)),
    Format("prompt/completion", ("prompt", "completion")),
    Format("alpaca", ("instruction", "output"), ("input", "system", "history")),
    Format("sharegpt", ("conversations",), ("system", "tools")),
    Format("sharegpt", ("conversation",), ("system", "tools")),
)
WANTED = (
    "a record has 'text', or 'messages', or 'prompt' and 'completion', or 'instruction' and 'output' (alpaca), or "
    "'conversations' (sharegpt)"
)
LIST_KEYS = ("messages", "conversations", "conversation", "history")  # they may be JSON in a string
_NEEDED_KEYS = tuple(dict.fromkeys(key for format in FORMATS for key in format.keys))
KNOWN_KEYS = tuple(dict.fromkeys((*_NEEDED_KEYS, *(key for format in FORMATS for key in format.optional))))

_ALPACA_OPENING = "Below is an instruction that describes a task"
_ALPACA_WITH_INPUT = ", paired with an input that provides further context"
_ALPACA_TASK = ". Write a response that appropriately completes the request."


def alpaca_prompt(instruction: str, context: str) -> str:
    """Alpaca's wording (github.com/tatsu-lab/stanford_alpaca), up to where the response begins, which is on a line of its own.

    Args:
        instruction: the task.
        context: the record's ``input``; empty for none, which has a wording of its own.
    """
    opening = f"{_ALPACA_OPENING}{_ALPACA_WITH_INPUT if context else ''}{_ALPACA_TASK}"
    sections = [f"### Instruction:\n{instruction}", *([f"### Input:\n{context}"] if context else []), "### Response:\n"]
    return "\n\n".join((opening, *sections))


def format_of(row: Mapping[str, Any], where: str) -> Format:
    """The one format whose keys the row has.

    A key whose value is null or an empty string counts as absent: tables have those for what another row has.

    Raises:
        ValueError: there is none, or there are several.
    """
    present = {key for key, value in row.items() if not _is_empty(value)}
    found = [format for format in FORMATS if present.issuperset(format.keys)]
    if [format.name for format in found] == ["text", "alpaca"] and _is_rendering(row):
        return found[1]
    if [format.name for format in found] == ["text"] and "instruction" in present and "output" in row:
        raise _empty_value(row, "output", where)
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(
            f"{where}: has {' and '.join(repr(_title(format)) for format in found)} at once; keep one of them"
        )
    raise _no_format(row, present, where)


def check_columns(names: Sequence[str], where: str) -> None:
    """Refuse a table that can hold no record, before its rows are read.

    Raises:
        ValueError: the columns make up no format.
    """
    found = [format for format in FORMATS if set(names).issuperset(format.keys)]
    if not found:
        raise _no_format(dict.fromkeys(names, True), set(names), where)
    if [format.name for format in found] == ["alpaca"]:
        _refuse_misspelt_input(names, where)


def make_record(row: Mapping[str, Any], format: Format, source: str, line: int | None, number: int | None) -> Record:
    """The record that a row of a format makes.

    Args:
        row: key to value, as the file has them.
        format: what :func:`format_of` says of it.
        source: path of the file, or id of the hub data set.
        line: where it begins, or None.
        number: of the row, or None.

    Raises:
        ValueError: a value is of a wrong type, empty, or cannot be expressed.
    """
    place = where_of(source, line, number)
    row = {**row, **_parsed_lists(row, format.keys, place)}
    if format.name == "alpaca":
        messages, instruction = _alpaca(row, place)
        return Record(source, line, messages=messages, instruction=instruction, row=number)
    if format.name in ("messages", "sharegpt"):
        chat = sharegpt_messages(row, format.keys[0], place) if format.name == "sharegpt" else messages_of(row, place)
        return Record(source, line, messages=chat.messages, row=number, num_dropped_turns=chat.num_dropped)
    text, prompt, completion = (
        checked_text(row[key], repr(key), place) if key in format.keys else None
        for key in ("text", "prompt", "completion")
    )
    return Record(source, line, text=text, prompt=prompt, completion=completion, row=number)


def ignored_keys(row: Mapping[str, Any], format: Format) -> set[str]:
    """Keys of a row with something in them that the format does not know."""
    return {key for key, value in row.items() if key not in format.keys + format.optional and not _is_empty(value)}


def _title(format: Format) -> str:
    return format.name if format.name != "sharegpt" else format.keys[0]


def _is_empty(value: Any) -> bool:
    return value is None or value == ""


def _parsed_lists(row: Mapping[str, Any], keys: Sequence[str], where: str) -> dict[str, Any]:
    """Conversations that are JSON in a string, which is all that a table of CSV can hold."""
    parsed = {}
    for key in set(keys).intersection(LIST_KEYS):
        value = row[key]
        if not isinstance(value, str) or not value.strip():
            continue
        try:
            parsed[key] = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{where}: {key!r} is a string and malformed JSON at character {error.pos + 1} ({error.msg}); a conversation "
                'is a list, or JSON like [{"role": "user", ... in a string'
            ) from None
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{where}: {key!r} is JSON that cannot be read ({error}); correct or remove this record"
            ) from None
    return parsed


def _is_rendering(row: Mapping[str, Any]) -> bool:
    """Whether 'text' is the rest of an Alpaca row written out once more, as in the original data set."""
    parts = [row[key] for key in ("text", "instruction", "output")]
    return all(isinstance(part, str) for part in parts) and all(part.strip() in parts[0] for part in parts[1:])


def _no_format(row: Mapping[str, Any], present: set[str], where: str) -> ValueError:
    partial = [format for format in FORMATS if present.intersection(format.keys)]
    for format in partial:
        there, missing = (next(key for key in format.keys if (key in present) is wanted) for wanted in (True, False))
        if missing not in row:
            return ValueError(f"{where}: has {there!r} but no {missing!r}{hint(row, (missing,))}; {WANTED}")
        return _empty_value(row, missing, where)
    for key in _NEEDED_KEYS:
        if key in row:
            return _empty_value(row, key, where)
    if not row:
        return ValueError(f"{where}: an object without keys; {WANTED}")
    return ValueError(f"{where}: unknown keys {shown(list(row))}{hint(row, _NEEDED_KEYS)}; {WANTED}")


def _empty_value(row: Mapping[str, Any], key: str, where: str) -> ValueError:
    if row[key] == "":
        return ValueError(f"{where}: {key!r} is an empty string; correct or remove this record")
    wanted = "a list of messages" if key in LIST_KEYS else "a string"
    return ValueError(f"{where}: {key!r} is null, it must be {wanted}; correct or remove this record")


def _alpaca(row: Mapping[str, Any], where: str) -> tuple[list[dict[str, Any]], tuple[str, str]]:
    for key in ("system", "history"):
        if row.get(key) not in (None, "", [], "[]"):
            raise ValueError(f"{where}: {key!r} has no place in an alpaca record; write the conversation as 'messages'")
    _refuse_misspelt_input([key for key, value in row.items() if not _is_empty(value)], where)
    instruction, output = (checked_text(row[key], repr(key), where) for key in ("instruction", "output"))
    context = row.get("input")
    context = "" if context is None or (isinstance(context, str) and not context.strip()) else context
    if context:
        context = checked_text(context, "'input'", where)
    elif context != "":
        raise ValueError(f"{where}: 'input' is {type_name(context)}, it must be a string; correct or leave it out")
    question = f"{instruction}\n\n{context}" if context else instruction
    return [{"role": "user", "content": question}, {"role": "assistant", "content": output}], (instruction, context)


def _refuse_misspelt_input(keys: Sequence[str], where: str) -> None:
    """The only key whose loss would go unnoticed, and change what is taught."""
    for key in () if "input" in keys else keys:
        if key not in KNOWN_KEYS and difflib.get_close_matches(key.lower(), ("input",), cutoff=0.8):
            raise ValueError(f"{where}: unknown key {key!r} in an alpaca record (is it meant to be 'input'?)")
