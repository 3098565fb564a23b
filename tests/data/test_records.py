import json
import logging

import datasets
import pytest

from lowtide.data import Record, read_records

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


def write_lines(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_text_file_is_one_record(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("One line.\n\nAnother.\n")
    assert read_records(path) == [Record(str(path), 1, text="One line.\n\nAnother.\n")]


def test_the_three_kinds_of_json_lines(tmp_path):
    text = write_lines(tmp_path / "text.jsonl", {"text": "a"}, {"text": "b"})
    chat = write_lines(tmp_path / "chat.json", {"messages": CHAT})
    pair = write_lines(tmp_path / "pair.jsonl", {"prompt": "p", "completion": "c"})
    assert read_records([text, str(chat), pair]) == [
        Record(str(text), 1, text="a"),
        Record(str(text), 2, text="b"),
        Record(str(chat), 1, messages=CHAT),
        Record(str(pair), 1, prompt="p", completion="c"),
    ]


def test_a_directory_is_read_in_sorted_order_without_hidden_and_foreign_files(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / ".cache").mkdir()
    for name in ("b.txt", "a.md", "sub/c.txt", ".cache/d.txt", "picture.png"):
        (tmp_path / name).write_text(name)
    assert [record.text for record in read_records(str(tmp_path))] == ["a.md", "b.txt", "sub/c.txt"]


def test_byte_order_mark_crlf_and_blank_lines_are_tolerated(tmp_path):
    text, rows = tmp_path / "t.txt", tmp_path / "r.jsonl"
    text.write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n")
    rows.write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n\r\n   \n{"text": "two"}')
    assert read_records(text)[0].text == "one\ntwo\n"
    assert [(record.line, record.text) for record in read_records(rows)] == [(1, "one"), (4, "two")]


def test_a_line_separator_inside_a_string_does_not_end_the_line(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text('{"text": "a\u2028b\x85c"}\n{"text": "d"}\n', encoding="utf-8")
    assert [record.text for record in read_records(path)] == ["a\u2028b\x85c", "d"]


def test_other_keys_are_ignored_and_named_once(tmp_path, caplog):
    rows = [{"text": "a", "id": 1}, {"text": "b", "id": 2, "prompt": None}]
    path = write_lines(tmp_path / "r.jsonl", *rows)
    with caplog.at_level(logging.WARNING):
        assert [record.text for record in read_records(path)] == ["a", "b"]
    assert [record.getMessage() for record in caplog.records] == [f"{path}: ignoring the keys 'id'"]


def test_null_columns_do_not_count(tmp_path):
    row = {"messages": [{**CHAT[0], "name": None}, CHAT[1]], "text": None, "prompt": "hi"}
    assert read_records(write_lines(tmp_path / "r.jsonl", row))[0].messages == CHAT


# The second line of a file whose first is {"text": "fine"} -> what the error says after "file:2: ".
BAD_LINES = {
    "malformed": ('{"text": "a"', "malformed JSON at column 13"),
    "not an object": ('"text"', "a string instead of a JSON object"),
    "a number": ("17", "a number instead of a JSON object"),
    "an array": ('[{"text": "a"}]', "a JSON array, but every line must be one object; convert it: jq"),
    "deep": ('{"text":' + "[" * 100_000, "JSON that cannot be read"),
    "huge number": ('{"text":' + "1" * 5000 + "}", "JSON that cannot be read"),
    "no keys": ("{}", "an object without keys"),
    "unknown key": ('{"txt": "a"}', "unknown keys 'txt' (is 'txt' meant to be 'text'?); a record has 'text', or"),
    "capital": ('{"Text": "a"}', "unknown keys 'Text' (is 'Text' meant to be 'text'?)"),
    "far key": ('{"question": "a", "answer": "b"}', "unknown keys 'question', 'answer'; a record has 'text', or"),
    "null": ('{"text": null}', "'text' is null, it must be a string"),
    "null messages": ('{"messages": null}', "'messages' is null, it must be a list"),
    "wrong type": ('{"text": 3}', "'text' is a number, it must be a string"),
    "list": ('{"text": ["a"]}', "'text' is a list, it must be a string"),
    "boolean": ('{"text": true}', "'text' is a boolean, it must be a string"),
    "empty": ('{"text": ""}', "'text' is an empty string"),
    "blank": ('{"text": " \\n"}', "'text' is an empty string"),
    "half a surrogate pair": ('{"text": "a\\ud800"}', "'text' has half a surrogate pair at character 1"),
    "other kind": (
        '{"prompt": "a", "completion": "b"}',
        "a 'prompt/completion' record in a file that began with 'text'",
    ),
    "two kinds": ('{"text": "a", "prompt": "a", "completion": "b"}', "has 'text' and 'prompt/completion' at once"),
}
BAD_PAIRS = {
    "no completion": ('{"prompt": "a"}', "has 'prompt' but no 'completion'; a record has"),
    "misspelt": ('{"prompt": "a", "compeltion": "b"}', "(is 'compeltion' meant to be 'completion'?)"),
    "no prompt": ('{"completion": "a"}', "has 'completion' but no 'prompt'"),
    "null completion": ('{"prompt": "a", "completion": null}', "'completion' is null, it must be a string"),
    "empty prompt": ('{"prompt": "", "completion": "b"}', "'prompt' is an empty string"),
    "list of messages": ('{"prompt": [], "completion": "b"}', "'prompt' is a list, it must be a string"),
}
BAD_CHATS = {
    "not a list": ("3", "'messages' is a number, it must be a list of {role, content} objects"),
    "empty": ("[]", "the conversation has no assistant turn"),
    "not objects": ('["hi"]', "messages[0] is a string instead of an object"),
    "no role": ('[{"content": "a"}]', "messages[0] has no 'role'"),
    "no content": ('[{"role": "user"}]', "messages[0] has no 'content'"),
    "misspelt": ('[{"role": "user", "contents": "a"}]', "no 'content' (is 'contents' meant to be 'content'?)"),
    "unknown role": (
        '[{"role": "gpt", "content": "a"}]',
        "messages[0] has the unknown role 'gpt'; roles are system, user",
    ),
    "role of a wrong type": ('[{"role": [1], "content": "a"}]', "messages[0] has the unknown role [1]"),
    "null content": ('[{"role": "user", "content": null}]', "messages[0] content is null, it must be a string"),
    "parts": ('[{"role": "user", "content": [{"type": "text"}]}]', "messages[0] content[0] text is null, it must be"),
    "a picture": (
        '[{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "b"}}]}]',
        "messages[0] content[1] is a part of type 'image_url', and only text can be trained on",
    ),
    "a part that is a string": ('[{"role": "user", "content": ["a"]}]', "content[0] is a string instead of an object"),
    "more in a part": (
        '[{"role": "user", "content": [{"type": "text", "text": "a", "detail": "high"}]}]',
        "messages[0] content[0] has unknown keys 'detail'",
    ),
    "no parts": ('[{"role": "user", "content": []}]', "messages[0] content is an empty string"),
    "empty content": ('[{"role": "user", "content": ""}]', "messages[0] content is an empty string"),
    "tool calls": (
        '[{"role": "assistant", "content": null, "tool_calls": [{"id": "1"}]}]',
        "messages[0] has unknown keys 'tool_calls'",
    ),
    "a name that is none": ('[{"role": "user", "content": "a", "name": 1}]', "messages[0] name is a number"),
    "half a weight": (
        '[{"role": "assistant", "content": "a", "weight": 0.5}]',
        "messages[0] weight is 0.5, it must be 0 (not trained on) or 1",
    ),
    "a weight that is none": ('[{"role": "assistant", "content": "a", "weight": true}]', "messages[0] weight is True"),
    "a user's weight": (
        '[{"role": "user", "content": "a", "weight": 1}]',
        "messages[0] has weight 1, but of a conversation only assistant turns are trained on",
    ),
    "no weight": (
        '[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]',
        "every assistant turn of the conversation has weight 0, so there is nothing to learn",
    ),
    "no assistant": ('[{"role": "user", "content": "a"}]', "the conversation has no assistant turn"),
    "assistant alone": (
        '[{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]',
        "the conversation has no assistant turn behind a turn of another role",
    ),
}


def assert_refused(path, line, says):
    with pytest.raises(ValueError) as caught:
        read_records(path)
    message = str(caught.value)
    assert message.startswith(f"{path}:{line}: ")
    assert says in message
    assert "\n" not in message


@pytest.mark.parametrize("case", BAD_LINES)
def test_a_bad_line_is_named(tmp_path, case):
    line, says = BAD_LINES[case]
    path = tmp_path / "r.jsonl"
    path.write_text(f'{{"text": "fine"}}\n{line}\n{{"text": "fine"}}\n')
    assert_refused(path, 2, says)


@pytest.mark.parametrize("case", BAD_PAIRS)
def test_a_bad_prompt_or_completion_is_named(tmp_path, case):
    line, says = BAD_PAIRS[case]
    path = tmp_path / "r.jsonl"
    path.write_text(f'\n{{"prompt": "a", "completion": "b"}}\n{line}\n')
    assert_refused(path, 3, says)


@pytest.mark.parametrize("case", BAD_CHATS)
def test_a_bad_conversation_is_named(tmp_path, case):
    messages, says = BAD_CHATS[case]
    path = tmp_path / "r.jsonl"
    path.write_text(f'{{"messages": {messages}}}\n')
    assert_refused(path, 1, says)


def test_a_pretty_printed_object_is_malformed_at_its_first_line(tmp_path):
    path = tmp_path / "r.json"
    path.write_text(json.dumps({"text": "a"}, indent=2))
    assert_refused(path, 1, "every line must be one whole JSON object")


def test_invalid_utf8_names_line_and_byte(tmp_path):
    text, rows = tmp_path / "t.txt", tmp_path / "r.jsonl"
    text.write_bytes(b"one\ntwo\nth\xe9e\n")
    rows.write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    assert_refused(text, 3, "byte 10 (0xe9) is not valid UTF-8; save the file as UTF-8")
    assert_refused(rows, 2, "byte 24 (0xff) is not valid UTF-8; save the file as UTF-8")
    text.write_text("one", encoding="utf-16")
    assert_refused(text, 1, "byte 0 (0xff) is not valid UTF-8; it looks like UTF-16; save the file as UTF-8")


@pytest.mark.parametrize(("name", "content"), [("t.txt", ""), ("t.md", " \n"), ("r.jsonl", ""), ("r.json", "\n  \n")])
def test_an_empty_file_has_no_records(tmp_path, name, content):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(ValueError) as caught:
        read_records([path])
    assert str(caught.value) == f"{path}: no records (the file is empty)"


@pytest.mark.parametrize("name", ["missing.jsonl", "data/missing.jsonl", "a/b/c", "missing"])
def test_a_missing_file_is_named(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError) as caught:
        read_records(name)
    assert str(caught.value) == f"{name}: no such file or directory"


def test_a_missing_path_inside_an_existing_directory_is_not_looked_up_on_the_hub(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="data/set: no such file or directory"):
        read_records("data/set")


def test_other_things_that_are_no_data(tmp_path):
    table = tmp_path / "t.xlsx"
    table.write_text("a,b\n")
    with pytest.raises(
        ValueError, match=r"t\.xlsx: unknown file type '\.xlsx'; data files end in \.txt, \.md, \.jsonl"
    ):
        read_records(table)
    with pytest.raises(FileNotFoundError, match=r"holds no \.txt, \.md, \.jsonl, \.json, \.csv, \.tsv, \.parquet file"):
        read_records(tmp_path)
    with pytest.raises(ValueError, match="no data files given"):
        read_records([])
    with pytest.raises(FileNotFoundError, match="the data path is empty"):
        read_records("")


def test_a_hub_data_set_is_its_train_split(monkeypatch):
    asked = []

    def load_dataset(name, split):
        asked.append((name, split))
        return datasets.Dataset.from_list([{"messages": CHAT}, {"messages": CHAT[:1]}][: len(asked)])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read_records("org/some-chats") == [Record("org/some-chats", None, messages=CHAT, row=1)]
    assert asked == [("org/some-chats", "train")]
    with pytest.raises(ValueError, match="org/some-chats: row 2: the conversation has no assistant turn"):
        read_records("org/some-chats")


def test_bad_lines_can_be_skipped_and_are_named(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_bytes(
        b'{"text": "a"}\nnonsense\n{"text": "\xff"}\n{"prompt": "p", "completion": "c"}\n{"text": "b"}\n{"text": ""}\n'
    )
    bad = []
    assert [record.text for record in read_records(path, bad.append)] == ["a", "b"]
    assert [str(error).split(": ")[0] for error in bad] == [f"{path}:{line}" for line in (2, 3, 4, 6)]
    with pytest.raises(ValueError, match=f"{path}:2"):
        read_records(path)


def test_a_file_of_bad_lines_only_is_refused_all_the_same(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text("nonsense\n{}\n")
    with pytest.raises(ValueError) as caught:
        read_records(path, lambda error: None)
    assert str(caught.value).startswith(
        f"{path}: no records (all 2 lines are bad; the first: {path}:1: malformed JSON at column 1"
    )


def test_what_a_turn_has_that_counts_as_absent(tmp_path):
    for extra in (
        {"name": ""},
        {"name": None},
        {"tool_calls": []},
        {"tool_calls": None},
        {"audio": {}},
        {"weight": None},
    ):
        path = write_lines(tmp_path / "r.jsonl", {"messages": [{**turn, **extra} for turn in CHAT]})
        assert read_records(path)[0].messages == CHAT, extra


def test_conversations_as_openai_has_them(tmp_path):
    user, assistant = CHAT
    turns = [
        {"role": "developer", "content": [{"type": "text", "text": "Be brief."}]},
        {**user, "name": "ann", "weight": 0},
        {**assistant, "weight": 0},
        {"role": "user", "content": [{"type": "text", "text": "a\n"}, {"type": "text", "text": "b", "detail": None}]},
        {**assistant, "weight": 1.0},
    ]
    (record,) = read_records(write_lines(tmp_path / "r.jsonl", {"messages": turns}))
    assert record.messages == [
        {"role": "system", "content": "Be brief."},
        {**user, "name": "ann"},
        {**assistant, "weight": 0},
        {"role": "user", "content": "a\nb"},
        assistant,
    ]


def test_assistant_turns_at_the_beginning_are_left_out_and_counted(tmp_path, caplog):
    greeting = [CHAT[1], {**CHAT[1], "content": "well?"}]
    path = write_lines(tmp_path / "r.jsonl", *({"messages": [*before, *CHAT]} for before in (greeting, [], CHAT[1:])))
    with caplog.at_level(logging.WARNING):
        records = read_records(path)
    assert [record.messages for record in records] == [CHAT] * 3
    assert [record.num_dropped_turns for record in records] == [2, 0, 1]
    says = "2 conversations begin with an assistant turn, which has no question and is left out"
    assert [record.getMessage() for record in caplog.records] == [f"{path}: {says}"]
