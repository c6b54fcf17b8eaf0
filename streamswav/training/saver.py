"""Saving and restoring a run: what goes into a checkpoint, when, and from whom."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from streamswav.config import Config, dump_config
from streamswav.errors import CheckpointError
from streamswav.stream.listed import find_lists, new_list
from streamswav.stream.outcomes import OUTCOMES
from streamswav.stream.position import Position
from streamswav.stream.store import Store, redact
from streamswav.training.checkpoint import Checkpoint, CheckpointFolder, pack, read_checkpoint, unpack
from streamswav.training.distributed import Ranks
from streamswav.training.feed import Feed
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
        by_rank: queue and random state of every rank.
    """

    checkpoint: Checkpoint
    step: int
    loss_first: float | None
    position: Position
    shared: dict[str, Any]
    by_rank: list[dict[str, Any]]


class Saver:
    """Writes checkpoints when they are due; rank 0 writes for all.

    Attributes:
        last: the newest checkpoint of this run.
    """

    def __init__(
        self,
        folder: CheckpointFolder,
        store: Store,
        config: Config,
        ranks: Ranks,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._folder, self._store, self._config, self._ranks = folder, store, config, ranks
        self._clock = clock
        self._saved_at = clock()
        self._saved_images = 0
        self._finished = False
        self.last: Checkpoint | None = None

    def hurried(self, seconds: float) -> Saver:
        """Return a saver of the same run that gives storage only so many seconds."""
        section = self._store.section
        deadline = min(seconds, section.deadline_seconds)
        other = copy.copy(self)
        other._store = Store(section.model_copy(update={"deadline_seconds": deadline}))
        other._folder = self._folder.through(other._store)
        return other

    def due(self, images: int) -> bool:
        """Tell whether minutes, or with `images` trained the images, since the last checkpoint are over."""
        section = self._config.checkpoint
        late = section.minutes is not None and self._clock() - self._saved_at >= 60 * section.minutes
        far = section.images is not None and images - self._saved_images >= section.images
        return late or far

    def save(self, learner: Learner, feed: Feed, *, step: int, loss_first: float | None) -> Checkpoint | None:
        """Write a checkpoint; every rank must call this after the same step.

        Returns:
            The checkpoint; None where the last one holds all this already.

        Raises:
            StorageError: it could not be written.
        """
        position = feed.synchronise()
        if self.last and self.last.step == step and self._finished == position.finished:
            return None
        state = learner.state_dict()
        by_rank = self._ranks.gather({"queue": state.pop("queue"), "random": torch.get_rng_state()})

        def write() -> Checkpoint:
            self._write_passed_over(feed, step)
            files = {
                "model.pt": pack(state),
                "ranks.pt": pack(by_rank),
                "position.json": json.dumps(position.to_json()).encode(),
                "run.json": json.dumps({"step": step, "loss_first": loss_first}).encode(),
                "config.yaml": dump_config(without_secrets(self._config)).encode(),
            }
            about = describe_model(self._config)
            saved = self._folder.save(files, step=step, images=position.trained, about=about)
            self._prune(saved)
            return saved

        self.last = self._ranks.lead(write)
        self._saved_at, self._saved_images = self._clock(), position.trained
        self._finished = position.finished
        feed.unwritten.clear()
        return self.last

    def _write_passed_over(self, feed: Feed, step: int) -> None:
        """List what was not trained since the last checkpoint, in files that no checkpoint's end removes."""
        for outcome in OUTCOMES:
            found = [each for each in feed.unwritten if each.outcome == outcome]
            if found:
                named = ({**asdict(each), "shard": feed.shard_key(each)} for each in found)
                lines = "".join(json.dumps(each) + "\n" for each in named)
                place = new_list(self._store, self._config.run.directory, outcome, step)
                self._store.write(place, lines.encode())

    def restore(self) -> Restored | None:
        """Read the newest whole checkpoint, chosen by rank 0 for all; None where the run is new.

        Raises:
            CheckpointError: it is of another model, or none is whole.
        """
        found: list[tuple[Checkpoint, dict[str, bytes]]] = []

        def choose() -> str | None:
            newest = self._folder.newest()
            found.extend([newest] if newest else [])
            self._forget_lists(newest[0].step if newest else -1)
            return newest[0].url if newest else None

        url = self._ranks.lead(choose)
        if url is None:
            return None

        def fetch() -> None:
            """Rank 0 has read it; the others fetch it from where it lies, not through rank 0."""
            if not found:
                found.append(read_checkpoint(url, self._store))
            refuse_other_model(found[0][0], describe_model(self._config))

        self._ranks.each(fetch)
        ((checkpoint, files),) = found
        run = json.loads(files["run.json"])
        position = Position.from_json(json.loads(files["position.json"]))
        self.last, self._saved_images = checkpoint, checkpoint.images
        self._finished = position.finished
        return Restored(
            checkpoint,
            step=run["step"],
            loss_first=run["loss_first"],
            position=position,
            shared=unpack(files["model.pt"]),
            by_rank=unpack(files["ranks.pt"]),
        )

    def _forget_lists(self, step: int) -> None:
        """Remove lists of what came after a step: it comes again, and its outcome may be another then."""
        for _, written, url in list(find_lists(self._store, self._config.run.directory)):
            if written > step:
                self._store.delete(url)

    def _prune(self, saved: Checkpoint) -> None:
        every = self._config.checkpoint.keep_every_images
        if every and saved.images // every > self._saved_images // every:
            self._folder.keep_for_good(saved)
        self._folder.prune(saved, keep=self._config.checkpoint.keep)


def load_into(learner: Learner, restored: Restored, ranks: Ranks, *, batch: int) -> None:
    """Give a learner what was restored, on this number of ranks and for this global batch.

    Raises:
        CheckpointError: the state does not fit the learner.
    """
    queues = [state["queue"] for state in restored.by_rank]
    saved = restored.position.grid.batch
    features = [each["features"] for each in queues] if queues[0] else []
    length = learner.queue.features.shape[1] if learner.queue is not None else 0
    own = queues[0]
    if length and features:
        own = {"features": _own_queue(features, ranks, saved=saved, batch=batch, length=length)}
    learner.load_state_dict({**restored.shared, "queue": own})
    if ranks.world_size == len(restored.by_rank):
        torch.set_rng_state(restored.by_rank[ranks.rank]["random"])


def without_secrets(config: Config) -> Config:
    """Return the configuration as it may lie in the run's folder: signed URLs without their queries."""
    stream = config.stream
    update = {"urls": list(map(redact, stream.urls)), "exclude": list(map(redact, stream.exclude))}
    return config.model_copy(update={"stream": stream.model_copy(update=update)})


def describe_model(config: Config) -> dict[str, Any]:
    """What a checkpoint's tensors depend on: another value is another model."""
    return {
        "model": config.model.model_dump(mode="json"),
        "swav": {
            "prototypes": config.swav.prototypes,
            "assigned_crops": config.swav.assigned_crops,
            "queue_length": config.swav.queue_length,
        },
        "optimizer": {"name": config.optimizer.name},
        "stream": {"seed": config.stream.seed},
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


def _own_queue(
    features: list[torch.Tensor], ranks: Ranks, *, saved: int, batch: int, length: int
) -> torch.Tensor:
    """This rank's part of the queues [A, length, D] of all ranks that saved.

    A queue is a row of batches, the newest first, and each rank holds its share of every batch; so the
    shares are put together batch by batch before they are divided among the ranks that there are now. Where
    the batch has another size now, the oldest embeddings fall out, or their place is empty for a while.
    """
    if len(features) == ranks.world_size and saved == batch:
        return features[ranks.rank]
    share, dim = saved // len(features), features[0].shape[2]
    by_batch = torch.cat([each.view(len(each), -1, share, dim) for each in features], dim=2)
    whole = by_batch.flatten(1, 2)
    want = length * ranks.world_size
    whole = torch.nn.functional.pad(whole[:, :want], (0, 0, 0, max(0, want - whole.shape[1])))
    return whole.view(len(whole), -1, batch, dim).chunk(ranks.world_size, dim=2)[ranks.rank].flatten(1, 2)
