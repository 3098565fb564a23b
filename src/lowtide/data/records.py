"""Records: what a user's files hold, read strictly and before any tokenizer is involved.

Three kinds of record exist: a plain text, a conversation (``messages``) and a prompt with its completion. Text files
(.txt, .md) are one record a file; JSON-lines files (.jsonl, .json) are one record a line, all of one kind. Every error
is one line that names file and line and says what to do.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..log import get_logger

logger = get_logger(__name__)

TEXT_SUFFIXES = (".txt", ".md")
JSON_SUFFIXES = (".jsonl", ".json")
ROLES = ("system", "user", "assistant", "tool")
KINDS = {"text": ("text",), "messages": ("messages",), "prompt/completion": ("prompt", "completion")}
_KNOWN_KEYS = tuple(key for keys in KINDS.values() for key in keys)
_WANTED = "a record has 'text', or 'messages', or 'prompt' and 'completion'"


@dataclass(frozen=True)
class Record:
    """One thing to learn from: either ``text``, or ``messages``, or ``prompt`` with ``completion``; the rest is None.

    ``source`` is the path (or hub id) and ``line`` the line (or row) it came from, both counted from 1.
    """

    source: str
    line: int
    text: str | None = None
    messages: list[dict[str, str]] | None = None
    prompt: str | None = None
    completion: str | None = None

    @property
    def where(self) -> str:
        """``source:line``, as error messages name it."""
        return f"{self.source}:{self.line}"


OnBad = Callable[[ValueError], None]  # told of a record that cannot be used


def read_records(paths: str | Path | Sequence[str | Path], on_bad: OnBad | None = None) -> list[Record]:
    """Read all records of one or more files, directories (searched with their subdirectories) or hub data set ids.

    A string that is no existing path and looks like ``org/name`` is loaded with ``datasets.load_dataset`` (its train
    split). The order is that of the arguments, then of the sorted file names, then of the lines.

    Args:
        paths: what to read.
        on_bad: called with the error of every line that is no usable record, which is then left out; None to refuse the file.

    Raises:
        FileNotFoundError: a path does not exist, a directory holds no data file, a hub data set cannot be loaded.
        ValueError: a file is not UTF-8, malformed, empty, of an unknown type, or mixes kinds of record.
    """
    entries = [paths] if isinstance(paths, (str, Path)) else list(paths)
    if not entries:
        raise ValueError("no data files given")
    return [record for entry in entries for record in _read_entry(entry, on_bad)]


def _read_entry(entry: str | Path, on_bad: OnBad | None) -> list[Record]:
    path = Path(entry).expanduser()
    if not str(entry):
        raise FileNotFoundError("the data path is empty; name a file, a directory or a hub data set")
    if path.is_dir():
        return [record for file in _data_files(path) for record in _read_file(file, on_bad)]
    if path.exists():
        return _read_file(path, on_bad)
    if isinstance(entry, str) and _looks_like_hub_id(entry):
        return _read_hub(entry, on_bad)
    raise FileNotFoundError(f"{entry}: no such file or directory")


def _data_files(directory: Path) -> list[Path]:
    """Data files below a directory, sorted; hidden files and folders (``.git``, ``.cache``) are not data."""
    found = [
        path
        for path in sorted(directory.rglob("*"))
        if path.suffix.lower() in TEXT_SUFFIXES + JSON_SUFFIXES
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(directory).parts)
    ]
    if not found:
        raise FileNotFoundError(f"{directory}: holds no {', '.join(TEXT_SUFFIXES + JSON_SUFFIXES)} file")
    return found


def _read_file(path: Path, on_bad: OnBad | None) -> list[Record]:
    suffix = path.suffix.lower()
    if suffix in TEXT_SUFFIXES:
        records = _read_text(path)
    elif suffix in JSON_SUFFIXES:
        records = _records_of(str(path), _json_rows(path), on_bad)
    else:
        known = ", ".join(TEXT_SUFFIXES + JSON_SUFFIXES)
        raise ValueError(f"{path}: unknown file type {path.suffix!r}; data files end in {known}")
    logger.info("%s: %d records", path, len(records))
    return records


def _read_text(path: Path) -> list[Record]:
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise _not_utf8(f"{path}:{line}", raw, error.start, error.start) from None
    text = text.removeprefix("\ufeff").replace("\r\n", "\n")
    if not text.strip():
        raise ValueError(f"{path}: no records (the file is empty)")
    return [Record(str(path), 1, text=text)]


def _json_rows(path: Path) -> Iterator[tuple[int, dict[str, Any] | ValueError]]:
    """(line number, object, or what is wrong with it) of every line that is not blank."""
    offset = 0
    # Binary lines end at \n alone; text mode and splitlines() would also cut at characters that JSON allows in strings.
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            try:
                line = raw.decode("utf-8")
                line = (line.removeprefix("\ufeff") if number == 1 else line).strip()
                if line:
                    yield number, _json_object(line, f"{path}:{number}")
            except UnicodeDecodeError as error:
                yield number, _not_utf8(f"{path}:{number}", raw, error.start, offset + error.start)
            except ValueError as error:
                yield number, error
            offset += len(raw)


def _not_utf8(where: str, raw: bytes, index: int, offset: int) -> ValueError:
    utf16 = offset < 2 and raw[:2] in (b"\xff\xfe", b"\xfe\xff")
    hint = "it looks like UTF-16; " if utf16 else ""
    return ValueError(f"{where}: byte {offset} (0x{raw[index]:02x}) is not valid UTF-8; {hint}save the file as UTF-8")


def _json_object(line: str, where: str) -> dict[str, Any]:
    if line.startswith("["):
        raise ValueError(
            f"{where}: a JSON array, but every line must be one object; convert it: jq -c '.[]' old.json > new.jsonl"
        )
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{where}: malformed JSON at column {error.colno} ({error.msg}); every line must be one whole JSON object"
        ) from None
    except (ValueError, RecursionError) as error:  # a number of 5000 digits, nesting of 1000 levels
        raise ValueError(f"{where}: JSON that cannot be read ({error}); correct or remove the line") from None
    if not isinstance(row, dict):
        raise ValueError(f"{where}: {_type_name(row)} instead of a JSON object; {_WANTED}")
    return row


def _records_of(
    source: str, rows: Iterable[tuple[int, dict[str, Any] | ValueError]], on_bad: OnBad | None
) -> list[Record]:
    """The records of one source, which must all be of the first one's kind."""
    records: list[Record] = []
    ignored: set[str] = set()
    first_kind, num_bad = "", 0
    for line, row in rows:
        where = f"{source}:{line}"
        try:
            if isinstance(row, ValueError):
                raise row
            kind = _kind_of(row, where)
            if first_kind and kind != first_kind:
                raise ValueError(
                    f"{where}: a {kind!r} record in a file that began with {first_kind!r} (line {records[0].line}); "
                    "put each kind into a file of its own"
                )
            records.append(_record(row, kind, source, line))
        except ValueError as error:
            if on_bad is None:
                raise
            on_bad(error)
            num_bad += 1
            continue
        first_kind = kind
        ignored.update(key for key, value in row.items() if key not in KINDS[kind] and value is not None)
    if not records:
        raise ValueError(f"{source}: no records ({f'all {num_bad} lines are bad' if num_bad else 'the file is empty'})")
    if ignored:
        logger.warning("%s: ignoring the keys %s", source, _shown(sorted(ignored)))
    return records


def _kind_of(row: dict[str, Any], where: str) -> str:
    # A key whose value is null counts as absent: tables written by column have null for what another row has.
    present = {key for key, value in row.items() if value is not None}
    kinds = [kind for kind, keys in KINDS.items() if present.issuperset(keys)]
    if len(kinds) == 1:
        return kinds[0]
    if kinds:
        raise ValueError(f"{where}: has {' and '.join(map(repr, kinds))} at once; keep one of them")
    for key in _KNOWN_KEYS:
        if key in row and key not in present:
            wanted = "a list of messages" if key == "messages" else "a string"
            raise ValueError(f"{where}: {key!r} is null, it must be {wanted}; correct or remove the line")
    for key, other in (("prompt", "completion"), ("completion", "prompt")):
        if key in present:
            raise ValueError(f"{where}: has {key!r} but no {other!r}{_hint(row, (other,))}; {_WANTED}")
    if not row:
        raise ValueError(f"{where}: an object without keys; {_WANTED}")
    raise ValueError(f"{where}: unknown keys {_shown(list(row))}{_hint(row, _KNOWN_KEYS)}; {_WANTED}")


def _record(row: dict[str, Any], kind: str, source: str, line: int) -> Record:
    where = f"{source}:{line}"
    if kind == "messages":
        return Record(source, line, messages=_messages(row["messages"], where))
    text, prompt, completion = (
        _string(row[key], repr(key), where) if key in KINDS[kind] else None for key in ("text", "prompt", "completion")
    )
    return Record(source, line, text=text, prompt=prompt, completion=completion)


def _messages(value: Any, where: str) -> list[dict[str, str]]:
    if not isinstance(value, list):
        raise ValueError(f"{where}: 'messages' is {_type_name(value)}, it must be a list of {{role, content}} objects")
    messages = [_message(item, f"messages[{index}]", where) for index, item in enumerate(value)]
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        raise ValueError(f"{where}: the conversation has no assistant turn, so there is nothing to learn; remove it")
    if roles[0] == "assistant":
        raise ValueError(f"{where}: the conversation starts with an assistant turn; put the user's turn before it")
    return messages


def _message(item: Any, name: str, where: str) -> dict[str, str]:
    wanted = "a message has 'role' and 'content'"
    if not isinstance(item, dict):
        raise ValueError(f"{where}: {name} is {_type_name(item)} instead of an object; {wanted}")
    for key in ("role", "content"):
        if key not in item:
            raise ValueError(f"{where}: {name} has no {key!r}{_hint(item, (key,))}; {wanted}")
    # Stricter than for a record: tool calls or images left out in silence would change what the model is taught.
    extra = [key for key, entry in item.items() if key not in ("role", "content") and entry is not None]
    if extra:
        raise ValueError(f"{where}: {name} has unknown keys {_shown(extra)}; {wanted} and nothing else")
    role = item["role"]
    if role not in ROLES:
        raise ValueError(f"{where}: {name} has the unknown role {role!r}; roles are {', '.join(ROLES)}")
    return {"role": role, "content": _string(item["content"], f"{name} content", where)}


def _string(value: Any, name: str, where: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where}: {name} is {_type_name(value)}, it must be a string; correct or remove the line")
    if not value.strip():
        raise ValueError(f"{where}: {name} is an empty string; correct or remove the line")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where}: {name} has half a surrogate pair at character {error.start}; correct or remove the line"
        ) from None
    return value


def _type_name(value: Any) -> str:
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object"}
    return "null" if value is None else names.get(type(value), f"a {type(value).__name__}")


def _shown(keys: list[str], limit: int = 6) -> str:
    shown = [repr(key if len(key) <= 60 else f"{key[:60]}...") for key in keys[:limit]]
    return ", ".join(shown) + (", ..." if len(keys) > limit else "")


def _hint(row: dict[str, Any], wanted: Sequence[str]) -> str:
    """`` (is 'txt' meant to be 'text'?)`` when one of the row's keys is nearly a wanted one, else nothing."""
    for key in row:
        close = difflib.get_close_matches(str(key).lower(), wanted, n=1, cutoff=0.7)
        if key not in wanted and close:
            return f" (is {key!r} meant to be {close[0]!r}?)"
    return ""


def _looks_like_hub_id(name: str) -> bool:
    """``org/name``, unless it is more likely a mistyped path: a data file's name, or inside an existing directory."""
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) is None:
        return False
    return Path(name).suffix.lower() not in TEXT_SUFFIXES + JSON_SUFFIXES and not Path(name).parent.is_dir()


def _read_hub(name: str, on_bad: OnBad | None) -> list[Record]:
    import datasets  # takes seconds, and most users read files

    try:
        rows = datasets.load_dataset(name, split="train")
    except Exception as error:  # datasets, huggingface_hub and requests each raise families of their own
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise FileNotFoundError(
            f"{name}: neither an existing path nor a data set that the hub gave ({type(error).__name__}: {reason})"
        ) from error
    return _records_of(name, enumerate(rows, start=1), on_bad)
