"""Checkpoints: a folder a step, data first, then its list of files with checksums, then the pointer.

    <run>/checkpoints/step-000001200/model.pt       network and optimizer, the same on all ranks
    <run>/checkpoints/step-000001200/ranks.pt       what each rank has of its own: queue, random state
    <run>/checkpoints/step-000001200/position.json  where the stream is
    <run>/checkpoints/step-000001200/health.json    state of the verdict, where there is one
    <run>/checkpoints/step-000001200/writer.json    who writes here, written first: nobody else does
    <run>/checkpoints/step-000001200/checkpoint.json  step, images, SHA-256 of the above: it is whole
    <run>/checkpoints/latest                        the name of the newest whole one

A folder without a `checkpoint.json` that matches was cut off while being written, and is passed over. No
checkpoint is ever written over, whole or not: a second one of the same step has `.2` behind its name. So a
process that was thought dead and wakes up spoils nothing. An older checkpoint goes only once a newer one is
whole. All of it loads with `weights_only=True`.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import posixpath
import shutil
import uuid
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

import torch

from streamswav.errors import ChangedError, CheckpointError, LeaseError, NotFoundError, StorageError
from streamswav.stream.store import Store, join, redact
from streamswav.training.lease import Lease

FORMAT_VERSION = 1

_LIST = "checkpoint.json"
_POINTER = "latest"
_KEEP = "keep"
_CLAIM = "writer.json"
_CLEAN_SECONDS = 10.0

Content = bytes | Callable[[BinaryIO], object]


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint, found but not read.

    Attributes:
        url: its folder.
        step: optimizer steps it holds.
        images: images trained until then.
        files: (size, SHA-256) by name.
        about: what it was made with (model and objective), to refuse another's.
    """

    url: str
    step: int
    images: int
    files: Mapping[str, tuple[int, str]]
    about: Mapping[str, Any]

    @property
    def size(self) -> int:
        """Bytes of all its files."""
        return sum(size for size, _ in self.files.values())


class CheckpointFolder:
    """The checkpoints of one run, in a folder or on S3.

    Attributes:
        warn: told, in words, of what is passed over.
    """

    def __init__(
        self,
        url: str,
        store: Store,
        *,
        lease: Lease | None = None,
        warn: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.url, self._store, self._lease, self.warn = url, store, lease, warn

    def through(self, store: Store) -> CheckpointFolder:
        """Return the same folder as another store reaches it."""
        return CheckpointFolder(self.url, store, lease=self._lease, warn=self.warn)

    def save(
        self, files: Mapping[str, Content], *, step: int, images: int, about: Mapping[str, Any]
    ) -> Checkpoint:
        """Write a checkpoint whole, then move the pointer.

        Args:
            files: by name: bytes, or a function that writes them into the file it is given.
            step: optimizer steps it holds.
            images: images trained until then.
            about: what it was made with.

        Raises:
            StorageError: it could not be written; older checkpoints are untouched.
            LeaseError: another process writes to the run.
        """
        self._check()
        name = self._claim(step)
        folder = join(self.url, name)
        try:
            sums = {file: self._write(join(folder, file), content) for file, content in files.items()}
            listing = {
                "format_version": FORMAT_VERSION,
                "step": step,
                "images": images,
                "files": sums,
                "about": dict(about),
                "writer": self._number,
            }
            self._check()
            self._store.write(join(folder, _LIST), json.dumps(listing, indent=1).encode())
        except (StorageError, CheckpointError):
            self._discard(folder)
            raise
        self._point_to(name)
        return Checkpoint(folder, step, images, sums, about)

    def adopt(self, checkpoint: Checkpoint, *, through: Store) -> Checkpoint:
        """Copy a checkpoint from another folder, and verify it on the way.

        Args:
            checkpoint: to be copied.
            through: the store that reaches it.

        Raises:
            CheckpointError: it is damaged there.
            StorageError: it cannot be read, or not written here.
        """

        def copied(file: str, digest: str) -> Callable[[BinaryIO], None]:
            def copy(target: BinaryIO) -> None:
                summed = _Summed(target)
                with through.reading(join(checkpoint.url, file)) as source:
                    shutil.copyfileobj(source, cast("BinaryIO", summed), 1 << 20)
                if summed.digest != digest:
                    raise CheckpointError(f"{checkpoint.url}: {file} is damaged (SHA-256 differs)")

            return copy

        files: dict[str, Content] = {name: copied(name, sha) for name, (_, sha) in checkpoint.files.items()}
        return self.save(files, step=checkpoint.step, images=checkpoint.images, about=checkpoint.about)

    def last_writer(self) -> int:
        """Return the number of the writer of the checkpoint that `latest` names; 0 where there is none."""
        latest = self._latest()
        return self._writer_of(latest) if latest else 0

    def newest(self, *, only: Collection[str] | None = None) -> tuple[Checkpoint, dict[str, bytes]] | None:
        """Read the newest checkpoint that is whole, walking past damaged and unfinished ones with a warning.

        None where the run has none yet, or was cut off while writing its first.
        `only` is `read_checkpoint`'s.

        Raises:
            CheckpointError: there are checkpoints, but none is whole.
        """
        names, before = self.names(), None
        # Beside a run that goes on, what was listed may be gone when it is read: it is listed again then.
        while names != before:
            for name in reversed(self._of_the_line(names)):
                try:
                    return read_checkpoint(join(self.url, name), self._store, only=only)
                except CheckpointError as error:
                    self.warn(f"passed over: {error}")
            if not self.begun():
                return None
            before, names = names, self.names()
        raise CheckpointError(
            f"{self.url}: none of the {len(names)} checkpoints is whole; remove them to start"
        )

    def begun(self) -> bool:
        """Tell whether any checkpoint was ever written to its end."""
        committed = any(_LIST in files for files in self._contents().values())
        return committed or self._store.exists(join(self.url, _POINTER))

    def names(self) -> list[str]:
        """Return the names of all checkpoints, whole or not, oldest first."""
        return sorted(self._contents(), key=_order)

    def keep_for_good(self, checkpoint: Checkpoint) -> None:
        """Exempt a checkpoint from `prune`."""
        self._store.write(join(checkpoint.url, _KEEP), b"")

    def prune(self, newest: Checkpoint, *, keep: int) -> None:
        """Remove what is older than the newest `keep` checkpoints, but for those kept for good.

        Args:
            newest: the one that was saved last. Whatever has a later step was passed over when the run was
                restored: it does not count, and stays until the run has come as far.
            keep: how many, `newest` among them.
        """
        contents = self._contents()
        last = _order(posixpath.basename(newest.url))
        names = [name for name in sorted(contents, key=_order) if _order(name) <= last]
        whole = [name for name in names if _LIST in contents[name]]
        kept = {*whole[-keep:], *(name for name in whole if _KEEP in contents[name])}
        for name in names:
            if name not in kept:
                self._store.delete(join(self.url, name))

    def _claim(self, step: int) -> str:
        """Choose a name that nobody writes under, and have it so."""
        name = f"step-{step:09d}"
        again = itertools.count(2)
        while True:
            claim = json.dumps({"writer": self._number, "claim": uuid.uuid4().hex}).encode()
            with suppress(ChangedError):
                if not self._store.exists(join(self.url, name, _LIST)):
                    self._store.swap(join(self.url, name, _CLAIM), claim, version=None)
                    return name
            name = f"step-{step:09d}.{next(again)}"

    def _write(self, url: str, content: Content) -> tuple[int, str]:
        """Write a file as it is made, and return its size and SHA-256."""
        with self._store.writing(url) as target:
            summed = _Summed(target)
            if callable(content):
                summed.fill(content)
            else:
                summed.write(content)
        return summed.size, summed.digest

    def _discard(self, folder: str) -> None:
        """Remove what a failed save has left, where that takes but a moment."""
        seconds = min(_CLEAN_SECONDS, self._store.section.deadline_seconds)
        with suppress(StorageError):
            Store(self._store.section.model_copy(update={"deadline_seconds": seconds})).delete(folder)

    def _point_to(self, name: str) -> None:
        place = join(self.url, _POINTER)
        try:
            version: str | None = self._store.read_version(place)[1]
        except NotFoundError:
            version = None
        self._check()
        try:
            self._store.swap(place, name.encode(), version=version)
        except ChangedError:
            self._check()
            raise LeaseError(f"{redact(place)}: another process moved it; only one may write here") from None

    @property
    def _number(self) -> int:
        return self._lease.number if self._lease else 0

    def _check(self) -> None:
        if self._lease:
            self._lease.check()

    def _latest(self) -> str | None:
        try:
            return self._store.read(join(self.url, _POINTER)).decode(errors="replace").strip()
        except NotFoundError:
            return None

    def _writer_of(self, name: str) -> int:
        try:
            return int(json.loads(self._store.read(join(self.url, name, _LIST))).get("writer", 0))
        except (NotFoundError, ValueError, AttributeError, TypeError):
            return 0

    def _of_the_line(self, names: list[str]) -> list[str]:
        """Leave out what a writer that had lost its lease brought to an end behind its successor's back."""
        latest = self._latest()
        if latest is None or latest not in names or latest == names[-1]:
            return names
        number = self._writer_of(latest)
        behind = [name for name in names if _order(name) > _order(latest) and self._writer_of(name) < number]
        return [name for name in names if name not in behind]

    def _contents(self) -> dict[str, set[str]]:
        """The files of every checkpoint, by its name."""
        try:
            found = self._store.list(self.url)
        except NotFoundError:
            return {}
        contents: dict[str, set[str]] = {}
        for info in found:
            name, _, file = info.url.removeprefix(self.url).lstrip("/").partition("/")
            if name.startswith("step-") and file:
                contents.setdefault(name, set()).add(file)
        return contents


def read_checkpoint(
    url: str, store: Store, *, only: Collection[str] | None = None
) -> tuple[Checkpoint, dict[str, bytes]]:
    """Read one checkpoint and verify it.

    Args:
        url: its folder.
        store: where it lies.
        only: names of the files to read; of all others only the size is verified.

    Raises:
        CheckpointError: it is not whole, or of a format that this version does not read.
    """
    try:
        listing = json.loads(store.read(join(url, _LIST)))
        version = listing["format_version"]
        files = {name: (int(size), str(digest)) for name, (size, digest) in listing["files"].items()}
        checkpoint = Checkpoint(url, int(listing["step"]), int(listing["images"]), files, listing["about"])
    except NotFoundError:
        raise CheckpointError(f"{url}: no {_LIST}; it was cut off while being written") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{url}: {_LIST} is damaged") from None
    if version not in (FORMAT_VERSION, FORMAT_VERSION - 1):
        raise CheckpointError(f"{url}: format {version}, this version reads {FORMAT_VERSION}")
    data = {}
    for name, (size, digest) in files.items():
        try:
            if only is not None and name not in only:
                found = store.info(join(url, name)).size, digest
            else:
                data[name] = store.read(join(url, name))
                found = len(data[name]), hashlib.sha256(data[name]).hexdigest()
        except NotFoundError:
            raise CheckpointError(f"{url}: {name} is missing") from None
        if found != (size, digest):
            raise CheckpointError(f"{url}: {name} is damaged (size or SHA-256 differ)")
    return checkpoint, data


class _Summed:
    """A file that is written, with the size and SHA-256 of what went into it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._sum = file, hashlib.sha256()
        self._error: Exception | None = None
        self.size = 0

    @property
    def digest(self) -> str:
        return self._sum.hexdigest()

    def fill(self, content: Callable[[BinaryIO], object]) -> None:
        """Have it written by another, who may have words of his own for what went wrong: torch has."""
        try:
            content(cast("BinaryIO", self))
        except Exception:
            if self._error:
                raise self._error from None
            raise

    def write(self, data: bytes | memoryview) -> int:
        if self._error:
            raise self._error
        self._sum.update(data)
        try:
            self._file.write(data)
        except Exception as error:
            self._error = error
            raise
        self.size += len(data)
        return len(data)

    def flush(self) -> None:
        self._file.flush()


def _order(name: str) -> tuple[int, int, str]:
    """Oldest first: step-000000005, step-000000005.2, .., step-000000005.10, step-000000006."""
    step, _, again = name.removeprefix("step-").partition(".")
    return (int(step) if step.isdecimal() else 0, int(again) if again.isdecimal() else 0, name)


def pack(state: object) -> bytes:
    """Serialise tensors and plain containers."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def packed(state: object) -> Callable[[BinaryIO], None]:
    """Return what writes the same into a file, tensor by tensor: there is no second copy of it in memory."""
    return lambda file: torch.save(state, file)


def unpack(data: bytes) -> Any:
    """Read what `pack` gave, on the CPU, executing nothing."""
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def find_checkpoint(
    url: str, store: Store, *, only: Collection[str] | None = None
) -> tuple[Checkpoint, dict[str, bytes]]:
    """Read a checkpoint by its own folder, its run's, or its run's `checkpoints`; the newest whole one.

    `only` is `read_checkpoint`'s.

    Raises:
        CheckpointError: there is none.
    """
    if posixpath.basename(url.rstrip("/")).startswith("step-"):
        return read_checkpoint(url.rstrip("/"), store, only=only)
    for folder in (join(url, "checkpoints"), url):
        found = CheckpointFolder(folder, store).newest(only=only)
        if found:
            return found
    raise CheckpointError(f"{url}: there is no checkpoint")
