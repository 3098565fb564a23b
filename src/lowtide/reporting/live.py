"""The report of a run while it goes on: a page that this machine alone can open, from a thread beside the training.

Nothing in here can stop or delay a step: the training knows nothing of it, the server reads what the run writes to its file, and only
when a page asks. A page asks every two seconds, and more rarely the longer the answers take.
"""

from __future__ import annotations

import json
import os
import socketserver
import threading
import time
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qs, urlsplit

from ..log import get_logger
from .history import History
from .page import content, page, plotly_script

_logger = get_logger(__name__)

HOST = "127.0.0.1"  # never another: the page has no password
FIRST_PORT = 8765
_NUM_PORTS = 20
_WATCHED_S = 10.0  # a page that asked so recently is open
_LAST_ANSWER_S = 4.0  # how long the end of a run waits for an open page to fetch the last state
_STALLED_S = 10.0  # a connection on which nothing happens so long is closed

Source = Callable[[], tuple[str, Callable[[], History]]]


class LiveReport:
    """Serves the page until it is closed.

    Args:
        source: gives a text that is another one whenever something has happened in the run, and what makes the run as it is now.
        defaults: of the settings.
        port: None for the first free one from 8765 on.

    Attributes:
        url: of the page.

    Raises:
        ModuleNotFoundError: plotly is not installed.
        ValueError: the port that was named is not free.
    """

    def __init__(self, source: Source, defaults: Mapping[str, Any], port: int | None = None) -> None:
        plotly_script()
        self._source, self._defaults = source, defaults
        self._lock = threading.Lock()
        self._last_asked = float("-inf")
        self._served: str | None = None
        self._server = _listen(port, self)
        self.port: int = self._server.server_address[1]
        self.url = f"http://{HOST}:{self.port}/"
        threading.Thread(target=self._server.serve_forever, name="live report", daemon=True).start()

    def page(self) -> bytes:
        """The page as it is first sent."""
        with self._lock:
            _, run = self._source()
            return page([run()], self._defaults, live=True).encode("utf-8")

    def news(self, version: str) -> bytes | None:
        """What the page shows now, as JSON; None if that is the version it has."""
        with self._lock:
            now, run = self._source()
            found = None if version == now else {**content([run()], self._defaults), "version": now}
            answer = None if found is None else json.dumps(found, allow_nan=False).encode("utf-8")
            self._last_asked, self._served = time.monotonic(), now
        return answer

    def close(self, wait: bool = True) -> None:
        """Stop serving.

        Args:
            wait: let a page that is open fetch the last state first, for a few seconds at most.
        """
        try:
            limit = time.monotonic() + _LAST_ANSWER_S
            while wait and self._is_behind() and time.monotonic() < limit:
                time.sleep(0.05)
        except Exception as error:
            _logger.debug("live report: %s", error)
        self._server.shutdown()
        self._server.server_close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(wait=kind is None)

    def _is_behind(self) -> bool:
        """A page is open and does not show the last state."""
        if time.monotonic() - self._last_asked > _WATCHED_S:
            return False
        with self._lock:
            return self._source()[0] != self._served


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    block_on_close = False
    allow_reuse_address = os.name == "posix"  # elsewhere it would let two programs have one port

    def __init__(self, port: int, live: LiveReport) -> None:
        self.live = live
        super().__init__((HOST, port), _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A page that was closed in the middle of an answer, and the like."""
        _logger.debug("live report: a request failed", exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = _STALLED_S

    def do_GET(self) -> None:
        """Called by http.server."""
        # Another site whose name leads to this machine (DNS rebinding) must not read the page.
        if self.headers.get("Host") not in {f"{name}:{self.server.live.port}" for name in (HOST, "localhost")}:
            return self._answer(403, b"this page is for this machine only\n")
        asked = urlsplit(self.path)
        try:
            if asked.path == "/":
                return self._answer(200, self.server.live.page(), "text/html; charset=utf-8")
            if asked.path == "/news":
                news = self.server.live.news(parse_qs(asked.query).get("version", [""])[0])
                return self._answer(204) if news is None else self._answer(200, news, "application/json")
        except OSError:
            raise
        except Exception:
            _logger.debug("live report: no answer", exc_info=True)
            return self._answer(500, b"the report could not be made\n")
        return self._answer(404, b"there is no such page\n")

    def _answer(self, status: int, body: bytes = b"", kind: str = "text/plain; charset=utf-8") -> None:
        self.send_response(status)
        if status != 204:
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("X-Frame-Options", "DENY")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Not to the terminal, which shows the progress."""


def _listen(port: int | None, live: LiveReport) -> _Server:
    if port is not None:
        try:
            return _Server(port, live)
        except OSError as error:
            reason = error.strerror or str(error)
            raise ValueError(
                f"the live report cannot have port {port} ({reason}): name another, or give --live alone for a free one"
            ) from None
    for each in (*range(FIRST_PORT, FIRST_PORT + _NUM_PORTS), 0):  # 0: any
        try:
            return _Server(each, live)
        except OSError:
            continue
    raise ValueError("the live report finds no free port on this machine")
