"""Which samples are trained, decided before they are decoded: not what was redacted, excluded or filtered.

`stream.exclude` names files of keys, one a line, plain or gzipped: `KEY`, a sample's name in its tar up to
the first dot of the file name (`n01440764/10026`, without `.jpg`), or `SHARD:KEY` for that shard alone, as
`part-7/train-000012.tar:n01440764/10026`; SHARD is the tar's path below the folder that all stream.urls
share. Blank lines and lines that begin with # say nothing. `stream.where` is for `conditions`.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import BinaryIO, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from streamswav.config import StreamSection
from streamswav.errors import ConfigError
from streamswav.stream.conditions import Candidate, Condition, Function, SizeOf, parse
from streamswav.stream.redaction import is_tombstone
from streamswav.stream.store import Store, redact

_GZIP = b"\x1f\x8b"
_REDACTED = ("excluded", "redacted")
_LISTED = ("excluded", "list")


class Judged(Protocol):
    """What a sample must have to be judged."""

    @property
    def key(self) -> str:
        """Its name in the tar."""

    @property
    def members(self) -> dict[str, bytes]:
        """Bytes by extension."""

    @property
    def image(self) -> bytes | None:
        """Bytes of its image, if it has one."""


class Selection:
    """Tells which samples are trained. Pickled with 8 bytes an excluded key.

    Args:
        excluded: (shard key or "", sample key) of what is not trained.
        tests: conditions, all of which must hold.
        size_of: reads (height, width) from an image's header.

    Attributes:
        digest: short hash over keys and conditions, for the log.
    """

    def __init__(
        self,
        excluded: Iterable[tuple[str, str]] = (),
        tests: Sequence[Condition | Function] = (),
        *,
        size_of: SizeOf,
    ) -> None:
        anywhere, within = bytearray(), bytearray()
        for shard, key in excluded:
            if shard:
                within += _hash(f"{shard}:{key}")
            else:
                anywhere += _hash(key)
        self._anywhere, self._within = _sorted(anywhere), _sorted(within)
        self._tests, self._size_of = tuple(tests), size_of
        whole = hashlib.blake2b(self._anywhere.tobytes(), digest_size=4)
        whole.update(b"\0" + self._within.tobytes() + b"\0" + "\n".join(each.text for each in tests).encode())
        self.digest = whole.hexdigest()

    @staticmethod
    def none() -> Selection:
        """Return the selection that takes all samples but redacted ones."""
        return Selection(size_of=_no_size)

    @property
    def excluded_keys(self) -> int:
        """Keys of `stream.exclude`, each counted once."""
        return len(self._anywhere) + len(self._within)

    def judge(self, sample: Judged, shard_key: str) -> tuple[str, str] | None:
        """Return what becomes of a sample of this shard if it is not trained: outcome and short reason.

        Returns:
            ("excluded", "redacted" or "list"), ("filtered", the condition or what it missed), or None to
            train the sample.

        Raises:
            ConfigError: a function of `stream.where` raised.
        """
        members = sample.members
        if is_tombstone(members):
            return _REDACTED
        if len(self._anywhere) and _holds(self._anywhere, sample.key):
            return _LISTED
        if len(self._within) and _holds(self._within, f"{shard_key}:{sample.key}"):
            return _LISTED
        return self._filter(sample, members) if self._tests else None

    def _filter(self, sample: Judged, members: Mapping[str, bytes]) -> tuple[str, str] | None:
        candidate = Candidate(sample.key, members, sample.image, self._size_of)
        for test in self._tests:
            if reason := test.judge(candidate):
                return "filtered", reason
        return None


def load_selection(section: StreamSection, store: Store, *, size_of: SizeOf) -> Selection:
    """Read the lists of `stream.exclude` and the conditions of `stream.where`.

    Args:
        section: names them.
        store: how the lists are reached.
        size_of: reads (height, width) from an image's header, as `crops.decode.image_size` does; picklable.

    Raises:
        ConfigError: a line that can be no key; a condition that cannot be understood, or imported.
        StorageError: a list cannot be read.
    """
    tests = [parse(text) for text in section.where]
    excluded = (each for url in section.exclude for each in read_keys(url, store, option="stream.exclude"))
    return Selection(excluded, tests, size_of=size_of)


def read_keys(url: str, store: Store, *, option: str) -> Iterator[tuple[str, str]]:
    """Yield (shard key or "", sample key) for every line of a file of keys.

    Raises:
        ConfigError: under the name `option`: a line that can be no key, or a damaged gzip file.
        StorageError: the file cannot be read.
    """
    for number, text in read_lines(url, store, option=option):
        yield split_key(text, option=option, where=f"line {number} of {redact(url)}")


def read_lines(url: str, store: Store, *, option: str) -> Iterator[tuple[int, str]]:
    """Yield number and text of the lines that say something; plain or gzipped. Raises as `read_keys`."""
    data = store.read(url)
    source: BinaryIO = io.BytesIO(data)
    try:
        with cast(BinaryIO, gzip.GzipFile(fileobj=source)) if data.startswith(_GZIP) else source as lines:
            for number, line in enumerate(lines, 1):
                text = line.decode("utf-8", "replace").lstrip("\ufeff").strip()
                if text and not text.startswith("#"):
                    yield number, text
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ConfigError(option, f"{redact(url)} is damaged ({error})") from None


def split_key(text: str, *, option: str, where: str) -> tuple[str, str]:
    """Split `KEY` or `SHARD.tar:KEY` into shard key or "", and sample key.

    Raises:
        ConfigError: no sample can have this key; names the place, not the key.
    """
    shard, found, key = text.partition(".tar:")
    shard, key = (shard + ".tar", key) if found else ("", text)
    if not key or "." in key.rpartition("/")[2]:
        reason = "a key ends before the first dot of the file name: leave its extension out"
        raise ConfigError(option, f"{where} can match no sample; {reason}")
    return shard, key


def _hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=8).digest()


def _sorted(digests: bytearray) -> NDArray[np.uint64]:
    return np.unique(np.frombuffer(bytes(digests), np.uint64))


def _holds(hashes: NDArray[np.uint64], text: str) -> bool:
    wanted = np.frombuffer(_hash(text), np.uint64)
    place = int(np.searchsorted(hashes, wanted)[0])
    return place < len(hashes) and bool(hashes[place] == wanted[0])


def _no_size(_: bytes) -> tuple[int, int]:
    raise NotImplementedError("a selection without conditions asks for no size")
