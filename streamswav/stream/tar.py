"""A strict, incremental parser of WebDataset tars: samples, and every byte that is not one.

Python's tarfile ends in silence at a damaged header or at a cut on a 512-byte boundary. Here an archive is
complete only at its end-of-archive blocks; anything else is a `Damage` with a reason, after which parsing
goes on at the next valid header. The byte ranges of samples and damages tile the archive up to its end.

Format: POSIX ustar with PAX (`x`, `g`) and GNU (`L`, `K`) extensions; members are grouped into samples by
the WebDataset convention: the path up to the first dot of the file name is the key, the rest the extension.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from streamswav.errors import DamageError

IMAGE_EXTENSIONS = frozenset(
    {"jpg", "jpeg", "png", "webp", "avif", "gif", "bmp", "ppm", "pgm", "tif", "tiff", "jp2", "img", "image"}
)

_BLOCK = 512
_ZEROS = bytes(_BLOCK)
_COMPRESSED = (b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"\xfd7zXZ", b"BZh")  # gzip, zstd, xz, bzip2
_REGULAR = (b"0", b"\0", b"7")
_EXTENSION_LIMIT = 1 << 20  # a long name or PAX record; anything larger is damage, not a name


@dataclass(frozen=True, slots=True)
class TarSample:
    """All members of one key.

    Attributes:
        key: path in the archive up to the first dot of the file name.
        ordinal: number of samples before it in the archive.
        start: first byte that belongs to it (members that are no sample's count with the next one).
        stop: first byte that no longer does.
        members: bytes by lower-case extension, in the order of the archive.
    """

    key: str
    ordinal: int
    start: int
    stop: int
    members: dict[str, bytes]

    @property
    def image(self) -> bytes | None:
        """The first member with the extension of an image, or None."""
        for extension, data in self.members.items():
            if extension.rpartition(".")[2] in IMAGE_EXTENSIONS:
                return data
        return None


def label_of(members: Mapping[str, bytes]) -> int | str | None:
    """Content of the `.cls` member, a number where it is one, or None."""
    text = members.get("cls")
    if text is None:
        return None
    stripped = text.decode("utf-8", "replace").strip()
    try:
        return int(stripped)
    except ValueError:
        return stripped


@dataclass(frozen=True, slots=True)
class Damage:
    """Bytes [start, stop) that could not be parsed. An empty range tells of missing end-of-archive blocks."""

    reason: str
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class _Member:
    """One member, up to the byte `stop`; `name` is empty for what is not a regular file."""

    name: str
    stop: int
    data: bytes


def read_samples(
    blocks: Iterable[bytes], *, size: int | None = None, start: int = 0, ordinal: int = 0
) -> Iterator[TarSample | Damage]:
    """Parse an archive, or the rest of one, as its bytes arrive.

    Args:
        blocks: consecutive bytes of the archive, cut anywhere, from offset `start` on.
        size: length of the whole archive where it is known.
        start: offset of the first byte: 0, or the `start` of a sample.
        ordinal: ordinal of the sample at `start`.

    Yields:
        Samples with growing ordinals, and damages, in the order of their bytes.
    """
    group: dict[str, bytes] = {}
    key, begin, end = "", start, start
    for item in _read_members(_Feed(blocks, start), size):
        name, extension = ("", "") if isinstance(item, Damage) else _split_name(item.name)
        # A repeated extension begins a new sample of the same key: both images are there to be trained.
        if group and (isinstance(item, Damage) or (name and (name != key or extension in group))):
            yield TarSample(key, ordinal, begin, end, group)
            ordinal, begin, group = ordinal + 1, end, {}
        if isinstance(item, Damage):
            yield Damage(item.reason, begin, item.stop)
            begin = end = item.stop
        elif name:
            key, end = name, item.stop
            group[extension] = item.data
    if group:
        yield TarSample(key, ordinal, begin, end, group)


class _Feed:
    """Bytes by exact amounts from blocks of any length."""

    def __init__(self, blocks: Iterable[bytes], start: int) -> None:
        self._blocks = iter(blocks)
        self._buffer = b""
        self._at = 0
        self.offset = start

    def take(self, count: int) -> bytes:
        """Return the next `count` bytes, fewer only at the end."""
        stop = self._at + count
        if stop > len(self._buffer):
            self._fill(count)
            stop = self._at + count
        data = self._buffer[self._at : stop]
        self._at += len(data)
        self.offset += len(data)
        return data

    def back(self, count: int) -> None:
        """Give back the end of what was taken last."""
        self._at -= count
        self.offset -= count

    def _fill(self, count: int) -> None:
        parts = [self._buffer[self._at :]]
        have = len(parts[0])
        while have < count and (block := next(self._blocks, None)) is not None:
            parts.append(block)
            have += len(block)
        self._buffer, self._at = b"".join(parts), 0


def _read_members(feed: _Feed, size: int | None) -> Iterator[_Member | Damage]:
    """Yield members and damages until the end of the archive."""
    while True:
        try:
            member = _read_member(feed, size)
        except DamageError as damage:
            more = _resynchronise(feed, damage.reason)
            yield Damage(damage.reason, damage.start, feed.offset)
            if not more:
                return
        else:
            if member is None:
                return
            yield member


def _read_member(feed: _Feed, size: int | None) -> _Member | None:
    """Read one member with its extension headers; None at the end of the archive.

    Raises:
        DamageError: a bad header, a cut, or no end-of-archive blocks.
    """
    start = feed.offset
    long_name, long_size = None, None
    while True:
        header = feed.take(_BLOCK)
        if header == _ZEROS:
            _check_end(feed, start)
            return None
        _check_header(header, start, feed.offset)
        kind = header[156:157]
        length = long_size if long_size is not None else _number(header[124:136], feed.offset)
        if kind in (b"x", b"L"):
            extension = _read_extension(feed, start, length)
            if kind == b"L":
                long_name = extension.rstrip(b"\0").decode("utf-8", "replace")
            else:
                long_name, long_size = _parse_pax(extension, long_name)
            continue
        data = _read_data(feed, start, length, size)
        name = long_name if long_name is not None else _name(header)
        return _Member(name if kind in _REGULAR else "", feed.offset, data)


def _read_data(feed: _Feed, start: int, length: int, size: int | None) -> bytes:
    padded = -(-length // _BLOCK) * _BLOCK
    if size is not None and feed.offset + length > size:
        raise DamageError("truncated", start, size)
    data = feed.take(padded)
    if len(data) < length:
        raise DamageError("truncated", start, feed.offset)
    return data if len(data) == length else data[:length]


def _read_extension(feed: _Feed, start: int, length: int) -> bytes:
    if length > _EXTENSION_LIMIT:
        raise DamageError("bad_header", start, feed.offset)
    return _read_data(feed, start, length, None)


def _check_header(header: bytes, start: int, stop: int) -> None:
    """Refuse what is no whole header; the member's headers began at `start`, this one ends at `stop`."""
    if stop == len(header) and any(header.startswith(magic) for magic in _COMPRESSED):
        raise DamageError("compressed", start, stop)
    if len(header) < _BLOCK:
        raise DamageError("truncated" if stop > start else "no_end_of_archive", start, stop)
    if not _valid_checksum(header):
        raise DamageError("bad_header", stop - _BLOCK, stop)


def _valid_checksum(header: bytes) -> bool:
    """The unsigned sum of the header with its checksum field read as spaces."""
    field = header[148:156].strip(b" \0")
    try:
        return int(field, 8) == sum(header) - sum(header[148:156]) + 256
    except ValueError:
        return False


def _number(field: bytes, stop: int) -> int:
    """An octal number, or GNU's base-256 form for 8 GiB and more."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    try:
        return int(field.strip(b" \0") or b"0", 8)
    except ValueError:
        raise DamageError("bad_header", stop - _BLOCK, stop) from None


def _name(header: bytes) -> str:
    name = header[:100].partition(b"\0")[0]
    prefix = header[345:500].partition(b"\0")[0] if header[257:262] == b"ustar" else b""
    # GNU's old format keeps other fields where ustar has the prefix; its magic ends in two spaces.
    if prefix and header[257:265] != b"ustar  \0":
        name = prefix + b"/" + name
    return name.decode("utf-8", "replace")


def _parse_pax(records: bytes, name: str | None) -> tuple[str | None, int | None]:
    """Read `path` and `size` from PAX records (`LENGTH KEY=VALUE\\n`)."""
    size = None
    while records:
        length, space, _ = records.partition(b" ")
        if not space or not length.isdigit() or not 0 < int(length) <= len(records):
            break
        record = records[len(length) + 1 : int(length)].rstrip(b"\n")
        key, _, value = record.partition(b"=")
        if key == b"path":
            name = value.decode("utf-8", "replace")
        elif key == b"size" and value.isdigit():
            size = int(value)
        records = records[int(length) :]
    return name, size


def _check_end(feed: _Feed, start: int) -> None:
    """Zero blocks end an archive only if nothing but zeros follows."""
    while block := feed.take(_BLOCK):
        if block != _ZEROS[: len(block)]:
            feed.back(len(block))
            raise DamageError("zero_blocks", start, feed.offset)


def _resynchronise(feed: _Feed, reason: str) -> bool:
    """Go to the next valid header; False if the archive ends before one."""
    hopeless = reason in ("truncated", "compressed")
    while len(block := feed.take(_BLOCK)) == _BLOCK:
        if not hopeless and block[257:262] == b"ustar" and _valid_checksum(block):
            feed.back(_BLOCK)
            return True
    return False


def _split_name(path: str) -> tuple[str, str]:
    """Split into key and lower-case extension; an empty key for what is no sample's member."""
    folder, slash, base = path.rpartition("/")
    stem, dot, extension = base.partition(".")
    if not dot or not stem or not extension:
        return "", ""
    return folder + slash + stem, extension.lower()
