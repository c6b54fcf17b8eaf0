"""A real Prometheus for tests: its programs, and a server that scrapes a run and is asked what it saw."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from runs import free_port

Series = dict[str, Any]


def program(name: str) -> str:
    """The path of `prometheus` or `promtool`; the test is skipped where there is none."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed (ops/setup takes it from Debian's package prometheus)")
    return found


@dataclass(frozen=True)
class Prometheus:
    """A server that is running."""

    url: str

    def ask(self, path: str, **parameters: str) -> Any:
        """What its API answers; what it refuses is an error with its words."""
        query = urllib.parse.urlencode(parameters)
        try:
            with urllib.request.urlopen(f"{self.url}/api/v1/{path}?{query}", timeout=10) as reply:
                return json.load(reply)["data"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{parameters}: {error.read().decode()}") from None

    def query(self, expression: str) -> list[Series]:
        """The series of an expression, as of now."""
        answer = self.ask("query", query=expression)
        found = answer["result"]
        return found if answer["resultType"] != "scalar" else [{"metric": {}, "value": found}]

    def value(self, expression: str) -> float | None:
        """The value of an expression with one series; None: it has none."""
        found = self.query(expression)
        assert len(found) <= 1, found
        return float(found[0]["value"][1]) if found else None

    def wait_for(self, expression: str, seconds: float = 60) -> list[Series]:
        """Wait until an expression has a series."""
        return self.wait_until(lambda: self.query(expression), f"no series of {expression}", seconds)

    def wait_until(self, reached: Callable[[], Any], otherwise: str, seconds: float = 60) -> Any:
        """Wait for something, and fail in these words."""
        deadline = time.monotonic() + seconds
        while not (found := reached()):
            assert time.monotonic() < deadline, f"{otherwise} within {seconds} s"
            time.sleep(0.2)
        return found


@contextlib.contextmanager
def scraping(
    port: int, folder: Path, *, rules: Path, labels: Mapping[str, str] | None = None
) -> Iterator[Prometheus]:
    """A Prometheus that scrapes a port of the loopback each second and evaluates rules as often."""
    folder.mkdir(parents=True, exist_ok=True)
    target = {"targets": [f"127.0.0.1:{port}"], "labels": dict(labels or {})}
    configuration = {
        "global": {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(rules)],
        "scrape_configs": [{"job_name": "streamswav", "static_configs": [target]}],
    }
    file, own = folder / "prometheus.yaml", free_port()
    file.write_text(yaml.safe_dump(configuration))
    command = [program("prometheus"), f"--config.file={file}", f"--storage.tsdb.path={folder / 'data'}"]
    command += [f"--web.listen-address=127.0.0.1:{own}"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        server = Prometheus(f"http://127.0.0.1:{own}")
        _await_ready(server, process, folder / "log")
        yield server
    finally:
        process.terminate()
        process.wait()


def _await_ready(server: Prometheus, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(300):
        assert process.poll() is None, log.read_text()
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{server.url}/-/ready", timeout=5):
            return
        time.sleep(0.1)
    pytest.fail(f"prometheus does not answer: {log.read_text()}")
