"""Single files of weights, read without executing anything that is in them.

    zip archive of torch.save    held against its checksums, then mapped into memory: what nobody asks for,
                                 an optimizer say, takes none
    torch.save before 1.6        read whole
    safetensors                  a list of names, shapes and bytes: there is nothing in it to execute

What a pickle may build is torch's list for `weights_only`, and beside it numpy's scalars (learning rates in
training checkpoints) and `argparse.Namespace` (their arguments). Everything else is refused by name.
"""

from __future__ import annotations

import argparse
import re
import tempfile
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch

from streamswav.errors import CheckpointError, NotFoundError
from streamswav.stream.store import Store, redact
from streamswav.transfer.weights.tensors import Tensors, flatten, one_line

_ZIP, _PICKLE = b"PK\x03\x04", b"\x80"
_BEFORE_1_6 = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_LIST = "data.pkl"
_MOST_LIST_BYTES = 64 << 20  # names and shapes of the largest trunk take a tenth of a MiB
_MOST_HEADER_BYTES = 100_000_000  # safetensors' own bound
_HEAD_BYTES = 512
_PIECE_BYTES = 8 << 20
_LONGEST = 120
_OF_TORCH = "WeightsUnpickler error: "  # after advice that does not hold here
_GLOBAL = re.compile(r"GLOBAL ([\w.]+)")

_NUMPY = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")  # before numpy 2, and since
_KINDS = "?bhilqBHILQefd"
_INERT: list[Any] = [
    *((np.float64(0).__reduce__()[0], name) for name in _NUMPY),
    np.dtype,
    *{type(np.dtype(kind)) for kind in _KINDS},
    argparse.Namespace,
]
"""Types that pickles of training checkpoints hold and that do nothing when they are built."""


def is_file(url: str, store: Store) -> bool:
    """Tell whether this is a file, and not a folder or nothing."""
    try:
        store.info(url)
    except NotFoundError:
        return False
    return True


def read_tensors(url: str, store: Store) -> tuple[Tensors, dict[str, str]]:
    """Read the tensors of a file by their dotted names, and what the file says of itself.

    The names are those of nested containers, joined: `state_dict.module.conv1.weight`. Tensors may be mapped
    from the file: copy what is kept. Only safetensors has a place for words.

    Raises:
        CheckpointError: it is no file of weights, is damaged, or holds what would have to be executed.
        StorageError: it cannot be read.
    """
    with _at_hand(url, store) as path:
        try:
            return _read(path)
        except CheckpointError as error:
            raise CheckpointError(one_line(f"{redact(url)}: {error}")) from None


@contextmanager
def _at_hand(url: str, store: Store) -> Iterator[Path]:
    """Give a local file: the one that is meant, or a copy that lasts as long as its tensors are mapped."""
    local = re.sub(r"^file://", "", url)
    if "://" not in local:
        store.info(url)
        yield Path(local)
        return
    with tempfile.TemporaryDirectory(prefix="streamswav-weights-") as folder:
        copy = Path(folder, "weights")
        store.download(url, copy)
        yield copy


def _read(path: Path) -> tuple[Tensors, dict[str, str]]:
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    if head.startswith(_ZIP):
        _check_archive(path)
        return _unpickle(path, mapped=True), {}
    if head.startswith(_BEFORE_1_6):
        return _unpickle(path, mapped=False), {}
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= _MOST_HEADER_BYTES:
        return _read_safetensors(path)
    raise CheckpointError(_what_else(head))


def _check_archive(path: Path) -> None:
    """Refuse zip archives that torch.save does not write, or that changed since, before torch reads them."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            _check_entries(entries)
            damaged = [entry.filename for entry in entries if entry.CRC and not _is_whole(archive, entry)]
    except CheckpointError:
        raise
    # What zipfile raises depends on which byte is wrong.
    except Exception:
        raise CheckpointError(
            "it is cut off or damaged: the list at the end of the archive is missing or wrong"
        ) from None
    if damaged:
        shown = f"{len(damaged)} of {len(entries)} entries of the archive"
        raise CheckpointError(f"it is damaged: {shown} differ from their checksum, first {damaged[0]}")


def _check_entries(entries: Sequence[zipfile.ZipInfo]) -> None:
    """Look at what the archive lists."""
    names = {entry.filename.partition("/")[2] for entry in entries}
    if "constants.pkl" in names or any(name.startswith("code/") for name in names):
        raise CheckpointError("a TorchScript archive, which is a program; save the state_dict of its model")
    lists = [entry for entry in entries if entry.filename.partition("/")[2] == _LIST]
    if len(lists) != 1 or any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise CheckpointError("a zip archive that torch.save did not write")
    if lists[0].file_size > _MOST_LIST_BYTES:
        shown = f"{lists[0].file_size:,} bytes beside the tensors; at most {_MOST_LIST_BYTES:,} are read"
        raise CheckpointError(f"its pickle holds {shown}: save the state_dict alone")


def _is_whole(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bool:
    """Hold an entry against its checksum, which torch does not; torch.save can be told to write 0 for it."""
    try:
        with archive.open(entry) as file:
            while file.read(_PIECE_BYTES):
                pass
    except (zipfile.BadZipFile, EOFError):
        return False
    return True


def _unpickle(path: Path, *, mapped: bool) -> Tensors:
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(_INERT):
            warnings.simplefilter("ignore")  # of formats that are old, and of tensors that are mapped
            return flatten(torch.load(path, map_location="cpu", weights_only=True, mmap=mapped))
    except CheckpointError:
        raise
    # What torch raises depends on which byte is wrong.
    except Exception as error:
        if found := _GLOBAL.search(str(error)):
            raise CheckpointError(
                f"it holds {found[1]}, which would have to be executed; nothing was. Where the file is "
                "trusted, save the state_dict of its model alone"
            ) from None
        raise CheckpointError(f"it is damaged, or no file of tensors: {_in_short(error)}") from None


def _read_safetensors(path: Path) -> tuple[Tensors, dict[str, str]]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (safetensors.SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"a safetensors file that is cut off or damaged: {_in_short(error)}") from None


def _what_else(head: bytes) -> str:
    """Say what a file is that holds no weights, by how it begins."""
    if not head:
        return "the file is empty"
    text = head.decode("utf-8", errors="replace").strip().lower()
    if text.startswith(("<!doctype", "<html", "<?xml")):
        return "a web page, not weights; what was downloaded is probably a message of the server"
    if text.startswith("version https://git-lfs"):
        return "a pointer of Git LFS, not the weights it stands for: fetch them with `git lfs pull`"
    if "\ufffd" not in text[:-1] and "".join(text.split()).isprintable():
        return "text, not weights"
    if head.startswith(_PICKLE):
        return "a plain pickle, which may hold code and is not opened; torch.save and safetensors are read"
    return "neither written by torch.save nor in safetensors, or damaged from its beginning"


def _in_short(error: Exception) -> str:
    text = " ".join(str(error).partition(_OF_TORCH)[2].split() or str(error).split()) or type(error).__name__
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
