"""A run in a second place: what is committed is copied there, with all that a run's folder has."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable

from streamswav.errors import ConfigError, NotFoundError, StreamswavError
from streamswav.stream.listed import find_lists
from streamswav.stream.store import ObjectInfo, Store, join, redact
from streamswav.training.background import Background
from streamswav.training.checkpoint import Checkpoint, CheckpointFolder
from streamswav.training.lease import LEASE_FILE

_CHECKPOINTS = "checkpoints/"


class Mirror:
    """Copies a run from its folder, not from memory: a slow second place delays no checkpoint.

    Where the second place is slower than the run saves, it gets the newest checkpoint each time it is ready.

    Args:
        source: the run's folder.
        target: where the copy goes; a run can go on from there with `run.directory`.
        store: reaches both.
        tell: hears how each copy went: None, or what was wrong.
    """

    def __init__(
        self, source: str, target: str, store: Store, *, tell: Callable[[StreamswavError | None], None]
    ) -> None:
        one, other = source.rstrip("/") + "/", target.rstrip("/") + "/"
        if one.startswith(other) or other.startswith(one):
            reason = "must lie apart from run.directory"
            raise ConfigError("checkpoint.copy_to", reason, value=redact(target))
        self._source, self._target, self._store, self._tell = source, target, store, tell
        self._folder = CheckpointFolder(join(target, "checkpoints"), store)
        self._background = Background("copy")
        self._lock = threading.Lock()
        self._next: tuple[Checkpoint, int, bool] | None = None
        self._copying = False
        self._versions: dict[str, str] = {}
        self._last: str | None = None

    def offer(self, checkpoint: Checkpoint, *, keep: int, for_good: bool) -> None:
        """Have a committed checkpoint copied, and older copies pruned; returns at once."""
        with self._lock:
            for_good = for_good or (self._next is not None and self._next[2])
            self._next = checkpoint, keep, for_good
            if not self._copying:
                self._copying = True
                self._background.start(self._work)

    def finish(self) -> None:
        """Wait for the copy that is going on, and copy what the run's end has written."""
        self._background.wait()
        if self._last is not None:
            self._told(self._copy_files)

    def _work(self) -> None:
        while True:
            with self._lock:
                task, self._next = self._next, None
                if task is None:
                    self._copying = False
                    return
            self._told(lambda task=task: self._copy(*task))  # type: ignore[misc]  # bound at once

    def _told(self, work: Callable[[], None]) -> None:
        try:
            work()
        except StreamswavError as error:
            self._tell(error)
        else:
            self._tell(None)

    def _copy(self, checkpoint: Checkpoint, keep: int, for_good: bool) -> None:
        """Lists first: a checkpoint counts on what they hold."""
        self._copy_files()
        copied = self._folder.adopt(checkpoint, through=self._store)
        self._last = copied.url
        if for_good:
            self._folder.keep_for_good(copied)
        self._folder.prune(copied, keep=keep)

    def _copy_files(self) -> None:
        """Copy all but the checkpoints that is not there yet, and remove lists that the run took back."""
        found = [info for info in self._store.list(self._source) if self._is_copied(info)]
        for info in found:
            if self._versions.get(info.url) != info.version:
                self._copy_file(info)
                self._versions[info.url] = info.version
        there = {join(self._target, self._name(info)) for info in found}
        for _, _, url in list(find_lists(self._store, self._target)):
            if url not in there:
                self._store.delete(url)

    def _copy_file(self, info: ObjectInfo) -> None:
        place = join(self._target, self._name(info))
        try:
            same = self._store.info(place).size == info.size and place.endswith(".jsonl")
        except NotFoundError:
            same = False
        if not same:
            with self._store.reading(info.url) as source, self._store.writing(place) as target:
                shutil.copyfileobj(source, target, 1 << 20)

    def _is_copied(self, info: ObjectInfo) -> bool:
        name = self._name(info)
        return not name.startswith(_CHECKPOINTS) and name != LEASE_FILE

    def _name(self, info: ObjectInfo) -> str:
        return info.url.removeprefix(self._source.rstrip("/")).lstrip("/")
