import json
import re
import threading
import urllib.request

import pytest
import yaml

from lowtide.training import trainer
from page_reader import Page


@pytest.fixture
def arguments(model_dir, task, tmp_path):
    return [
        "train", "--model", model_dir, "--data", task, "--output", tmp_path / "out", "--max-steps", 6, "--device", "cpu",
        "--dtype", "float32", "--eval-fraction", 0,
    ]  # fmt: skip


def test_the_page_during_a_run(lowtide, arguments, tmp_path, monkeypatch, capfd):
    """The page is fetched between two steps, in the middle of the training loop."""
    seen = {}
    original = trainer._look_at

    def look_and_fetch(run, *others):
        original(run, *others)
        if run.report.num_steps == 3:
            seen["out"] = capfd.readouterr().out
            (url,) = re.findall(r"^Live report: (http://127\.0\.0\.1:\d+/)$", seen["out"], re.MULTILINE)
            with urllib.request.urlopen(url, timeout=5) as answer:
                seen["page"] = Page(answer.read().decode())
            with urllib.request.urlopen(f"{url}news?version=", timeout=5) as answer:
                seen["news"] = json.load(answer)
            seen["url"] = url

    monkeypatch.setattr(trainer, "_look_at", look_and_fetch)
    monkeypatch.setattr("lowtide.reporting.live._LAST_ANSWER_S", 0.1)
    result = lowtide(*arguments, "--live")
    assert result.code == 0
    assert seen["page"].trace("loss", "training, each step")["x"] == [1, 2, 3]
    assert "3 of 6" in seen["news"]["body"] and "no end yet" in seen["news"]["body"]
    assert "live report" not in [thread.name for thread in threading.enumerate()]
    with pytest.raises(OSError):
        urllib.request.urlopen(seen["url"], timeout=2)
    assert "live" not in yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())
    assert (tmp_path / "out" / "model").is_dir()


def test_a_port_that_is_taken(lowtide, arguments, tmp_path):
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        number = taken.getsockname()[1]
        result = lowtide(*arguments, "--live", number)
    assert result.code == 2 and len(result.err) == 1 and f"cannot have port {number}" in result.err[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", ["0", "65536", "x"])
def test_what_is_no_port(lowtide, arguments, value):
    result = lowtide(*arguments, "--live", value)
    assert result.err == [f"lowtide: error: argument --live: expected a port from 1 to 65535, or none, got {value!r}"]


@pytest.mark.parametrize("flag", ["--dry-run", "--find-lr"])
def test_nothing_to_show(lowtide, arguments, flag):
    result = lowtide(*arguments, flag, "--live")
    assert result.code == 2 and "--live shows a training run" in result.err[0]
