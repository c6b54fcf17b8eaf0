"""Web servers, read-only."""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import BinaryIO

import aiohttp

from streamswav.errors import UnsupportedError
from streamswav.redact import redact
from streamswav.stream.store.remote import CONNECTIONS, Remote
from streamswav.stream.store.transfer import Transfer
from streamswav.stream.store.urls import ObjectInfo


class Web(Remote):
    """Web servers, read-only."""

    _session: aiohttp.ClientSession | None = None

    def walk(self, folder: str, stem: str = "") -> Iterator[ObjectInfo]:  # noqa: ARG002 - refused anyway
        """Refuse."""
        reason = "a web server cannot be listed: name each object, or give a list file"
        raise UnsupportedError(redact(folder), reason)

    def write(self, url: str, source: BinaryIO, size: int) -> None:  # noqa: ARG002 - refused anyway
        """Refuse."""
        raise UnsupportedError(redact(url), "web servers are read only")

    def writing(self, url: str) -> AbstractContextManager[BinaryIO]:
        """Refuse."""
        raise UnsupportedError(redact(url), "web servers are read only")

    def swap(self, url: str, data: bytes, version: str | None) -> str:  # noqa: ARG002 - refused anyway
        """Refuse."""
        raise UnsupportedError(redact(url), "web servers are read only")

    def delete(self, url: str) -> None:
        """Refuse."""
        raise UnsupportedError(redact(url), "web servers are read only")

    def keeps_conditions(self, url: str) -> bool:
        """Refuse."""
        raise UnsupportedError(redact(url), "web servers are read only")

    async def _date(self, url: str) -> str | None:
        async with self._client().head(url, allow_redirects=True) as reply:
            return reply.headers.get("Date")

    async def _head(self, url: str) -> ObjectInfo:
        async with self._client().head(url, allow_redirects=True) as reply:
            length = reply.headers.get("Content-Length")
            if reply.ok and length is not None:
                return ObjectInfo(url, int(length), _header_version(reply))
        # Some servers refuse HEAD, links signed for GET among them: one byte tells the length too.
        async with self._client().get(url, headers={"Range": "bytes=0-0"}) as reply:
            reply.raise_for_status()
            total = reply.headers.get("Content-Range", "").rpartition("/")[2]
            if not total.isdecimal():
                raise UnsupportedError(redact(url), "the server does not tell the object's length")
            return ObjectInfo(url, int(total), _header_version(reply))

    async def _get(self, transfer: Transfer, attempt: int) -> None:
        span = transfer.range
        async with self._client().get(transfer.url, headers={"Range": span} if span else {}) as reply:
            reply.raise_for_status()
            transfer.accept(
                version=_header_version(reply),
                span=reply.headers.get("Content-Range"),
                length=reply.content_length,
            )
            async for chunk in reply.content.iter_any():
                transfer.take(chunk, attempt)

    def _client(self) -> aiohttp.ClientSession:
        if self._session is None:
            seconds = self._section.timeout_seconds
            trusted = ssl.create_default_context(cafile=self._section.ca_bundle)
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=CONNECTIONS, ssl=trusted),
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=seconds, sock_read=seconds),
                headers={"Accept-Encoding": "identity"},
                auto_decompress=False,
            )
            self._close_at_exit(self._session.close)
        return self._session


def _header_version(reply: aiohttp.ClientResponse) -> str:
    return reply.headers.get("ETag", "").strip('"') or reply.headers.get("Last-Modified", "")
