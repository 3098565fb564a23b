import http.client
import json
import logging
import socket
import threading

import pytest

from lowtide.reporting import live as live_module
from lowtide.reporting import page as page_module
from lowtide.reporting.history import History
from lowtide.reporting.live import HOST, LiveReport
from page_reader import Page
from run_events import config_event, train_event


class Run:
    """A run that is made to go on."""

    def __init__(self):
        self.events = [config_event(), train_event(1)]
        self.fails = False

    def __call__(self):
        if self.fails:
            raise RuntimeError("broken")
        return str(len(self.events)), lambda: History("run", None, list(self.events))


@pytest.fixture
def run():
    return Run()


@pytest.fixture
def live(run, monkeypatch):
    for module in (page_module, live_module):
        monkeypatch.setattr(module, "plotly_script", lambda: "window.Plotly = {react() {}};")
    with LiveReport(run, {"lr": None}) as found:
        yield found


def get(live, path="/", **headers):
    connection = http.client.HTTPConnection(HOST, live.port, timeout=5)
    connection.request("GET", path, headers=headers)
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer.status, body


def test_the_page_and_its_news(live, run):
    status, body = get(live)
    found = Page(body.decode())
    assert status == 200 and found.loads() == [] and found.trace("loss", "training, each step")["x"] == [1.0]
    status, body = get(live, "/news?version=")
    first = json.loads(body)
    assert status == 200 and first["version"] == "2"
    assert get(live, "/news?version=2") == (204, b"")
    run.events.append(train_event(2))
    status, body = get(live, "/news?version=2")
    second = json.loads(body)
    assert status == 200 and next(c for c in second["charts"] if c["key"] == "loss")["traces"][0]["x"] == [1.0, 2.0]
    assert "2 of 10" in Page(second["body"]).text


def test_only_this_machine(live):
    assert live._server.server_address[0] == "127.0.0.1" and live.url.startswith("http://127.0.0.1:")
    assert get(live, Host=f"localhost:{live.port}")[0] == 200
    assert get(live, Host=f"evil.example:{live.port}")[0] == 403
    with socket.socket() as probe, pytest.raises(OSError):
        probe.settimeout(1)
        probe.connect(("127.0.0.2", live.port))  # this machine, too, but another address


def test_other_paths_are_nothing(live):
    for path in ("/metrics.jsonl", "/../config.yaml", "/news/"):
        assert get(live, path)[0] == 404


def test_errors_stay_inside(live, run, capfd, caplog):
    run.fails = True
    with caplog.at_level(logging.INFO):
        assert get(live)[0] == get(live, "/news")[0] == 500
        with socket.create_connection((HOST, live.port)) as client:
            client.sendall(b"\x00garbage\r\n\r\n")
    run.fails = False
    assert get(live)[0] == 200
    assert capfd.readouterr() == ("", "") and not caplog.records


def test_a_named_port_must_be_free(live, run):
    with pytest.raises(ValueError, match=rf"cannot have port {live.port} \(.*in use\)"):
        LiveReport(run, {}, live.port)
    with LiveReport(run, {}) as other:
        assert other.port != live.port


def test_it_ends_with_the_run(live):
    live.close()
    with pytest.raises(OSError):
        get(live)


def test_an_open_page_gets_the_last_state(live, run):
    get(live, "/news?version=2")
    run.events.append(train_event(2))
    closing = threading.Thread(target=live.close)
    closing.start()
    status, body = get(live, "/news?version=2")
    assert status == 200 and json.loads(body)["version"] == "3"
    closing.join(5)
    assert not closing.is_alive()


def test_nobody_is_waited_for_who_has_left(live, run, monkeypatch):
    get(live, "/news?version=2")
    run.events.append(train_event(2))
    monkeypatch.setattr(live_module, "_LAST_ANSWER_S", 0.1)
    live.close()
