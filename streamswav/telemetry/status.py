"""What /status tells of a run: rank 0 keeps it, and leaves it in a file where the launcher serves it."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from streamswav.telemetry.logs import own_log

STATUS_FILE = "status.json"


class Status:
    """The state of a run by key; all values are plain.

    Args:
        folder: that rank and launcher share; None: there is no launcher.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._path = folder / STATUS_FILE if folder else None
        self._values: dict[str, Any] = {}
        self._lock = threading.Lock()  # checkpoints are told of by the thread that writes them

    def update(self, **values: Any) -> None:
        """Take over what is new, without secrets."""
        with self._lock:
            self._values |= own_log().settings.redactor.tree(plain(values))
            if self._path is not None:
                aside = self._path.with_suffix(".new")
                aside.write_text(json.dumps(self._values))
                aside.replace(self._path)

    def read(self) -> dict[str, Any]:
        """Return all of it."""
        with self._lock:
            return dict(self._values)


def read_status(folder: Path) -> dict[str, Any]:
    """Return what the rank left there; nothing while there is none."""
    try:
        values: dict[str, Any] = json.loads((folder / STATUS_FILE).read_text())
    except FileNotFoundError:
        return {}
    return values


def plain(value: Any) -> Any:
    """Return a value as JSON has it, which knows no NaN."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {name: plain(each) for name, each in value.items()}
    return value
