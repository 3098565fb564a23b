"""Writers of data files of every type, and the same rows in every format."""

import csv
import json

import pyarrow
import pyarrow.parquet

LIST_KEYS = ("messages", "conversations", "conversation")

# Two rows of each format, with what breaks careless parsers: quotes, commas, newlines, characters of many bytes.
ROWS = {
    "text": [{"text": 'She said "no",\nthen\tyes.'}, {"text": "größer, 東京 \U0001f600"}],
    "messages": [
        {"messages": [{"role": "user", "content": 'Say "a,b"\n\nnow'}, {"role": "assistant", "content": "a,b"}]},
        {
            "messages": [
                {"role": "system", "content": "Decide."},
                {"role": "user", "content": "größer?"},
                {"role": "assistant", "content": "東京"},
                {"role": "user", "content": "Sure?"},
                {"role": "assistant", "content": "yes"},
            ]
        },
    ],
    "prompt/completion": [
        {"prompt": 'Say "a,b"\nnow:', "completion": " a,b\n"},
        {"prompt": "größer?", "completion": "東京"},
    ],
    "alpaca": [
        {"instruction": 'Join "x",\nthen stop.', "input": "a, b", "output": "ab"},
        {"instruction": "größer?", "input": "", "output": "東京"},
    ],
    "sharegpt": [
        {"conversations": [{"from": "human", "value": 'Say "a,b"\n\nnow'}, {"from": "gpt", "value": "a,b"}]},
        {
            "conversations": [
                {"from": "system", "value": "Decide."},
                {"from": "human", "value": "größer?"},
                {"from": "gpt", "value": "東京"},
                {"from": "human", "value": "Sure?"},
                {"from": "gpt", "value": "yes"},
            ]
        },
    ],
}


def _json_lines(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def _array(path, rows):
    path.write_text(json.dumps(rows, ensure_ascii=False, indent=1), encoding="utf-8")


def _array_in_a_line(path, rows):
    path.write_text(json.dumps(rows), encoding="utf-8")


def _object(path, rows):
    path.write_text(json.dumps({"data": rows}, indent=2), encoding="utf-8")


def _object_in_a_line(path, rows):
    path.write_text(json.dumps({"version": "1", "train": rows}), encoding="utf-8")


def _object_a_line(path, rows):
    """An object that is written by hand: its list begins on the first line."""
    lines = ",\n".join(json.dumps(row) for row in rows)
    path.write_text('{"data": [\n' + lines + "\n]}\n", encoding="utf-8")


def cell(key, value):
    return json.dumps(value, ensure_ascii=False) if key in LIST_KEYS and value is not None else value


def _table(path, rows):
    keys = list(dict.fromkeys(key for row in rows for key in row))
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, keys, delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows({key: cell(key, value) for key, value in row.items()} for row in rows)


def _parquet(path, rows):
    keys = dict.fromkeys(key for row in rows for key in row)  # from_pylist looks at the first row only
    table = pyarrow.Table.from_pylist([{key: row.get(key) for key in keys} for row in rows])
    pyarrow.parquet.write_table(table, path)


# kind of file -> (suffix, its type as it is reported, writer)
KINDS = {
    "json lines": (".jsonl", "JSON Lines", _json_lines),
    "json lines named .json": (".json", "JSON Lines", _json_lines),
    "array": (".json", "JSON", _array),
    "array in a line": (".json", "JSON", _array_in_a_line),
    "object": (".json", "JSON", _object),
    "object in a line": (".json", "JSON", _object_in_a_line),
    "object of lines": (".json", "JSON", _object_a_line),
    "csv": (".csv", "CSV", _table),
    "tsv": (".tsv", "TSV", _table),
    "parquet": (".parquet", "Parquet", _parquet),
}
FOUR = ("json lines", "array", "csv", "parquet")


def write(kind, path, rows):
    """Write rows as a kind of file; returns its path, which has got the suffix."""
    suffix, _, writer = KINDS[kind]
    path = path.with_suffix(suffix)
    writer(path, rows)
    return path
