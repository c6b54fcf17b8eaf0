"""Amazon S3 and what speaks its protocol."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, cast

from botocore.exceptions import ClientError

from streamswav.config import StorageSection, check_endpoint
from streamswav.errors import ChangedError, NotFoundError, UnsupportedError
from streamswav.redact import redact
from streamswav.stream.store.clients import Clients
from streamswav.stream.store.remote import Remote
from streamswav.stream.store.retry import OnRequest
from streamswav.stream.store.transfer import Transfer
from streamswav.stream.store.upload import PART_BYTES, Upload
from streamswav.stream.store.urls import ObjectInfo

__all__ = ["CHUNK_BYTES", "PART_BYTES", "S3"]

CHUNK_BYTES = 256 << 10


class S3(Remote):
    """Amazon S3 and what speaks its protocol, through the client that s3fs sets up."""

    def __init__(self, section: StorageSection, on_request: OnRequest) -> None:
        super().__init__(section, on_request)
        check_endpoint(section)
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
        with self.writing(url) as file:
            shutil.copyfileobj(source, file, max(1, min(size, PART_BYTES)))

    @contextmanager
    def writing(self, url: str) -> Iterator[BinaryIO]:
        """Give a file to write into; the object appears once the context ends without an error."""
        upload = Upload(self._request, url)
        try:
            yield cast("BinaryIO", upload)
            upload.commit(lambda: self.info(url).size)
        except BaseException:
            upload.abort()
            raise

    def swap(self, url: str, data: bytes, version: str | None) -> str:
        """Replace an object if it is of this version; `None`: there must be none.

        The version is compared before, and the server asked to compare it again as it writes (If-Match,
        If-None-Match). Servers that do not know the condition say so, or ignore it as rclone does: there two
        may pass the first comparison at the same moment.
        """
        try:
            now: str | None = self.info(url).version
        except NotFoundError:
            now = None
        if now != version:
            raise ChangedError(redact(url), "another process has written it")
        condition = {"IfNoneMatch": "*"} if version is None else {"IfMatch": f'"{version}"'}
        try:
            reply = self._request(url, "write", "put_object", Body=data, **condition)
        except UnsupportedError:
            reply = self._request(url, "write", "put_object", Body=data)
        except ChangedError:
            # A first attempt may have gone through with its answer lost.
            found, now = self.read_version(url)
            if found != data:
                raise
            return now
        return _version(reply)

    def delete(self, url: str) -> None:
        """Remove an object, or all below a folder."""
        bucket, key = _split(url)
        if not key.strip("/"):
            raise UnsupportedError(redact(url), "a whole bucket is not deleted")
        for info in list(self.walk(url)):
            self._request(info.url, "delete", "delete_object")
        self._request(f"s3://{bucket}/{key}", "delete", "delete_object")

    def keeps_conditions(self, url: str) -> bool:
        """Write an object twice, the second time on the condition that there is none."""
        self._request(url, "write", "put_object", Body=b"")
        try:
            self._request(url, "write", "put_object", Body=b"again", IfNoneMatch="*")
        except ChangedError:
            return True
        except UnsupportedError:
            pass
        return False

    def _request(self, url: str, operation: str, method: str, **arguments: Any) -> dict[str, Any]:
        bucket, key = _split(url)

        async def request() -> dict[str, Any]:
            async with self._clients.lease() as client:
                reply: dict[str, Any] = await getattr(client, method)(Bucket=bucket, Key=key, **arguments)
            return reply

        return self._call(url, operation, request)

    async def _date(self, url: str) -> str | None:
        """Ask for the start of a listing: a refusal tells the time as well, that of a wrong clock too."""
        async with self._clients.lease() as client:
            try:
                reply = await client.list_objects_v2(Bucket=_split(url)[0], MaxKeys=1)
            except ClientError as error:
                reply = error.response
        date: str | None = reply["ResponseMetadata"].get("HTTPHeaders", {}).get("date")
        return date

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
