"""All object storage: ranged reads, writes and listings of local files, S3 and web servers.

    Store -> LocalFiles | S3 | Web, the latter two through one layer of retries

The only package that knows fsspec, s3fs, botocore and aiohttp. Their own retries are off; ours asks only
for the bytes that are still missing.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from streamswav.config import StorageSection
from streamswav.errors import NotFoundError, UnsupportedError
from streamswav.redact import redact
from streamswav.stream.store.identity import CREDENTIALS, Identity, find_identity
from streamswav.stream.store.local import LocalFiles, leaving_no_empty_folder
from streamswav.stream.store.retry import IdentityError, OnRequest
from streamswav.stream.store.s3 import S3
from streamswav.stream.store.urls import (
    HTTP,
    LOCAL,
    ObjectInfo,
    fixed_part,
    is_pattern,
    join,
    matches,
    scheme_of,
)
from streamswav.stream.store.web import Web

__all__ = [
    "CREDENTIALS",
    "Identity",
    "IdentityError",
    "ObjectInfo",
    "Store",
    "find_identity",
    "fixed_part",
    "is_pattern",
    "join",
    "leaving_no_empty_folder",
    "redact",
]

Objects = list[ObjectInfo]
_DEFAULTS = StorageSection()


class Store:
    """Every place where data lies, by URL: a path, file://, s3://, http:// and https:// (these read-only).

    Cheap to build and to pickle: clients are made at the first request, one set a process, since they
    do not survive a fork. Safe to use from several threads.

    Attributes:
        on_request: called after every attempt over the network with its outcome (ok, throttled, error,
            timeout), its duration in seconds and the bytes received. It is not pickled.
    """

    def __init__(self, section: StorageSection = _DEFAULTS, *, on_request: OnRequest | None = None) -> None:
        self.section = section
        self.on_request = on_request
        self._places: dict[tuple[int, str], _Place] = {}

    def __getstate__(self) -> StorageSection:
        return self.section

    def __setstate__(self, section: StorageSection) -> None:
        self.__init__(section)  # type: ignore[misc]  # the state is exactly the constructor's argument

    def list(self, url: str) -> Objects:
        """Return all objects below a folder, recursively, sorted by URL.

        Raises:
            NotFoundError: no such bucket or folder. (A bucket has no folders: an empty list then.)
            DeniedError, UnsupportedError, UnavailableError: as everywhere in this class.
        """
        return sorted(self._place(url).walk(url), key=_by_url)

    def glob(self, url: str) -> Objects:
        """Return the objects that fit a pattern of `*`, `?` and `[..]`, sorted; none crosses a slash."""
        folder, stem = fixed_part(url)
        wanted = url if "/" in url else f"./{url}"
        found = self._place(url).walk(folder, stem)
        return sorted((info for info in found if matches(info.url, wanted)), key=_by_url)

    def info(self, url: str) -> ObjectInfo:
        """Return size and version of one object.

        Raises:
            NotFoundError: there is none.
            UnsupportedError: the server does not tell its length.
        """
        return self._place(url).info(url)

    def exists(self, url: str) -> bool:
        """Tell whether this is an object, or a folder that holds any."""
        try:
            self.info(url)
        except NotFoundError:
            with contextlib.suppress(NotFoundError, UnsupportedError):
                return any(True for _ in self._place(url).walk(url))
            return False
        return True

    def read_range(self, url: str, start: int, stop: int, *, version: str | None = None) -> bytes:
        """Return exactly the bytes [start, stop).

        Raises:
            ChangedError: the object is shorter, or its version is not the one given.
            UnsupportedError: the server does not honour ranges.
        """
        return self._place(url).read(url, start, stop, version) if stop > start else b""

    def read(self, url: str) -> bytes:
        """Return a whole object."""
        return self._place(url).read(url, 0, None, None)

    def write(self, url: str, data: bytes) -> None:
        """Store bytes under a name; readers see the old object or the new one, never a part.

        Raises:
            DeniedError: no permission.
            UnavailableError: no room, or no answer until the deadline.
        """
        self._place(url).write(url, io.BytesIO(data), len(data))

    def writing(self, url: str) -> AbstractContextManager[BinaryIO]:
        """Give a file to write into, without seeking; the object appears whole as the context ends.

        After an error nothing has appeared. To S3 it goes in parts while it is written. Raises what `write`
        does, as it is written or as the context ends.
        """
        return self._place(url).writing(url)

    def reading(self, url: str) -> BinaryIO:
        """Return an object as a file, which is read block by block; all of it is of one version."""
        source = _Ranges(self, self.info(url))
        return io.BufferedReader(source, self.section.block_bytes)

    def read_version(self, url: str) -> tuple[bytes, str]:
        """Return a small object and the version that `swap` takes."""
        return self._place(url).read_version(url)

    def swap(self, url: str, data: bytes, *, version: str | None) -> str:
        """Replace an object if it still has this version, and return the new one.

        Args:
            url: of the object.
            data: new content; other than any that it ever had, since a version may be a digest.
            version: as `read_version` gave it; None: there must be no such object.

        Raises:
            ChangedError: another process has written it. Where the store has no conditional writes this is
                found out by reading before, which leaves a moment in which two may pass.
        """
        return self._place(url).swap(url, data, version)

    def upload(self, path: Path, url: str) -> None:
        """Store a file, in parts if it is large; as `write`, it appears whole."""
        with path.open("rb") as file:
            self._place(url).write(url, file, path.stat().st_size)

    def download(self, url: str, path: Path) -> None:
        """Fetch an object into a file, which appears whole."""
        info = self.info(url)
        source = io.BufferedReader(_Ranges(self, info), self.section.block_bytes)
        LocalFiles().write(str(path), source, info.size)

    def delete(self, url: str) -> None:
        """Remove an object, or a folder with all it holds; nothing there is fine."""
        self._place(url).delete(url)

    def keeps_conditions(self, url: str) -> bool:
        """Tell whether the store itself refuses a write whose condition does not hold, as `swap` needs it.

        It is tried: an object of this name is there afterwards.
        """
        return self._place(url).keeps_conditions(url)

    def clock_ahead(self, url: str) -> float | None:
        """Return by how many seconds the server's clock is ahead of this machine's; None: it tells no time.

        The answer is right to a second and the time of a request.
        """
        return self._place(url).clock_ahead(url)

    def _place(self, url: str) -> _Place:
        scheme = scheme_of(url)
        if scheme in LOCAL:
            return LocalFiles()
        kind = Web if scheme in HTTP else S3
        key = (os.getpid(), kind.__name__)
        return self._places.get(key) or self._places.setdefault(key, kind(self.section, self._report))

    def _report(self, outcome: str, seconds: float, received: int) -> None:
        if self.on_request:
            self.on_request(outcome, seconds, received)


class _Place(Protocol):
    """What `Store` asks of each kind of storage."""

    def walk(self, folder: str, stem: str = "") -> Iterator[ObjectInfo]: ...
    def info(self, url: str) -> ObjectInfo: ...
    def read(self, url: str, start: int, stop: int | None, version: str | None) -> bytes: ...
    def read_version(self, url: str) -> tuple[bytes, str]: ...
    def write(self, url: str, source: BinaryIO, size: int) -> None: ...
    def writing(self, url: str) -> AbstractContextManager[BinaryIO]: ...
    def swap(self, url: str, data: bytes, version: str | None) -> str: ...
    def delete(self, url: str) -> None: ...
    def keeps_conditions(self, url: str) -> bool: ...
    def clock_ahead(self, url: str) -> float | None: ...


def _by_url(info: ObjectInfo) -> str:
    return info.url


class _Ranges(io.RawIOBase):
    """An object as a stream of ranged reads, all of one version."""

    def __init__(self, store: Store, info: ObjectInfo) -> None:
        self._store, self._info, self._position = store, info, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        stop = min(self._position + len(buffer), self._info.size)
        data = self._store.read_range(self._info.url, self._position, stop, version=self._info.version)
        buffer[: len(data)] = data
        self._position = stop
        return len(data)
