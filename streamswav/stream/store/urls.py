"""Names of stored objects: joining and matching them. Nothing here touches a store."""

from __future__ import annotations

import fnmatch
import re
from dataclasses import dataclass

from streamswav.errors import UnsupportedError
from streamswav.redact import redact

LOCAL = ("", "file")
HTTP = ("http", "https")
SCHEMES = (*LOCAL, *HTTP, "s3")

_MAGIC = re.compile(r"[*?\[]")


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """One stored object. `version` is its ETag, else Last-Modified, else the file's mtime in nanoseconds."""

    url: str
    size: int
    version: str


def scheme_of(url: str) -> str:
    """Return the scheme of a URL, empty for a plain path.

    Raises:
        UnsupportedError: a scheme that is not read here (`pipe:` among them).
    """
    scheme, found, _ = url.partition("://")
    if not found:
        scheme = "pipe" if url.startswith("pipe:") else ""
    if scheme not in SCHEMES:
        known = "a path, file://, s3://, http:// or https://"
        raise UnsupportedError(redact(url), f"unknown scheme {scheme!r}; what can be read is {known}")
    return scheme


def join(base: str, *parts: str) -> str:
    """Return the URL of something below a folder."""
    return "/".join([base.rstrip("/") if base != "/" else "", *(part.strip("/") for part in parts)])


def is_pattern(url: str) -> bool:
    """Tell whether the URL is a `*`, `?`, `[..]` pattern. A web address never is: it cannot be listed."""
    return scheme_of(url) not in HTTP and _MAGIC.search(url) is not None


def fixed_part(pattern: str) -> tuple[str, str]:
    """Split off the folder of a pattern that has no magic, and what its objects' names begin with."""
    magic = _MAGIC.search(pattern)
    fixed = pattern[: magic.start()] if magic else pattern
    folder, _, stem = fixed.rpartition("/")
    return folder or ("/" if fixed.startswith("/") else "."), stem


def matches(url: str, pattern: str) -> bool:
    """Tell whether an object's URL fits a pattern; no wildcard crosses a slash."""
    parts, wanted = url.split("/"), pattern.split("/")
    return len(parts) == len(wanted) and all(map(fnmatch.fnmatchcase, parts, wanted))
