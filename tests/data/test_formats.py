"""Five formats in every type of file, and what is said of broken ones."""

import dataclasses
import json
import logging
import sys
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from lowtide.data import Record, read_records, read_sources

sys.path.insert(0, str(Path(__file__).parent))
from data_files import FOUR, KINDS, ROWS, write

USER, ASSISTANT = ({"role": role, "content": "x"} for role in ("user", "assistant"))
HUMAN, GPT = ({"from": role, "value": "x"} for role in ("human", "gpt"))

CONTENTS = {
    "text": [{"text": row["text"]} for row in ROWS["text"]],
    "messages": [{"messages": row["messages"]} for row in ROWS["messages"]],
    "prompt/completion": ROWS["prompt/completion"],
    "alpaca": [
        {
            "messages": [
                {"role": "user", "content": 'Join "x",\nthen stop.\n\na, b'},
                {"role": "assistant", "content": "ab"},
            ],
            "instruction": ('Join "x",\nthen stop.', "a, b"),
        },
        {
            "messages": [{"role": "user", "content": "größer?"}, {"role": "assistant", "content": "東京"}],
            "instruction": ("größer?", ""),
        },
    ],
    "sharegpt": [{"messages": row["messages"]} for row in ROWS["messages"]],
}


def contents(records):
    """What records teach, without where they come from."""
    return [dataclasses.replace(record, source="", line=None, row=None) for record in records]


def refusal(path):
    with pytest.raises(ValueError) as caught:
        read_records(path)
    message = str(caught.value)
    assert message.startswith(f"{path}:")
    assert "\n" not in message
    return message.removeprefix(str(path))


def write_line(tmp_path, row):
    return write("json lines", tmp_path / "r", [row])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("format", ROWS)
def test_every_format_in_every_type_of_file(tmp_path, format, kind):
    path = write(kind, tmp_path / "r", ROWS[format])
    (source,) = read_sources(path)
    assert contents(source.records) == [Record("", None, **content) for content in CONTENTS[format]]
    assert (source.name, source.format, source.file_type) == (str(path), format, KINDS[kind][1])


@pytest.mark.parametrize("kind", FOUR)
def test_what_was_detected_is_logged(tmp_path, caplog, kind):
    path = write(kind, tmp_path / "r", ROWS["sharegpt"])
    with caplog.at_level(logging.INFO, "lowtide"):
        read_records(path)
    assert [record.getMessage() for record in caplog.records] == [f"{path}: sharegpt ({KINDS[kind][1]}), 2 records"]


@pytest.mark.parametrize(
    ("kind", "places"),
    [
        ("json lines", (":1", ":2")),
        ("array", (": row 1", ": row 2")),
        ("csv", (":2 (row 1)", ":4 (row 2)")),
        ("parquet", (": row 1", ": row 2")),
    ],
)
def test_where_a_record_is(tmp_path, kind, places):
    path = write(kind, tmp_path / "r", ROWS["alpaca"])  # the first one's instruction has a newline
    assert [record.where for record in read_records(path)] == [f"{path}{place}" for place in places]


# Three broken variants of every format in every type of file: broken syntax, a wrong value, a misspelt key --------------

CUT_OFF = {
    "json lines": (":2: malformed JSON at column ", "every line must be one whole JSON object"),
    "array": (": malformed JSON at column ", "the file must be one whole JSON array of objects"),
    "csv": ("malformed CSV in the row that begins here", "put quotes around a cell with quotes"),
    "parquet": (": a Parquet file that cannot be read (", "write or download it anew"),
}


@pytest.mark.parametrize("kind", FOUR)
@pytest.mark.parametrize("format", ROWS)
def test_a_file_that_is_cut_off(tmp_path, format, kind):
    path = write(kind, tmp_path / "r", ROWS[format])
    raw = path.read_bytes()
    if kind == "csv":  # the opening quote of the last row's last cell is there, its closing one is not
        raw = raw.rstrip().rstrip(b'"').rpartition(b"\n")[0] + b'\n"open, and'
    path.write_bytes(raw[:-3])
    message = refusal(path)
    assert all(part in message for part in CUT_OFF[kind])
    if kind != "parquet":
        last = path.read_bytes().count(b"\n") + 1
        assert message.startswith(f":{last}: malformed")
    bad = []
    if kind == "json lines":
        assert len(read_records(path, bad.append)) == len(bad) == 1
    else:  # nobody knows where the next record begins
        with pytest.raises(ValueError, match="malformed CSV|malformed JSON|cannot be read"):
            read_records(path, bad.append)


# A second row and what is said of it; in a table of text the same value cannot be written, so another one is.
WRONG_VALUES = {
    "text": ({"text": 7}, "'text' is a number, it must be a string"),
    "messages": (
        {"messages": [USER, {"role": "asistant", "content": "b"}]},
        "messages[1] has the unknown role 'asistant' (is it meant to be 'assistant'?); roles are system, user, assistant",
    ),
    "prompt/completion": ({"prompt": "p", "completion": ["c"]}, "'completion' is a list, it must be a string"),
    "alpaca": ({"instruction": "i", "input": 3, "output": "o"}, "'input' is a number, it must be a string"),
    "sharegpt": (
        {"conversations": [HUMAN, {"from": "gtp", "value": "b"}]},
        "conversations[1] has the unknown role 'gtp' (is it meant to be 'gpt'?); roles are human, gpt, system",
    ),
}
WRONG_CELLS = {
    "text": ({"text": ""}, "'text' is an empty string"),
    "prompt/completion": ({"prompt": "p", "completion": ""}, "'completion' is an empty string"),
    "alpaca": ({"instruction": "", "input": "3", "output": "o"}, "'instruction' is an empty string"),
}


@pytest.mark.parametrize("kind", FOUR)
@pytest.mark.parametrize("format", ROWS)
def test_a_wrong_value(tmp_path, format, kind):
    wrong, says = (WRONG_CELLS if kind == "csv" else {}).get(format, WRONG_VALUES[format])
    good = ROWS[format][0]
    if kind == "parquet" and format not in ("messages", "sharegpt"):
        good = wrong  # a column has one type
    path = write(kind, tmp_path / "r", [good, wrong] if kind == "csv" else [good, wrong, good])
    row = 1 if good is wrong else 2
    line = path.read_bytes().count(b"\n") if kind == "csv" else 2
    place = {"json lines": ":2: ", "csv": f":{line} (row 2): "}.get(kind, f": row {row}: ")
    assert refusal(path).startswith(place + says)
    if row == 2:
        bad = []
        assert len(read_records(path, bad.append)) == (1 if kind == "csv" else 2)
        assert [str(error).startswith(f"{path}{place}{says}") for error in bad] == [True]


MISSPELT = {
    "text": ({"txt": "a"}, "unknown keys 'txt' (is 'txt' meant to be 'text'?)"),
    "messages": ({"mesages": [USER, ASSISTANT]}, "unknown keys 'mesages' (is 'mesages' meant to be 'messages'?)"),
    "prompt/completion": (
        {"prompt": "p", "compleation": "c"},
        "has 'prompt' but no 'completion' (is 'compleation' meant to be 'completion'?)",
    ),
    "alpaca": (
        {"instruction": "i", "input": "x", "ouput": "o"},
        "has 'instruction' but no 'output' (is 'ouput' meant to be 'output'?)",
    ),
    "sharegpt": (
        {"convesations": [HUMAN, GPT]},
        "unknown keys 'convesations' (is 'convesations' meant to be 'conversations'?)",
    ),
}


@pytest.mark.parametrize("kind", FOUR)
@pytest.mark.parametrize("format", ROWS)
def test_a_misspelt_key(tmp_path, format, kind):
    wrong, says = MISSPELT[format]
    table = kind in ("csv", "parquet")
    path = write(kind, tmp_path / "r", [wrong, wrong] if table else [ROWS[format][0], wrong])
    place = {
        "json lines": ":2: ",
        "array": ": row 2: ",
        "csv": ":1: the first line must be a header: ",
        "parquet": ": ",
    }[kind]
    message = refusal(path)
    assert message.startswith(place + says)
    assert message.endswith("'instruction' and 'output' (alpaca), or 'conversations' (sharegpt)")


@pytest.mark.parametrize("kind", FOUR)
@pytest.mark.parametrize("format", ["messages", "sharegpt"])
def test_a_turn_without_one_of_its_keys(tmp_path, format, kind):
    key, turn_keys = ("messages", ("role", "content")) if format == "messages" else ("conversations", ("from", "value"))
    turns = [dict(zip(turn_keys, ("user", "x"), strict=True)), {turn_keys[0]: "assistant"}]
    path = write(kind, tmp_path / "r", [{key: turns}])
    missing = f"{key}[1] has no {turn_keys[1]!r}; a message has {turn_keys[0]!r} and {turn_keys[1]!r}"
    if kind == "parquet":  # there the key exists in every turn, with nothing in it
        missing = f"{key}[1] {turn_keys[1]} is null, it must be a string"
    assert missing in refusal(path)


# What holds of every type of file ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["json lines", "array", "object", "csv", "tsv"])
def test_a_byte_order_mark_is_no_part_of_the_data(tmp_path, kind):
    path = write(kind, tmp_path / "r", ROWS["alpaca"])
    before = contents(read_records(path))
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert contents(read_records(path)) == before


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("r.json", "[]"),
        ("r.json", '{"data": []}'),
        ("r.json", " [ ]\n"),
        ("r.json", ""),
        ("r.csv", ""),
        ("r.csv", "\n\n"),
        ("r.csv", "text\n"),
        ("r.tsv", "prompt\tcompletion\n"),
    ],
)
def test_an_empty_file(tmp_path, name, content):
    path = tmp_path / name
    path.write_text(content)
    assert refusal(path) == ": no records (the file is empty)"


def test_an_empty_parquet_file(tmp_path):
    path = tmp_path / "r.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), path)
    assert refusal(path) == ": no records (the file is empty)"
    path.write_bytes(b"")
    assert refusal(path).startswith(": a Parquet file that cannot be read (")


@pytest.mark.parametrize("kind", FOUR)
def test_two_formats_in_a_file(tmp_path, kind):
    path = write(kind, tmp_path / "r", [ROWS["text"][0], ROWS["alpaca"][0], ROWS["text"][1]])
    message = refusal(path)
    first = "line 1" if kind == "json lines" else "row 1"
    assert (
        f"a 'alpaca' record in a file that began with 'text' ({first}); put each kind into a file of its own" in message
    )
    bad = []
    assert [record.text for record in read_records(path, bad.append)] == [row["text"] for row in ROWS["text"]]
    assert len(bad) == 1


@pytest.mark.parametrize("kind", FOUR)
def test_rows_of_which_none_is_good(tmp_path, kind):
    path = write(kind, tmp_path / "r", [{"prompt": "p", "completion": " "}] * 2)
    noun, bad = "lines" if kind == "json lines" else "rows", []
    with pytest.raises(ValueError) as caught:
        read_records(path, bad.append)
    assert str(caught.value) == f"{path}: no records (all 2 {noun} are bad; the first: {bad[0]})"
    assert "'completion' is an empty string" in str(bad[0])


@pytest.mark.parametrize("kind", FOUR)
def test_other_columns_are_ignored_and_named(tmp_path, caplog, kind):
    path = write(kind, tmp_path / "r", [{"text": "a", "id": "1", "none": None}, {"text": "b", "id": "2", "none": None}])
    with caplog.at_level(logging.WARNING):
        assert [record.text for record in read_records(path)] == ["a", "b"]
    named = "'id', 'none'" if kind == "parquet" else "'id'"
    assert [record.getMessage() for record in caplog.records] == [f"{path}: ignoring the keys {named}"]


def test_a_directory_of_all_types(tmp_path):
    for index, kind in enumerate(KINDS):
        write(kind, tmp_path / f"{index}", [{"text": kind}])
    assert [record.text for record in read_records(tmp_path)] == list(KINDS)


# Formats -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "extra", [{}, {"input": None}, {"input": " \n"}, {"system": "", "history": []}, {"history": None}]
)
def test_an_alpaca_record_without_input(tmp_path, caplog, extra):
    row = {"instruction": "i", "output": "o", **extra}
    with caplog.at_level(logging.WARNING):
        (record,) = read_records(write_line(tmp_path, row))
    assert record.messages == [{"role": "user", "content": "i"}, {"role": "assistant", "content": "o"}]
    assert record.instruction == ("i", "")
    assert caplog.records == []


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        ({"system": "Be brief."}, "'system' has no place in an alpaca record; write the conversation as 'messages'"),
        ({"history": [["a", "b"]]}, "'history' has no place in an alpaca record; write the conversation as 'messages'"),
        ({"inputs": "x"}, "unknown key 'inputs' in an alpaca record (is it meant to be 'input'?)"),
        ({"Input": "x"}, "unknown key 'Input' in an alpaca record (is it meant to be 'input'?)"),
        ({"input": False}, "'input' is a boolean, it must be a string"),
        ({"input": ["x"]}, "'input' is a list, it must be a string"),
        ({"output": None}, "'output' is null, it must be a string"),
        ({"output": 3}, "'output' is a number, it must be a string"),
        ({"text": "i and something else"}, "has 'text' and 'alpaca' at once; keep one of them"),
        ({"text": "i", "output": ""}, "'output' is an empty string"),
        ({"prompt": "p", "completion": "c"}, "has 'prompt/completion' and 'alpaca' at once"),
    ],
)
def test_an_alpaca_record_that_cannot_be_expressed(tmp_path, extra, says):
    assert refusal(write_line(tmp_path, {"instruction": "i", "output": "o!", **extra})).startswith(f":1: {says}")


def test_a_misspelt_input_is_noticed_in_tables_too(tmp_path):
    rows = [{"instruction": "i", "inputs": "x", "output": "o"}]
    for kind in ("csv", "parquet"):
        path = write(kind, tmp_path / "r", rows)
        assert "unknown key 'inputs' in an alpaca record (is it meant to be 'input'?)" in refusal(path)


def test_alpaca_as_first_published_has_its_text_written_out_as_well(tmp_path, caplog):
    text = "Below is an instruction.\n\n### Instruction:\nAdd.\n\n### Response:\n3"
    path = write_line(tmp_path, {"instruction": "Add.", "input": "", "output": "3", "text": text})
    with caplog.at_level(logging.WARNING):
        (record,) = read_records(path)
    assert (record.instruction, record.text) == (("Add.", ""), None)
    assert [record.getMessage() for record in caplog.records] == [f"{path}: ignoring the keys 'text'"]


def test_sharegpt_in_its_spellings(tmp_path):
    messages = [USER, ASSISTANT, {"role": "tool", "content": "x"}, ASSISTANT]
    turns = [HUMAN, GPT, {"from": "tool", "value": "x"}, GPT]
    expected = [Record("", None, messages=messages)]
    for row in (
        {"conversations": turns},
        {"conversation": turns},
        {"conversations": [{"from": "user", "value": "x"}, {"from": "assistant", "value": "x"}, *turns[2:]]},
        {"conversations": [{**turn, "weight": None} for turn in turns], "tools": "[]"},
    ):
        assert contents(read_records(write_line(tmp_path, row))) == expected
    for row in (
        {"conversations": [USER, ASSISTANT, *messages[2:]]},
        {"conversations": [{"from": None, "value": None, **turn} for turn in messages]},
        {"conversations": [GPT, *turns]},
    ):
        assert read_records(write_line(tmp_path, row))[0].messages == messages
    with_system = {"conversations": [HUMAN, GPT], "system": "Be brief."}
    system = {"role": "system", "content": "Be brief."}
    assert read_records(write_line(tmp_path, with_system))[0].messages == [system, USER, ASSISTANT]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"conversations": [HUMAN, HUMAN, GPT]}, "two user turns follow one another (turns 1 and 2); join them"),
        ({"conversations": [HUMAN, GPT, GPT]}, "two assistant turns follow one another (turns 2 and 3); join them"),
        (
            {"conversations": [HUMAN, HUMAN, GPT], "system": "s"},
            "two user turns follow one another (turns 1 and 2); join them",
        ),
        ({"conversations": [GPT, HUMAN]}, "the conversation has no assistant turn behind a turn of another role"),
        ({"conversations": [GPT, HUMAN, HUMAN, GPT]}, "two user turns follow one another (turns 2 and 3); join them"),
        ({"conversations": [HUMAN]}, "the conversation has no assistant turn"),
        ({"conversations": []}, "the conversation has no assistant turn"),
        ({"conversations": "hi"}, "'conversations' is a string and malformed JSON at character 1 (Expecting value)"),
        ({"conversations": '"hi"'}, "'conversations' is a string, it must be a list of {from, value} objects"),
        ({"conversations": 7}, "'conversations' is a number, it must be a list of {from, value} objects"),
        ({"conversations": ["hi"]}, "conversations[0] is a string instead of an object"),
        ({"conversation": [{"content": "x"}]}, "conversation[0] has no 'from'"),
        ({"conversation": [USER, GPT]}, "conversation[1] has no 'role'"),
        ({"conversations": [{**HUMAN, "loss": 0}, GPT]}, "conversations[0] has unknown keys 'loss'"),
        ({"conversations": [HUMAN, {"from": None, "value": "x"}]}, "conversations[1] has the unknown role None"),
        ({"conversations": [HUMAN, {"from": "gpt", "value": 1}]}, "conversations[1] value is a number"),
        ({"conversations": None}, "'conversations' is null, it must be a list of messages"),
        (
            {"conversations": [HUMAN, GPT], "conversation": [HUMAN, GPT]},
            "has 'conversations' and 'conversation' at once",
        ),
        ({"conversations": [HUMAN, GPT], "tools": "[{}]"}, "'tools' cannot be expressed"),
        ({"conversations": [HUMAN, GPT], "system": 1}, "'system' is a number, it must be a string"),
        (
            {"conversations": [{"from": "system", "value": "x"}, HUMAN, GPT], "system": "y"},
            "has a 'system' prompt and conversations[0] is another; keep one of them",
        ),
    ],
)
def test_a_sharegpt_record_that_cannot_be_expressed(tmp_path, row, says):
    assert refusal(write_line(tmp_path, row)).startswith(f":1: {says}")


@pytest.mark.parametrize("kind", ["json lines", "array", "parquet"])
@pytest.mark.parametrize("format", ["messages", "sharegpt"])
def test_a_conversation_that_is_json_in_a_string(tmp_path, format, kind):
    rows = [{key: json.dumps(turns) for key, turns in row.items()} for row in ROWS[format]]
    path = write(kind, tmp_path / "r", rows)
    assert [record.messages for record in read_records(path)] == [row["messages"] for row in ROWS["messages"]]


def test_turns_of_weight_0_survive_what_the_demo_writes(tmp_path):
    from lowtide.cli.demo_material import _row

    messages = [USER, {**ASSISTANT, "weight": 0}, {**USER, "name": "ann"}, ASSISTANT]
    (record,) = read_records(write_line(tmp_path, {"messages": messages}))
    (again,) = read_records(write_line(tmp_path, _row(record)))
    assert again.messages == record.messages == messages


def test_a_hub_data_set_in_alpacas_format(monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: datasets.Dataset.from_list(ROWS["alpaca"]))
    (source,) = read_sources("org/alpaca")
    assert (source.format, source.file_type) == ("alpaca", "hub data set")
    assert contents(source.records) == [Record("", None, **content) for content in CONTENTS["alpaca"]]
    assert source.records[1].where == "org/alpaca: row 2"


# JSON in one piece -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (
            '[{"text": "a"},\n {"text": "b"}\n {"text": "c"}]',
            ":3: malformed JSON at column 2 (Expecting ',' delimiter)",
        ),
        ('{"data": [\n{"text": "a"},\n{"text": }\n]}', ":3: malformed JSON at column 10"),
        ('[{"text": "a"}, "b"]', ": row 2: a string instead of a JSON object"),
        ("[1]", ": row 1: a number instead of a JSON object"),
        ('[[{"text": "a"}]]', ": row 1: a list instead of a JSON object"),
        ('{\n"rows": [{"text": "a"}]\n}', ":1: an object without a list under 'data' or 'train'; write an array"),
        (
            '{\n"dta": [{"text": "a"}]\n}',
            ":1: an object without a list under 'data' or 'train' (is 'dta' meant to be 'data'?)",
        ),
        ('{\n"data": {"text": "a"}\n}', ":1: an object without a list under 'data' or 'train'"),
        ('{"data": [{"text": "a"}], "train": []}', ":1: an object with lists under 'data' and 'train' at once"),
        ("[" * 100_000, ": JSON that cannot be read"),
        ('[{"text": "a"}]\n[{"text": "b"}]\n', ":2: malformed JSON at column 1 (Extra data)"),
    ],
)
def test_json_in_one_piece_that_is_wrong(tmp_path, content, says):
    path = tmp_path / "r.json"
    path.write_text(content)
    assert refusal(path).startswith(says)


def test_json_in_one_piece_that_is_not_utf8(tmp_path):
    path = tmp_path / "r.json"
    path.write_bytes(b'[{"text": "a"},\n{"text": "\xff"}]')
    assert refusal(path).startswith(":2: byte 26 (0xff) is not valid UTF-8")
    path.write_text('[{"text": "a"}]', encoding="utf-16")
    assert "it looks like UTF-16; save the file as UTF-8" in refusal(path)


def test_bad_items_of_an_array_can_be_skipped(tmp_path):
    path = tmp_path / "r.json"
    path.write_text('[{"text": "a"}, 3, {"txt": "b"}, {"text": "c"}]')
    bad = []
    assert [(record.row, record.text) for record in read_records(path, bad.append)] == [(1, "a"), (4, "c")]
    assert [str(error).split(": ")[1] for error in bad] == ["row 2", "row 3"]


def test_other_keys_beside_the_list_are_named(tmp_path, caplog):
    path = tmp_path / "r.json"
    path.write_text('{"train": [{"text": "a"}], "test": [{"text": "b"}]}')
    with caplog.at_level(logging.WARNING):
        assert [record.text for record in read_records(path)] == ["a"]
    assert caplog.records[0].getMessage() == f"{path}: reading the list under 'train', ignoring the keys 'test'"


def test_one_object_in_a_line_is_a_record(tmp_path):
    path = tmp_path / "r.json"
    path.write_text('{"text": "a"}')
    assert [record.text for record in read_records(path)] == ["a"]


def test_a_broken_first_line_does_not_make_json_lines_one_document(tmp_path):
    path = tmp_path / "r.json"
    path.write_text('{"text": "a"\n{"text": "b"}\n')
    assert refusal(path).startswith(":1: malformed JSON at column 13")
    assert [record.text for record in read_records(path, lambda error: None)] == ["b"]


def test_an_array_in_a_jsonl_file_is_told_apart(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text('[{"text": "a"}]')
    assert refusal(path).endswith("or name the file .json if it is one array")


# CSV ---------------------------------------------------------------------------------------------------------------------


def write_csv(tmp_path, content, name="r.csv"):
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_cells_with_quotes_commas_and_newlines(tmp_path):
    path = write_csv(tmp_path, 'prompt , completion\r\n\r\n"a ""b"", c\nd",e\r\n\r\n"f\r\n\r\ng", h \r\n')
    assert [(record.line, record.row, record.prompt, record.completion) for record in read_records(path)] == [
        (3, 1, 'a "b", c\nd', "e"),
        (6, 2, "f\r\n\r\ng", " h "),
    ]


def test_a_long_cell(tmp_path):
    import csv

    limit = csv.field_size_limit()
    text = "long " * 100_000
    assert read_records(write_csv(tmp_path, f"text\n{text}\n"))[0].text == text
    assert csv.field_size_limit() == limit


def test_rows_of_a_wrong_length_can_be_skipped(tmp_path):
    path = write_csv(tmp_path, "prompt,completion\na,b\nc\nd,e,f\ng,h\n")
    assert refusal(path).startswith(
        ":3 (row 2): has 1 cells, but the header has 2; put quotes around cells with commas"
    )
    bad = []
    assert [record.prompt for record in read_records(path, bad.append)] == ["a", "g"]
    assert [str(error).split(":")[1][:9] for error in bad] == ["3 (row 2)", "4 (row 3)"]


def test_bytes_that_are_not_utf8_cost_their_row_only(tmp_path):
    path = write_csv(tmp_path, b'text\na\n"b\n\xff"\nc\n')
    assert refusal(path) == ":4: byte 10 (0xff) is not valid UTF-8; save the file as UTF-8"
    bad = []
    assert [record.text for record in read_records(path, bad.append)] == ["a", "c"]
    assert len(bad) == 1
    path.write_text("text\na\n", encoding="utf-16")
    with pytest.raises(ValueError, match="it looks like UTF-16"):
        read_records(path, bad.append)


@pytest.mark.parametrize(
    ("content", "name", "says"),
    [
        (
            "prompt;completion\na;b\n",
            "r.csv",
            ":1: the columns are separated by semicolons; separate them by commas (.csv)",
        ),
        (
            "prompt\tcompletion\na\tb\n",
            "r.csv",
            ":1: the columns are separated by tabs; separate them by commas (.csv)",
        ),
        ("prompt,completion\na,b\n", "r.tsv", ":1: the columns are separated by commas; separate them by tabs (.tsv)"),
        ("text,id,text\na,1,b\n", "r.csv", ":1: the header has the column 'text' twice; rename one of them"),
        (
            "What is it?,It is 3.\n",
            "r.csv",
            ":1: the first line must be a header: unknown keys 'What is it?', 'It is 3.'",
        ),
        ('text\na\n"b"c\n', "r.csv", ":3: malformed CSV in the row that begins here (',' expected after '\"')"),
        ('text\na\n\n"b\nc\n', "r.csv", ":4: malformed CSV in the row that begins here (unexpected end of data)"),
        (
            "text\na\rb\n",
            "r.csv",
            ":2: malformed CSV in the row that begins here (new-line character seen in unquoted field",
        ),
        (
            "messages\n\"[{'role': 'user'}]\"\n",
            "r.csv",
            ":2 (row 1): 'messages' is a string and malformed JSON at character 3 (Expecting property name enclosed in double quotes)",
        ),
        ("conversations\nhi\n", "r.csv", ":2 (row 1): 'conversations' is a string and malformed JSON at character 1"),
        ("messages\n" + "[" * 100_000 + "\n", "r.csv", ":2 (row 1): 'messages' is JSON that cannot be read"),
        ("messages\n3\n", "r.csv", ":2 (row 1): 'messages' is a number, it must be a list of {role, content} objects"),
        ("text,messages\n,\n", "r.csv", ":2 (row 1): 'text' is an empty string"),
    ],
)
def test_csv_that_is_wrong(tmp_path, content, name, says):
    assert refusal(write_csv(tmp_path, content, name)).startswith(says)


# Parquet -----------------------------------------------------------------------------------------------------------------


def write_parquet(tmp_path, columns):
    path = tmp_path / "r.parquet"
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def test_nulls_in_parquet(tmp_path):
    chats = [
        None,
        [{"role": "user", "content": "x", "name": None}, {"role": "assistant", "content": "x", "name": None}],
    ]
    path = write_parquet(tmp_path, {"text": ["a", None], "messages": [None, None]})
    assert refusal(path) == ": row 2: 'text' is null, it must be a string; correct or remove this record"
    assert [record.row for record in read_records(path, lambda error: None)] == [1]
    path = write_parquet(tmp_path, {"text": pyarrow.nulls(2, pyarrow.string()), "messages": chats})
    bad = []
    (record,) = read_records(path, bad.append)
    assert (record.row, record.messages) == (2, [USER, ASSISTANT])
    assert len(bad) == 1
    path = write_parquet(tmp_path, {"messages": [[None, ASSISTANT]]})
    assert refusal(path).startswith(": row 1: messages[0] is null instead of an object")


def test_parquet_of_more_than_one_batch_and_row_group(tmp_path):
    path = tmp_path / "r.parquet"
    texts = [f"text {number}" for number in range(2500)]
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path, row_group_size=700)
    records = read_records(path)
    assert [record.text for record in records] == texts
    assert [record.row for record in records] == list(range(1, 2501))


def test_parquet_with_strings_of_other_types(tmp_path):
    for kind in (pyarrow.large_string(), pyarrow.dictionary(pyarrow.int32(), pyarrow.string())):
        path = write_parquet(tmp_path, {"text": pyarrow.array(["a", "b", "a"]).cast(kind)})
        assert [record.text for record in read_records(path)] == ["a", "b", "a"]
    path = write_parquet(tmp_path, {"text": pyarrow.array([b"a"])})
    assert refusal(path).startswith(": row 1: 'text' is a bytes, it must be a string")


def test_parquet_text_that_is_not_utf8_costs_its_row_only(tmp_path):
    broken = pyarrow.array([b"a", b"\xff", b"c"]).view(pyarrow.string())
    path = write_parquet(tmp_path, {"text": broken})
    assert refusal(path) == ": row 2: text that is not valid UTF-8; correct or remove this record"
    assert [record.text for record in read_records(path, lambda error: None)] == ["a", "c"]


def test_damage_in_the_middle_of_parquet(tmp_path):
    path = tmp_path / "r.parquet"
    texts = [f"text {number}" for number in range(2000)]
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path, row_group_size=1000, use_dictionary=False)
    start = pyarrow.parquet.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
    raw = bytearray(path.read_bytes())
    raw[start : start + 40] = b"\xff" * 40
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=r"r\.parquet: a Parquet file that cannot be read"):
        read_records(path, lambda error: None)


def test_no_table_is_damaged_by_reading_it(tmp_path):
    for kind in FOUR:
        path = write(kind, tmp_path / "r", ROWS["messages"])
        before = path.read_bytes()
        read_records(path)
        assert path.read_bytes() == before


def test_rows_survive_a_round_trip_through_json(tmp_path):
    # What the demo does with a user's file: records of every format are written as lines and read again.
    from lowtide.cli.demo_material import _row

    for format, rows in ROWS.items():
        records = read_records(write("array", tmp_path / "r", rows))
        path = tmp_path / "again.jsonl"
        path.write_text("".join(json.dumps(_row(record)) + "\n" for record in records))
        assert contents(read_records(path)) == contents(records), format
