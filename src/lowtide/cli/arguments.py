"""Flags and a config file from one dataclass, under the same names, and errors that name the nearest valid one.

A field ``max_seq_len`` is the flag ``--max-seq-len`` and the key ``max_seq_len`` (or ``max-seq-len``) of the file. A
flag wins over the file, the file over the default. Values of both go through one function, ``convert``, so that both
are checked alike and complain alike.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn, TypeVar

from .config_file import Entry, read_config_file

T = TypeVar("T")


class UsageError(ValueError):
    """The command line or the config file is wrong; the message is one line for the user."""


class Parser(argparse.ArgumentParser):
    """An argument parser that raises ``UsageError`` instead of printing the usage and leaving."""

    def __init__(self, **options: Any) -> None:
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """Called by argparse."""
        raise UsageError(message)

    def flags(self) -> list[str]:
        """All long flags of this parser."""
        return [flag for action in self._actions for flag in action.option_strings if flag.startswith("--")]


def positive_int(text: str) -> int:
    """The value of a flag that counts something."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def whole_number(text: str) -> int:
    """The value of a flag that may be 0."""
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 0, got {text!r}")
    return int(text)


# What other trainers call a setting; not accepted, but understood.
_ELSEWHERE = {
    "learning_rate": "lr",
    "num_train_epochs": "epochs",
    "num_epochs": "epochs",
    "steps": "max_steps",
    "max_length": "max_seq_len",
    "model_name_or_path": "model",
    "model_path": "model",
    "train_data": "data",
    "dataset": "data",
    "output_dir": "output",
    "lr_scheduler_type": "schedule",
    "optim": "optimizer",
    "per_device_train_batch_size": "batch_size",
    "max_grad_norm": "clip_grad_norm",
    "gradient_accumulation_steps": "micro_batch_size",
}


def nearest(word: str, valid: Iterable[str]) -> str:
    """``" (did you mean --lr?)"``, or nothing where no valid word is near. Flags and names alike."""
    written = {name.strip("-").replace("-", "_"): name for name in valid}
    meant = {**{other: written[name] for other, name in _ELSEWHERE.items() if name in written}, **written}
    found = difflib.get_close_matches(word.strip("-").replace("-", "_"), meant, n=1)
    return f" (did you mean {meant[found[0]]}?)" if found else ""


def unknown_arguments(parser: Parser, extra: Sequence[str]) -> UsageError:
    """The error for what argparse did not recognise; names the nearest flag."""
    word = next((arg for arg in extra if arg.startswith("-")), extra[0])
    flag = word.partition("=")[0]
    if not flag.startswith("-"):
        return UsageError(f"unexpected argument {word!r}; every setting is a flag, see {parser.prog} --help")
    return UsageError(f"unknown flag {flag}{nearest(flag, parser.flags())}; see {parser.prog} --help")


def add_dataclass_arguments(parser: argparse.ArgumentParser, cls: type, groups: Sequence[str] = ()) -> None:
    """A flag for every field of a dataclass, and ``--config``.

    Args:
        parser: where to add them.
        cls: dataclass whose fields may have ``metadata`` with ``help``, ``group`` and ``choices``.
        groups: order of the groups in the help.
    """
    parser.add_argument(
        "--config", metavar="FILE", help="YAML or JSON file with any of the settings below; flags win over it"
    )
    fields = dataclasses.fields(cls)
    for title in groups or dict.fromkeys(field.metadata.get("group", "settings") for field in fields):
        group = parser.add_argument_group(title)
        for field in fields:
            if field.metadata.get("group", "settings") == title:
                _add_flag(group, cls, field)


def build_from_arguments(cls: type[T], args: argparse.Namespace) -> T:
    """The dataclass from the flags in ``args`` and the file that ``--config`` names.

    Raises:
        UsageError: an unknown key, a value of the wrong type, or a setting that is missing.
        FileNotFoundError: there is no such config file.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    if getattr(args, "config", None):
        for entry in read_config_file(args.config):
            name = entry.key.replace("-", "_")
            if name not in fields:
                raise UsageError(f"{entry.where}: unknown key {entry.key!r}{nearest(name, fields)}")
            values[name] = _from_file(cls, name, entry)
    values |= {name: getattr(args, name) for name in fields if hasattr(args, name)}
    for name, field in fields.items():
        if name not in values and not _has_default(field):
            raise UsageError(f"{name} is missing: give {flag_of(name)}, or {name} in a file for --config")
    return cls(**values)


def flag_of(name: str) -> str:
    """``max_seq_len`` is the flag ``--max-seq-len``."""
    return "--" + name.replace("_", "-")


def convert(cls: type, name: str, value: Any) -> Any:
    """``value``, from a file or (as text) from a flag, as the type of the field ``name`` of ``cls``.

    Text that reads as a number becomes one, because YAML takes 1e-3 for text.

    Raises:
        ValueError: it is not of that type; the message says what was expected.
    """
    kind, optional, many = _kind_of(cls, name)
    if isinstance(value, int) and not isinstance(value, bool) and _metadata(cls, name).get("numbers"):
        value = str(value)
    if isinstance(value, str) and value in _metadata(cls, name).get("words", ()):
        return value
    if value is None or (isinstance(value, str) and value.lower() in ("none", "null")):
        if optional:
            return None
    elif many:
        return [_convert_one(kind, item) for item in (value if isinstance(value, list) else [value])]
    else:
        return _convert_one(kind, value)
    raise ValueError(f"expected {_EXPECTED[kind]}, got {value!r}")


_EXPECTED: dict[type, str] = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def _convert_one(kind: type, value: Any) -> Any:
    wrong = ValueError(f"expected {_EXPECTED[kind]}, got {value!r}")
    if kind is bool:
        if isinstance(value, bool):
            return value
        raise wrong
    if kind is str:
        if isinstance(value, str):
            return value
        raise wrong
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise wrong
    try:
        number = kind(value)
    except (ValueError, OverflowError):
        raise wrong from None
    if isinstance(value, float) and number != value and value == value:
        raise wrong  # 2.5 is not a whole number
    return number


def _kind_of(cls: type, name: str) -> tuple[type, bool, bool]:
    """(type of one value, None is allowed, a sequence of them) of a field such as ``Sequence[str] | None``."""
    hint = typing.get_type_hints(cls)[name]
    parts = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
    (kind,) = (part for part in parts if part is not type(None))
    many = typing.get_origin(kind) is not None
    return (typing.get_args(kind)[0] if many else kind), type(None) in parts, many


def _metadata(cls: type, name: str) -> Mapping[Any, Any]:
    return next(field.metadata for field in dataclasses.fields(cls) if field.name == name)


def _from_file(cls: type, name: str, entry: Entry) -> Any:
    try:
        return convert(cls, name, entry.value)
    except ValueError as error:
        raise UsageError(f"{entry.where}: {entry.key}: {error}") from None


def _has_default(field: dataclasses.Field[Any]) -> bool:
    return field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING


def _add_flag(group: argparse._ArgumentGroup, cls: type, field: dataclasses.Field[Any]) -> None:
    kind, _, many = _kind_of(cls, field.name)
    options: dict[str, Any] = {"dest": field.name, "default": argparse.SUPPRESS, "help": _help(field)}
    if kind is bool:
        group.add_argument(flag_of(field.name), action=argparse.BooleanOptionalAction, **options)
        return

    def from_text(text: str) -> Any:
        try:
            return _convert_one(kind, text) if many else convert(cls, field.name, text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    choices = field.metadata.get("choices", ())
    metavar = field.metadata.get("metavar") or ("{" + ",".join(choices) + "}" if choices else _METAVAR[kind])
    alone = field.metadata.get("alone")
    nargs = "+" if many else None if alone is None else "?"
    group.add_argument(flag_of(field.name), type=from_text, metavar=metavar, nargs=nargs, const=alone, **options)


_METAVAR: dict[type, str] = {int: "N", float: "X", str: "NAME"}


def _help(field: dataclasses.Field[Any]) -> str:
    text, _, unset = str(field.metadata.get("help", "")).partition("; default: ")
    if unset:
        text += f" (default: {unset})"
    elif not _has_default(field):
        text += " (required)"
    elif field.default is not None:
        default = str(field.default).lower() if isinstance(field.default, bool) else field.default
        text += f" (default: {default})"
    return text.replace("%", "%%")
