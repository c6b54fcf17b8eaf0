"""The S3 client of a process, and the next one when its credentials are no longer taken."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import s3fs

from streamswav.config import StorageSection
from streamswav.stream.store.remote import CONNECTIONS

RENEW_SECONDS = 5.0


@dataclass(eq=False, slots=True)
class _Client:
    """One client, with the credentials that were there when it was made, and how many requests use it."""

    filesystem: s3fs.S3FileSystem
    made: float
    users: int = 0
    connected: Any = None

    async def connect(self) -> Any:
        self.connected = await self.filesystem.set_session()
        return self.connected

    async def close(self) -> None:
        if self.connected is not None:
            await self.connected.close()


class Clients:
    """Lends out a client. All but `doubt` runs on fsspec's event loop, hence needs no lock.

    botocore renews roles and tokens itself, but what it read from a file or the environment it keeps for
    good. A new session walks the whole chain again.
    """

    def __init__(self, section: StorageSection) -> None:
        self._section = section
        self._current: _Client | None = None
        self._doubted = False

    def doubt(self) -> None:
        """Have the next request make a client anew, unless this one was made a moment ago."""
        current = self._current
        self._doubted = current is not None and time.monotonic() - current.made >= RENEW_SECONDS

    @asynccontextmanager
    async def lease(self) -> AsyncIterator[Any]:
        """Lend the client; one that was replaced meanwhile is closed when its last request ends."""
        old, client = self._current, self._newest()
        client.users += 1
        try:
            if old is not None and old is not client and not old.users:
                await old.close()
            yield await client.connect()
        finally:
            client.users -= 1
            if client is not self._current and not client.users:
                await client.close()

    async def close(self) -> None:
        """Close the client; one that was replaced belongs to its requests."""
        if self._current is not None:
            await self._current.close()

    def _newest(self) -> _Client:
        if self._current is None or self._doubted:
            self._current = _Client(_filesystem(self._section), time.monotonic())
            self._doubted = False
        return self._current


def _filesystem(section: StorageSection) -> s3fs.S3FileSystem:
    """Set up s3fs. All it is asked for is its client: the retries around its own calls stay out of reach."""
    style = {None: "path" if section.endpoint_url else "auto", True: "path", False: "virtual"}
    client = {"region_name": section.region, "verify": section.ca_bundle}
    return s3fs.S3FileSystem(
        anon=section.anonymous,
        endpoint_url=section.endpoint_url,
        client_kwargs={name: value for name, value in client.items() if value is not None},
        config_kwargs={
            "connect_timeout": section.timeout_seconds,
            "read_timeout": section.timeout_seconds,
            "max_pool_connections": CONNECTIONS,
            "retries": {"mode": "standard", "total_max_attempts": 1},
            "s3": {"addressing_style": style[section.path_style]},
            # Other servers than Amazon's do not know its newer checksums.
            "request_checksum_calculation": "when_required",
            "response_checksum_validation": "when_required",
        },
        asynchronous=True,  # its methods are awaited here; otherwise it would wait inside the collector
        skip_instance_cache=True,
        use_listings_cache=False,
    )
