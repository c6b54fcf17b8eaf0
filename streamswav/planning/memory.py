"""Memory of one GPU by part, and the batch that fits."""

from __future__ import annotations

import bisect
from collections.abc import Callable
from dataclasses import dataclass, replace

from streamswav.config import Config
from streamswav.defaults import Facts, resolve
from streamswav.planning.ledger import CODES, PARTS
from streamswav.planning.rehearsal import Rehearsal, rehearse

CONTEXT = 512 << 20
"""CUDA context and the libraries' code, which no allocator sees."""
WORKSPACES = 1 << 30
"""cuDNN and cuBLAS: the fastest algorithms are chosen by trial and may ask for as much."""
COMMUNICATION = 512 << 20
"""NCCL's buffers, where there is more than one rank."""
FRAGMENTS = 0.05
"""Of what tensors hold: blocks of the caching allocator that are larger than what lies in them."""

FILLED = 0.8
"""Share of the memory that a default batch may take."""
LARGEST = 256
"""Images a rank that a default batch has at most."""
_AUGMENTING_BYTES = 16
"""Bytes a value of one resolution's crops while they are augmented: pixels, images, blurred ones, results."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one GPU at the moment when most is held.

    Attributes:
        parts: what tensors are for (`planning.ledger.PARTS`), then the allowances.
        phase: of the step, when the most is held.
        saved: bytes kept for the backward pass, a share of which is gone at the peak if that is later.
        codes: the most that Sinkhorn and the loss hold, at their own time.
        augmenting: the most held while crops are augmented, before the step: beside it, not on top.
        total: all parts.
    """

    parts: dict[str, int]
    phase: str
    saved: int
    codes: int
    augmenting: int
    total: int


def count_memory(rehearsal: Rehearsal, config: Config, *, world_size: int, local: int) -> Memory:
    """Add the allowances to what a rehearsed step held."""
    ledger = rehearsal.ledger
    parts = {part: ledger.peak[part] for part in PARTS}
    tensors = ledger.peak_bytes
    allowances = {
        "context": CONTEXT,
        "workspaces": WORKSPACES,
        "communication": COMMUNICATION if world_size > 1 else 0,
        "fragments": round(FRAGMENTS * tensors),
    }
    values = (count * local * 3 * size * size for count, size in _resolutions(config))
    return Memory(
        parts={**parts, **allowances},
        phase=ledger.peak_phase,
        saved=ledger.saved,
        codes=ledger.most[CODES],
        augmenting=_AUGMENTING_BYTES * max(values),
        total=tensors + sum(allowances.values()),
    )


def largest_batch(config: Config, facts: Facts, *, memory: int) -> int:
    """Return the images a rank, a power of two up to 256, of which a step fills no more than 80% of `memory`.

    At least 1, though it may not fit either.

    Args:
        config: as it was given, `training.batch` open.
        facts: of the run.
        memory: bytes of the smallest GPU.
    """
    candidates = [1 << power for power in range(LARGEST.bit_length())]

    def share(local: int) -> float:
        batch = local * facts.world_size
        training = config.training.model_copy(update={"batch": batch})
        queue = config.swav.queue_length
        swav = config.swav.model_copy(update={"queue_length": 0 if queue and queue < batch else queue})
        stream = config.stream.model_copy(update={"columns": None})
        given = config.model_copy(update={"training": training, "swav": swav, "stream": stream})
        resolved, _ = resolve(given, replace(facts, begun=None))
        held = count_memory(
            rehearse(resolved, world_size=facts.world_size),
            resolved,
            world_size=facts.world_size,
            local=local,
        )
        return held.total / memory

    return candidates[max(0, last_that_fits(candidates, share, FILLED))]


def last_that_fits(candidates: list[int], share: Callable[[int], float], most: float) -> int:
    """Return the index of the last of ascending candidates whose share is within `most`, or -1."""
    return bisect.bisect_right(candidates, most, key=share) - 1


def _resolutions(config: Config) -> list[tuple[int, int]]:
    return list(zip(config.crops.counts, config.crops.sizes, strict=True))
