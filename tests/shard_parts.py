"""Shards made of parts that are known, and what a run over them must come to."""

from __future__ import annotations

import itertools
import json
import tarfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from conftest import encode_image
from runs import newest

from streamswav import cli
from streamswav.errors import EXIT_DONE
from streamswav.stream.manifest import Manifest
from streamswav.stream.outcomes import Tally, tally_one
from streamswav.stream.position import Position
from streamswav.telemetry.metrics import Metrics

JPEG = encode_image(0)


@dataclass(frozen=True)
class Part:
    """A stretch of a shard: with a key it is a sample, with a reason it is not trained; else it is the end.

    What has a reason and no outcome is quarantined.
    """

    data: bytes
    key: str = ""
    reason: str = ""
    outcome: str = "quarantined"


def tar_member(name, data, form=tarfile.USTAR_FORMAT):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    return info.tobuf(form) + data + bytes(-len(data) % 512)


def sample(key, reason="", *, form=tarfile.USTAR_FORMAT, outcome="quarantined", **members):
    members = members or {"jpg": JPEG, "cls": b"1"}
    data = b"".join(tar_member(f"{key}.{extension}", each, form) for extension, each in members.items())
    return Part(data, key, reason, outcome)


def samples(*numbers, prefix="b"):
    return [sample(f"{prefix}/{number:03d}") for number in numbers]


def damage(reason, data=b""):
    return Part(data, reason=reason)


END = Part(bytes(1024))


def join(parts):
    return b"".join(part.data for part in parts)


@dataclass
class Shards:
    """Shards in a folder, by the parts that they are made of; two whole ones beside what the test adds."""

    folder: Path
    parts: dict[str, list[Part]] = field(default_factory=dict)

    def write(self, name, parts):
        self.folder.mkdir(parents=True, exist_ok=True)
        self.parts[name] = list(parts)
        (self.folder / name).write_bytes(join(parts))

    def places(self, name):
        """(part, first byte, byte after the last) of a shard."""
        parts = self.parts[name]
        stops = itertools.accumulate(len(part.data) for part in parts)
        return [(part, stop - len(part.data), stop) for part, stop in zip(parts, stops, strict=True)]

    def lose(self, name, reason, start):
        """From `start` on the shard is one lost stretch."""
        kept = [part for part, _, stop in self.places(name) if stop <= start]
        rest = join(self.parts[name])[start:]
        assert join(kept) + rest == join(self.parts[name]), "lost from within a sample on"
        self.parts[name] = [*kept, damage(reason, rest)]


@dataclass(frozen=True)
class Ended:
    """How a run ended.

    Attributes:
        code: exit code.
        said: the lines for people.
        folder: of the run.
        metrics: of this process.
        keys: arguments with which an audit reaches the shards.
    """

    code: int
    said: list[str]
    folder: Path
    metrics: Metrics
    keys: tuple[str, ...] = ()

    @property
    def position(self):
        return Position.from_json(json.loads((newest(self.folder) / "position.json").read_text()))

    @property
    def manifest(self):
        return Manifest.from_json(json.loads((self.folder / "manifest.json").read_text()))

    def listed(self, outcome="quarantined"):
        """Entries of the side lists of an outcome."""
        files = sorted((self.folder / outcome).glob("step-*.jsonl"))
        return [json.loads(line) for file in files for line in file.read_text().splitlines()]

    def left(self):
        return [json.loads(line) for line in (self.folder / "left.jsonl").read_text().splitlines()]

    def metric(self, name, **labels):
        return self.metrics.registry.get_sample_value(f"streamswav_{name}", labels)


def check(ended, shards):
    """Hold a run that is done to what its shards are made of.

    Each stretch that is not trained is listed once, with shard, pass, reason, bytes, key and ordinal; the
    checkpoint, the metrics and an audit that reads the shards again count the same; every other sample was
    trained once, or left.
    """
    entries = check_position(ended, shards)
    quarantined = [entry for entry in entries if entry[7] == "quarantined"]
    samples_lost = sum(entry[6] is not None for entry in quarantined)
    assert ended.metric("samples_total", outcome="quarantined") == samples_lost
    size = Counter()
    for _, _, reason, start, stop, *_ in quarantined:
        size[reason] += stop - start
    for reason, count in size.items():
        assert ended.metric("quarantined_bytes_total", reason=reason) == count


def check_position(ended, shards):
    """As `check`, but for the metrics, which are of one process; return what must be listed."""
    assert (ended.code, ended.said) == (EXIT_DONE, [])
    assert cli.main(["audit", str(ended.folder), "--recount", "--workers", "1", *ended.keys]) == EXIT_DONE
    entries, usable, reasons = Counter(), Tally(), Counter()
    for index, shard in enumerate(ended.manifest.shards):
        ordinal = 0
        for part, start, stop in shards.places(shard.key):
            number = ordinal if part.key else None
            ordinal += bool(part.key)
            if part.reason:
                entries[shard.key, 0, part.reason, start, stop, part.key, number, part.outcome] += 1
                reasons[part.reason] += bool(part.key)
            elif part.key:
                usable += tally_one(ended.manifest.shards[index].digest, 0, number, start, stop)
    names = ("shard", "turn", "reason", "start", "stop", "key", "ordinal", "outcome")
    found = [*ended.listed(), *ended.listed("excluded")]
    assert Counter(tuple(each[name] for name in names) for each in found) == entries
    position = ended.position
    assert position.reasons == +reasons
    damages = Counter((each.reason, each.start, each.stop) for each in position.damages)
    assert damages == Counter(entry[2:5] for entry in entries if entry[6] is None)
    left, digests = Tally(), {shard.key: shard.digest for shard in ended.manifest.shards}
    for each in ended.left():
        left += tally_one(digests[each["shard"]], 0, each["ordinal"], each["start"], each["stop"])
    assert left.samples < position.grid.batch
    assert position.total("trained") + left == usable
    lost = sum(entry[6] is not None and entry[7] == "quarantined" for entry in entries)
    assert position.total("quarantined").samples == lost
    return entries
