"""One piece of work at a time, in a thread, while training goes on."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Background:
    """Runs one job after another, never two at once; what fails is the job's own to keep."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._thread: threading.Thread | None = None

    @property
    def busy(self) -> bool:
        """Whether a job is still going on."""
        return self._thread is not None and self._thread.is_alive()

    def start(self, job: Callable[[], None]) -> None:
        """Begin a job, once the one before is over. It does not keep the process from ending."""
        self.wait()
        self._thread = threading.Thread(target=job, daemon=True, name=self._name)
        self._thread.start()

    def wait(self, seconds: float | None = None) -> bool:
        """Wait for the job that is going on, if any; tell whether it is over."""
        if self._thread is not None:
            self._thread.join(seconds)
        return not self.busy
