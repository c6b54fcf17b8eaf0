"""Objects that are plain files. Whatever is written appears whole, by a rename."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import os
import shutil
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from streamswav.errors import ChangedError, DeniedError, NotFoundError, UnavailableError, UnsupportedError
from streamswav.stream.store.urls import LOCAL, ObjectInfo, join, scheme_of

ASIDE = ".partial"

_MAY_PASS = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EIO,
    errno.ESTALE,
    errno.ETIMEDOUT,
    errno.EHOSTDOWN,
    errno.ENOTCONN,
}
_NO_NAMES = {errno.ELOOP, errno.ENAMETOOLONG}


@contextmanager
def leaving_no_empty_folder(url: str) -> Iterator[None]:
    """Remove, at the end, those of a local folder and its parents that were made meanwhile and are empty."""
    path = path_of(url) if scheme_of(url) in LOCAL else None
    made = [] if path is None else [each for each in (path, *path.parents) if not each.exists()]
    try:
        yield
    finally:
        with suppress(OSError):
            for each in made:
                each.rmdir()


class LocalFiles:
    """Paths and file:// URLs."""

    def walk(self, folder: str, stem: str = "") -> Iterator[ObjectInfo]:
        """Yield the files below a folder whose relative path begins with `stem`."""
        root = path_of(folder)
        with _reading(folder):
            os.stat(root / ".")  # noqa: PTH116 - pathlib drops the dot that makes a file an error
            for parent, _, names in os.walk(root, onerror=_raise, followlinks=True):
                for name in names:
                    file = Path(parent, name)
                    relative = file.relative_to(root).as_posix()
                    if relative.startswith(stem) and not name.endswith(ASIDE):
                        yield _info(join(folder, relative), file.stat())

    def info(self, url: str) -> ObjectInfo:
        """Return size and version of a file."""
        with _reading(url), _opened(url) as file:
            return _info(url, os.fstat(file.fileno()))

    def read(self, url: str, start: int, stop: int | None, version: str | None) -> bytes:
        """Return bytes [start, stop) of a file; `None` means its end."""
        with _reading(url), _opened(url) as file:
            now = _info(url, os.fstat(file.fileno()))
            if version is not None and version != now.version:
                raise ChangedError(url, "the file was written again since it was listed")
            stop = now.size if stop is None else stop
            file.seek(start)
            data = file.read(stop - start)
        if len(data) != stop - start:
            raise ChangedError(url, f"ends at byte {now.size}, where {stop} were expected")
        return data

    def write(self, url: str, source: BinaryIO, size: int) -> None:  # noqa: ARG002 - as its remote kin
        """Copy a stream to a file: aside, to the disk, then under its name."""
        with self.writing(url) as file:
            shutil.copyfileobj(source, file, 1 << 20)

    @contextmanager
    def writing(self, url: str) -> Iterator[BinaryIO]:
        """Give a file to write into; it has its name once the context ends without an error."""
        path = path_of(url)
        aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}{ASIDE}")
        with _writing(url):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                with aside.open("wb") as file:
                    yield file
                    file.flush()
                    os.fsync(file.fileno())
                aside.replace(path)
            finally:
                aside.unlink(missing_ok=True)

    def read_version(self, url: str) -> tuple[bytes, str]:
        """Return a file and what `swap` knows it by: its digest, since two writes may share a time."""
        data = self.read(url, 0, None, None)
        return data, _digest(data)

    def swap(self, url: str, data: bytes, version: str | None) -> str:
        """Replace a file if it is of this version; `None`: there must be none.

        A lock on the folder keeps others that swap here waiting. Where a network's file system has no
        locks, two may pass the comparison at the same moment.
        """
        path = path_of(url)
        with _writing(url), _locked(path.parent):
            try:
                now = self.read_version(url)[1]
            except NotFoundError:
                now = None
            if now != version:
                raise ChangedError(url, "another process has written it")
            self.write(url, io.BytesIO(data), len(data))
        return _digest(data)

    def delete(self, url: str) -> None:
        """Remove a file, or a folder with all it holds; nothing there is fine."""
        path = path_of(url)
        if not path.name:
            raise UnsupportedError(url, "the root and the working folder are not deleted")
        with _writing(url):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def keeps_conditions(self, url: str) -> bool:
        """Tell whether the folder of a file can be locked."""
        self.write(url, io.BytesIO(), 0)
        descriptor = os.open(path_of(url).parent, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError:
            return False
        else:
            return True
        finally:
            os.close(descriptor)

    def clock_ahead(self, url: str) -> float | None:  # noqa: ARG002 - as its remote kin
        """Tell nothing: it is this machine's clock."""
        return None


def path_of(url: str) -> Path:
    """Return the path of a local URL."""
    return Path(url.removeprefix("file://"))


def _info(url: str, status: os.stat_result) -> ObjectInfo:
    return ObjectInfo(url, status.st_size, str(status.st_mtime_ns))


def _opened(url: str) -> BinaryIO:
    """Open a file; a pipe is refused, which would be waited at for a writer and has no length."""
    file = open(path_of(url), "rb", opener=_without_waiting)  # noqa: SIM115 - given to the caller
    if stat.S_ISFIFO(os.fstat(file.fileno()).st_mode):
        file.close()
        raise UnsupportedError(url, "is a pipe, not a file")
    return file


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)


def _raise(error: OSError) -> None:
    raise error


@contextmanager
def _reading(url: str) -> Iterator[None]:
    try:
        yield
    except IsADirectoryError:
        raise NotFoundError(url, "is a folder, not a file") from None
    except (FileNotFoundError, NotADirectoryError):
        raise NotFoundError(url, "there is no such file or folder") from None
    except PermissionError:
        raise DeniedError(url, "no permission to read") from None
    except ValueError:  # a zero byte
        raise NotFoundError(url, "no file can have this name") from None
    except OSError as error:
        kind = NotFoundError if error.errno in _NO_NAMES else UnavailableError
        raise kind(url, f"cannot be read ({error.strerror})") from None


@contextmanager
def _writing(url: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        # A disk that is full has room again some day.
        kind = UnavailableError if error.errno in _MAY_PASS else DeniedError
        raise kind(url, f"cannot be written ({error.strerror})") from None


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder, where it can be had."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
