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
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .record import Record
from .record import where as where_of


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
LIST_KEYS = ("messages", "conversations", "conversation", "history")  # in CSV their cells hold JSON
_NEEDED_KEYS = tuple(dict.fromkeys(key for format in FORMATS for key in format.keys))
KNOWN_KEYS = tuple(dict.fromkeys((*_NEEDED_KEYS, *(key for format in FORMATS for key in format.optional))))

ROLES = {role: role for role in ("system", "user", "assistant", "tool")}
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", **ROLES}

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
    if format.name == "alpaca":
        messages, instruction = _alpaca(row, place)
        return Record(source, line, messages=messages, instruction=instruction, row=number)
    if format.name == "sharegpt":
        return Record(source, line, messages=_sharegpt(row, format.keys[0], place), row=number)
    if format.name == "messages":
        return Record(source, line, messages=_messages(row["messages"], place), row=number)
    text, prompt, completion = (
        _string(row[key], repr(key), place) if key in format.keys else None for key in ("text", "prompt", "completion")
    )
    return Record(source, line, text=text, prompt=prompt, completion=completion, row=number)


def ignored_keys(row: Mapping[str, Any], format: Format) -> set[str]:
    """Keys of a row with something in them that the format does not know."""
    return {key for key, value in row.items() if key not in format.keys + format.optional and not _is_empty(value)}


def _title(format: Format) -> str:
    return format.name if format.name != "sharegpt" else format.keys[0]


def _is_empty(value: Any) -> bool:
    return value is None or value == ""


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


def _alpaca(row: Mapping[str, Any], where: str) -> tuple[list[dict[str, str]], tuple[str, str]]:
    for key in ("system", "history"):
        if row.get(key) not in (None, "", []):
            raise ValueError(f"{where}: {key!r} has no place in an alpaca record; write the conversation as 'messages'")
    _refuse_misspelt_input([key for key, value in row.items() if not _is_empty(value)], where)
    instruction, output = (_string(row[key], repr(key), where) for key in ("instruction", "output"))
    context = row.get("input")
    context = "" if context is None or (isinstance(context, str) and not context.strip()) else context
    if context:
        context = _string(context, "'input'", where)
    elif context != "":
        raise ValueError(f"{where}: 'input' is {type_name(context)}, it must be a string; correct or leave it out")
    question = f"{instruction}\n\n{context}" if context else instruction
    return [{"role": "user", "content": question}, {"role": "assistant", "content": output}], (instruction, context)


def _refuse_misspelt_input(keys: Sequence[str], where: str) -> None:
    """The only key whose loss would go unnoticed, and change what is taught."""
    for key in () if "input" in keys else keys:
        if key not in KNOWN_KEYS and difflib.get_close_matches(key.lower(), ("input",), cutoff=0.8):
            raise ValueError(f"{where}: unknown key {key!r} in an alpaca record (is it meant to be 'input'?)")


def _sharegpt(row: Mapping[str, Any], key: str, where: str) -> list[dict[str, str]]:
    if row.get("tools") not in (None, "", [], "[]"):
        raise ValueError(
            f"{where}: 'tools' cannot be expressed; remove this record, or the key if the turns do without"
        )
    turns = _turns(row[key], key, ("from", "value"), SHAREGPT_ROLES, where)
    if row.get("system") not in (None, ""):
        system = {"role": "system", "content": _string(row["system"], "'system'", where)}
        if turns and turns[0]["role"] == "system":
            raise ValueError(f"{where}: has a 'system' prompt and {key}[0] is another; keep one of them")
        turns.insert(0, system)
    for index, (before, after) in enumerate(itertools.pairwise(turns)):
        if before["role"] == after["role"]:
            raise ValueError(
                f"{where}: two {after['role']} turns follow one another (turns {index + 1} and {index + 2}); join them, or "
                "write the conversation as 'messages'"
            )
    return _checked(turns, where)


def _messages(value: Any, where: str) -> list[dict[str, str]]:
    return _checked(_turns(value, "messages", ("role", "content"), ROLES, where), where)


def _checked(messages: list[dict[str, str]], where: str) -> list[dict[str, str]]:
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        raise ValueError(f"{where}: the conversation has no assistant turn, so there is nothing to learn; remove it")
    if roles[0] == "assistant":
        raise ValueError(f"{where}: the conversation starts with an assistant turn; put the user's turn before it")
    return messages


def _turns(value: Any, name: str, keys: tuple[str, str], roles: Mapping[str, str], where: str) -> list[dict[str, str]]:
    """Turns of a conversation as ``role`` and ``content``; ``keys`` are what the file calls these two."""
    if not isinstance(value, list):
        raise ValueError(
            f"{where}: {name!r} is {type_name(value)}, it must be a list of {{{keys[0]}, {keys[1]}}} objects"
        )
    return [_turn(item, f"{name}[{index}]", keys, roles, where) for index, item in enumerate(value)]


def _turn(item: Any, name: str, keys: tuple[str, str], roles: Mapping[str, str], where: str) -> dict[str, str]:
    wanted = f"a message has {keys[0]!r} and {keys[1]!r}"
    if not isinstance(item, dict):
        raise ValueError(f"{where}: {name} is {type_name(item)} instead of an object; {wanted}")
    for key in keys:
        if key not in item:
            raise ValueError(f"{where}: {name} has no {key!r}{hint(item, (key,))}; {wanted}")
    # Stricter than for a record: tool calls or images left out in silence would change what the model is taught.
    extra = [key for key, entry in item.items() if key not in keys and entry is not None]
    if extra:
        raise ValueError(f"{where}: {name} has unknown keys {shown(extra)}; {wanted} and nothing else")
    role = item[keys[0]]
    if not isinstance(role, str) or role not in roles:
        raise ValueError(
            f"{where}: {name} has the unknown role {role!r}{_near_role(role, roles)}; roles are {', '.join(roles)}"
        )
    return {"role": roles[role], "content": _string(item[keys[1]], f"{name} {keys[1]}", where)}


def _near_role(role: Any, roles: Iterable[str]) -> str:
    close = difflib.get_close_matches(role.lower(), list(roles), n=1) if isinstance(role, str) else []
    return f" (is it meant to be {close[0]!r}?)" if close else ""


def _string(value: Any, name: str, where: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where}: {name} is {type_name(value)}, it must be a string; correct or remove this record")
    if not value.strip():
        raise ValueError(f"{where}: {name} is an empty string; correct or remove this record")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where}: {name} has half a surrogate pair at character {error.start}; correct or remove this record"
        ) from None
    return value


def type_name(value: Any) -> str:
    """What a value is, in words of JSON: "a list"."""
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object"}
    return "null" if value is None else names.get(type(value), f"a {type(value).__name__}")


def shown(keys: Sequence[str], limit: int = 6) -> str:
    """Some keys for an error message, shortened."""
    some = [repr(key if len(key) <= 60 else f"{key[:60]}...") for key in keys[:limit]]
    return ", ".join(some) + (", ..." if len(keys) > limit else "")


def hint(keys: Iterable[str], wanted: Sequence[str]) -> str:
    """`` (is 'txt' meant to be 'text'?)`` when one of the keys is nearly a wanted one, else nothing."""
    for key in keys:
        close = difflib.get_close_matches(str(key).lower(), wanted, n=1, cutoff=0.7)
        if key not in wanted and close:
            return f" (is {key!r} meant to be {close[0]!r}?)"
    return ""
