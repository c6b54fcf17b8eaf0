"""What a benchmark ran on, for its figures' file."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version


def machine(*packages: str) -> dict[str, object]:
    """Return processor, load and versions; `packages` are named as they are installed."""
    return {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
    }
