"""The health of the representation, without labels, from what training has at hand.

The functions are pure. `Window` gathers what they need while training goes on: a few sums a step on the
device, over a sample of the rows, and nothing is read there before somebody asks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

MOMENT_ROWS = 64
"""Rows a step, of one crop, whose spread and moments are taken."""

ASSIGNED_ROWS = 128
"""Rows a step, of all crops, whose softmax over the prototypes is taken."""

RANK_ROWS = 12.5
"""Rows a dimension that RankMe needs: 25,600 for 2,048 features (Garrido et al., 2023)."""

WIDEST = 2048
"""Dimensions of which all moments are kept; of wider features every second, third, ... one."""

DUPLICATE = 0.975
"""Cosine from which two prototypes are one."""

COMPARED = 1024
"""Prototypes, and embeddings of either end of the queue, that are looked at."""

Add = Callable[[Tensor], Tensor]


def spread(embeddings: Tensor) -> Tensor:
    """Return how far unit embeddings [B, D] lie apart: their standard deviation by dimension times sqrt(D).

    1 where they fill the sphere evenly, 0 where all are one point (Chen and He, Exploring Simple Siamese
    Representation Learning, 2021, section 4.1). Embeddings that fill a plane alone may have a large one:
    `effective_rank` sees that.
    """
    return embeddings.std(dim=0).mean() * math.sqrt(embeddings.shape[1])


def effective_rank(second_moment: Tensor) -> Tensor:
    """Return RankMe of features Z [M, F] from their second moment Z'Z [F, F], float64.

    exp(-sum p ln p) over the singular values s of Z, with p = s / sum s (Garrido et al., RankMe: Assessing
    the Downstream Performance of Pretrained Self-Supervised Representations by Their Rank, 2023, equations 1
    and 2; after Roy and Vetterli, 2007). Not centred, as there. s are the roots of the eigenvalues of Z'Z;
    those within the rounding error of the largest are none. At most min(M, F).
    """
    values = torch.linalg.eigvalsh(second_moment)
    noise = values[-1] * len(values) * torch.finfo(values.dtype).eps
    roots = torch.where(values > noise, values, 0.0).sqrt()
    return entropy(roots / roots.sum()).exp()


def entropy(shares: Tensor) -> Tensor:
    """Return -sum p ln p over the last dimension, in nats."""
    each: Tensor = torch.special.entr(shares)
    return each.sum(dim=-1)


def crop_agreement(best: Tensor, assigned: Sequence[int]) -> Tensor:
    """Return for how many pairs of crops the best prototype [N, B] is the same.

    Pairs are those of the loss: an assigned crop and any other one. It is 1 also where all images have one
    prototype.
    """
    pairs = [(one, other) for one in assigned for other in range(len(best)) if one != other]
    return torch.stack([(best[one] == best[other]).float().mean() for one, other in pairs]).mean()


def usage(used: int, rows: int, prototypes: int) -> float:
    """Return the share of the prototypes in use, of those that `rows` images could have shown.

    `rows` draws out of K alike prototypes find K (1 - (1 - 1/K)^rows) different ones: K for a long window.
    In use are those that have the highest *score* of some image; codes are balanced by construction.
    """
    findable = -prototypes * math.expm1(rows * math.log1p(-1 / prototypes))
    return min(1.0, used / findable)


def unique_prototypes(prototypes: Tensor, *, compared: int = COMPARED) -> Tensor:
    """Return the share of prototypes [K, D], of unit length, that are not nearly one before them.

    As the unique prototypes of Govindarajan et al., On Partial Prototype Collapse in the DINO Family of
    Self-Supervised Methods, 2024: the first of those closer than a cosine of 0.975 stands for all. At most
    `compared` of them, evenly drawn, are held against all the others.
    """
    stride = -(-len(prototypes) // compared)
    numbers = torch.arange(0, len(prototypes), stride, device=prototypes.device)
    near = prototypes[::stride] @ prototypes.T > DUPLICATE
    before = torch.arange(len(prototypes), device=prototypes.device) < numbers[:, None]
    return 1 - (near & before).any(dim=1).float().mean()


def staleness(queue: Tensor, prototypes: Tensor, temperature: float) -> Tensor:
    """Return which share of the assignments of a queue's older half moved away from those of its newer half.

    Both halves of the embeddings [L, D], the newest first, are scored by the prototypes [K, D] of now, as the
    objective does. Images come in random order, so a network that stands still assigns both halves alike, and
    one that moves leaves the old ones where it no longer puts anything. Total variation distance of the two
    mean softmax assignments, less that of two halves dealt by turns, which is chance: 0 fresh, 1 stale.
    """
    stride = -(-len(queue) // (4 * COMPARED))
    shares = torch.softmax((queue[::stride] @ prototypes.T).float() / temperature, dim=1)
    half = len(shares) // 2
    if half < 2:
        return shares.new_zeros(())
    moved = _distance(shares[:half], shares[half : 2 * half])
    chance = _distance(shares[0::2][:half], shares[1::2][:half])
    return (moved - chance).clamp(min=0)


def gradient_norms(parts: Mapping[str, Iterable[nn.Parameter]]) -> dict[str, float]:
    """Return the norms of the last step's gradients by part, and of all; none that is not finite.

    Parts that rest have none.
    """
    by_part = {name: [p.grad for p in part if p.grad is not None] for name, part in parts.items()}
    by_part["all"] = [grad for gradients in by_part.values() for grad in gradients]
    norms = {name: float(get_total_norm(found)) for name, found in by_part.items() if found}
    return {f"gradient_norm/{name}": norm for name, norm in norms.items() if math.isfinite(norm)}


class Moments:
    """The second moment [F, F] of sampled features, in float64, and RankMe of it once they are enough."""

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._rows = 0
        self._rank: float | None = None

    def add(self, rows: Tensor) -> None:
        """Take features [n, F]."""
        rows = rows[:, :: -(-rows.shape[1] // WIDEST)].double()
        if self._sum is None:
            self._sum = rows.new_zeros(rows.shape[1], rows.shape[1])
        self._sum.addmm_(rows.T, rows)
        self._rows += len(rows)

    def rank(self) -> float | None:
        """Return RankMe of the last features that were enough; None: there were none yet."""
        if self._sum is not None and self._rows >= RANK_ROWS * len(self._sum):
            rank = float(effective_rank(self._sum))
            self._rank = rank if math.isfinite(rank) else None
            self._sum.zero_()
            self._rows = 0
        return self._rank


class Window:
    """What the steps since the last readings showed.

    Where a window between two readings has too few rows for a figure, the rows before it count as well.

    Args:
        prototypes: K.
        assigned: the crops whose codes are predicted.
        temperature: of the softmax over prototypes.
        device: where embeddings and scores are.
    """

    def __init__(
        self, prototypes: int, *, assigned: Sequence[int], temperature: float, device: torch.device
    ) -> None:
        self._prototypes, self._assigned, self._temperature = prototypes, tuple(assigned), temperature
        self._used = torch.zeros(prototypes, dtype=torch.bool, device=device)
        self._used_rows = 0
        self._shares = torch.zeros(prototypes, device=device)
        self._share_sums = torch.zeros(2, device=device)  # entropies of the rows, rows
        self._shared_rows = 0
        self._sums = torch.zeros(3, device=device)  # agreement, spread, steps
        self._embeddings, self._features = Moments(), Moments()

    def add(self, embeddings: Tensor, scores: Tensor, features: Tensor, *, skipped: Tensor) -> None:
        """Take a step's embeddings [N, B, D], scores [N, B, K] and features [N, B, F].

        One that was `skipped`, a boolean scalar, adds nothing. Nothing is read from the device.
        """
        best = scores.argmax(dim=-1)
        self._used[best.flatten()] = True
        self._used_rows += best.numel()
        kept = skipped.logical_not()
        points = _even(embeddings[self._assigned[0]], MOMENT_ROWS)
        each = torch.stack([crop_agreement(best, self._assigned), spread(points), kept.float()])
        self._sums += torch.where(kept, each, 0.0)
        self._add_shares(_even(scores.flatten(0, 1), ASSIGNED_ROWS), kept)
        self._embeddings.add(torch.where(kept, points, 0.0))
        seen = _even(features[self._assigned[0]], MOMENT_ROWS)
        self._features.add(torch.where(kept, seen, 0.0))

    def read(self, add: Add, *, ranks: int = 1, leads: bool = True) -> dict[str, float]:
        """Return the readings, over all ranks but for the ranks of matrices, and begin anew.

        Args:
            add: adds up a float64 tensor on the CPU over all ranks, which all call this after the same step.
            ranks: how many they are.
            leads: this one also tells RankMe, of its own rows.
        """
        own = (self._used.double(), self._shares.double(), self._share_sums.double(), self._sums.double())
        summed = add(torch.cat(own).cpu())
        used, shares, share_sums, sums = torch.split(summed, [len(each) for each in own])
        found = {"ln_prototypes": math.log(self._prototypes)}
        if best := self._used_rows * ranks:
            found["prototype_usage_ratio"] = usage(int((used > 0).sum()), best, self._prototypes)
        (entropies, rows), (agreement, spreads, steps) = share_sums.tolist(), sums.tolist()
        if rows:
            within, whole = entropies / rows, float(entropy(shares / rows))
            found["assignment_entropy_ratio"] = whole / math.log(self._prototypes)
            found["assignment_information_ratio"] = max(0.0, whole - within) / math.log(self._prototypes)
        if steps:
            found["crop_agreement_ratio"] = agreement / steps
            if math.isfinite(spreads):
                found["embedding_std_ratio"] = spreads / steps
        if leads:
            ranked = {"embedding_rankme": self._embeddings.rank(), "rankme": self._features.rank()}
            found |= {name: rank for name, rank in ranked.items() if rank is not None}
        self._begin(ranks)
        return found

    def _add_shares(self, scores: Tensor, kept: Tensor) -> None:
        shares = torch.softmax(scores.float() / self._temperature, dim=1)
        self._shares += torch.where(kept, shares.sum(dim=0), 0.0)
        both = torch.stack([entropy(shares).sum(), kept * len(shares)])
        self._share_sums += torch.where(kept, both, 0.0)
        self._shared_rows += len(shares)

    def _begin(self, ranks: int) -> None:
        self._sums.zero_()
        if self._used_rows * ranks >= 8 * self._prototypes:
            self._used.zero_()
            self._used_rows = 0
        if self._shared_rows * ranks >= 4 * self._prototypes:
            self._shares.zero_()
            self._share_sums.zero_()
            self._shared_rows = 0


def _even(matrix: Tensor, most: int) -> Tensor:
    """Return at most so many rows, evenly drawn."""
    return matrix[:: -(-len(matrix) // most)]


def _distance(one: Tensor, other: Tensor) -> Tensor:
    return (one.mean(dim=0) - other.mean(dim=0)).abs().sum() / 2
