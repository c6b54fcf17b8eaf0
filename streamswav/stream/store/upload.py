"""An S3 object that is written as it is made: in parts, several on their way at a time, never all at once."""

from __future__ import annotations

import io
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextlib import suppress
from typing import Any

from streamswav.errors import NotFoundError, StorageError

PART_BYTES = 8 << 20
PARTS_IN_FLIGHT = 4
PARTS_OF_A_LENGTH = 2000  # then they double: 10,000 parts are allowed, 496 GiB in all

Part = dict[str, Any]
Request = Callable[..., dict[str, Any]]


class Upload(io.RawIOBase):
    """What is written goes out in parts of 8 MiB or more; what is no more than two of them, at once.

    Args:
        request: makes one request for the object: `request(url, operation, method, **arguments)`.
        url: of the object.
    """

    def __init__(self, request: Request, url: str) -> None:
        self._request, self._url = request, url
        self._rest = bytearray()
        self._id: str | None = None
        self._size = self._number = 0
        self._sending: deque[Future[Part]] = deque()
        self._sent: list[Part] = []

    def writable(self) -> bool:
        """Always; that is what it is for."""
        return True

    def write(self, data: Any) -> int:
        """Take bytes; waits where too many parts are on their way.

        Raises:
            StorageError: a part could not be sent.
        """
        self._rest += data
        while len(self._rest) > 2 * PART_BYTES or (self._id and len(self._rest) >= self._length):
            self._send(self._length)
        return len(data)

    def commit(self, stored_size: Callable[[], int]) -> None:
        """Have the object appear.

        Args:
            stored_size: asks the server for the size of what it holds under the name.

        Raises:
            StorageError: it could not be done; nothing has appeared.
        """
        if self._id is None:
            self._request(self._url, "write", "put_object", Body=bytes(self._rest))
            return
        if self._rest:
            self._send(len(self._rest))
        while self._sending:
            self._sent.append(self._sending.popleft().result())
        self._complete(stored_size)

    def abort(self) -> None:
        """Have the server forget the parts, as far as it can be reached."""
        if self._id is not None:
            wait(self._sending)  # what is still on its way would stay behind
            with suppress(StorageError):
                self._request(self._url, "abort", "abort_multipart_upload", UploadId=self._id)

    @property
    def _length(self) -> int:
        return PART_BYTES << (self._number // PARTS_OF_A_LENGTH)

    def _send(self, length: int) -> None:
        if self._id is None:
            self._id = self._request(self._url, "write", "create_multipart_upload")["UploadId"]
        body = bytes(memoryview(self._rest)[:length])
        del self._rest[:length]
        self._size += length
        self._number += 1
        while len(self._sending) >= PARTS_IN_FLIGHT:
            self._sent.append(self._sending.popleft().result())
        part: Future[Part] = Future()
        self._sending.append(part)
        # No pool of threads: the interpreter would wait for an upload that was given up.
        arguments = (part, self._number, body)
        threading.Thread(target=self._send_part, args=arguments, daemon=True, name="upload").start()

    def _send_part(self, part: Future[Part], number: int, body: bytes) -> None:
        try:
            reply = self._request(
                self._url, "write", "upload_part", UploadId=self._id, PartNumber=number, Body=body
            )
            part.set_result({"PartNumber": number, "ETag": reply["ETag"]})
        except BaseException as error:  # it is raised where the part is waited for
            part.set_exception(error)

    def _complete(self, stored_size: Callable[[], int]) -> None:
        try:
            self._request(
                self._url,
                "write",
                "complete_multipart_upload",
                UploadId=self._id,
                MultipartUpload={"Parts": self._sent},
            )
        except NotFoundError:
            # A first attempt may have gone through with its answer lost: the upload is then unknown.
            if stored_size() != self._size:
                raise
