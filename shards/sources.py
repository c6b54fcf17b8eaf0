"""Where images come from: folders, MNIST's idx files, torchvision's data sets.

A source knows how many images there are and reads any of them, so that they can be dealt in any order.
"""

from __future__ import annotations

import gzip
import inspect
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from shards.images import encode_png
from streamswav.errors import ConfigError, DecodeError, NotFoundError, UnsupportedError
from streamswav.stream.tar import IMAGE_EXTENSIONS

TORCHVISION = "torchvision:"

_IDX_IMAGES, _IDX_LABELS = 0x0803, 0x0801
_IDX_PREFIXES = {"train": ("train",), "test": ("t10k", "test")}


@dataclass(frozen=True, slots=True)
class Item:
    """One image: a unique key without dots, its encoded bytes, and its class where it has one."""

    key: str
    data: bytes
    label: int | None


class Source(Protocol):
    """Images in a fixed order. `classes` names the labels; it is empty where there are none."""

    classes: Sequence[str]

    def __len__(self) -> int: ...

    def read(self, index: int) -> Item:
        """Read one image.

        Raises:
            DecodeError: it cannot be read.
        """
        ...


def open_source(location: str, *, split: str = "train", root: Path | None = None) -> Source:
    """Find out what kind of source this is, and open it.

    Args:
        location: an image folder (flat, or a folder for each class), a folder of idx files as MNIST and
            Fashion-MNIST come, or `torchvision:NAME`.
        split: of idx files and torchvision's data sets.
        root: where torchvision's data sets lie, or are downloaded to.

    Raises:
        NotFoundError: there is nothing there.
        ConfigError: it is nothing that can be understood.
    """
    if location.startswith(TORCHVISION):
        return TorchvisionSource(location.removeprefix(TORCHVISION), split=split, root=root or Path("data"))
    folder = Path(location)
    if not folder.is_dir():
        raise NotFoundError(location, "there is no such folder on this machine")
    if any(folder.glob("*-images-idx3-ubyte*")):
        return IdxSource(folder, split=split)
    return FolderSource(folder)


class FolderSource:
    """Image files below a folder, in the order of their paths. Folders of the first level are classes."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files = sorted(_image_files(folder))
        if not self._files:
            raise NotFoundError(str(folder), "there are no images (files with the extension of one) below it")
        tops = {file.split("/", 1)[0] for file in self._files}
        # With images beside them the folders are but folders.
        nested = all("/" in file for file in self._files)
        self.classes: Sequence[str] = sorted(tops) if nested else []
        self._labels = {name: label for label, name in enumerate(self.classes)}
        self._keys = unique_keys(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def read(self, index: int) -> Item:
        """Read one file as it is."""
        file = self._files[index]
        try:
            data = (self._folder / file).read_bytes()
        except OSError as error:
            raise DecodeError("unreadable", f"{file}: {error.strerror}") from None
        return Item(self._keys[index], data, self._labels.get(file.split("/", 1)[0]))


class IdxSource:
    """Images and labels in MNIST's idx format (big-endian, gzipped or not), as lossless PNG."""

    def __init__(self, folder: Path, *, split: str) -> None:
        prefixes = _IDX_PREFIXES.get(split, (split,))
        found = [prefix for prefix in prefixes if any(folder.glob(f"{prefix}-images-idx3-ubyte*"))]
        if not found:
            raise NotFoundError(
                str(folder), f"there is no {prefixes[0]}-images-idx3-ubyte.gz for the split {split}"
            )
        self._images = _read_idx(folder, f"{found[0]}-images-idx3-ubyte", _IDX_IMAGES)
        self._labels = _read_idx(folder, f"{found[0]}-labels-idx1-ubyte", _IDX_LABELS)
        if len(self._images) != len(self._labels):
            reason = f"has {len(self._images)} images and {len(self._labels)} labels for the split {split}"
            raise ConfigError("SOURCE", reason, value=str(folder))
        self.classes: Sequence[str] = [str(label) for label in range(int(self._labels.max(initial=0)) + 1)]

    def __len__(self) -> int:
        return len(self._images)

    def read(self, index: int) -> Item:
        """Encode one image."""
        return Item(
            f"{index:08d}", encode_png(Image.fromarray(self._images[index])), int(self._labels[index])
        )


class TorchvisionSource:
    """A data set of torchvision: its files as they are where it knows them, otherwise lossless PNG."""

    def __init__(self, name: str, *, split: str, root: Path) -> None:
        self._dataset = _open_torchvision(name, split, root)
        self._files = _original_files(self._dataset)
        self.classes: Sequence[str] = [str(name) for name in getattr(self._dataset, "classes", None) or []]

    def __len__(self) -> int:
        return len(self._dataset)

    def read(self, index: int) -> Item:
        """Read one file, or encode what the data set gives."""
        if self._files:
            path, target = self._files[index]
            try:
                return Item(f"{index:08d}", Path(path).read_bytes(), _label(target))
            except OSError as error:
                raise DecodeError("unreadable", f"{path}: {error.strerror}") from None
        image, target = self._dataset[index]
        return Item(f"{index:08d}", encode_png(image), _label(target))


def unique_keys(files: Sequence[str]) -> list[str]:
    """Turn paths into keys: without extension, dots replaced (webdataset ends a key at the first dot)."""
    taken: set[str] = set()
    keys = []
    for file in files:
        path = os.fsencode(file).decode("utf-8", "replace")
        base = key = path.rpartition(".")[0].replace(".", "_")
        number = 1
        while key in taken:
            number += 1
            key = f"{base}-{number}"
        taken.add(key)
        keys.append(key)
    return keys


def _image_files(folder: Path) -> list[str]:
    found = []
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            stem, _, extension = name.rpartition(".")
            if stem.strip(".") and extension.lower() in IMAGE_EXTENSIONS and not name.startswith("."):
                found.append(Path(parent, name).relative_to(folder).as_posix())
    return found


def _read_idx(folder: Path, name: str, magic: int) -> NDArray[np.uint8]:
    """Read an idx file: magic number (type and number of dimensions), the dimensions, the bytes."""
    file = next((folder / each for each in (f"{name}.gz", name) if (folder / each).is_file()), None)
    if file is None:
        raise NotFoundError(str(folder / f"{name}.gz"), "there is no such file")
    try:
        data = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        (found,) = struct.unpack_from(">I", data)
        shape = struct.unpack_from(f">{magic & 0xFF}I", data, 4)
        if found != magic:
            raise ConfigError(
                "SOURCE", f"is not the idx file that its name says (magic {found:#x})", value=str(file)
            )
        return np.frombuffer(data, np.uint8, offset=4 + 4 * len(shape)).reshape(shape)
    except (OSError, EOFError, ValueError, struct.error) as error:
        raise ConfigError("SOURCE", f"is damaged ({error})", value=str(file)) from None


def _open_torchvision(name: str, split: str, root: Path) -> Any:
    # Importing torchvision brings torch with it, which the other sources do without.
    from torchvision import datasets  # noqa: PLC0415

    kind: Any = getattr(datasets, name, None)
    if not inspect.isclass(kind):
        raise UnsupportedError(
            TORCHVISION + name, "torchvision has no such data set (names are as CIFAR10, STL10)"
        )
    known = inspect.signature(kind).parameters
    wanted = {"root": str(root), "split": split, "train": split == "train"}
    arguments = {key: value for key, value in wanted.items() if key in known}
    try:
        return kind(**arguments)
    except (RuntimeError, OSError) as missing:
        if "download" not in known:
            raise NotFoundError(TORCHVISION + name, f"is not below {root} ({missing})") from None
    except (ValueError, TypeError) as error:
        raise ConfigError("SOURCE", f"cannot be opened ({error})", value=TORCHVISION + name) from None
    except ImportError as error:
        reason = f"needs a package that is not installed ({error}); install it with pip"
        raise UnsupportedError(TORCHVISION + name, reason) from None
    try:
        return kind(**{**arguments, "download": True})
    except (RuntimeError, OSError) as error:
        reason = f"is not below {root}, and could not be downloaded ({error}); fetch it there by other means"
        raise NotFoundError(TORCHVISION + name, reason) from None


def _original_files(dataset: Any) -> list[tuple[Any, Any]]:
    """Paths and targets of a data set that reads files, by the names that torchvision's keep them under."""
    for name in ("samples", "_samples"):
        samples = getattr(dataset, name, None)
        if samples and isinstance(samples[0][0], str | Path):
            return list(samples)
    files, labels = getattr(dataset, "_image_files", None), getattr(dataset, "_labels", None)
    return list(zip(files, labels, strict=True)) if files and labels else []


def _label(target: Any) -> int | None:
    """A class number; segmentations, boxes and the `-1` of unlabelled images are none."""
    try:
        label = int(target)
    except (TypeError, ValueError):
        return None
    return label if label >= 0 else None
