"""Amazon S3 and what speaks its protocol."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO
from urllib.parse import urlsplit

from botocore.exceptions import ClientError

from streamswav.config import StorageSection
from streamswav.errors import ConfigError, NotFoundError, StorageError, UnsupportedError
from streamswav.stream.store.clients import Clients
from streamswav.stream.store.remote import Remote
from streamswav.stream.store.retry import OnRequest
from streamswav.stream.store.transfer import Transfer
from streamswav.stream.store.urls import ObjectInfo, redact

CHUNK_BYTES = 256 << 10
PART_BYTES = 8 << 20
PARTS_IN_FLIGHT = 4
MOST_PARTS = 10_000


class S3(Remote):
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
        self._clients = Clients(section)
        self._close_at_exit(self._clients.close)

    def walk(self, folder: str, stem: str = "") -> Iterator[ObjectInfo]:
        """Yield what lies below a folder under names that begin with `stem`."""
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
        """Store `size` bytes, in parts where they are many."""
        if size <= 2 * PART_BYTES:
            data = source.read(size)
            self._request(url, "write", "put_object", Body=data)
        else:
            self._write_parts(url, source, size)

    def delete(self, url: str) -> None:
        """Remove an object, or all below a folder."""
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
            async with self._clients.lease() as client:
                reply: dict[str, Any] = await getattr(client, method)(Bucket=bucket, Key=key, **arguments)
            return reply

        return self._call(url, operation, request)

    async def _page(self, bucket: str, prefix: str, token: dict[str, str]) -> dict[str, Any]:
        async with self._clients.lease() as client:
            page: dict[str, Any] = await client.list_objects_v2(Bucket=bucket, Prefix=prefix, **token)
        return page

    async def _head(self, url: str) -> ObjectInfo:
        bucket, key = _split(url)
        async with self._clients.lease() as client:
            try:
                reply = await client.head_object(Bucket=bucket, Key=key)
            except ClientError as error:
                if error.response["Error"]["Code"] in ("400", "403"):
                    # The answer to HEAD has no body, hence no reason; that to GET has.
                    (await client.get_object(Bucket=bucket, Key=key, Range="bytes=0-0"))["Body"].close()
                raise
        return ObjectInfo(url, reply["ContentLength"], _version(reply))

    async def _get(self, transfer: Transfer, attempt: int) -> None:
        bucket, key = _split(transfer.url)
        span = transfer.range
        wanted = {"Range": span} if span else {}
        async with self._clients.lease() as client:
            reply = await client.get_object(Bucket=bucket, Key=key, **wanted)
            body = reply["Body"]
            try:
                transfer.accept(
                    version=_version(reply),
                    span=reply.get("ContentRange"),
                    length=reply.get("ContentLength"),
                )
                while chunk := await body.read(CHUNK_BYTES):
                    transfer.take(chunk, attempt)
            finally:
                body.close()

    def _on_denied(self) -> None:
        self._clients.doubt()


def _split(url: str) -> tuple[str, str]:
    bucket, _, key = url.removeprefix("s3://").partition("/")
    return bucket, key


def _version(reply: dict[str, Any]) -> str:
    """ETag without quotes, since some servers leave them out in listings; times in whole seconds."""
    tag, modified = reply.get("ETag"), reply.get("LastModified")
    return str(tag).strip('"') if tag else str(int(modified.timestamp())) if modified else ""
