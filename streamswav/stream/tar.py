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
        members: bytes by lower-case extension, in the order of the archive; empty in what was parsed only
            for its place.
        reason: why it was passed over (`too_large`); empty for what was read.
    """

    key: str
    ordinal: int
    start: int
    stop: int
    members: dict[str, bytes]
    reason: str = ""

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
class _Header:
    """What precedes a member's bytes; `name` is empty for what is not a regular file."""

    name: str
    start: int
    length: int

    @property
    def padding(self) -> int:
        """Zeros that follow its bytes."""
        return -self.length % _BLOCK


def read_samples(
    blocks: Iterable[bytes],
    *,
    size: int | None = None,
    start: int = 0,
    ordinal: int = 0,
    limit: int | None = None,
) -> Iterator[TarSample | Damage]:
    """Parse an archive, or the rest of one, as its bytes arrive.

    Between two samples nothing is held but the block that is being parsed.

    Args:
        blocks: consecutive bytes of the archive, cut anywhere, from offset `start` on.
        size: length of the whole archive where it is known.
        start: offset of the first byte: 0, or the `start` of a sample.
        ordinal: ordinal of the sample at `start`.
        limit: most bytes of a sample's members; a larger one is passed over, with the reason `too_large`.

    Yields:
        Samples with growing ordinals, and damages, in the order of their bytes.
    """
    feed, group = _Feed(blocks, start), _Group(start, ordinal, limit)
    while True:
        try:
            header = _read_header(feed, size)
            if header is None:
                break
            key, extension = _split_name(header.name)
            # The member's bytes stay where they are until the sample before it is out of the way.
            if key and group.ends_before(key, extension):
                yield group.close()
            group.read(feed, header, key, extension)
        except DamageError as damage:
            if group.members:
                yield group.close()
            more = _resynchronise(feed, damage.reason)
            yield group.pass_over(damage.reason, feed.offset)
            if not more:
                return
    # What is no sample's at the very end counts with the last one.
    if group.members:
        yield group.close(group.seen)
    elif group.seen > group.start:
        yield group.pass_over("no_sample", group.seen)


class _Group:
    """The sample that is being gathered.

    Attributes:
        start: first byte that is not accounted for.
        seen: the byte after the last member, be it a sample's or not.
        members: bytes by extension; without their bytes once the sample is too large.
    """

    def __init__(self, start: int, ordinal: int, limit: int | None) -> None:
        self.start = self.seen = self._stop = start
        self.members: dict[str, bytes] = {}
        self._ordinal, self._limit = ordinal, limit
        self._key, self._size, self._reason = "", 0, ""

    def ends_before(self, key: str, extension: str) -> bool:
        """Tell whether a member begins another sample: one of the same key where the extension repeats."""
        return bool(self.members) and (key != self._key or extension in self.members)

    def read(self, feed: _Feed, header: _Header, key: str, extension: str) -> None:
        """Read a member's bytes, or pass over them: those of no sample's, and of one that is too large.

        Raises:
            DamageError: the archive ends within them.
        """
        size = self._size + header.length
        if key and self._limit is not None and size > self._limit:
            self._reason, self.members = "too_large", dict.fromkeys(self.members, b"")
        if key and not self._reason:
            data = feed.take(header.length)
            whole = len(data) == header.length
        else:
            data = b""
            whole = feed.skip(header.length) == header.length
        if not whole:
            raise DamageError("truncated", header.start, feed.offset)
        feed.skip(header.padding)
        self.seen = feed.offset
        if key:
            self._key, self._size, self._stop = key, size, feed.offset
            self.members[extension] = data

    def close(self, stop: int | None = None) -> TarSample:
        """Return the sample, which ends at `stop`, else after its last member; the next one begins there."""
        stop = self._stop if stop is None else stop
        members = {} if self._reason else self.members
        sample = TarSample(self._key, self._ordinal, self.start, stop, members, self._reason)
        self._ordinal += 1
        self._begin(stop)
        return sample

    def pass_over(self, reason: str, stop: int) -> Damage:
        """Return the damage from the last sample to `stop`; the next one begins there."""
        damage = Damage(reason, self.start, stop)
        self._begin(stop)
        return damage

    def _begin(self, start: int) -> None:
        self.start, self.members = start, {}
        self.seen = max(self.seen, start)
        self._size, self._reason = 0, ""


class _Feed:
    """Bytes by exact amounts from blocks of any length, of which it holds one at a time."""

    def __init__(self, blocks: Iterable[bytes], start: int) -> None:
        self._blocks = iter(blocks)
        self._block = b""
        self._at = 0
        self.offset = start

    def take(self, count: int) -> bytes:
        """Return the next `count` bytes, fewer only at the end."""
        stop = self._at + count
        if stop <= len(self._block):
            data = self._block[self._at : stop]
            self._at = stop
        else:
            data = b"".join(self._parts(count))
        self.offset += len(data)
        return data

    def skip(self, count: int) -> int:
        """Pass over the next `count` bytes, and return how many there were."""
        stop = self._at + count
        if stop <= len(self._block):
            self._at, passed = stop, count
        else:
            passed = sum(map(len, self._parts(count)))
        self.offset += passed
        return passed

    def back(self, data: bytes) -> None:
        """Give back what was taken last."""
        self._block, self._at = data + self._block[self._at :], 0
        self.offset -= len(data)

    def _parts(self, count: int) -> Iterator[memoryview]:
        while count:
            if self._at == len(self._block):
                block = next(self._blocks, None)
                if block is None:
                    return
                self._block, self._at = block, 0
            part = memoryview(self._block)[self._at : self._at + count]
            self._at += len(part)
            count -= len(part)
            yield part


def _read_header(feed: _Feed, size: int | None) -> _Header | None:
    """Read a member's header with its extension headers; None at the end of the archive.

    Raises:
        DamageError: a bad header, a cut, or no end-of-archive blocks.
    """
    start = feed.offset
    long_name, long_size = None, None
    while True:
        extended = feed.offset > start
        header = feed.take(_BLOCK)
        if header == _ZEROS and not extended:
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
        if size is not None and feed.offset + length > size:
            raise DamageError("truncated", start, size)
        name = long_name if long_name is not None else _name(header)
        return _Header(name if kind in _REGULAR else "", start, length)


def _read_extension(feed: _Feed, start: int, length: int) -> bytes:
    if length > _EXTENSION_LIMIT:
        raise DamageError("bad_header", start, feed.offset)
    data = feed.take(length)
    if len(data) < length:
        raise DamageError("truncated", start, feed.offset)
    feed.skip(-length % _BLOCK)
    return data


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
    digits = field.strip(b" \0")
    # Python would also take a sign and underscores.
    if digits.strip(b"01234567"):
        raise DamageError("bad_header", stop - _BLOCK, stop)
    return int(digits or b"0", 8)


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
            feed.back(block)
            raise DamageError("zero_blocks", start, feed.offset)


def _resynchronise(feed: _Feed, reason: str) -> bool:
    """Go to the next valid header; False if the archive ends before one."""
    hopeless = reason in ("truncated", "compressed")
    while len(block := feed.take(_BLOCK)) == _BLOCK:
        if not hopeless and block[257:262] == b"ustar" and _valid_checksum(block):
            feed.back(block)
            return True
    return False


def _split_name(path: str) -> tuple[str, str]:
    """Split into key and lower-case extension; an empty key for what is no sample's member."""
    folder, slash, base = path.rpartition("/")
    stem, dot, extension = base.partition(".")
    if not dot or not stem or not extension:
        return "", ""
    return folder + slash + stem, extension.lower()
