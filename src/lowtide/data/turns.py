"""Turns: a conversation in the spellings that people have for it, as the ``messages`` that a chat template takes.

    messages        {"role": "user", "content": "..."}, content perhaps in parts: [{"type": "text", "text": "..."}]
    conversations   {"from": "human", "value": "..."} (ShareGPT), or the keys of messages

A turn may also have OpenAI's ``name``, which the template is given, and an assistant's ``weight``: 0 for a turn that is not
trained on. A conversation cannot begin with an assistant turn, perhaps behind a system prompt, since nothing is asked there; such
turns are dropped.
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from .wording import checked_text, hint, is_empty, shown, type_name

ROLES = {**{role: role for role in ("system", "user", "assistant", "tool")}, "developer": "system"}
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", **ROLES}

_KEYS, _SHAREGPT_KEYS = ("role", "content"), ("from", "value")
_OPTIONAL_KEYS = ("name", "weight")

Turn = dict[str, Any]


class Conversation(NamedTuple):
    """Turns with ``role``, ``content`` and perhaps ``name`` and ``weight``, and how many were dropped at its beginning."""

    messages: list[Turn]
    num_dropped: int


def messages_of(row: Mapping[str, Any], where: str) -> Conversation:
    """The conversation of a row with ``messages``.

    Raises:
        ValueError: it cannot be expressed, or teaches nothing.
    """
    return _checked(_turns(row["messages"], "messages", _KEYS, ROLES, where), where)


def sharegpt_messages(row: Mapping[str, Any], key: str, where: str) -> Conversation:
    """The conversation of a row of ShareGPT's format.

    Args:
        row: key to value.
        key: that of the turns.
        where: the place, for people.

    Raises:
        ValueError: it cannot be expressed, or teaches nothing.
    """
    if row.get("tools") not in (None, "", [], "[]"):
        raise ValueError(
            f"{where}: 'tools' cannot be expressed; remove this record, or the key if the turns do without"
        )
    turns = _turns(row[key], key, _spelling(row[key]), SHAREGPT_ROLES, where)
    num_inserted = 0
    if row.get("system") not in (None, ""):
        system = {"role": "system", "content": checked_text(row["system"], "'system'", where)}
        if turns and turns[0]["role"] == "system":
            raise ValueError(f"{where}: has a 'system' prompt and {key}[0] is another; keep one of them")
        turns.insert(0, system)
        num_inserted = 1
    conversation = _checked(turns, where)
    in_file = conversation.num_dropped - num_inserted
    for index, (before, after) in enumerate(itertools.pairwise(conversation.messages), in_file):
        if before["role"] == after["role"]:
            raise ValueError(
                f"{where}: two {after['role']} turns follow one another (turns {index + 1} and {index + 2}); join them, or "
                "write the conversation as 'messages'"
            )
    return conversation


def _spelling(turns: Any) -> tuple[str, str]:
    """The keys of the turns, told from the first one."""
    first = turns[0] if isinstance(turns, list) and turns else None
    is_ours = isinstance(first, dict) and first.get("from") is None and first.get("role") is not None
    return _KEYS if is_ours else _SHAREGPT_KEYS


def _checked(turns: list[Turn], where: str) -> Conversation:
    """The conversation without the assistant's turns at its beginning, if something is learnt there."""
    first = next((index for index, turn in enumerate(turns) if turn["role"] != "system"), len(turns))
    asked = next((index for index in range(first, len(turns)) if turns[index]["role"] != "assistant"), len(turns))
    messages, num_dropped = turns[:first] + turns[asked:], asked - first
    answers = [turn for turn in messages if turn["role"] == "assistant"]
    if not answers:
        what = "no assistant turn" if not num_dropped else "no assistant turn behind a turn of another role"
        raise ValueError(f"{where}: the conversation has {what}, so there is nothing to learn; remove it")
    if not any(turn.get("weight", 1) for turn in answers):
        raise ValueError(
            f"{where}: every assistant turn of the conversation has weight 0, so there is nothing to learn; remove it"
        )
    return Conversation(messages, num_dropped)


def _turns(value: Any, name: str, keys: tuple[str, str], roles: Mapping[str, str], where: str) -> list[Turn]:
    """Turns as ``role`` and ``content``; ``keys`` are what the file calls these two."""
    if not isinstance(value, list):
        raise ValueError(
            f"{where}: {name!r} is {type_name(value)}, it must be a list of {{{keys[0]}, {keys[1]}}} objects"
        )
    return [_turn(item, f"{name}[{index}]", keys, roles, where) for index, item in enumerate(value)]


def _turn(item: Any, name: str, keys: tuple[str, str], roles: Mapping[str, str], where: str) -> Turn:
    wanted = f"a message has {keys[0]!r} and {keys[1]!r}"
    if not isinstance(item, dict):
        raise ValueError(f"{where}: {name} is {type_name(item)} instead of an object; {wanted}")
    for key in keys:
        if key not in item:
            raise ValueError(f"{where}: {name} has no {key!r}{hint(item, (key,))}; {wanted}")
    # Stricter than for a record: tool calls or images left out in silence would change what the model is taught.
    extra = [key for key, entry in item.items() if key not in keys + _OPTIONAL_KEYS and not is_empty(entry)]
    if extra:
        raise ValueError(
            f"{where}: {name} has unknown keys {shown(extra)}; {wanted}, and may have 'name' and 'weight', nothing else"
        )
    role = item[keys[0]]
    if not isinstance(role, str) or role not in roles:
        raise ValueError(
            f"{where}: {name} has the unknown role {role!r}{_near_role(role, roles)}; roles are {', '.join(roles)}"
        )
    turn: Turn = {"role": roles[role], "content": _content(item[keys[1]], f"{name} {keys[1]}", where)}
    if not is_empty(item.get("name")):
        turn["name"] = checked_text(item["name"], f"{name} name", where)
    if not is_empty(item.get("weight")) and not _weight(item["weight"], turn["role"], name, where):
        turn |= {"weight": 0} if turn["role"] == "assistant" else {}  # no other turn is trained on anyway
    return turn


def _weight(value: Any, role: str, name: str, where: str) -> int:
    if isinstance(value, bool) or value not in (0, 1):
        raise ValueError(
            f"{where}: {name} weight is {value!r}, it must be 0 (not trained on) or 1; correct or remove this record"
        )
    if value == 1 and role != "assistant":
        raise ValueError(
            f"{where}: {name} has weight 1, but of a conversation only assistant turns are trained on; set it to 0 or leave it "
            "out"
        )
    return int(value)


def _content(value: Any, name: str, where: str) -> str:
    if isinstance(value, list):
        value = "".join(_part(part, f"{name}[{index}]", where) for index, part in enumerate(value))
    return checked_text(value, name, where)


def _part(part: Any, name: str, where: str) -> str:
    wanted = 'a part is {"type": "text", "text": ...}'
    if not isinstance(part, dict):
        raise ValueError(f"{where}: {name} is {type_name(part)} instead of an object; {wanted}")
    if part.get("type") != "text":
        raise ValueError(
            f"{where}: {name} is a part of type {part.get('type')!r}, and only text can be trained on; remove it, or this record"
        )
    extra = [key for key, entry in part.items() if key not in ("type", "text") and not is_empty(entry)]
    if extra:
        raise ValueError(f"{where}: {name} has unknown keys {shown(extra)}; {wanted}, nothing else")
    text = part.get("text")
    if not isinstance(text, str):
        raise ValueError(
            f"{where}: {name} text is {type_name(text)}, it must be a string; correct or remove this record"
        )
    return text


def _near_role(role: Any, roles: Iterable[str]) -> str:
    close = difflib.get_close_matches(role.lower(), list(roles), n=1) if isinstance(role, str) else []
    return f" (is it meant to be {close[0]!r}?)" if close else ""
