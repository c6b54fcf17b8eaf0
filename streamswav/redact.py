"""Keeps secrets out of whatever a process says or writes: the one place that knows what they look like.

Two kinds are found: those whose form gives them away (in URLs, `NAME=value`, headers, AWS key ids), and the
values of environment variables whose names say that they are secret.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

HIDDEN = "***"

_SCHEMES = ("http", "https", "s3")
_USER = re.compile(r"(?<=://)[^/?#\s'\"]+@")
_QUERY = re.compile(r"[?#][^\s'\")]*")
_END = r"(?=[:.,;]*(?:[\s'\"<>)]|$))"  # punctuation that follows belongs to the sentence
_URL_QUERY = re.compile(rf"((?:https?|s3)://[^\s?#'\"<>]+)[?#][^\s'\"<>)]*?{_END}", re.IGNORECASE)
_SIGNED = re.compile(
    r"\b(X-(?:Amz|Goog)-(?:Signature|Credential|Security-Token)|AWSAccessKeyId|Credential|Signature|sig)"
    r"=[^\s&'\",;]+",
    re.IGNORECASE,
)
_NAME = r"[\w.-]*(?:secret|token|passwor[dt]|passwd|(?:api|access|private)[_-]?key)[\w.-]*"
_WHOLE_NAME = re.compile(_NAME, re.IGNORECASE)
_NAMED = re.compile(
    rf"({_NAME}['\"]?\s*[=:]\s*)(?:(['\"]).*?(?:\2|$|(?=\n))|[^\s&,;'\"]+?(?=[:.]*(?:[\s&,;'\"]|$)))",
    re.IGNORECASE,
)
_BEARER = re.compile(r"\b(Bearer|Authorization:\s*\w+)\s+[\w.~+/=:-]{4,}", re.IGNORECASE)
_AWS_KEY_ID = re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b")

_SECRET_NAME = re.compile(
    r"SECRET|TOKEN|PASSWORD|PASSWD|CREDENTIAL|(?:^|_)(?:API|ACCESS)?_?KEY(?:_ID)?$|APIKEY"
)
_NO_SECRET_NAME = re.compile(r"^STREAMSWAV_.*__|_(?:FILE|PATH|DIR|URI|EXPIRATION)$")
_SHORTEST = 8
"""Characters of a value that is looked for: one like `true` stands where it is no secret, too."""


def redact(url: str) -> str:
    """Return the URL fit for a log: without user, password, query string and fragment."""
    if url.startswith("@"):  # a list of URLs
        return "@" + redact(url[1:])
    if url.partition("://")[0] not in _SCHEMES:
        return url
    return _QUERY.sub("", _USER.sub("", url))


@dataclass(frozen=True)
class Redactor:
    """Takes secrets out of text.

    Attributes:
        values: those that are known by their value, longest first.
    """

    values: tuple[str, ...] = ()

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Redactor:
        """Know the secrets of an environment, as they are and as they stand in URLs."""
        values = {
            value.strip()
            for name, value in environment.items()
            if _SECRET_NAME.search(name.upper()) and not _NO_SECRET_NAME.search(name.upper())
        }
        long = {value for value in values if len(value) >= _SHORTEST}
        every = long | {quote(value, safe="") for value in long}
        return cls(tuple(sorted(every, key=lambda value: (-len(value), value))))

    def text(self, text: str) -> str:
        """Return the text without secrets."""
        for value in self.values:
            if value in text:
                text = re.sub(rf"(?<![A-Za-z0-9]){re.escape(value)}(?![A-Za-z0-9])", HIDDEN, text)
        text = _URL_QUERY.sub(r"\1", _USER.sub("", text))
        text = _SIGNED.sub(rf"\1={HIDDEN}", text)
        text = _NAMED.sub(rf"\1\2{HIDDEN}\2", text)
        return _AWS_KEY_ID.sub(HIDDEN, _BEARER.sub(rf"\1 {HIDDEN}", text))

    def tree(self, value: Any) -> Any:
        """Return lists and mappings with every text in them redacted, those under secret names as a whole."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, Mapping):
            return {name: HIDDEN if _hides(name, each) else self.tree(each) for name, each in value.items()}
        if isinstance(value, list | tuple):
            return [self.tree(each) for each in value]
        return value


def _hides(name: object, value: object) -> bool:
    return isinstance(name, str) and isinstance(value, str) and bool(value and _WHOLE_NAME.fullmatch(name))
