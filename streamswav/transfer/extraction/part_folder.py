"""A folder of parts: what was computed of stretches of shards, written as it comes, found again later.

embed.json                          what the parts hold, of which shards; once all are there, the totals
part-000012-00003.json              record of stretch 3 of shard 12, written last: with it the part is there
part-000012-00003.features.npy, ..  its files, as the record lists them with size and SHA-256
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from streamswav.errors import ConfigError, DataError, NotFoundError
from streamswav.stream.manifest import Manifest
from streamswav.stream.outcomes import PassedOver
from streamswav.stream.store import Store, join, redact
from streamswav.transfer.extraction.reading import Account
from streamswav.transfer.extraction.stretches import End, Stretch

INDEX_FILE = "embed.json"
FORMAT_VERSION = 1

_NAME = re.compile(r"part-(\d{6,})-(\d{5,})")
_RECORD_END = ".json"


@dataclass(frozen=True)
class Record:
    """What is known of a part.

    Attributes:
        stretch: which.
        shard: key of its shard.
        images: in it.
        account: of the stretch.
        files: (size in bytes, SHA-256) of each, by what follows the part's name.
    """

    stretch: Stretch
    shard: str
    images: int
    account: Account
    files: Mapping[str, tuple[int, str]]


class PartFolder:
    """Parts below a URL. Safe to use from several threads, and from several ranks for different parts.

    Args:
        url: of the folder, local or s3://.
        store: where it lies.
        about: what decides the parts; plain data, each entry under a name that a person understands.
        option: name of the option that gave the URL, for messages.
    """

    def __init__(self, url: str, store: Store, about: Mapping[str, Any], *, option: str) -> None:
        self.url, self._store, self._about, self._option = url, store, _plain(about), option

    def begin(self, notes: Mapping[str, Any]) -> None:
        """Find the folder as it was left, or describe it.

        Args:
            notes: kept beside the description, for people; they may be others the next time.

        Raises:
            ConfigError: it holds parts of something else; says what differs. Or it is a web address.
            StorageError: it cannot be read or written.
        """
        if self.url.startswith(("http://", "https://")):
            reason = "web addresses can only be read: give a folder or s3://bucket/folder"
            raise ConfigError(self._option, reason, value=redact(self.url))
        try:
            held = self._store.read(join(self.url, INDEX_FILE))
        except NotFoundError:
            index = {"format_version": FORMAT_VERSION, "about": self._about, "notes": notes}
            self._store.write(join(self.url, INDEX_FILE), _dump(index))
            return
        found = read_index(self.url, held, option=self._option)["about"]
        for name in {**self._about, **found}:
            if found.get(name) != self._about.get(name):
                there, here = (_short(each.get(name)) for each in (found, self._about))
                reason = f"{INDEX_FILE} there is of another {name} ({there}, now it is {here})"
                raise ConfigError(
                    self._option, f"{reason}: choose another folder, or remove it", value=redact(self.url)
                )

    def stretches(self) -> list[Stretch]:
        """Return the stretches that have a record, sorted."""
        names = (info.url.rpartition("/")[2] for info in self._store.list(self.url))
        records = (name.removesuffix(_RECORD_END) for name in names if name.endswith(_RECORD_END))
        return sorted(stretch for name in records if (stretch := parse_name(name)))

    def load(self, stretch: Stretch) -> tuple[Record, dict[str, bytes]] | None:
        """Return a part with its files; None where it is not whole."""
        name = part_name(stretch)
        try:
            record = read_record(self._store.read(join(self.url, name + _RECORD_END)), stretch)
            files = {end: self._store.read(join(self.url, name + end)) for end in record.files}
        except (NotFoundError, DataError):
            return None
        whole = all(summary(files[end]) == listed for end, listed in record.files.items())
        return (record, files) if whole else None

    def save(self, record: Record, files: Mapping[str, bytes]) -> None:
        """Write a part: its files, then its record."""
        name = part_name(record.stretch)
        for end, data in files.items():
            self._store.write(join(self.url, name + end), data)
        self._store.write(join(self.url, name + _RECORD_END), write_record(record))

    def read_quarantined(self, stretch: Stretch) -> list[dict[str, Any]]:
        """Return what could not be used of a stretch: shard, reason, byte range, and of a sample its name."""
        record = read_record(self._store.read(join(self.url, part_name(stretch) + _RECORD_END)), stretch)
        return [{"shard": record.shard, **_quarantined_json(each)} for each in record.account.quarantined]

    def finish(
        self,
        notes: Mapping[str, Any],
        totals: Mapping[str, Any],
        listed: Sequence[tuple[Stretch, str, int]],
    ) -> None:
        """Say that all parts are there.

        Args:
            notes: as in `begin`.
            totals: over all parts.
            listed: every part, with the key of its shard and its images.
        """
        parts = [[part_name(stretch), shard, images] for stretch, shard, images in listed]
        index = {"format_version": FORMAT_VERSION, "about": self._about, "notes": notes}
        whole = _dump({**index, "totals": totals, "parts": parts})
        url = join(self.url, INDEX_FILE)
        if self._store.read(url) != whole:
            self._store.write(url, whole)


def part_name(stretch: Stretch) -> str:
    """Return what the names of a part's files begin with."""
    return f"part-{stretch.shard:06d}-{stretch.number:05d}"


def parse_name(name: str) -> Stretch | None:
    """Return the stretch of a name that `part_name` gave; None for other names."""
    match = _NAME.fullmatch(name)
    return Stretch(int(match[1]), int(match[2])) if match else None


def summary(data: bytes) -> tuple[int, str]:
    """Return what a record says of a file."""
    return len(data), hashlib.sha256(data).hexdigest()


def read_index(url: str, data: bytes, *, option: str) -> dict[str, Any]:
    """Read `embed.json` of a folder.

    Raises:
        ConfigError: under the name `option`: it is something else, or of another version.
    """
    try:
        index = json.loads(data)
        version, about = index["format_version"], index["about"]
    except (ValueError, KeyError, TypeError):
        version, about = None, None
    if not isinstance(about, dict):
        raise ConfigError(option, f"{INDEX_FILE} is damaged, or is something else", value=redact(url))
    if version != FORMAT_VERSION:
        reason = f"{INDEX_FILE} is of format {version}, this version reads {FORMAT_VERSION}"
        raise ConfigError(option, reason, value=redact(url))
    return dict(index)


def describe_shards(manifest: Manifest) -> dict[str, Any]:
    """Return what tells shards from others: number, bytes, and a hash over keys, sizes and versions."""
    whole = hashlib.blake2b(digest_size=16)
    for shard in manifest.shards:
        whole.update(f"{shard.key}\0{shard.size}\0{shard.version}\n".encode())
    return {"count": len(manifest.shards), "bytes": manifest.size, "digest": whole.hexdigest()}


def write_record(record: Record) -> bytes:
    """Return a record as JSON, with a digest over itself."""
    account = record.account
    passed: dict[str, dict[str, int]] = {}
    for (outcome, reason), count in sorted(account.passed.items()):
        passed.setdefault(outcome, {})[reason] = count
    values = {
        "shard": record.shard,
        "images": record.images,
        "samples": account.samples,
        "passed": passed,
        "quarantined": [_quarantined_json(each) for each in account.quarantined],
        "end": asdict(account.end),
        "files": {end: list(listed) for end, listed in record.files.items()},
    }
    return _dump({**values, "digest": _digest(values)})


def read_record(data: bytes, stretch: Stretch) -> Record:
    """Read what `write_record` gave.

    Raises:
        DataError: it is damaged.
    """
    try:
        values = json.loads(data)
        if values.pop("digest") != _digest(values):
            raise DataError("a record is damaged")
        passed = {
            (outcome, reason): count
            for outcome, counts in values["passed"].items()
            for reason, count in counts.items()
        }
        quarantined = tuple(PassedOver(stretch.shard, 0, **each) for each in values["quarantined"])
        account = Account(values["samples"], passed, quarantined, End(**values["end"]))
        files = {end: (size, digest) for end, (size, digest) in values["files"].items()}
        return Record(stretch, values["shard"], values["images"], account, files)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise DataError("a record is damaged") from None


def _quarantined_json(each: PassedOver) -> dict[str, Any]:
    return {
        "reason": each.reason,
        "start": each.start,
        "stop": each.stop,
        "key": each.key,
        "ordinal": each.ordinal,
    }


def _digest(values: Mapping[str, Any]) -> str:
    return hashlib.blake2b(_dump(values), digest_size=8).hexdigest()


def _dump(values: Mapping[str, Any]) -> bytes:
    return json.dumps(values).encode() + b"\n"


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Bring values to what JSON gives back."""
    plain: dict[str, Any] = json.loads(json.dumps(values))
    return plain


def _short(value: object) -> str:
    """Show a value of a description in a message."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {_short(each)}" for name, each in value.items())
    return "none" if value is None else str(value)
