"""Weighted nearest neighbours (paper, appendix B.6): exact, and in bounded memory at any size."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from streamswav.errors import ConfigError
from streamswav.transfer.results import Accuracy, measure_accuracy

# 1024 x 65536 similarities are 256 MiB, and still large enough to keep a matrix product busy.
_QUERIES_AT_ONCE = 1024
_BANK_AT_ONCE = 65536
_USUAL = (20, 200)


@dataclass(frozen=True)
class KnnSettings:
    """How neighbours vote.

    Attributes:
        neighbours: each k that is reported; None: 20 and 200, as far as there are so many training images.
        temperature: T of a neighbour's weight, exp(cosine / T).
    """

    neighbours: tuple[int, ...] | None = None
    temperature: float = 0.1

    def fit(self, images: int) -> tuple[int, ...]:
        """Return each k to report of `images` training images.

        Raises:
            ConfigError: a k that was asked for is larger.
        """
        if self.neighbours is None:
            return tuple(k for k in _USUAL if k <= images) or (images,)
        most = max(self.neighbours)
        if most > images:
            raise ConfigError("--k", f"there are only {images} training images", value=most)
        return self.neighbours

    def left_out(self, images: int) -> tuple[int, ...]:
        """Return each usual k that `images` training images are too few for."""
        return () if self.neighbours else tuple(k for k in _USUAL if k > images)


def measure_knn(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    *,
    classes: int,
    settings: KnnSettings,
    device: torch.device | str = "cpu",
) -> dict[int, Accuracy]:
    """Classify by weighted votes of the nearest training images.

    Args:
        train: features [N, F]; lengths do not matter.
        train_labels: classes [N], in 0 to C - 1.
        test: features [M, F].
        test_labels: classes [M]; one that is in no training image is never hit.
        classes: C.
        settings: every k, and the temperature.
        device: where similarities are computed.

    Returns:
        Accuracy by k.

    Raises:
        ConfigError: a k above N that was asked for.
    """
    scores: dict[int, list[Tensor]] = {k: [] for k in settings.fit(len(train))}
    for queries in _unit_parts(test, _QUERIES_AT_ONCE, device):
        bank = _unit_parts(train, _BANK_AT_ONCE, device)
        similarities, indices = find_neighbours(queries, bank, max(scores))
        weights = weigh(similarities, settings.temperature)
        voters = train_labels.to(device)[indices]
        for k, found in scores.items():
            found.append(count_votes(weights[:, :k], voters[:, :k], classes).cpu())
    return {k: measure_accuracy(torch.cat(found), test_labels) for k, found in scores.items()}


def find_neighbours(queries: Tensor, bank: Iterable[Tensor], k: int) -> tuple[Tensor, Tensor]:
    """Find the k most similar rows of a bank that comes in parts.

    Args:
        queries: unit features [Q, F].
        bank: unit features [n, F] each, at least k in all, on the same device.
        k: how many.

    Returns:
        Cosine similarities [Q, k], best first, and indices [Q, k] into the whole bank.
    """
    best = queries.new_empty(len(queries), 0)
    where = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    begin = 0
    for part in bank:
        near = (queries @ part.T).topk(min(k, len(part)), dim=1)
        candidates = torch.cat([best, near.values], dim=1)
        best, chosen = candidates.topk(min(k, candidates.shape[1]), dim=1)
        where = torch.cat([where, near.indices + begin], dim=1).gather(1, chosen)
        begin += len(part)
    return best, where


def weigh(similarities: Tensor, temperature: float) -> Tensor:
    """Return exp(cosine / T) of neighbours [Q, k], best first, divided by the nearest one's weight.

    The quotient changes no vote, and keeps small temperatures from overflowing.
    """
    return ((similarities - similarities[:, :1]) / temperature).exp()


def count_votes(weights: Tensor, voters: Tensor, classes: int) -> Tensor:
    """Add up weights [Q, k] by the voters' classes [Q, k] to scores [Q, C]; -inf where nobody votes."""
    votes = weights.new_zeros(len(weights), classes).scatter_add_(1, voters, weights)
    return votes.where(votes > 0, -torch.inf)


def _unit_parts(features: Tensor, rows: int, device: torch.device | str) -> Iterator[Tensor]:
    """Yield so many rows at a time; a normalised copy of the whole would double what is held."""
    for part in torch.split(features, rows):
        yield F.normalize(part.to(device), dim=1)
