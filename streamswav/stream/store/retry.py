"""The one layer of retries: transient failures are tried again, with full jitter, up to a deadline."""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Callable
from typing import TypeVar

from streamswav.errors import DeniedError, NotFoundError, UnavailableError
from streamswav.redact import redact
from streamswav.stream.store.throttle import Throttle

BASE_SECONDS = 0.1
CAP_SECONDS = 20.0
QUIET_SECONDS = 5.0
WARNING_SECONDS = 60.0

OnRequest = Callable[[str, float, int], None]
Result = TypeVar("Result")

logger = logging.getLogger(__name__)


class TransientError(Exception):
    """One attempt failed in a way that may pass. `outcome` is a metric's label: throttled, error, timeout."""

    def __init__(self, outcome: str, reason: str) -> None:
        super().__init__(reason)
        self.outcome, self.reason = outcome, reason


class IdentityError(DeniedError):
    """The credentials themselves were refused, rather than what they may do."""


def backoff(attempt: int) -> float:
    """Return the pause in seconds after the n-th failure: uniform below 0.1 x 2^n, at most 20."""
    return random.uniform(0, min(CAP_SECONDS, BASE_SECONDS * 2**attempt))  # noqa: S311 - not a secret


class Retrier:
    """Calls attempts until one succeeds, one fails for good, or the deadline has passed.

    Args:
        deadline_seconds: how long a call goes on without a byte.
        on_request: told the outcome, seconds and bytes of every attempt.
        throttle: gives every attempt its turn.
        on_denied: called before a denial is tried again, to have credentials read anew.
    """

    def __init__(
        self,
        deadline_seconds: float,
        on_request: OnRequest,
        *,
        throttle: Throttle,
        on_denied: Callable[[], None] = lambda: None,
    ) -> None:
        self._deadline = deadline_seconds
        self._on_request = on_request
        self._throttle = throttle
        self._on_denied = on_denied
        self._worked: set[tuple[str, str]] = set()
        self._warned_at = -math.inf

    def call(
        self,
        attempt: Callable[[float], Result],
        *,
        url: str,
        operation: str,
        received: Callable[[], int] = lambda: 0,
    ) -> Result:
        """Return what `attempt(seconds_left)` returns.

        A refusal is final where the same operation never worked on this server and bucket (of credentials:
        where nothing ever did). Once it has, it is treated as transient: credentials expire and are renewed,
        policies are reloaded. The deadline counts from the last byte received.

        Raises:
            UnavailableError: the deadline passed; it says how often was tried and what failed last.
            StorageError: whatever else `attempt` raised.
        """
        place = ("/".join(url.split("/", 4)[: 4 if url.startswith("s3:") else 3]), operation)
        trouble = _Trouble(redact(url), operation, self._deadline, self._warn)
        while True:
            before = received()
            began = self._throttle.enter(trouble.left)
            if began is None:
                raise trouble.ended()
            try:
                result = self._observed(attempt, began, trouble.left, received)
            except DeniedError as error:
                if not self._may_pass(error, place):
                    raise
                self._on_denied()
                trouble.add(TransientError("error", f"refused after it had worked: {error.reason}"))
            except TransientError as error:
                trouble.add(error)
            else:
                self._worked.add(place)
                return result
            trouble.pause(moved=received() > before)

    def _may_pass(self, error: DeniedError, place: tuple[str, str]) -> bool:
        return place in self._worked or (isinstance(error, IdentityError) and bool(self._worked))

    def _warn(self, text: str) -> None:
        """Log a warning; where many requests meet the same trouble, that of one will do."""
        now = time.monotonic()
        if now >= self._warned_at + WARNING_SECONDS:
            self._warned_at = now
            logger.warning(text)

    def _observed(
        self, attempt: Callable[[float], Result], began: float, left: float, received: Callable[[], int]
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
            self._throttle.leave(began, outcome)
            self._on_request(outcome, time.monotonic() - started, received() - before)
        return result


class _Trouble:
    """How a call went until now."""

    def __init__(self, url: str, operation: str, deadline: float, warn: Callable[[str], None]) -> None:
        self._url, self._operation, self._deadline, self._warn = url, operation, deadline, warn
        self._started = self._moved = time.monotonic()
        self._failures, self._in_a_row, self._reason = 0, 0, ""

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return self._deadline - (time.monotonic() - self._moved)

    def add(self, failure: TransientError) -> None:
        """Note a failure."""
        self._failures += 1
        self._in_a_row += 1
        # The deadline cuts the last attempt short: what failed before it says more.
        if not self._reason or failure.outcome != "timeout" or self.left > 0:
            self._reason = failure.reason

    def pause(self, *, moved: bool) -> None:
        """Wait before the next attempt; `moved` tells that the last one brought bytes.

        Raises:
            UnavailableError: the deadline has passed.
        """
        if moved:
            self._moved, self._in_a_row = time.monotonic(), 1
        left, elapsed = self.left, time.monotonic() - self._started
        if left <= 0:
            raise self.ended()
        if elapsed > QUIET_SECONDS:
            self._warn(f"{self._url}: {self._reason}; trying for up to {self._deadline:.0f} s")
        time.sleep(min(backoff(self._in_a_row), left))

    def ended(self) -> UnavailableError:
        """Return the error that tells what was tried."""
        seconds = f"{time.monotonic() - self._started:.0f} s"
        if not self._failures:
            return UnavailableError(
                self._url, f"{self._operation} had no turn in {seconds}: the server throttles"
            )
        tried = f"{self._operation} failed {self._failures} times in {seconds}"
        return UnavailableError(self._url, f"{tried}; the last time: {self._reason}")
