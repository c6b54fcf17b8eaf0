"""Saving a run: what goes into a checkpoint, when, and from whom."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch

from streamswav.config import Config, dump_config
from streamswav.errors import (
    DeniedError,
    NotFoundError,
    StorageError,
    StreamswavError,
    UnavailableError,
    UnsupportedError,
)
from streamswav.stream.listed import new_list
from streamswav.stream.manifest import Shard
from streamswav.stream.outcomes import OUTCOMES, PassedOver
from streamswav.stream.position import Position
from streamswav.stream.store import Store, redact
from streamswav.telemetry.secrecy import without_secrets
from streamswav.training.background import Background
from streamswav.training.checkpoint import (
    Checkpoint,
    CheckpointFolder,
    Content,
    packed,
)
from streamswav.training.distributed import Ranks
from streamswav.training.feed import Feed
from streamswav.training.health import Health
from streamswav.training.history import write_history
from streamswav.training.learner import Learner
from streamswav.training.mirror import Mirror
from streamswav.training.restore import Restored, describe_model
from streamswav.training.snapshot import Stage

RETRY_SECONDS = 1.0
RETRY_CAP_SECONDS = 120.0


@dataclass(frozen=True)
class _Snapshot:
    """A checkpoint that is not written yet.

    Attributes:
        step: optimizer steps it holds.
        images: images trained until then.
        shards: by which entries of the side lists name theirs.
        files: what it consists of.
    """

    step: int
    images: int
    shards: Sequence[Shard]
    files: Mapping[str, Content]


class Listener(Protocol):
    """What hears how saving goes; called on rank 0, in the thread that writes."""

    def staged(self, seconds: float) -> None:
        """A snapshot was taken; for so long training stood still."""

    def saved(self, checkpoint: Checkpoint, seconds: float) -> None:
        """One is committed, after so long a time of writing."""

    def save_failed(self, reason: str) -> None:
        """One could not be written."""

    def save_delayed(self) -> None:
        """One is put off, since the one before is still being written."""


class Saver:
    """Takes checkpoints when they are due; rank 0 writes them for all, in the background.

    One that is due while another is being written is put off until that is done: training never waits for
    storage, there is one snapshot in memory at a time, and what is saved then is newer. One that cannot be
    written is a warning, and a new one is taken soon after, until `checkpoint.deadline_seconds` have gone
    without any.

    Attributes:
        last: the newest checkpoint of this run; known on rank 0 alone.
        listener: hears how saving goes.
        health: what judges the run; its state lies in the checkpoints, its history beside them.
    """

    def __init__(
        self,
        folder: CheckpointFolder,
        store: Store,
        config: Config,
        ranks: Ranks,
        *,
        mirror: Mirror | None = None,
        listener: Listener | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._folder, self._store, self._config, self._ranks = folder, store, config, ranks
        self._mirror, self._clock = mirror, clock
        self._stage, self._background = Stage(), Background("checkpoint")
        self._good_at = self._staged_at = clock()
        self._staged_images = 0
        self._staged: tuple[int, bool] | None = None
        self._unlisted: list[PassedOver] = []
        self._failure: StreamswavError | None = None
        self._failures, self._retry_at = 0, 0.0
        self._fatal: StreamswavError | None = None
        self._worked = self._delayed = False
        self.last: Checkpoint | None = None
        self.listener = listener
        self.health: Health | None = None
        self._history: list[str] = []

    def resume_from(self, restored: Restored) -> None:
        """Count minutes and images from a checkpoint, and save anew only what it does not hold."""
        self.last = restored.checkpoint
        self._staged = restored.step, restored.position.finished
        self._staged_images = restored.position.seen.samples

    def due(self, images: int) -> bool:
        """Tell whether minutes, or with `images` trained the images, since the last checkpoint are over.

        While one is being written none is; after one that failed it is time again soon. Of rank 0.
        """
        section = self._config.checkpoint
        now = self._clock()
        late = section.minutes is not None and now - self._staged_at >= 60 * section.minutes
        far = section.images is not None and images - self._staged_images >= section.images
        if self._background.busy:
            if (late or far) and not self._delayed:
                self._delayed = True
                self._tell("save_delayed")
            return False
        if self._failure:
            return self._fatal is not None or now >= self._retry_at
        return late or far

    def save(
        self,
        learner: Learner,
        feed: Feed,
        *,
        step: int,
        loss_first: float | None,
        wait: bool = False,
        seconds: float | None = None,
    ) -> None:
        """Take a checkpoint; every rank must call this after the same step.

        Args:
            learner: what is saved.
            feed: where the stream is.
            step: optimizer steps done.
            loss_first: of the run's first step.
            wait: return only when all is committed. Otherwise it is written while training goes on.
            seconds: with `wait`, how long storage is given, at most.

        Raises:
            StorageError: with `wait`, it could not be written; otherwise none could for too long, or storage
                refused from the start.
            LeaseError: another process writes to the run.
        """
        position = feed.synchronise()
        self._ranks.lead(lambda: self._settle(seconds))
        if self._ranks.lead(lambda: self._is_new(step, position.finished)):
            self._take(learner, feed, position, step=step, loss_first=loss_first, seconds=seconds)
        if wait:
            self._ranks.lead(lambda: self._settle(seconds, strict=True))

    def list_passed_over(self, feed: Feed, *, step: int) -> None:
        """Write what was passed over though no checkpoint counts it: the run ends here, and says why.

        Every rank must call this after the same step, and after `feed.synchronise`.

        Raises:
            StorageError: it could not be written.
        """

        def write() -> None:
            self._background.wait()
            self._unlisted += feed.unwritten
            self._take_history()
            self._write_lists(step, feed.manifest.shards, self._store)

        self._ranks.lead(write)
        feed.unwritten.clear()

    def close(self, seconds: float | None = None) -> None:
        """Wait for what is being written, and for its copy; on every rank, at the end.

        Args:
            seconds: how long at most, where the run ends with an error; then no copy is waited for.
        """
        if not self._ranks.leads:
            return
        self._background.wait(seconds)
        if self._mirror and seconds is None:
            self._mirror.finish()

    def _settle(self, seconds: float | None = None, *, strict: bool = False) -> None:
        """Wait until nothing is being written, and raise what ends the run; if `strict`, any failure."""
        if not self._background.wait(seconds):
            raise UnavailableError(
                redact(self._folder.url), f"a checkpoint is still being written after {seconds:.0f} s"
            )
        if error := self._fatal or (self._failure if strict else None):
            raise error

    def _is_new(self, step: int, finished: bool) -> bool:
        return self._failure is not None or self._staged != (step, finished)

    def _take(
        self,
        learner: Learner,
        feed: Feed,
        position: Position,
        *,
        step: int,
        loss_first: float | None,
        seconds: float | None,
    ) -> None:
        """Copy all that is saved, and begin to write it."""
        began = time.perf_counter()
        state = learner.state_dict()
        own = {name: state.pop(name) for name in learner.own_state} | {"random": torch.get_rng_state()}
        by_rank = self._ranks.collect(Stage().take(own))
        self._staged, self._staged_images = (step, position.finished), position.seen.samples
        unlisted, feed.unwritten[:] = [*self._unlisted, *feed.unwritten], []
        if not self._ranks.leads:
            return
        self._unlisted = unlisted
        self._take_history()
        snapshot = _Snapshot(
            step=step,
            images=position.trained,
            shards=feed.manifest.shards,
            files={
                "model.pt": packed(self._stage.take(state)),
                "ranks.pt": packed(by_rank),
                "position.json": json.dumps(position.to_json()).encode(),
                "run.json": json.dumps({"step": step, "loss_first": loss_first}).encode(),
                "config.yaml": dump_config(without_secrets(self._config)).encode(),
                # Apart from what is the same to the bit in every run: lines are logged by the clock.
                **({"health.json": json.dumps(self.health.state()).encode()} if self.health else {}),
            },
        )
        self._staged_at, self._delayed = self._clock(), False
        self._tell("staged", time.perf_counter() - began)
        self._background.start(lambda: self._write(snapshot, self._within(seconds)))

    def _within(self, seconds: float | None) -> tuple[CheckpointFolder, Store]:
        """Return folder and store, where it is in a hurry such as give storage only so many seconds."""
        section = self._store.section
        if seconds is None or seconds >= section.deadline_seconds:
            return self._folder, self._store
        store = Store(section.model_copy(update={"deadline_seconds": seconds}))
        return self._folder.through(store), store

    def _write(self, snapshot: _Snapshot, through: tuple[CheckpointFolder, Store]) -> None:
        """Write lists and checkpoint. In a thread: nothing is raised here."""
        folder, store = through
        began = time.perf_counter()
        try:
            self._write_lists(snapshot.step, snapshot.shards, store)
            saved = folder.save(
                snapshot.files,
                step=snapshot.step,
                images=snapshot.images,
                about=describe_model(self._config),
            )
        except StreamswavError as error:
            self._note_failure(error, snapshot.step)
        except Exception as error:  # it is raised where the ranks are together
            reason = f"{redact(folder.url)}: cannot be written ({type(error).__name__}: {error})"
            self._fatal = self._failure = StreamswavError(reason)
            self._tell("save_failed", reason)
        else:
            self._note_success(saved, folder, time.perf_counter() - began)

    def _note_success(self, saved: Checkpoint, folder: CheckpointFolder, seconds: float) -> None:
        before = self.last.images if self.last else 0
        self._failure, self._failures = None, 0
        self._worked, self._good_at, self.last = True, self._clock(), saved
        self._tell("saved", saved, seconds)
        section = self._config.checkpoint
        every = section.keep_every_images
        for_good = every is not None and saved.images // every > before // every
        try:
            if for_good:
                folder.keep_for_good(saved)
            folder.prune(saved, keep=section.keep)
        except StorageError as error:
            self._folder.warn(f"older checkpoints stay for now: {error}")
        if self._mirror:
            self._mirror.offer(saved, keep=section.keep, for_good=for_good)

    def _note_failure(self, error: StreamswavError, step: int) -> None:
        now = self._clock()
        self._failure = error
        self._failures += 1
        over = now - self._good_at
        deadline = self._config.checkpoint.deadline_seconds
        refused = isinstance(error, DeniedError | UnsupportedError | NotFoundError)
        if not isinstance(error, StorageError) or (refused and not self._worked):
            self._fatal = error
        elif over >= deadline:
            tried = f"no checkpoint could be written for {over:.0f} s (checkpoint.deadline_seconds)"
            reason = f"{tried}, {self._failures} tries; the last time: {error}"
            self._fatal = UnavailableError(redact(self._folder.url), reason)
        pause = min(RETRY_SECONDS * 2.0 ** min(self._failures - 1, 20), RETRY_CAP_SECONDS)
        self._retry_at = min(now + pause, max(self._good_at + deadline, now))
        end = "" if self._fatal else f"; trying again in {self._retry_at - now:.0f} s with a newer one"
        self._tell("save_failed", f"the checkpoint of step {step} could not be written: {error}{end}")

    def _tell(self, what: str, *values: Any) -> None:
        if self.listener is not None:
            getattr(self.listener, what)(*values)

    def _take_history(self) -> None:
        if self.health:
            self._history += self.health.take_lines()

    def _write_lists(self, step: int, shards: Sequence[Shard], store: Store) -> None:
        """List what was not trained, in files that no checkpoint's end removes, before one counts it.

        What was listed is not listed again where the checkpoint itself fails.
        """
        for outcome in OUTCOMES:
            found = [each for each in self._unlisted if each.outcome == outcome]
            if found:
                named = ({**asdict(each), "shard": shards[each.shard].key} for each in found)
                lines = "".join(json.dumps(each) + "\n" for each in named)
                place = new_list(store, self._config.run.directory, outcome, step)
                store.write(place, lines.encode())
                self._unlisted = [each for each in self._unlisted if each.outcome != outcome]
        write_history(store, self._config.run.directory, step, self._history)
        self._history = []
