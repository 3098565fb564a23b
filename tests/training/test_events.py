import errno
import json
import math
import os

import pytest

from lowtide.training import EventLog, read_events
from lowtide.training.events import EventReader, parse_events


def test_one_json_object_a_line_readable_before_it_is_closed(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with EventLog(path) as log:
        log({"event": "train", "loss": 1.5, "step": 1})
        log({"event": "eval", "perplexity": 2.0, "step": 1})
        assert [json.loads(line)["event"] for line in path.read_text().splitlines()] == ["train", "eval"]
    assert read_events(path, "eval") == [{"event": "eval", "perplexity": 2.0, "step": 1}]
    assert len(read_events(path)) == 2


def test_not_a_number_becomes_null_at_any_depth(tmp_path):
    with EventLog(tmp_path / "m.jsonl") as log:
        log({"event": "x", "loss": math.nan, "deep": {"list": [math.inf, (-math.inf, 1.0)]}})
    assert read_events(tmp_path / "m.jsonl") == [{"event": "x", "loss": None, "deep": {"list": [None, [None, 1.0]]}}]


def test_what_cannot_be_written_waits(tmp_path, caplog):
    """A disk that takes a part of a line, then nothing, then everything again."""

    class Disk:
        def __init__(self, file):
            self.file, self.room = file, 10**9

        def write(self, data):
            if not self.room:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            written = self.file.write(data[: self.room])
            self.room -= written
            return written

        def __getattr__(self, name):
            return getattr(self.file, name)

    path = tmp_path / "m.jsonl"
    log = EventLog(path)
    log._file = disk = Disk(log._file)
    log({"step": 1})
    disk.room = 3
    for step in (2, 3):
        log({"step": step})
    with pytest.raises(OSError, match="No space"):
        log.position()
    assert caplog.text.count("waits in memory") == 1 and path.read_text().startswith('{"step": 1}\n{"s')
    disk.room = 10**9
    log({"step": 4})
    assert log.position() == path.stat().st_size
    assert [event["step"] for event in read_events(path)] == [1, 2, 3, 4]
    disk.room = 4
    log({"step": 5})
    log.close()
    with EventLog(path, existing=True) as log:
        log({"step": 6})
    assert [event["step"] for event in read_events(path)] == [1, 2, 3, 4, 6]
    assert "could not be written to its end" in caplog.text


def test_never_overwrites(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text("precious")
    with pytest.raises(FileExistsError):
        EventLog(path)
    assert path.read_text() == "precious"


def write(path, *events, end=""):
    path.write_text("".join(json.dumps(event) + "\n" for event in events) + end)


def steps(reader):
    reader.read()
    return [event["step"] for event in reader.events]


def test_a_reader_follows_a_file(tmp_path):
    path = tmp_path / "m.jsonl"
    reader = EventReader(path)
    assert steps(reader) == []
    write(path, {"event": "train", "step": 1}, end='{"event": "tra')
    assert steps(reader) == [1]
    before = reader.version
    assert steps(reader) == [1] and reader.version == before
    write(path, {"event": "train", "step": 1}, {"event": "train", "step": 2}, end="nothing\n")
    assert steps(reader) == [1, 2] and reader.num_unreadable == 1 and reader.version != before


def test_a_reader_sees_that_a_file_was_cut_and_written_on(tmp_path):
    path = tmp_path / "m.jsonl"
    events = [{"event": "train", "step": step, "time": 0.5} for step in (1, 2, 3)]
    write(path, *events)
    reader = EventReader(path)
    assert steps(reader) == [1, 2, 3]
    write(path, events[0])
    assert steps(reader) == [1]
    write(path, events[0], *({"event": "train", "step": step, "time": 0.7} for step in (2, 3, 4)))
    assert steps(reader) == [1, 2, 3, 4]
    write(path, events[0], *({"event": "train", "step": step, "time": 0.9} for step in (2, 3, 4, 5)))
    assert steps(reader) == [1, 2, 3, 4, 5]


def test_parsing_keeps_what_can_be_read():
    text = b'{"event": "a"}\n\xff\n[1]\n{"event": 3}\n{"event": "b"}\n{"event": "c"}'
    assert parse_events(text) == ([{"event": "a"}, {"event": "b"}], 3)
