"""A proxy before a real server that changes what passes: for servers and permissions other than rclone's."""

from __future__ import annotations

import contextlib
import http.client
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

Headers = dict[str, str]
HOPS = ("connection", "transfer-encoding", "content-length")
DENIED = b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
FAILED = b"<Error><Code>PreconditionFailed</Code><Message>It exists</Message></Error>"


@dataclass
class Meddler:
    """What is done to requests and answers.

    Attributes:
        url: of the proxy.
        refuse: methods that are answered with 403.
        conditions: whether a PUT under If-None-Match is answered as by Amazon: 412 where the object was
            written before.
        change: gets method and headers of an answer, lower case, and may change them.
    """

    url: str = ""
    refuse: set[str] = field(default_factory=set)
    conditions: bool = False
    change: Callable[[str, Headers], None] = lambda _, __: None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    meddler: Meddler
    target: str
    written: set[str]

    def log_message(self, *args: Any) -> None: ...

    def handle_any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.command in self.meddler.refuse:
            self.answer(403, {"content-type": "application/xml"}, DENIED)
        elif self.meddler.conditions and self.headers.get("If-None-Match") and self.path in self.written:
            self.answer(412, {"content-type": "application/xml"}, FAILED)
        else:
            self.answer(*self.passed_on(body))

    do_GET = do_HEAD = do_PUT = do_DELETE = do_POST = handle_any  # noqa: N815 - named by the library

    def passed_on(self, body: bytes) -> tuple[int, Headers, bytes]:
        place = urlsplit(self.target)
        with contextlib.closing(http.client.HTTPConnection(place.netloc, timeout=30)) as connection:
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                connection.putheader(name, value)
            connection.endheaders(body or None)
            reply = connection.getresponse()
            headers = {name.lower(): value for name, value in reply.getheaders()}
            if self.command == "PUT":
                self.written.add(self.path)
            return reply.status, headers, reply.read()

    def answer(self, status: int, headers: Headers, body: bytes) -> None:
        self.meddler.change(self.command, headers)
        length = headers.get("content-length", "0") if self.command == "HEAD" else str(len(body))
        self.send_response_only(status)
        for name, value in headers.items():
            if name not in HOPS:
                self.send_header(name, value)
        self.send_header("Content-Length", length)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients go away; that is no concern of the tests."""


@contextlib.contextmanager
def meddling(target: str) -> Iterator[Meddler]:
    """Run a proxy before `target`. The Host header passes as it is, so that signatures hold."""
    meddler = Meddler()
    names = {"meddler": meddler, "target": target, "written": set()}
    with _Server(("127.0.0.1", 0), type("Handler", (_Handler,), names)) as server:
        meddler.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=lambda: server.serve_forever(0.02), daemon=True)
        thread.start()
        try:
            yield meddler
        finally:
            server.shutdown()
            thread.join()
