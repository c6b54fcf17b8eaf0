"""All object storage: ranged reads, writes and listings of local files, S3 and web servers.

The only module that knows fsspec, s3fs, botocore and aiohttp. Their own retries are off; there is one
layer of retries (`stream/retry.py`), and it asks only for the bytes that are still missing.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import io
import os
import ssl
import threading
import weakref
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeVar
from urllib.parse import urlsplit

import aiohttp
import fsspec.asyn
import s3fs
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
from streamswav.errors import (
    ConfigError,
    DeniedError,
    NotFoundError,
    StorageError,
    UnsupportedError,
)
from streamswav.stream.local import LocalFiles
from streamswav.stream.retry import OnRequest, Retrier, TransientError
from streamswav.stream.transfer import Transfer, refusal
from streamswav.stream.urls import (
    HTTP,
    LOCAL,
    ObjectInfo,
    fixed_part,
    is_pattern,
    join,
    matches,
    redact,
    scheme_of,
)

__all__ = ["ObjectInfo", "Store", "is_pattern", "join", "redact"]

CHUNK_BYTES = 256 << 10
PART_BYTES = 8 << 20
PARTS_IN_FLIGHT = 4
MOST_PARTS = 10_000
CONNECTIONS = 64

Objects = list[ObjectInfo]
Result = TypeVar("Result")

_DEFAULTS = StorageSection()
_FAILURES = (BotoCoreError, ClientError, ResponseParserError, aiohttp.ClientError, OSError)


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
            DeniedError: no permission, no room.
        """
        self._place(url).write(url, io.BytesIO(data), len(data))

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

    def _place(self, url: str) -> _Place:
        scheme = scheme_of(url)
        if scheme in LOCAL:
            return LocalFiles()
        kind = _Web if scheme in HTTP else _S3
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
    def write(self, url: str, source: BinaryIO, size: int) -> None: ...
    def delete(self, url: str) -> None: ...


class _Remote:
    """Storage behind a network: every request is a coroutine on fsspec's event loop, run by a retrier."""

    def __init__(self, section: StorageSection, on_request: OnRequest) -> None:
        if section.ca_bundle and not Path(section.ca_bundle).is_file():
            raise ConfigError("storage.ca_bundle", "there is no such file", value=section.ca_bundle)
        self._section = section
        self._loop = fsspec.asyn.get_loop()
        self._retrier = Retrier(section.deadline_seconds, on_request)

    def info(self, url: str) -> ObjectInfo:
        return self._call(url, "info", lambda: self._head(url))

    def read(self, url: str, start: int, stop: int | None, version: str | None) -> bytes:
        transfer = Transfer(url, start, stop, version)
        self._call(url, "read", lambda: self._resume(transfer), received=lambda: len(transfer.body))
        return bytes(transfer.body)

    async def _resume(self, transfer: Transfer) -> None:
        """A connection may break after its last byte: then nothing is left to ask for."""
        if transfer.missing:
            await self._get(transfer)
            transfer.finish()

    async def _head(self, url: str) -> ObjectInfo:
        raise NotImplementedError

    async def _get(self, transfer: Transfer) -> None:
        raise NotImplementedError

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


class _S3(_Remote):
    """Amazon S3 and what speaks its protocol, through the client that s3fs sets up."""

    def __init__(self, section: StorageSection, on_request: OnRequest) -> None:
        super().__init__(section, on_request)
        endpoint = section.endpoint_url
        if endpoint is not None and not (
            endpoint.startswith(("http://", "https://")) and urlsplit(endpoint).hostname
        ):
            raise ConfigError(
                "storage.endpoint_url", "must be http://HOST:PORT or https://HOST", value=redact(endpoint)
            )
        self._filesystem = _filesystem(section)
        self._connected = False

    def walk(self, folder: str, stem: str = "") -> Iterator[ObjectInfo]:
        bucket, key = _split(folder)
        prefix = f"{key.rstrip('/')}/{stem}" if key else stem
        token: dict[str, str] = {}
        while True:
            page = self._call(folder, "list", functools.partial(self._page, bucket, prefix, token))
            for entry in page.get("Contents", []):
                if not entry["Key"].endswith("/"):
                    yield ObjectInfo(f"s3://{bucket}/{entry['Key']}", entry["Size"], _version(entry))
            if not page.get("NextContinuationToken"):
                return
            token = {"ContinuationToken": page["NextContinuationToken"]}

    def write(self, url: str, source: BinaryIO, size: int) -> None:
        if size <= 2 * PART_BYTES:
            data = source.read(size)
            self._request(url, "write", "put_object", Body=data)
        else:
            self._write_parts(url, source, size)

    def delete(self, url: str) -> None:
        bucket, key = _split(url)
        if not key.strip("/"):
            raise UnsupportedError(redact(url), "a whole bucket is not deleted")
        for info in list(self.walk(url)):
            self._request(info.url, "delete", "delete_object")
        self._request(f"s3://{bucket}/{key}", "delete", "delete_object")

    def _write_parts(self, url: str, source: BinaryIO, size: int) -> None:
        length = max(PART_BYTES, -(-size // MOST_PARTS))
        upload = self._request(url, "write", "create_multipart_upload")["UploadId"]
        lock = threading.Lock()

        def send(number: int) -> dict[str, Any]:
            with lock:
                source.seek((number - 1) * length)
                data = source.read(length)
            reply = self._request(url, "write", "upload_part", UploadId=upload, PartNumber=number, Body=data)
            return {"PartNumber": number, "ETag": reply["ETag"]}

        try:
            with ThreadPoolExecutor(PARTS_IN_FLIGHT) as pool:
                parts = list(pool.map(send, range(1, -(-size // length) + 1)))
            self._complete(url, upload, parts, size)
        except BaseException:
            with contextlib.suppress(StorageError):
                self._request(url, "abort", "abort_multipart_upload", UploadId=upload)
            raise

    def _complete(self, url: str, upload: str, parts: list[dict[str, Any]], size: int) -> None:
        try:
            self._request(
                url,
                "write",
                "complete_multipart_upload",
                UploadId=upload,
                MultipartUpload={"Parts": parts},
            )
        except NotFoundError:
            # A first attempt may have gone through with its answer lost: the upload is then unknown.
            if self.info(url).size != size:
                raise

    def _request(self, url: str, operation: str, method: str, **arguments: Any) -> dict[str, Any]:
        bucket, key = _split(url)

        async def request() -> dict[str, Any]:
            client = await self._client()
            reply: dict[str, Any] = await getattr(client, method)(Bucket=bucket, Key=key, **arguments)
            return reply

        return self._call(url, operation, request)

    async def _page(self, bucket: str, prefix: str, token: dict[str, str]) -> dict[str, Any]:
        client = await self._client()
        page: dict[str, Any] = await client.list_objects_v2(Bucket=bucket, Prefix=prefix, **token)
        return page

    async def _head(self, url: str) -> ObjectInfo:
        bucket, key = _split(url)
        client = await self._client()
        try:
            reply = await client.head_object(Bucket=bucket, Key=key)
        except ClientError as error:
            if error.response["Error"]["Code"] in ("400", "403"):
                # The answer to HEAD has no body, hence no reason; that to GET has.
                (await client.get_object(Bucket=bucket, Key=key, Range="bytes=0-0"))["Body"].close()
            raise
        return ObjectInfo(url, reply["ContentLength"], _version(reply))

    async def _get(self, transfer: Transfer) -> None:
        bucket, key = _split(transfer.url)
        span = transfer.range
        wanted = {"Range": span} if span else {}
        reply = await (await self._client()).get_object(Bucket=bucket, Key=key, **wanted)
        body = reply["Body"]
        try:
            transfer.accept(
                version=_version(reply),
                span=reply.get("ContentRange"),
                length=reply.get("ContentLength"),
            )
            while chunk := await body.read(CHUNK_BYTES):
                transfer.body += chunk
        finally:
            body.close()

    async def _client(self) -> Any:
        client = await self._filesystem.set_session()
        if not self._connected:
            self._connected = True
            self._close_at_exit(client.close)
        return client


class _Web(_Remote):
    """Web servers, read-only."""

    _session: aiohttp.ClientSession | None = None

    def walk(self, folder: str, stem: str = "") -> Iterator[ObjectInfo]:  # noqa: ARG002 - refused anyway
        reason = "a web server cannot be listed: name each object, or give a list file"
        raise UnsupportedError(redact(folder), reason)

    def write(self, url: str, source: BinaryIO, size: int) -> None:  # noqa: ARG002 - refused anyway
        raise UnsupportedError(redact(url), "web servers are read only")

    def delete(self, url: str) -> None:
        raise UnsupportedError(redact(url), "web servers are read only")

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

    async def _get(self, transfer: Transfer) -> None:
        span = transfer.range
        async with self._client().get(transfer.url, headers={"Range": span} if span else {}) as reply:
            reply.raise_for_status()
            transfer.accept(
                version=_header_version(reply),
                span=reply.headers.get("Content-Range"),
                length=reply.content_length,
            )
            async for chunk in reply.content.iter_any():
                transfer.body += chunk

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
            return DeniedError(url, f"no credentials were found ({hint})")
        case SSOError() | TokenRetrievalError():
            return DeniedError(url, "the single sign-on has expired (aws sso login)")
        case ParamValidationError() | aiohttp.InvalidURL():
            return UnsupportedError(url, "this is not a valid name")
        case ReadTimeoutError() | ConnectTimeoutError() | TimeoutError():
            return TransientError("timeout", "timed out")
    inner = getattr(error, "kwargs", {}).get("error") or error
    if isinstance(inner, aiohttp.ClientConnectorCertificateError):
        reason = "the server's certificate is not trusted (storage.ca_bundle names other authorities)"
        return UnsupportedError(url, reason)
    return TransientError("error", redact(f"{type(inner).__name__}: {inner}"))


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


def _split(url: str) -> tuple[str, str]:
    bucket, _, key = url.removeprefix("s3://").partition("/")
    return bucket, key


def _version(reply: dict[str, Any]) -> str:
    """ETag without quotes, since some servers leave them out in listings; times in whole seconds."""
    tag, modified = reply.get("ETag"), reply.get("LastModified")
    return str(tag).strip('"') if tag else str(int(modified.timestamp())) if modified else ""


def _header_version(reply: aiohttp.ClientResponse) -> str:
    return reply.headers.get("ETag", "").strip('"') or reply.headers.get("Last-Modified", "")


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
