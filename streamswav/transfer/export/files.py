"""The files of an export: one format, one function, which writes into a local folder and reads back."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from streamswav.errors import CheckpointError, ConfigError
from streamswav.transfer.export.constructors import detectron2_settings
from streamswav.transfer.export.graphs import Classified, check_onnx, write_onnx, write_program
from streamswav.transfer.export.source import Source
from streamswav.transfer.weights.names import to_detectron2, to_reference, to_torchvision

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
GRAPHS = ("onnx", "torch.export")

State = dict[str, Tensor]


@dataclass(frozen=True)
class Job:
    """What every format is written from.

    Attributes:
        source: the weights.
        dtype: of the floating-point tensors; one of `DTYPES`.
        size: S of the images that graphs are traced with.
        about: short facts that go into the file where its format has a place for them.
    """

    source: Source
    dtype: str
    size: int
    about: Mapping[str, str]

    @property
    def trunk(self) -> State:
        """The trunk's tensors in the type that is wanted."""
        return self.cast(self.source.trunk.state_dict())

    def graph(self) -> nn.Module:
        """Return what a graph is made of."""
        classifier = self.source.classifier
        return Classified(self.source.trunk, classifier).eval() if classifier else self.source.trunk

    def cast(self, state: Mapping[str, Tensor]) -> State:
        """Return tensors in the type that is wanted, each of them contiguous."""
        wanted = DTYPES[self.dtype]
        return {
            name: (each.to(wanted) if each.is_floating_point() else each).contiguous()
            for name, each in state.items()
        }


@dataclass(frozen=True)
class Format:
    """One kind of file.

    Attributes:
        file: its name in a folder.
        write: makes it; it is read back before it counts.
    """

    file: str
    write: Callable[[Job, Path], None]


def formats_named(names: Sequence[str]) -> list[str]:
    """Return each of the formats once, in the order of `FORMATS`; `all` is all of them.

    Raises:
        ConfigError: there is no such format.
    """
    wanted = {_ALIASES.get(name.lower(), name.lower()) for name in names}
    for name in sorted(wanted - {*FORMATS, ALL}):
        near = difflib.get_close_matches(name, FORMATS, n=1)
        known = f"is no format; there are {', '.join(FORMATS)} and {ALL}"
        raise ConfigError("--to", known, value=name, nearest=near[0] if near else None)
    return [name for name in FORMATS if name in wanted or ALL in wanted]


def refuse_format(name: str, source: Source, *, dtype: str) -> None:
    """Refuse what this trunk, this type or this installation does not allow.

    Raises:
        ConfigError: saying what can be done.
    """
    if name in GRAPHS and dtype != "float32":
        raise ConfigError("--dtype", f"{name} is written in float32 only", value=dtype)
    if name == "onnx":
        check_onnx()
    section = source.info.config.model
    if name == "detectron2" and detectron2_settings(source.trunk, section) is None:
        shown = f"{section.trunk} of width {section.width:g} with the {section.stem} stem"
        raise ConfigError("--to", f"there is no {shown} in detectron2", value=name)


def digest_of(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_torchvision(job: Job, path: Path) -> None:
    _save(to_torchvision(job.trunk, job.cast(job.source.classifier)), path)


def _write_reference(job: Job, path: Path) -> None:
    _save(to_reference(job.trunk, job.cast(job.source.beside)), path)


def _write_detectron2(job: Job, path: Path) -> None:
    _save(to_detectron2(job.trunk), path, around={"__author__": "streamswav", "matching_heuristics": True})


def _write_safetensors(job: Job, path: Path) -> None:
    state = to_torchvision(job.trunk, job.cast(job.source.classifier))
    safetensors.torch.save_file(state, path, metadata={"format": "pt", **job.about})
    _compare(safetensors.torch.load_file(path), state, path)


def _write_onnx(job: Job, path: Path) -> None:
    write_onnx(job.graph(), path, size=job.size, about=job.about)


def _write_program(job: Job, path: Path) -> None:
    write_program(job.graph(), path, size=job.size, about=json.dumps(dict(job.about)))


def _save(state: State, path: Path, around: Mapping[str, object] | None = None) -> None:
    """Write tensors, below `model` where there is something around them."""
    torch.save(state if around is None else {"model": state, **around}, path)
    read = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    _compare(read if around is None else read["model"], state, path)


def _compare(read: Mapping[str, Tensor], state: State, path: Path) -> None:
    if set(read) != set(state) or any(
        not torch.equal(_bits(read[name]), _bits(state[name])) for name in state
    ):
        raise CheckpointError(f"{path.name}: what was written is not what is read back; is the disk full?")


def _bits(tensor: Tensor) -> Tensor:
    """The bytes, so that what is not a number compares as well."""
    return tensor.reshape(-1).view(torch.uint8)


FORMATS = {
    "torchvision": Format("torchvision.pth", _write_torchvision),
    "timm": Format("timm.pth", _write_torchvision),
    "safetensors": Format("model.safetensors", _write_safetensors),
    "reference": Format("reference.pth", _write_reference),
    "detectron2": Format("detectron2.pth", _write_detectron2),
    "onnx": Format("model.onnx", _write_onnx),
    "torch.export": Format("model.pt2", _write_program),
}
ALL = "all"
DEFAULT = ("torchvision", "safetensors")

_ALIASES = {"torch_export": "torch.export", "torch-export": "torch.export", "pt2": "torch.export"}
