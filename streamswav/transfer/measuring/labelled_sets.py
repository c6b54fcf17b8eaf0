"""Labelled sets as they are handed to protocols, and as results describe them."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from streamswav.config import LabelsSection
from streamswav.stream.manifest import list_manifest
from streamswav.stream.store import Store, redact
from streamswav.training.distributed import Ranks
from streamswav.transfer.extraction.collected import Features
from streamswav.transfer.measuring.exchange import all_rows
from streamswav.transfer.measuring.results import DataUsed


def number_classes(train: Tensor, test: Tensor, ranks: Ranks) -> tuple[Tensor, Tensor, int]:
    """Number the classes that occur in the training images of all ranks.

    Args:
        train: labels [N] of this rank's images; or of images of several labels [N, C].
        test: labels [M] or [M, D].
        ranks: that have images.

    Returns:
        Classes [N] from 0 on, whatever the labels; classes [M], -1 for a label of no training image; and
        their number. Of several labels int8 [N, E] and [M, E], and E, the larger of C and D.
    """
    if train.dim() == 2:
        classes = max(train.shape[1], test.shape[1])
        several = [F.pad(each.to(torch.int8), (0, classes - each.shape[1])) for each in (train, test)]
        return several[0], several[1], classes
    names = torch.unique(torch.cat(all_rows(torch.unique(train), ranks)).cpu())
    places = torch.searchsorted(names, test).clamp(max=len(names) - 1)
    return torch.searchsorted(names, train), places.where(names[places] == test, -1), len(names)


def describe_set(
    features: Features, urls: Sequence[str], store: Store, labels: LabelsSection, ranks: Ranks
) -> DataUsed:
    """Return what all ranks together used."""
    told = ranks.gather((len(features.keys), digest_labelled(features), dict(features.skipped)))
    if features.labels.dim() == 2:
        classes = max(ranks.gather(features.labels.shape[1]))
    else:
        classes = len(torch.unique(torch.cat(all_rows(torch.unique(features.labels), ranks))))
    skipped: Counter[str] = sum((Counter(each) for *_, each in told), Counter())
    return DataUsed(
        [redact(url) for url in urls],
        sum(images for images, *_ in told),
        classes,
        dict(sorted(skipped.items())),
        f"{sum(digest for _, digest, _ in told) % (1 << 128):032x}",
        ranks.lead(lambda: list_manifest(urls, store).digest),
        redact(labels.file) or labels.member,
    )


def digest_labelled(features: Features) -> int:
    """Return a sum over keys and labels: of the same images the same, in any order and any shares."""
    total = 0
    for key, label in zip(features.keys, features.labels.tolist(), strict=True):
        text = f"{key}\0{label}".encode("utf-8", "surrogateescape")
        total += int.from_bytes(hashlib.blake2b(text, digest_size=16).digest(), "big")
    return total % (1 << 128)


def flat_places(places: Tensor) -> Tensor:
    """Return places [N, 2] as numbers [N] that grow with them."""
    return (places[:, 0] << 40) | places[:, 1]
