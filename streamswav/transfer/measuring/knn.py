"""Weighted nearest neighbours (paper, appendix B.6): exact, in bounded memory, on one rank or many.

Every rank holds its share of the training features. In rounds, all test features of the round are gathered on
all ranks (F float32 an image), each rank finds the nearest in its share, and an image's own rank gathers and
merges what all have found (k float32 and k int64 an image and rank) and lets the neighbours vote.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from streamswav.errors import ConfigError
from streamswav.training.distributed import Ranks
from streamswav.transfer.measuring.exchange import all_rows, rows_to
from streamswav.transfer.measuring.neighbours import Blocks, find_neighbours, merge
from streamswav.transfer.measuring.precision import MeanPrecision, measure_precision
from streamswav.transfer.measuring.results import Accuracy, Hits, count_hits

# Test images of a round, on all ranks together: at 2,048 features they are 128 MiB.
_ROUND = 16384
_VOTES_AT_ONCE = 1 << 24
_USUAL = (20, 200)


class Vote(NamedTuple):
    """Who votes, and how the votes are weighed."""

    k: int
    temperature: float


@dataclass(frozen=True)
class KnnSettings:
    """How neighbours vote.

    Attributes:
        neighbours: each k that is reported; None: 20 and 200, as far as there are so many training images.
        temperatures: each T of a neighbour's weight, exp(cosine / T), that is reported.
    """

    neighbours: tuple[int, ...] | None = None
    temperatures: tuple[float, ...] = (0.1,)

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

    def votes(self, images: int) -> tuple[Vote, ...]:
        """Return every k with every temperature."""
        return tuple(Vote(k, temperature) for k in self.fit(images) for temperature in self.temperatures)


def measure_knn(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    *,
    classes: int,
    settings: KnnSettings,
    device: torch.device | str = "cpu",
    ranks: Ranks | None = None,
    places: tuple[Tensor, Tensor] | None = None,
    alive: Callable[[], object] = lambda: None,
) -> dict[Vote, Accuracy | MeanPrecision]:
    """Classify by weighted votes of the nearest training images.

    The result does not depend on the number of ranks, nor on which has which images.

    Args:
        train: features [N, F], float32 or float16; lengths do not matter. With ranks: this one's share.
        train_labels: classes [N], in 0 to C - 1; or of multi-label images [N, C]: 1, 0, or -1 (not counted).
        test: features [M, F]; this rank's share.
        test_labels: classes [M], of which one that is in no training image is never hit; or [M, C].
        classes: C.
        settings: every k and temperature.
        device: where similarities are computed; with ranks their own.
        ranks: who share the images; a share may be empty.
        places: int64 [N] and [M], growing: where this rank's images are in the order of all training and of
            all test images. By default the ranks' shares follow one another.
        alive: called as the work goes on.

    Returns:
        On all ranks: accuracy, or with several labels an image mean average precision, by vote.

    Raises:
        ConfigError: a k above all N that was asked for.
    """
    ranks = ranks or Ranks(device=torch.device(device))
    bank_places, test_places = places or (_follow(train, ranks), _follow(test, ranks))
    bank = _Bank.share(train, train_labels, bank_places, ranks)
    votes = settings.votes(len(bank.labels))
    blocks = Blocks.fit(sum(ranks.gather(len(test))), len(bank.labels))
    scores: dict[Vote, list[Tensor]] = {vote: [torch.empty(0, classes)] for vote in votes}
    hits = dict.fromkeys(votes, Hits())
    multi = train_labels.dim() == 2
    most = max(vote.k for vote in votes)
    at_once = max(1, _VOTES_AT_ONCE // (classes * (most if multi else 1)))
    for found in _rounds(bank, test, most, blocks=blocks, ranks=ranks, alive=alive):
        for rows, similarities, voters in _in_parts(*found, at_once):
            for vote in votes:
                weights = weigh(similarities[:, : vote.k], vote.temperature)
                votes_cast = count_votes(weights, bank.labels[voters[:, : vote.k]], classes)
                if multi:
                    scores[vote].append(votes_cast.cpu())
                else:
                    hits[vote] += count_hits(votes_cast, test_labels[rows].to(votes_cast.device))
    if multi:
        return {vote: _precision(torch.cat(scores[vote]), test_labels, test_places, ranks) for vote in votes}
    return {vote: _total(each, ranks).accuracy for vote, each in hits.items()}


def weigh(similarities: Tensor, temperature: float) -> Tensor:
    """Return exp(cosine / T) of neighbours [Q, k], best first, divided by the nearest one's weight.

    The quotient changes no vote, and keeps small temperatures from overflowing.
    """
    return ((similarities - similarities[:, :1]) / temperature).exp()


def count_votes(weights: Tensor, voters: Tensor, classes: int) -> Tensor:
    """Add up weights [Q, k] by the voters' classes.

    Args:
        weights: of the neighbours.
        voters: their classes [Q, k], or [Q, k, C] of multi-label images.
        classes: C.

    Returns:
        Scores [Q, C]: -inf where nobody votes; of multi-label images the weighted share of neighbours that
        have the class.
    """
    if voters.dim() == 3:
        return (weights[:, :, None] * (voters > 0)).sum(dim=1) / weights.sum(dim=1, keepdim=True)
    votes = weights.new_zeros(len(weights), classes).scatter_add_(1, voters, weights)
    return votes.where(votes > 0, -torch.inf)


@dataclass(frozen=True)
class _Bank:
    """This rank's training features, the index of each among all, and the labels of all, in that order."""

    features: Tensor
    indices: Tensor
    labels: Tensor

    @staticmethod
    def share(features: Tensor, labels: Tensor, places: Tensor, ranks: Ranks) -> _Bank:
        every, order = torch.cat(all_rows(places, ranks)).sort()
        own = torch.searchsorted(every, places.to(every.device))
        return _Bank(features, own, torch.cat(all_rows(labels, ranks))[order])

    def nearest(
        self, queries: Tensor, k: int, blocks: Blocks, device: torch.device, alive: Callable[[], object]
    ) -> tuple[Tensor, Tensor]:
        """Return similarities [Q, k] and indices among all ranks' images [Q, k]."""
        similarities, rows = find_neighbours(
            queries, self.features, k, blocks=blocks, device=device, alive=alive
        )
        there = similarities.isfinite()
        if len(self.indices):
            rows = rows.where(~there, self.indices[rows.where(there, 0)])
        return similarities, rows


def _rounds(
    bank: _Bank, test: Tensor, k: int, *, blocks: Blocks, ranks: Ranks, alive: Callable[[], object]
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield, in turn, where some of this rank's test images begin, and their neighbours.

    They are similarities [q, k] and indices [q, k] among all ranks' images.
    """
    own = max(1, _ROUND // ranks.world_size)
    for begin in range(0, max(ranks.gather(len(test))), own):
        asked = all_rows(test[begin : begin + own], ranks)
        nearest = bank.nearest(torch.cat(asked), k, blocks, ranks.device, alive)
        counts = [len(each) for each in asked]
        for owner, share in enumerate(zip(*(torch.split(each, counts) for each in nearest), strict=True)):
            if not counts[owner]:
                continue
            near, where = (rows_to(owner, each, ranks) for each in share)
            if owner == ranks.rank:
                yield begin, *merge(torch.cat(near, dim=1), torch.cat(where, dim=1), k)
        alive()


def _in_parts(begin: int, near: Tensor, where: Tensor, most: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Cut what a round has found into parts of so many images, with the rows of each."""
    for some, voters in zip(torch.split(near, most), torch.split(where, most), strict=True):
        yield slice(begin, begin + len(some)), some, voters
        begin += len(some)


def _follow(rows: Tensor, ranks: Ranks) -> Tensor:
    """Return places where the ranks' shares follow one another."""
    begin = sum(ranks.gather(len(rows))[: ranks.rank])
    return torch.arange(begin, begin + len(rows))


def _precision(scores: Tensor, labels: Tensor, places: Tensor, ranks: Ranks) -> MeanPrecision:
    """Measure on rank 0, with all test images in their order, since the bootstrap draws by number."""
    order = torch.cat(all_rows(places, ranks)).argsort()
    every, wanted = (torch.cat(all_rows(each, ranks))[order].cpu() for each in (scores, labels))
    return ranks.lead(lambda: measure_precision(every, wanted))


def _total(hits: Hits, ranks: Ranks) -> Hits:
    return Hits(*ranks.total([hits.top1, hits.top5, hits.images]))
