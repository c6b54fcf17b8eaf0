"""Blocks of remote shards on a disk of this node, for several passes: one folder for all its processes.

    FOLDER/v1/OBJECT/VERSION-BLOCK-NUMBER     a block and a checksum for each 128 KiB of it
    FOLDER/v1/used                            bytes of all of them, written under its lock

An object is known by endpoint and URL, a block by the object's version tag and the size of blocks. A block
appears whole, by a rename, after its room was reserved; the least recently used go when room is short. What
was torn (a crash, a bad disk) fails its length or checksum and is fetched anew. Whatever fails here, the run
reads on without the cache.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import time
import uuid
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from streamswav.config import StorageSection
from streamswav.errors import ConfigError

CHUNK_BYTES = 128 << 10
KEPT_RATIO = 0.9
ORPHAN_SECONDS = 600.0
TOUCH_SECONDS = 60.0
PAUSE_SECONDS = 60.0

_REMOTE = ("s3://", "http://", "https://")
_SUM_BYTES = 4
_ASIDE = ".new-"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Blocks:
    """The blocks of one version of a remote object.

    Attributes:
        folder: name of the object's folder.
        version: what the names of this version's blocks begin with.
        size: of the object in bytes.
        block: bytes of a block; the last one may be shorter.
    """

    folder: str
    version: str
    size: int
    block: int

    def name(self, number: int) -> str:
        """Return the name of a block."""
        return f"{self.version}-{self.block}-{number}"

    def length(self, number: int) -> int:
        """Return the bytes of a block."""
        return min(self.block, self.size - number * self.block)


class BlockCache:
    """The cache of a node, as one process sees it. Threads may share it.

    Args:
        folder: where it lies; made where it is missing.
        limit: most bytes of all blocks together. Room is reserved under a lock before a block is written, so
            that all processes together stay below it.
        free_ratio: share of the disk that stays free.
        endpoint: of the store; the same URL is another object elsewhere.
    """

    def __init__(self, folder: Path, limit: int, *, free_ratio: float, endpoint: str = "") -> None:
        self._root, self._limit, self._endpoint = folder / "v1", limit, endpoint
        self._free_ratio = free_ratio
        self._paused_until = 0.0
        self._warned = False

    def of(self, url: str, version: str, *, size: int, block: int) -> Blocks | None:
        """Return how the blocks of an object are called; None for what is local or has no version."""
        if not version or not url.startswith(_REMOTE):
            return None
        return Blocks(_hash(self._endpoint, url), _hash(version, str(size)), size, block)

    def read(self, blocks: Blocks, start: int, stop: int) -> bytes | None:
        """Return the bytes [start, stop), if all the blocks that hold them are there and sound."""
        parts = []
        for number in range(start // blocks.block, -(-stop // blocks.block)):
            base = number * blocks.block
            part = self._read_block(blocks, number, max(start - base, 0), min(stop - base, blocks.block))
            if part is None:
                return None
            parts.append(part)
        return b"".join(parts) if len(parts) > 1 else parts[0]

    def write(self, blocks: Blocks, start: int, data: bytes) -> None:
        """Keep a block, if these bytes are one and there is room; never fails."""
        number, rest = divmod(start, blocks.block)
        if rest or len(data) != blocks.length(number) or time.monotonic() < self._paused_until:
            return
        name, aside = blocks.name(number), self._root / blocks.folder / f"{_ASIDE}{uuid.uuid4().hex}"
        try:
            body = data + _sums(name, data, 0)
            if not self._reserve(aside, len(body)):
                self._pause("there is no room for a block")
                return
            with aside.open("r+b") as file:
                file.write(body)
            self._commit(aside, name, len(body))
        except OSError as error:
            with suppress(OSError):
                aside.unlink(missing_ok=True)
            self._pause(error.strerror or type(error).__name__)

    def forget(self, blocks: Blocks, *, others: bool = False) -> None:
        """Remove what is kept of this version of an object, or of its others."""
        with suppress(OSError):
            for entry in list(os.scandir(self._root / blocks.folder)):
                if not entry.name.startswith(_ASIDE) and entry.name.startswith(blocks.version) != others:
                    Path(entry.path).unlink(missing_ok=True)

    def _read_block(self, blocks: Blocks, number: int, start: int, stop: int) -> bytes | None:
        """Return bytes of a block by the chunks that hold them; a block that is not sound is removed."""
        name, length = blocks.name(number), blocks.length(number)
        path = self._root / blocks.folder / name
        first, last = start // CHUNK_BYTES, -(-min(stop, length) // CHUNK_BYTES)
        try:
            with path.open("rb", buffering=0) as file:
                status = os.fstat(file.fileno())
                data = os.pread(
                    file.fileno(), min(last * CHUNK_BYTES, length) - first * CHUNK_BYTES, first * CHUNK_BYTES
                )
                sums = os.pread(file.fileno(), (last - first) * _SUM_BYTES, length + first * _SUM_BYTES)
        except OSError:
            return None
        if (
            status.st_size != length + _SUM_BYTES * -(-length // CHUNK_BYTES)
            or _sums(name, data, first) != sums
        ):
            with suppress(OSError):
                path.unlink(missing_ok=True)
            return None
        if time.time() - status.st_mtime > TOUCH_SECONDS:
            with suppress(OSError):
                os.utime(path)
        return data[start - first * CHUNK_BYTES : stop - first * CHUNK_BYTES]

    def _reserve(self, aside: Path, size: int) -> bool:
        """Make an empty file of this length, which counts from now on; False: there is no room for it."""
        with _locked(self._root) as used_file:
            used = _read_number(used_file)
            if used is None or used + size > self._room(used):
                used = self._sweep(size)
            fits = used + size <= self._room(used)
            if fits:
                aside.parent.mkdir(exist_ok=True)
                with aside.open("xb") as file:
                    file.truncate(size)
                used += size
            _write_number(used_file, used)
        return fits

    def _commit(self, aside: Path, name: str, size: int) -> None:
        """Give a block its name. Who counts blocks must not meet it under both names, or under none."""
        with _locked(self._root) as used_file:
            path = aside.with_name(name)
            if path.exists():  # another process was faster
                _write_number(used_file, (_read_number(used_file) or size) - size)
            aside.replace(path)

    def _room(self, used: int) -> int:
        """Return how many bytes the cache may have, of which it has `used`."""
        disk = os.statvfs(self._root)
        spare = disk.f_bavail * disk.f_frsize - int(self._free_ratio * disk.f_blocks * disk.f_frsize)
        return min(self._limit, used + spare)

    def _sweep(self, wanted: int) -> int:
        """Remove orphans, and where so many bytes have no room the oldest blocks; return what is left."""
        found = [(status.st_mtime, status.st_size, path) for path, status in self._files()]
        used, now = sum(size for _, size, _ in found), time.time()
        room = self._room(used)
        most = used if used + wanted <= room else int(KEPT_RATIO * room) - wanted
        for modified, size, path in sorted(found):
            orphan = path.name.startswith(_ASIDE)
            if now - modified > ORPHAN_SECONDS if orphan else used > most:
                path.unlink(missing_ok=True)
                used -= size
                with suppress(OSError):
                    path.parent.rmdir()  # the object's last block
        return used

    def _files(self) -> Iterator[tuple[Path, os.stat_result]]:
        for folder in list(os.scandir(self._root)):
            if folder.is_dir():
                for entry in list(os.scandir(folder.path)):
                    with suppress(FileNotFoundError):
                        yield Path(entry.path), entry.stat()

    def _pause(self, reason: str) -> None:
        """Leave blocks out for a while; say so once."""
        self._paused_until = time.monotonic() + PAUSE_SECONDS
        if not self._warned:
            self._warned = True
            logger.warning(
                f"storage.cache: {reason}; blocks are read without being kept ({self._root.parent})"
            )


def open_cache(section: StorageSection) -> BlockCache | None:
    """Return the node's cache; None where `storage.cache` names no folder."""
    if not section.cache:
        return None
    folder = Path(section.cache.removeprefix("file://"))
    return BlockCache(
        folder,
        section.cache_bytes,
        free_ratio=section.cache_free_ratio,
        endpoint=section.endpoint_url or "",
    )


def check_cache(section: StorageSection) -> None:
    """Refuse a folder in which nothing can be kept, before anything is read.

    Raises:
        ConfigError: it cannot be made or written.
    """
    if not section.cache:
        return
    folder = Path(section.cache.removeprefix("file://"))
    try:
        with _locked(folder / "v1"):
            pass
    except OSError as error:
        reason = f"this folder cannot be used ({error.strerror})"
        raise ConfigError("storage.cache", reason, value=section.cache) from None


@contextmanager
def _locked(root: Path) -> Iterator[int]:
    """Hold the lock of the cache, where it can be had; gives the file of the bytes in use."""
    root.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(root / "used", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)


def _read_number(descriptor: int) -> int | None:
    try:
        return int(os.pread(descriptor, 20, 0))
    except ValueError:
        return None


def _write_number(descriptor: int, number: int) -> None:
    os.pwrite(descriptor, f"{number:020d}".encode(), 0)


def _sums(name: str, data: bytes, first: int) -> bytes:
    """Return the checksums of chunks, from the number `first` on; a block under another's name has others."""
    view, seed = memoryview(data), zlib.crc32(name.encode())
    chunks = range(0, len(data), CHUNK_BYTES)
    numbers = (
        zlib.crc32(view[at : at + CHUNK_BYTES], seed ^ (first + place)) for place, at in enumerate(chunks)
    )
    return b"".join(number.to_bytes(_SUM_BYTES, "little") for number in numbers)


def _hash(*parts: str) -> str:
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=12).hexdigest()
