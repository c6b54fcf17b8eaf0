"""The parts of a rank, as they come, and the tensors that they are in the end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from streamswav.errors import ManifestError
from streamswav.stream.labels import Label, Labels
from streamswav.training.distributed import Ranks
from streamswav.transfer.extraction.part_folder import Record
from streamswav.transfer.extraction.part_formats import decode_part
from streamswav.transfer.extraction.parts import Part
from streamswav.transfer.extraction.reading import Account, Rows
from streamswav.transfer.extraction.stretches import Stretch


@dataclass(frozen=True)
class Features:
    """Features of N images, sorted by shard and place in the shard.

    Attributes:
        features: float32, or float16 where asked for, [N, F] on the CPU, as they leave the trunk (not
            normalised).
        labels: int64 [N]; where an image may have several int8 [N, C]: 1, 0, or -1 where nobody knows.
        keys: N names.
        skipped: samples and unreadable stretches that were not used, by reason.
        places: int64 [N, 2], of each image the index of its shard and its number in the shard.
    """

    features: Tensor
    labels: Tensor
    keys: tuple[str, ...]
    skipped: Mapping[str, int]
    places: Tensor


@dataclass
class Collected:
    """The parts of a rank, in the order of their arrival.

    Attributes:
        on_images: called with the number of images that were computed so far.
        dtype: that features are held in.
        parts: features and the rest of each; no features where there are no images.
        skipped: samples and damages by reason.
        images: that were computed.
    """

    on_images: Callable[[int], None]
    dtype: torch.dtype = torch.float32
    parts: dict[Stretch, tuple[Tensor | None, Rows]] = field(default_factory=dict)
    skipped: Counter[str] = field(default_factory=Counter)
    images: int = 0

    def found(self, record: Record, files: Mapping[str, bytes]) -> None:
        """Take a part that was there before."""
        rows, arrays = decode_part(files)
        features = torch.from_numpy(arrays["features"]) if arrays else None
        self._add(record.stretch, features, rows, record.account)

    def computed(self, part: Part) -> None:
        """Take a new part."""
        self._add(part.stretch, part.outputs.get("features"), part.rows, part.account)

    def on_batch(self, images: int) -> None:
        """Count images."""
        self.images += images
        if images:
            self.on_images(self.images)

    def facts(self) -> int:
        """Return the images so far."""
        return self.images

    def on_facts(self, facts: Sequence[int]) -> None:
        """Nothing follows from them."""

    def _add(self, stretch: Stretch, features: Tensor | None, rows: Rows, account: Account) -> None:
        self.parts[stretch] = None if features is None else features.to(self.dtype), rows
        for (_, reason), count in account.passed.items():
            self.skipped[reason] += count
        self.skipped.update(account.damages)

    def join(self, labels: Labels, ranks: Ranks) -> Features:
        """Join the parts in the shards' order; each is let go as soon as its rows are placed.

        Raises:
            ManifestError: no rank has any.
        """
        stretches = sorted(self.parts)
        rows = [self.parts[stretch][1] for stretch in stretches]
        count = sum(map(len, rows))
        width = max((each.shape[1] for each, _ in self.parts.values() if each is not None), default=0)
        all_labels = [label for each in rows for label in each.labels]
        highest = max(
            (max(label, default=-1) for label in all_labels if isinstance(label, tuple)), default=-1
        )
        told = ranks.gather((count, width, highest, dict(self.skipped)))
        if not any(each[0] for each in told):
            raise ManifestError(_explain_nothing([each[3] for each in told], labels))
        features = torch.empty(count, max(each[1] for each in told), dtype=self.dtype)
        begin = 0
        for stretch in stretches:
            part = self.parts.pop(stretch)[0]
            if part is not None:
                features[begin : begin + len(part)] = part
                begin += len(part)
        places = [
            (stretch.shard, ordinal)
            for stretch, each in zip(stretches, rows, strict=True)
            for ordinal in each.ordinals
        ]
        classes = labels.classes or 1 + max(each[2] for each in told)
        return Features(
            features,
            _to_tensor(all_labels, classes if labels.multi else None),
            tuple(key for each in rows for key in each.keys),
            dict(sorted(self.skipped.items())),
            torch.tensor(places, dtype=torch.int64).reshape(-1, 2),
        )


def _to_tensor(labels: Sequence[Label | None], classes: int | None) -> Tensor:
    """Return int64 [N], or of several labels an image int8 [N, C]."""
    if classes is None:
        return torch.tensor(labels, dtype=torch.int64)
    hot = torch.zeros(len(labels), classes, dtype=torch.int8)
    for row, label in zip(hot, labels, strict=True):
        numbers = label if isinstance(label, tuple) else ()
        row[[number for number in numbers if number >= 0]] = 1
        row[[~number for number in numbers if number < 0]] = -1
    return hot


def _explain_nothing(skipped: Sequence[Mapping[str, int]], labels: Labels) -> str:
    total = sum((Counter(each) for each in skipped), Counter[str]())
    counts = ", ".join(f"{count} {reason}" for reason, count in sorted(total.items()))
    return f"no image to evaluate with ({counts or 'there are no samples'}); {labels.needed}"
