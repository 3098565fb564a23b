"""What is fuzzed: every parser of something that a user or the internet may hand in. Each may raise only what is for the user."""

import argparse
import csv
import io
import json
import os
import shutil
from pathlib import Path

from hypothesis import strategies as st

from lowtide.cli.arguments import UsageError, build_from_arguments
from lowtide.data import read_records
from lowtide.models import load_config, load_model, load_tokenizer
from lowtide.models.gguf_header import read_header
from lowtide.training.checkpoint import read_checkpoint
from lowtide.training.config import TrainConfig

FOR_USERS = (ValueError, FileNotFoundError, PermissionError)  # one line each; UsageError is a ValueError

# Strings that break things: control characters, half surrogates, right-to-left marks, byte order marks, line separators.
text = st.text(max_size=20) | st.sampled_from(
    ["", "\x00", "\ud800", "\u2028", "\ufeff", "\u202e", "a" * 5000, "..", "/etc/passwd", "../x"]
)
keys = (
    st.sampled_from(["text", "messages", "prompt", "completion", "role", "content", "Text", "id", ""])
    | st.sampled_from(["instruction", "input", "output", "conversations", "from", "value", "data", "train", "history"])
    | text
)
numbers = st.integers() | st.floats() | st.sampled_from([0, -1, 2**31, 2**63, 10**400, 1e308])
json_values = st.recursive(
    st.none() | st.booleans() | numbers | text,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=4),
    max_leaves=12,
)
messages = st.lists(
    st.dictionaries(
        st.sampled_from(["role", "content", "name"]),
        st.sampled_from(["system", "user", "assistant", "tool", ""]) | json_values,
        max_size=3,
    ),
    max_size=4,
)
turns = st.lists(
    st.dictionaries(
        st.sampled_from(["from", "value", "weight"]),
        st.sampled_from(["human", "gpt", "system", ""]) | json_values,
        max_size=3,
    ),
    max_size=4,
)
records = st.fixed_dictionaries(
    {},
    optional={
        "text": json_values,
        "messages": messages | json_values,
        "prompt": json_values,
        "completion": json_values,
        "id": json_values,
        "instruction": json_values,
        "input": json_values,
        "output": json_values,
        "conversations": turns | json_values,
        "system": json_values,
    },
)


def as_bytes(value):
    """JSON as Python writes it, NaN and half surrogates included."""
    try:
        return json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")
    except ValueError:  # an integer of too many digits
        return b"1" * 5000


def as_text(value):
    return as_bytes(value).decode("utf-8", "surrogatepass")


@st.composite
def mangled(draw, original):
    """Bytes of a good file, with some cut out, doubled, overwritten or put in."""
    data = bytearray(draw(original) if isinstance(original, st.SearchStrategy) else original)
    for _ in range(draw(st.integers(1, 4))):
        place, length = draw(st.integers(0, max(0, len(data) - 1))), draw(st.integers(0, 16))
        what = draw(st.sampled_from(["cut", "put", "set", "double", "end"]))
        if what == "cut":
            del data[place : place + length]
        elif what == "put":
            data[place:place] = draw(st.binary(max_size=16))
        elif what == "set" and data:
            data[place] = draw(st.sampled_from([0, 1, 0x7F, 0x80, 0xFF, 0x22, 0x7B]))
        elif what == "double":
            data[place:place] = data[place : place + length]
        elif what == "end":
            del data[place:]
    return bytes(data)


lines = st.lists(records.map(as_bytes) | json_values.map(as_bytes) | st.binary(max_size=60), max_size=6)
record_files = (
    lines.map(b"\n".join) | lines.map(b"\r\n".join) | mangled(lines.map(b"\n".join)) | st.binary(max_size=300)
)

whole = st.lists(records, max_size=4).map(as_bytes) | st.dictionaries(
    keys, st.lists(records, max_size=3), max_size=2
).map(as_bytes)
whole_files = whole | mangled(whole)


def _table(rows, delimiter=","):
    """CSV whose header and cells are anything at all."""
    file = io.StringIO(newline="")
    csv.writer(file, delimiter=delimiter).writerows(rows)
    return file.getvalue().encode("utf-8", "surrogatepass")


cells = text | records.map(as_text) | st.lists(json_values, max_size=2).map(as_text)
tables = st.builds(
    lambda header, rows: _table([header, *rows]),
    st.lists(keys, min_size=1, max_size=3) | st.sampled_from([["prompt", "completion"], ["text"], ["messages"]]),
    st.lists(st.lists(cells, min_size=1, max_size=3), max_size=4),
)
table_files = tables | mangled(tables)


def parquet_bytes(rows):
    """Parquet of whatever rows one can be made of, else of texts."""
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.Table.from_pylist(rows)
        table = table if table.num_columns else pyarrow.table({"text": ["a", None]})
        file = io.BytesIO()
        pyarrow.parquet.write_table(table, file)
    except (pyarrow.ArrowException, OverflowError, UnicodeEncodeError):
        return parquet_bytes([{"text": "a"}, {"text": "b"}])
    return file.getvalue()


parquets = st.lists(records, min_size=1, max_size=3).map(parquet_bytes)
parquet_files = parquets | mangled(parquets)

settings_of_run = st.dictionaries(
    st.sampled_from(
        [
            "model",
            "data",
            "output",
            "lr",
            "max_steps",
            "batch_size",
            "save_every",
            "resume",
            "weights",
            "clip_memory",
            "packing",
        ]
    )
    | text,
    json_values | st.sampled_from(["1e-3", "15m", "2GiB", "auto"]),
    max_size=5,
)
GOOD_CONFIG = b"model: m\ndata: [a.jsonl]\noutput: out\nlr: 1.0e-3\nmax_steps: 200\nsave_every: 15m\n"
config_files = (
    settings_of_run.map(as_bytes)
    | mangled(settings_of_run.map(as_bytes))
    | mangled(GOOD_CONFIG)
    | st.binary(max_size=200)
)


def try_records(folder: Path, data: bytes, suffix: str = ".jsonl") -> None:
    """Read a file of records, refusing and skipping bad ones."""
    path = folder / f"data{suffix}"
    path.write_bytes(data)
    bad = []
    for on_bad in (None, bad.append):
        try:
            found = read_records(path, on_bad)
        except ValueError as error:
            assert str(path) in str(error), f"the message does not name the file: {error}"
            assert "\n" not in str(error).replace(str(data), ""), f"more than a line: {error}"
            continue
        for record in found:
            (record.text or record.prompt or record.messages[0]["content"]).encode("utf-8")
    assert all(str(error).startswith(str(path)) for error in bad)


def try_config(folder: Path, data: bytes, suffix: str = ".yaml") -> None:
    """Read a config file and make settings of it."""
    path = folder / f"run{suffix}"
    path.write_bytes(data)
    try:
        build_from_arguments(TrainConfig, argparse.Namespace(config=str(path))).validate()
    except UsageError as error:
        assert str(error)
    except ValueError as error:
        assert str(error)


def try_gguf(folder: Path, data: bytes) -> None:
    """Read the header of a GGUF file, the config of its model, its tokenizer and its weights."""
    path = folder / "model.gguf"
    path.write_bytes(data)
    for read in (read_header, load_config, load_tokenizer, load_model):
        try:
            read(path)
        except (*FOR_USERS, MemoryError) as error:
            assert str(error)


def try_model(folder: Path, good: Path, name: str, data: bytes) -> None:
    """Load a model one of whose files is not what it was, in both ways."""
    directory = folder / "model"
    shutil.rmtree(directory, ignore_errors=True)
    shutil.copytree(good, directory)
    (directory / name).write_bytes(data)
    for lazy in (False, True):
        try:
            load_model(str(directory), lazy=lazy)
        except (*FOR_USERS, MemoryError) as error:
            assert str(error)


def try_checkpoint(folder: Path, good: Path, name: str, data: bytes) -> None:
    """Read a checkpoint one of whose files is not what it was: never used if it is not."""
    directory = folder / "step-00000002"
    shutil.rmtree(directory, ignore_errors=True)
    shutil.copytree(good, directory)
    changed = (good / name).read_bytes() != data
    (directory / name).write_bytes(data)
    try:
        read_checkpoint(directory)
    except FOR_USERS as error:
        assert str(error)
        return
    assert not changed or os.path.basename(name) == "manifest.json", "a changed file was accepted"
