"""A real Prometheus for tests: its programs, and a server that scrapes something and is asked what it saw."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest


def program(name: str) -> str:
    """The path of `prometheus` or `promtool`; the test is skipped where there is none."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed (ops/setup takes it from Debian's package prometheus)")
    return found
