"""Checkpoints: a folder a step, data first, then its list of files with checksums, then the pointer.

    <run>/checkpoints/step-000001200/state-0.pt     a file a rank: what only that rank has
    <run>/checkpoints/step-000001200/model.pt       network and optimizer, the same on all ranks
    <run>/checkpoints/step-000001200/position.json  where the stream is
    <run>/checkpoints/step-000001200/checkpoint.json  step, images, SHA-256 of the above: it is whole
    <run>/checkpoints/latest                        the name of the newest whole one

A folder without a `checkpoint.json` that matches was cut off while being written, and is passed over. An
older checkpoint goes only once a newer one is whole. All of it loads with `weights_only=True`.
"""

from __future__ import annotations

import hashlib
import io
import json
import posixpath
from collections.abc import Callable, Mapping
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

    def save(
        self, files: Mapping[str, bytes], *, step: int, images: int, about: Mapping[str, Any]
    ) -> Checkpoint:
        """Write a checkpoint whole, then move the pointer.

        Raises:
            StorageError: it could not be written; older checkpoints are untouched.
        """
        name = f"step-{step:09d}"
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

    def newest(self) -> tuple[Checkpoint, dict[str, bytes]] | None:
        """Read the newest checkpoint that is whole, walking past damaged and unfinished ones with a warning.

        Raises:
            CheckpointError: there are checkpoints, but none is whole.
        """
        names = self.names()
        for name in reversed(names):
            try:
                return read_checkpoint(join(self.url, name), self._store)
            except CheckpointError as error:
                self._warn(f"passed over: {error}")
        if names:
            raise CheckpointError(
                f"{self.url}: none of the {len(names)} checkpoints is whole; remove them to start"
            )
        return None

    def names(self) -> list[str]:
        """Return the names of all checkpoints, whole or not, oldest first."""
        try:
            found = self._store.list(self.url)
        except NotFoundError:
            return []
        below = (info.url.removeprefix(self.url).lstrip("/").split("/") for info in found)
        return sorted({parts[0] for parts in below if len(parts) > 1 and parts[0].startswith("step-")})

    def keep_for_good(self, checkpoint: Checkpoint) -> None:
        """Exempt a checkpoint from `prune`."""
        self._store.write(join(checkpoint.url, _KEEP), b"")

    def prune(self, *, keep: int) -> None:
        """Remove all but the newest `keep` and those kept for good; call it after a save, never before."""
        for name in self.names()[:-keep]:
            if not self._store.exists(join(self.url, name, _KEEP)):
                self._store.delete(join(self.url, name))


def read_checkpoint(url: str, store: Store) -> tuple[Checkpoint, dict[str, bytes]]:
    """Read one checkpoint and verify it.

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
            data[name] = store.read(join(url, name))
        except NotFoundError:
            raise CheckpointError(f"{url}: {name} is missing") from None
        if len(data[name]) != size or hashlib.sha256(data[name]).hexdigest() != digest:
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


def find_checkpoint(url: str, store: Store) -> tuple[Checkpoint, dict[str, bytes]]:
    """Read a checkpoint by its own folder, its run's, or its run's `checkpoints`; the newest whole one.

    Raises:
        CheckpointError: there is none.
    """
    if posixpath.basename(url.rstrip("/")).startswith("step-"):
        return read_checkpoint(url.rstrip("/"), store)
    for folder in (join(url, "checkpoints"), url):
        found = CheckpointFolder(folder, store).newest()
        if found:
            return found
    raise CheckpointError(f"{url}: there is no checkpoint")
