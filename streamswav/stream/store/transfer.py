"""A ranged read in progress, and what a server's refusal means. Pure: no request is made here."""

from __future__ import annotations

from dataclasses import dataclass, field

from streamswav.errors import ChangedError, DeniedError, NotFoundError, StorageError, UnsupportedError
from streamswav.redact import redact
from streamswav.stream.store.retry import IdentityError, TransientError

_MISSING = {"NoSuchBucket": "there is no such bucket", "NoSuchKey": "there is no such object"}
_IDENTITY = {
    "InvalidAccessKeyId": "the server does not know the access key",
    "SignatureDoesNotMatch": "the secret key does not belong to the access key",
    "ExpiredToken": "the credentials have expired",
    "InvalidToken": "the session token is not valid",
    "RequestTimeTooSkewed": "the clock of this machine is wrong",
    "UnsupportedAlgorithm": "the server wants signed requests",
}
_ARCHIVED = "InvalidObjectState"
_REGION = {"PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "301"}
_THROTTLED = {"SlowDown", "Throttling", "ThrottlingException", "RequestLimitExceeded", "TooManyRequests"}
_TRANSIENT = {"RequestTimeout", "InternalError", "OperationAborted", "ConditionalRequestConflict"}


@dataclass(slots=True)
class Transfer:
    """A stretch of an object on its way: what has come survives a broken connection.

    `stop` is `None` for a whole object until its length is known; `version` is pinned by the first reply.
    """

    url: str
    start: int
    stop: int | None
    version: str | None
    body: bytearray = field(default_factory=bytearray)
    attempts: int = 0

    @property
    def missing(self) -> int:
        """Bytes still to come; 1 while that is unknown."""
        return 1 if self.stop is None else self.stop - self.start - len(self.body)

    @property
    def range(self) -> str | None:
        """The Range header for what is missing."""
        return None if self.stop is None else f"bytes={self.start + len(self.body)}-{self.stop - 1}"

    def begin(self) -> int:
        """Begin an attempt and return its number; what an earlier one still brings is not taken any more."""
        self.attempts += 1
        return self.attempts

    def take(self, chunk: bytes, attempt: int) -> None:
        """Take the next bytes. An attempt that was given up may not know it yet: its bytes are refused."""
        if attempt != self.attempts:
            raise TransientError("timeout", "timed out")
        self.body += chunk

    def accept(self, *, version: str, span: str | None, length: int | None) -> None:
        """Check a reply's head before its body is read.

        Content-Range is the proof that a range was honoured; the status is not: some S3 servers say 200.
        """
        if self.version not in (None, version):
            raise ChangedError(redact(self.url), "the object was replaced since it was listed")
        if self.stop is None:
            if length is None:
                raise UnsupportedError(redact(self.url), "the server does not tell the object's length")
            self.stop = length
        elif not span:
            raise UnsupportedError(redact(self.url), "the server answers a range with the whole object")
        elif not span.startswith(f"bytes {self.start + len(self.body)}-{self.stop - 1}/"):
            raise ChangedError(redact(self.url), f"gave {span} where bytes up to {self.stop} were expected")
        self.version = version

    def finish(self) -> None:
        """Make sure that the body was whole."""
        if self.missing > 0:
            raise TransientError("error", f"the connection ended {self.missing} bytes early")
        if self.missing < 0:
            raise UnsupportedError(redact(self.url), f"the server gave {-self.missing} bytes too many")


def refusal(url: str, status: int, code: str, message: str) -> Exception:
    """Return the error that an HTTP status and an S3 error code (or none) amount to."""
    if status in (405, 501):
        return UnsupportedError(url, f"the server cannot do this ({status} {code})".replace(" )", ")"))
    if status >= 500 or status in (408, 429) or code in _THROTTLED | _TRANSIENT:
        outcome = "throttled" if status in (429, 503) or code in _THROTTLED else "error"
        return TransientError(outcome, f"{status} {code}".strip())
    if status == 404:
        return NotFoundError(url, _MISSING.get(code, "there is no such object"))
    if status == 412:
        return ChangedError(url, "another process has written it")
    if status == 416:
        return ChangedError(url, "the object is shorter than expected")
    return _denial(url, status, code) or StorageError(url, f"{status} {code} {message}".strip())


def _denial(url: str, status: int, code: str) -> StorageError | None:
    if code in _REGION:
        return UnsupportedError(url, f"the bucket lies in another region: set storage.region ({code})")
    if code in _IDENTITY:
        return IdentityError(url, f"{_IDENTITY[code]} ({code})")
    if status in (401, 403):
        archived = "the object is archived and must be restored first"
        reason = archived if code == _ARCHIVED else "this identity has no permission"
        return DeniedError(url, f"{reason} ({code or status})")
    if status == 400 and code == "400":
        return IdentityError(
            url, "refused without a reason; the usual ones: a wrong region, expired credentials"
        )
    return None
