"""The one layer of retries: transient failures are tried again, with full jitter, up to a deadline."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from typing import TypeVar

from streamswav.errors import DeniedError, NotFoundError, UnavailableError
from streamswav.stream.store.urls import redact

BASE_SECONDS = 0.1
CAP_SECONDS = 20.0
QUIET_SECONDS = 5.0

OnRequest = Callable[[str, float, int], None]
Result = TypeVar("Result")

logger = logging.getLogger(__name__)


class TransientError(Exception):
    """One attempt failed in a way that may pass. `outcome` is a metric's label: throttled, error, timeout."""

    def __init__(self, outcome: str, reason: str) -> None:
        super().__init__(reason)
        self.outcome, self.reason = outcome, reason


def backoff(attempt: int) -> float:
    """Return the pause in seconds after the n-th failure: uniform below 0.1 x 2^n, at most 20."""
    return random.uniform(0, min(CAP_SECONDS, BASE_SECONDS * 2**attempt))  # noqa: S311 - not a secret


class Retrier:
    """Calls attempts until one succeeds, one fails for good, or the deadline has passed."""

    def __init__(self, deadline_seconds: float, on_request: OnRequest) -> None:
        self._deadline = deadline_seconds
        self._on_request = on_request
        self._worked: set[tuple[str, str]] = set()

    def call(
        self,
        attempt: Callable[[float], Result],
        *,
        url: str,
        operation: str,
        received: Callable[[], int] = lambda: 0,
    ) -> Result:
        """Return what `attempt(seconds_left)` returns.

        A refusal is final where the same operation never worked on this server and bucket. Once it has,
        it is treated as transient: credentials expire and are renewed, policies are reloaded.

        Raises:
            UnavailableError: the deadline passed; it says how often was tried and what failed last.
            StorageError: whatever else `attempt` raised.
        """
        place = ("/".join(url.split("/", 4)[: 4 if url.startswith("s3:") else 3]), operation)
        started, failures, warned = time.monotonic(), 0, False
        while True:
            left = self._deadline - (time.monotonic() - started)
            try:
                result = self._observed(attempt, left, received)
            except DeniedError as error:
                if place not in self._worked:
                    raise
                failure = TransientError("error", f"refused after it had worked: {error.reason}")
            except TransientError as error:
                failure = error
            else:
                self._worked.add(place)
                return result
            failures += 1
            elapsed = time.monotonic() - started
            if elapsed >= self._deadline:
                tried = f"{operation} failed {failures} times in {elapsed:.0f} s"
                raise UnavailableError(redact(url), f"{tried}; the last time: {failure.reason}")
            if not warned and elapsed > QUIET_SECONDS:
                warned = True
                logger.warning("%s: %s; trying for up to %.0f s", redact(url), failure.reason, self._deadline)
            time.sleep(min(backoff(failures), self._deadline - elapsed))

    def _observed(
        self, attempt: Callable[[float], Result], left: float, received: Callable[[], int]
    ) -> Result:
        outcome, before, started = "error", received(), time.monotonic()
        try:
            result = attempt(max(left, 0.01))
            outcome = "ok"
        except NotFoundError:
            outcome = "ok"
            raise
        except TransientError as error:
            outcome = error.outcome
            raise
        finally:
            self._on_request(outcome, time.monotonic() - started, received() - before)
        return result
