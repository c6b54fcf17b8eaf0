"""Computing what a network says of images, stretch by stretch of their shards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from streamswav.crops import normalise
from streamswav.errors import NonFiniteError
from streamswav.processes import Failed, open_loader
from streamswav.transfer.extraction.reading import Account, ImageBatch, ImageBatches, Rows
from streamswav.transfer.extraction.stretches import Stretch

Network = Callable[[Tensor], Mapping[str, Tensor]]
"""Normalised images [B, 3, S, S] to tensors [B, ..] by name; images do not influence one another."""


@dataclass(frozen=True)
class Part:
    """A stretch that is computed.

    Attributes:
        stretch: which.
        outputs: of the network for its N images, [N, ..] on the CPU; empty where there are none.
        rows: of the images.
        account: of the stretch.
    """

    stretch: Stretch
    outputs: Mapping[str, Tensor]
    rows: Rows
    account: Account


@dataclass
class _Begun:
    """A stretch of which batches have come."""

    outputs: dict[str, list[Tensor]] = field(default_factory=dict)
    rows: Rows = field(default_factory=Rows)

    def add(self, batch: ImageBatch, outputs: Mapping[str, Tensor]) -> None:
        for name, output in outputs.items():
            self.outputs.setdefault(name, []).append(output)
        self.rows += batch.rows


@torch.no_grad()
def compute_parts(
    network: Network,
    batches: ImageBatches,
    *,
    workers: int,
    device: torch.device,
    on_batch: Callable[[int], None],
) -> Iterator[Part]:
    """Yield the stretches of this rank's tasks as they are done.

    What is in them, to the last bit, depends neither on the number of workers nor on where an earlier run
    of this was interrupted: batches end with their stretch.

    Args:
        network: computes on `device`.
        batches: of this rank.
        workers: processes that read and decode; 0: this one does.
        device: of the images that the network gets.
        on_batch: called after every batch with its images, and with 0 now and then while none comes.

    Raises:
        NonFiniteError: an output is not a number.
        StorageError: a shard is out of reach, or is no longer what was listed.
    """
    if not any(batches.tasks):
        return
    preprocessing = batches.source.preprocessing
    begun: dict[Stretch, _Begun] = {}
    with open_loader(batches, workers=workers) as items:
        for item in items:
            if isinstance(item, Failed):
                raise item.error
            if item is None:
                on_batch(0)
                continue
            making = begun.setdefault(item.stretch, _Begun())
            if item.rows:
                pixels = item.pixels.to(device)
                images = normalise(pixels, mean=preprocessing.mean, std=preprocessing.std)
                making.add(item, {name: _finite(each) for name, each in network(images).items()})
            if item.account:
                del begun[item.stretch]
                outputs = {name: torch.cat(each) for name, each in making.outputs.items()}
                yield Part(item.stretch, outputs, making.rows, item.account)
            on_batch(len(item.rows))


def _finite(output: Tensor) -> Tensor:
    """Bring an output to the CPU.

    Raises:
        NonFiniteError: it is not a number.
    """
    output = output.cpu()
    if not output.isfinite().all():
        raise NonFiniteError("the trunk gives features that are not finite; its training diverged")
    return output
