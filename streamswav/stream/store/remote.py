"""What S3 and web servers have in common: coroutines on fsspec's event loop, retries, errors in our words."""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import os
import threading
import time
import weakref
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import aiohttp
import fsspec.asyn
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectTimeoutError,
    NoCredentialsError,
    ParamValidationError,
    PartialCredentialsError,
    ProfileNotFound,
    ReadTimeoutError,
    SSOError,
    TokenRetrievalError,
)
from botocore.parsers import ResponseParserError

from streamswav.config import StorageSection
from streamswav.errors import ConfigError, UnsupportedError
from streamswav.redact import redact
from streamswav.stream.store.retry import IdentityError, OnRequest, Retrier, TransientError
from streamswav.stream.store.throttle import shared_throttle
from streamswav.stream.store.transfer import Transfer, refusal
from streamswav.stream.store.urls import ObjectInfo

CONNECTIONS = 64

Result = TypeVar("Result")

_FAILURES = (BotoCoreError, ClientError, ResponseParserError, aiohttp.ClientError, OSError)


class Remote:
    """Storage behind a network: every request is a coroutine on fsspec's event loop, run by a retrier."""

    def __init__(self, section: StorageSection, on_request: OnRequest) -> None:
        if section.ca_bundle and not Path(section.ca_bundle).is_file():
            raise ConfigError("storage.ca_bundle", "there is no such file", value=section.ca_bundle)
        self._section = section
        self._loop = fsspec.asyn.get_loop()
        self._retrier = Retrier(
            section.deadline_seconds,
            on_request,
            throttle=shared_throttle(f"{type(self).__name__} {section.endpoint_url}", CONNECTIONS),
            on_denied=self._on_denied,
        )

    def info(self, url: str) -> ObjectInfo:
        """Return size and version."""
        return self._call(url, "info", lambda: self._head(url))

    def read(self, url: str, start: int, stop: int | None, version: str | None) -> bytes:
        """Return the bytes [start, stop), to the end where stop is None."""
        return bytes(self._transferred(Transfer(url, start, stop, version)).body)

    def read_version(self, url: str) -> tuple[bytes, str]:
        """Return a whole object and the version that it has."""
        transfer = self._transferred(Transfer(url, 0, None, None))
        return bytes(transfer.body), transfer.version or ""

    def clock_ahead(self, url: str) -> float | None:
        """Return by how many seconds the server's clock is ahead: its Date lies within the request's time."""
        asked = time.time()
        date = self._call(url, "info", lambda: self._date(url))
        answered = time.time()
        told = email.utils.parsedate_to_datetime(date).timestamp() if date else None
        return None if told is None else told + 0.5 - (asked + answered) / 2

    def _transferred(self, transfer: Transfer) -> Transfer:
        self._call(transfer.url, "read", lambda: self._resume(transfer), received=lambda: len(transfer.body))
        return transfer

    async def _resume(self, transfer: Transfer) -> None:
        """A connection may break after its last byte: then nothing is left to ask for."""
        if transfer.missing:
            await self._get(transfer, transfer.begin())
            transfer.finish()

    async def _head(self, url: str) -> ObjectInfo:
        raise NotImplementedError

    async def _get(self, transfer: Transfer, attempt: int) -> None:
        raise NotImplementedError

    async def _date(self, url: str) -> str | None:
        raise NotImplementedError

    def _on_denied(self) -> None:
        """Hear that what had worked was refused. Called in any thread."""

    def _call(
        self,
        url: str,
        operation: str,
        request: Callable[[], Coroutine[Any, Any, Result]],
        received: Callable[[], int] = lambda: 0,
    ) -> Result:
        def attempt(seconds: float) -> Result:
            try:
                result: Result = fsspec.asyn.sync(self._loop, request, timeout=seconds)
            except _FAILURES as error:
                # The cause is dropped: its text may hold a signed query string.
                raise explain(url, error) from None
            return result

        return self._retrier.call(attempt, url=url, operation=operation, received=received)

    def _close_at_exit(self, close: Callable[[], Coroutine[Any, Any, None]]) -> None:
        weakref.finalize(self, _close, os.getpid(), self._loop, close)


def explain(url: str, error: Exception) -> Exception:
    """Turn a library's exception into one of ours, or into a transient one; without any secret."""
    url = redact(url)
    if isinstance(error, aiohttp.ClientResponseError):
        return refusal(url, error.status, "", error.message)
    if isinstance(error, ClientError):
        said = error.response["Error"]
        status = error.response["ResponseMetadata"]["HTTPStatusCode"]
        return refusal(url, status, said.get("Code", ""), said.get("Message", ""))
    return _unanswered(url, error)


def _unanswered(url: str, error: Exception) -> Exception:
    match error:
        case NoCredentialsError() | PartialCredentialsError() | ProfileNotFound():
            hint = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or storage.anonymous"
            return IdentityError(url, f"no credentials were found ({hint})")
        case SSOError() | TokenRetrievalError():
            return IdentityError(url, "the single sign-on has expired (aws sso login)")
        case ParamValidationError() | aiohttp.InvalidURL():
            return UnsupportedError(url, "this is not a valid name")
        case ReadTimeoutError() | ConnectTimeoutError() | TimeoutError():
            return TransientError("timeout", "timed out")
    inner = getattr(error, "kwargs", {}).get("error") or error
    if isinstance(inner, aiohttp.ClientConnectorCertificateError):
        reason = "the server's certificate is not trusted (storage.ca_bundle names other authorities)"
        return UnsupportedError(url, reason)
    return TransientError("error", redact(f"{type(inner).__name__}: {inner}".replace(" ssl:default", "")))


def _close(
    owner: int, loop: asyncio.AbstractEventLoop, close: Callable[[], Coroutine[Any, Any, None]]
) -> None:
    """Close a client when its store goes. After a fork it is the parent's, and its loop does not run here."""
    if os.getpid() != owner or not loop.is_running():
        return
    closing = asyncio.run_coroutine_threadsafe(close(), loop)
    # The garbage collector comes by in any thread, under any lock: it must not wait. At exit, when the
    # main thread counts as stopped, somebody has to.
    if not threading.main_thread().is_alive():
        with contextlib.suppress(TimeoutError):
            closing.result(timeout=5)
