"""A pass over shards for what a network says of their images, on all ranks; interrupted, it goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from streamswav.training.distributed import Ranks
from streamswav.transfer.extraction.part_folder import PartFolder, Record
from streamswav.transfer.extraction.part_formats import Layout
from streamswav.transfer.extraction.part_writer import PartWriter
from streamswav.transfer.extraction.parts import Network, Part, compute_parts
from streamswav.transfer.extraction.reading import ImageBatches, ImageSource
from streamswav.transfer.extraction.stretches import End, Stretch, list_tasks, share_out
from streamswav.transfer.extraction.together import Together

_LOADS_AT_ONCE = 8


class Listener(Protocol):
    """What is done with the parts of a rank."""

    def found(self, record: Record, files: Mapping[str, bytes]) -> None:
        """Hear of a part that was there before."""

    def computed(self, part: Part) -> None:
        """Hear of a part that is new."""

    def on_batch(self, images: int) -> None:
        """Hear of a batch, or of none for a while (0)."""

    def facts(self) -> Any:
        """Return what the other ranks are told of this one every few seconds; plain data."""

    def on_facts(self, facts: Sequence[Any]) -> None:
        """Hear what all ranks told; what this raises is raised on all of them."""


@dataclass(frozen=True)
class Job:
    """A pass over shards.

    Attributes:
        source: the shards.
        network: what is computed of images.
        ranks: that share the work.
        workers: processes of each rank that read and decode; 0: the rank does.
        batch: images through the network at once.
        device: of the network.
        stops: of each shard, the ordinal from which on samples are left out; None: none are.
        folder: where parts are kept; None: nowhere.
        layout: of their files.
    """

    source: ImageSource
    network: Network
    ranks: Ranks
    workers: int
    batch: int
    device: torch.device
    stops: Sequence[int | None]
    folder: PartFolder | None = None
    layout: Layout = "npy"

    def run(self, listener: Listener, *, give_up: Callable[[], bool] = lambda: False) -> None:
        """Give every part to the listener of one rank: what is in the folder already, then what is computed.

        Raises:
            DrainedError: a rank was asked to stop; the parts that were done are in the folder.
            StreamswavError: what a rank, or its listener, raised; likewise.
        """
        ends = self._find(listener)
        tasks = list_tasks(ends, stops=self.stops)
        sizes = [shard.size for shard in self.source.reader.manifest.shards]
        world_size, processes = self.ranks.world_size, max(1, self.workers)
        shares = share_out(tasks, sizes, processes=world_size * processes)
        batches = ImageBatches(self.source, shares[self.ranks.rank :: world_size], self.batch)
        together: Together[Any] = Together(
            self.ranks, facts=listener.facts, on_facts=listener.on_facts, give_up=give_up
        )
        together.run(lambda: self._compute(batches, listener, together))

    def _compute(self, batches: ImageBatches, listener: Listener, together: Together[Any]) -> None:
        shards = [shard.key for shard in self.source.reader.manifest.shards]

        def on_batch(images: int) -> None:
            listener.on_batch(images)
            together.look()

        with PartWriter(self.folder, shards, self.layout, multi=self.source.labels.multi) as writer:
            for part in compute_parts(
                self.network, batches, workers=self.workers, device=self.device, on_batch=on_batch
            ):
                listener.computed(part)
                writer.save(part)

    def _find(self, listener: Listener) -> dict[Stretch, End]:
        """Read the parts that are there; each rank reads a share of them, which then is its own."""
        folder, ranks = self.folder, self.ranks
        if folder is None:
            return {}
        listed = ranks.lead(folder.stretches)
        found = ranks.each(lambda: list(_load(folder, listed[ranks.rank :: ranks.world_size], listener)))
        return dict(pair for pairs in found for pair in pairs)


def _load(
    folder: PartFolder, stretches: Sequence[Stretch], listener: Listener
) -> Iterator[tuple[Stretch, End]]:
    with ThreadPoolExecutor(_LOADS_AT_ONCE, thread_name_prefix="part-reader") as pool:
        for at in range(0, len(stretches), _LOADS_AT_ONCE):
            for loaded in pool.map(folder.load, stretches[at : at + _LOADS_AT_ONCE]):
                if loaded is not None:
                    record, files = loaded
                    listener.found(record, files)
                    yield record.stretch, record.account.end
