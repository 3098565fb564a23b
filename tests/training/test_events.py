import json
import math

import pytest

from lowtide.training import EventLog, read_events


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


def test_never_overwrites(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text("precious")
    with pytest.raises(FileExistsError):
        EventLog(path)
    assert path.read_text() == "precious"
