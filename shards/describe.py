"""What is in shards: counts, sizes, formats, resolutions, labels. Headers are read, pixels are not."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from shards.scan import map_shards, read_shard
from streamswav.crops.decode import image_size, sniff
from streamswav.errors import DecodeError
from streamswav.stream.redaction import is_tombstone
from streamswav.stream.store import ObjectInfo, Store
from streamswav.stream.tar import Damage, TarSample

_MOST_COMMON = 5


@dataclass(slots=True)
class Contents:
    """What was counted, of one shard or of many."""

    shard_bytes: list[int] = field(default_factory=list)
    shard_samples: list[int] = field(default_factory=list)
    image_bytes: list[int] = field(default_factory=list)
    resolutions: Counter[tuple[int, int]] = field(default_factory=Counter)
    formats: Counter[str] = field(default_factory=Counter)
    extensions: Counter[str] = field(default_factory=Counter)
    labels: Counter[str] = field(default_factory=Counter)
    damaged: Counter[str] = field(default_factory=Counter)

    def add(self, other: Contents) -> None:
        """Count another's contents too."""
        self.shard_bytes += other.shard_bytes
        self.shard_samples += other.shard_samples
        self.image_bytes += other.image_bytes
        for name in ("resolutions", "formats", "extensions", "labels", "damaged"):
            getattr(self, name).update(getattr(other, name))

    def to_json(self) -> dict[str, Any]:
        """Return plain data, most common first."""
        return {
            "shards": len(self.shard_bytes),
            "samples": sum(self.shard_samples),
            "bytes": sum(self.shard_bytes),
            "bytes_per_shard": _spread(self.shard_bytes),
            "samples_per_shard": _spread(self.shard_samples),
            "bytes_per_image": _spread(self.image_bytes),
            "width": _spread([width for width, _ in self.resolutions.elements()]),
            "height": _spread([height for _, height in self.resolutions.elements()]),
            "resolutions": {
                f"{w}x{h}": count for (w, h), count in self.resolutions.most_common(_MOST_COMMON)
            },
            "formats": dict(self.formats.most_common()),
            "extensions": dict(self.extensions.most_common()),
            "classes": len(self.labels),
            "labels": dict(self.labels.most_common()),
            "damaged": dict(self.damaged.most_common()),
        }


def describe(
    shards: Sequence[ObjectInfo],
    store: Store,
    *,
    workers: int = 1,
    on_shard: Callable[[], object] = lambda: None,
) -> Contents:
    """Count what is in all shards.

    Args:
        shards: what to read.
        store: how to reach it.
        workers: processes.
        on_shard: called after each shard.
    """
    total = Contents()
    for contents in map_shards(describe_shard, shards, store, workers=workers):
        total.add(contents)
        on_shard()
    return total


def describe_shard(store: Store, info: ObjectInfo) -> Contents:
    """Count what is in one shard."""
    contents = Contents(shard_bytes=[info.size], shard_samples=[0])
    for item in read_shard(info, store):
        if isinstance(item, Damage):
            contents.damaged[item.reason] += 1
        else:
            contents.shard_samples[0] += 1
            _count_sample(item, contents)
    return contents


def format_contents(contents: dict[str, Any]) -> str:
    """Lay out `Contents.to_json()` for a person."""
    rows = [
        ("shards", f"{contents['shards']:,}"),
        ("samples", f"{contents['samples']:,}"),
        ("bytes", f"{contents['bytes']:,}"),
        ("bytes a shard", _range(contents["bytes_per_shard"])),
        ("samples a shard", _range(contents["samples_per_shard"])),
        ("bytes an image", _range(contents["bytes_per_image"])),
        ("width", _range(contents["width"])),
        ("height", _range(contents["height"])),
        ("most common", _counts(contents["resolutions"])),
        ("formats", _counts(contents["formats"])),
        ("extensions", _counts(contents["extensions"])),
        ("classes", f"{contents['classes']:,}" if contents["classes"] else "no labels (.cls)"),
        ("samples a class", _range(_spread(list(contents["labels"].values())))),
        ("damaged", _counts(contents["damaged"])),
    ]
    return "".join(f"{name:<16} {text}\n" for name, text in rows if text)


def _count_sample(sample: TarSample, contents: Contents) -> None:
    contents.extensions.update(sample.members.keys())
    if "cls" in sample.members:
        contents.labels[sample.members["cls"].decode("utf-8", "replace").strip()] += 1
    image = sample.image
    if image is None:
        contents.damaged["redacted" if is_tombstone(sample.members) else "no_image"] += 1
        return
    contents.image_bytes.append(len(image))
    contents.formats[sniff(image) or "unknown"] += 1
    try:
        height, width = image_size(image)
    except DecodeError as error:
        contents.damaged[error.reason] += 1
    else:
        contents.resolutions[width, height] += 1


def _spread(values: Sequence[int]) -> dict[str, float] | None:
    if not values:
        return None
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def _range(spread: dict[str, float] | None) -> str:
    return "min {min:,}, median {median:,.10g}, max {max:,}".format(**spread) if spread else ""


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items())
