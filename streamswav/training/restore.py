"""Restoring a run: the newest whole checkpoint, on however many ranks there are now."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from streamswav.config import Config
from streamswav.errors import CheckpointError
from streamswav.stream.listed import find_lists
from streamswav.stream.position import Position
from streamswav.stream.store import Store
from streamswav.training.checkpoint import Checkpoint, CheckpointFolder, read_checkpoint, unpack
from streamswav.training.distributed import Ranks
from streamswav.training.history import forget_history
from streamswav.training.learner import Learner


@dataclass(frozen=True)
class Restored:
    """A run as its last checkpoint left it.

    Attributes:
        checkpoint: where it came from.
        step: optimizer steps done.
        loss_first: loss of the run's first step.
        position: of the stream.
        shared: network, optimizer and scaler.
        by_rank: random state of every rank, and what else is its own.
        health: state of the verdict; None: the checkpoint has none.
    """

    checkpoint: Checkpoint
    step: int
    loss_first: float | None
    position: Position
    shared: dict[str, Any]
    by_rank: list[dict[str, Any]]
    health: Mapping[str, Any] | None = None


def restore(folder: CheckpointFolder, store: Store, config: Config, ranks: Ranks) -> Restored | None:
    """Read the newest whole checkpoint, chosen by rank 0 for all; None where the run is new.

    Raises:
        CheckpointError: it is of another model, or none is whole.
    """
    found: list[tuple[Checkpoint, dict[str, bytes]]] = []

    def choose() -> str | None:
        newest = folder.newest()
        found.extend([newest] if newest else [])
        _forget_lists(store, config.run.directory, newest[0].step if newest else -1)
        return newest[0].url if newest else None

    url = ranks.lead(choose)
    if url is None:
        return None

    def fetch() -> None:
        """Rank 0 has read it; the others fetch it from where it lies, not through rank 0."""
        if not found:
            found.append(read_checkpoint(url, store))
        refuse_other_model(found[0][0], describe_model(config))

    ranks.each(fetch)
    ((checkpoint, files),) = found
    run = json.loads(files["run.json"])
    return Restored(
        checkpoint,
        step=run["step"],
        loss_first=run["loss_first"],
        position=Position.from_json(json.loads(files["position.json"])),
        shared=unpack(files["model.pt"]),
        by_rank=unpack(files["ranks.pt"]),
        health=json.loads(files.get("health.json", b"null")),
    )


def _forget_lists(store: Store, directory: str, step: int) -> None:
    """Remove lists of what came after a step: it comes again, and its outcome may be another then."""
    for _, written, url in list(find_lists(store, directory)):
        if written > step:
            store.delete(url)
    forget_history(store, directory, step)


def load_into(learner: Learner, restored: Restored, ranks: Ranks, *, batch: int) -> None:
    """Give a learner what was restored, on this number of ranks and for this global batch.

    Raises:
        CheckpointError: the state does not fit the learner.
    """
    saved = restored.position.grid.batch
    own = {}
    if learner.own_state:
        own = learner.own_part(restored.by_rank, ranks, saved=saved, batch=batch)
    learner.load_state_dict({**restored.shared, **own})
    if ranks.world_size == len(restored.by_rank):
        torch.set_rng_state(restored.by_rank[ranks.rank]["random"])


def describe_model(config: Config) -> dict[str, Any]:
    """What a checkpoint's tensors depend on: another value is another model."""
    shared = {
        "model": config.model.model_dump(mode="json", exclude={"init"}),
        "optimizer": {"name": config.optimizer.name},
        "stream": {"seed": config.stream.seed},
    }
    if config.run.task == "finetune":
        section = config.finetune
        return shared | {
            "finetune": {
                "mode": section.mode,
                "rates": list(section.rates),
                "weight_decays": list(section.weight_decays),
            },
            "labels": {"classes": config.labels.classes},
        }
    return shared | {
        "swav": {
            "prototypes": config.swav.prototypes,
            "assigned_crops": config.swav.assigned_crops,
            "queue_length": config.swav.queue_length,
        },
    }


def refuse_other_model(checkpoint: Checkpoint, here: Mapping[str, Any]) -> None:
    """Compare what a checkpoint was made with to what is configured.

    Raises:
        CheckpointError: naming the first key that differs.
    """
    for section, values in here.items():
        for name, value in values.items():
            saved = checkpoint.about.get(section, {}).get(name)
            if saved != value:
                raise CheckpointError(
                    f"{checkpoint.url} was made with {section}.{name} = {saved!r}, now it is {value!r}: "
                    "set it back, or choose another run.directory"
                )
