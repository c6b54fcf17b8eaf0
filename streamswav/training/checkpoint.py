"""Checkpoints: a folder a step, data first, then its list of files with checksums, then the pointer.

    <run>/checkpoints/step-000001200/model.pt       network and optimizer, the same on all ranks
    <run>/checkpoints/step-000001200/ranks.pt       what each rank has of its own: queue, random state
    <run>/checkpoints/step-000001200/position.json  where the stream is
    <run>/checkpoints/step-000001200/checkpoint.json  step, images, SHA-256 of the above: it is whole
    <run>/checkpoints/latest                        the name of the newest whole one

A folder without a `checkpoint.json` that matches was cut off while being written, and is passed over. No
whole checkpoint is ever written over: a second one of the same step has `.2` behind its name. An older
checkpoint goes only once a newer one is whole. All of it loads with `weights_only=True`.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import posixpath
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from streamswav.errors import CheckpointError, NotFoundError
from streamswav.stream.store import Store, join

FORMAT_VERSION = 1

_LIST = "checkpoint.json"
_POINTER = "latest"
_KEEP = "keep"


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
    """The checkpoints of one run, in a folder or on S3."""

    def __init__(self, url: str, store: Store, *, warn: Callable[[str], None] = lambda _: None) -> None:
        self.url, self._store, self._warn = url, store, warn

    def through(self, store: Store) -> CheckpointFolder:
        """Return the same folder as another store reaches it."""
        return CheckpointFolder(self.url, store, warn=self._warn)

    def save(
        self, files: Mapping[str, bytes], *, step: int, images: int, about: Mapping[str, Any]
    ) -> Checkpoint:
        """Write a checkpoint whole, then move the pointer.

        Raises:
            StorageError: it could not be written; older checkpoints are untouched.
        """
        name = f"step-{step:09d}"
        again = itertools.count(2)
        while self._store.exists(join(self.url, name, _LIST)):
            name = f"step-{step:09d}.{next(again)}"
        folder = join(self.url, name)
        for file, data in files.items():
            self._store.write(join(folder, file), data)
        sums = {file: (len(data), hashlib.sha256(data).hexdigest()) for file, data in files.items()}
        listing = {
            "format_version": FORMAT_VERSION,
            "step": step,
            "images": images,
            "files": sums,
            "about": dict(about),
        }
        self._store.write(join(folder, _LIST), json.dumps(listing, indent=1).encode())
        self._store.write(join(self.url, _POINTER), name.encode())
        return Checkpoint(folder, step, images, sums, about)

    def newest(self, *, only: Collection[str] | None = None) -> tuple[Checkpoint, dict[str, bytes]] | None:
        """Read the newest checkpoint that is whole, walking past damaged and unfinished ones with a warning.

        None where the run has none yet, or was cut off while writing its first.
        `only` is `read_checkpoint`'s.

        Raises:
            CheckpointError: there are checkpoints, but none is whole.
        """
        names = self.names()
        for name in reversed(names):
            try:
                return read_checkpoint(join(self.url, name), self._store, only=only)
            except CheckpointError as error:
                self._warn(f"passed over: {error}")
        if self.begun():
            raise CheckpointError(
                f"{self.url}: none of the {len(names)} checkpoints is whole; remove them to start"
            )
        return None

    def begun(self) -> bool:
        """Tell whether any checkpoint was ever written to its end."""
        committed = any(_LIST in files for files in self._contents().values())
        return committed or self._store.exists(join(self.url, _POINTER))

    def names(self) -> list[str]:
        """Return the names of all checkpoints, whole or not, oldest first."""
        return sorted(self._contents())

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
        names = [name for name in sorted(contents) if name <= posixpath.basename(newest.url)]
        whole = [name for name in names if _LIST in contents[name]]
        kept = {*whole[-keep:], *(name for name in whole if _KEEP in contents[name])}
        for name in names:
            if name not in kept:
                self._store.delete(join(self.url, name))

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


def pack(state: object) -> bytes:
    """Serialise tensors and plain containers."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


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
