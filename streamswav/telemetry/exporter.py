"""The endpoint of a pod: /metrics, /healthz, /readyz and /status."""

from __future__ import annotations

import io
import json
import os
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TextIO
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

from prometheus_client import make_wsgi_app

from streamswav.errors import ConfigError
from streamswav.telemetry.logs import own_log
from streamswav.telemetry.metrics import Metrics
from streamswav.telemetry.multiprocess import collected_registry, shared_folder

SHARED_MEMORY = "/dev/shm"  # noqa: S108 - it is measured, nothing is put there
PATIENCE_SECONDS = 10.0

_TEXT = "text/plain; charset=utf-8"


@dataclass(frozen=True)
class Source:
    """What is served.

    Attributes:
        metrics: of this process, and with them those of all that share its folder.
        status: returns what /status tells; it must hold no secrets.
        ready: whether the ranks are there.
    """

    metrics: Metrics
    status: Callable[[], Mapping[str, Any]] = dict
    ready: Callable[[], bool] = lambda: True


class Endpoint:
    """A WSGI application over a source, which remembers when it was scraped last.

    Attributes:
        scraped: time.monotonic() of the last scrape; -inf: there was none.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        folder = shared_folder()
        self._metrics: WSGIApplication = make_wsgi_app(
            collected_registry(folder) if folder else source.metrics.registry
        )
        self.scraped = -float("inf")

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """Answer a request."""
        source = self._source
        match environ["PATH_INFO"]:
            case "/metrics":
                measure_shared_memory(source.metrics)
                page = self._metrics(environ, start_response)
                self.scraped = time.monotonic()
                return page
            case "/healthz":
                return _answer(start_response, "200 OK", "ok\n")
            case "/readyz" if source.ready():
                return _answer(start_response, "200 OK", "ready\n")
            case "/readyz":
                return _answer(start_response, "503 Service Unavailable", "the ranks are not started yet\n")
            case "/status":
                told = json.dumps(source.status(), indent=1) + "\n"
                return _answer(start_response, "200 OK", told, kind="application/json")
        return _answer(start_response, "404 Not Found", "there is /metrics, /healthz, /readyz and /status\n")


def _answer(start_response: StartResponse, status: str, text: str, *, kind: str = _TEXT) -> list[bytes]:
    body = text.encode()
    start_response(status, [("Content-Type", kind), ("Content-Length", str(len(body)))])
    return [body]


def measure_shared_memory(metrics: Metrics) -> None:
    """Set how large /dev/shm is, and how much of it is used."""
    try:
        found = os.statvfs(SHARED_MEMORY)
    except FileNotFoundError:
        return
    metrics.set("shm_size_bytes", found.f_blocks * found.f_frsize)
    metrics.set("shm_used_bytes", (found.f_blocks - found.f_bfree) * found.f_frsize)


class _Complaint(io.StringIO):
    """What the server says of an answer that failed, on its way to the log."""

    def flush(self) -> None:
        """Tell it in one line."""
        if text := self.getvalue().strip():
            own_log().tell("warning", "the endpoint could not answer a request", traceback=text)
        self.seek(0)
        self.truncate()


class _Handler(WSGIRequestHandler):
    """Says nothing of requests but where an answer fails; one that does not come is not waited for long."""

    timeout = PATIENCE_SECONDS

    def log_message(self, *_: object) -> None:
        pass

    def get_stderr(self) -> TextIO:
        """Return where the traceback of an answer that failed is written to."""
        return _Complaint()


class _Server(socketserver.ThreadingMixIn, WSGIServer):
    daemon_threads = True

    def server_bind(self) -> None:
        """Bind without the base class' question to the name server, which may take long to answer."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]  # type: ignore[assignment]
        self.setup_environ()

    def handle_error(self, *_: object) -> None:
        """A client that has gone is no concern of the run."""


@contextmanager
def serve(source: Source, *, port: int, bind: str) -> Iterator[Endpoint | None]:
    """Serve the endpoint for as long as the context lasts; port 0 serves nothing.

    Raises:
        ConfigError: the port is in use, or the address is not this machine's.
    """
    if port == 0:
        yield None
        return
    endpoint = Endpoint(source)
    server = _listen(endpoint, port, bind)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), name="endpoint", daemon=True)
    thread.start()
    try:
        yield endpoint
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _listen(endpoint: Endpoint, port: int, bind: str) -> WSGIServer:
    reason = "choose another port, or 0 for none"
    try:
        family, *_, address = socket.getaddrinfo(bind, port, type=socket.SOCK_STREAM)[0]
        kind = type("_ServerOfFamily", (_Server,), {"address_family": family})
        server: WSGIServer = kind(address[:2], _Handler)
    except OSError as error:
        why = f"cannot serve metrics on {bind}:{port} ({error.strerror}); {reason}"
        raise ConfigError("telemetry.port", why, value=port) from None
    server.set_app(endpoint)
    return server
