"""Trunks out of checkpoints: which layout a path has, and its weights, all of them or none.

What can be read today is a checkpoint of this trainer, by the folder of its run, its `checkpoints` or one
`step-*`. Any other file is recognised as far as possible, so that its error says what it is.
"""

from __future__ import annotations

import enum
import os
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from streamswav.config import Config, StorageSection, parse_config
from streamswav.errors import CheckpointError, ConfigError, NotFoundError
from streamswav.models import Trunk, build_trunk
from streamswav.stream.store import Store, redact
from streamswav.training.checkpoint import Checkpoint, find_checkpoint, unpack

MODEL_FILE = "model.pt"
CONFIG_FILE = "config.yaml"

_TRUNK = "trunk."
_BESIDE_TRUNK = ("projection_head.", "prototypes.")
_DEFAULT_STORAGE = StorageSection()


class Layout(enum.Enum):
    """What a single file of weights turns out to be."""

    CHECKPOINT_FILE = "a file of a streamswav checkpoint; give the folder it lies in"
    PUBLISHED = "weights in the layout of the published SwAV models"
    TORCHVISION = "weights in torchvision's layout"
    TENSORS = "tensors under names of no known layout"
    OTHER = "PyTorch data without named tensors"
    UNREADABLE = "no file of tensors that can be read without executing code"


@dataclass(frozen=True)
class TrunkInfo:
    """Where a trunk comes from.

    Attributes:
        url: the checkpoint's folder, without query string.
        config: the run's configuration.
        step: optimizer steps it was trained for.
        images: images it was trained on.
    """

    url: str
    config: Config
    step: int
    images: int


def load_trunk(path: str | os.PathLike[str], *, storage: StorageSection = _DEFAULT_STORAGE) -> nn.Module:
    """Return a trained trunk in eval mode, on the CPU: images [B, 3, S, S] to features [B, F].

    Args:
        path: the folder of a run, of its checkpoints, or of one checkpoint; local or s3://.
        storage: how object storage is reached.

    Raises:
        CheckpointError: there is no checkpoint, it is damaged, or not of the model it says it is.
        StorageError: a location that cannot be read.
    """
    return open_trunk(os.fspath(path), storage=storage)[0]


def open_trunk(path: str, *, storage: StorageSection = _DEFAULT_STORAGE) -> tuple[Trunk, TrunkInfo]:
    """Return what `load_trunk` does, and where it comes from.

    Raises:
        CheckpointError, StorageError: as `load_trunk`.
    """
    store = Store(storage)
    if _is_file(path, store):
        layout = recognise(store.read(path))
        raise CheckpointError(f"{redact(path)}: {layout.value}; only checkpoint folders are read so far")
    checkpoint, files = find_checkpoint(path, store)
    for name in (MODEL_FILE, CONFIG_FILE):
        if name not in files:
            raise CheckpointError(f"{redact(checkpoint.url)}: there is no {name} in this checkpoint")
    info = _read_info(checkpoint, files[CONFIG_FILE])
    trunk = build_trunk(info.config.model)
    _fill(trunk, _trunk_state(unpack(files[MODEL_FILE]), info.url), source=info.url)
    trunk.eval()
    return trunk, info


def untrained_trunk(config: Config, seed: int) -> Trunk:
    """Return the trunk in eval mode as a run with this configuration and seed begins it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        trunk = build_trunk(config.model)
    trunk.eval()
    return trunk


def recognise(data: bytes) -> Layout:
    """Tell what a file of weights is, by its tensors' names."""
    try:
        content = unpack(data)
    # What torch raises depends on which byte is wrong.
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError, KeyError, TypeError):
        return Layout.UNREADABLE
    if isinstance(content, Mapping) and "network" in content:
        return Layout.CHECKPOINT_FILE
    names = _tensor_names(content)
    if any(name.removeprefix("module.").startswith(_BESIDE_TRUNK) for name in names):
        return Layout.PUBLISHED
    if {"conv1.weight", "layer1.0.conv1.weight"} <= {name.removeprefix("module.") for name in names}:
        return Layout.TORCHVISION
    return Layout.TENSORS if names else Layout.OTHER


def _tensor_names(content: object) -> list[str]:
    """Names of the tensors in a state dict, or in the one that training scripts put below `state_dict`."""
    if not isinstance(content, Mapping):
        return []
    inner = content.get("state_dict", content)
    return [str(name) for name, value in inner.items() if isinstance(value, Tensor)]


def _is_file(path: str, store: Store) -> bool:
    try:
        store.info(path)
    except NotFoundError:
        return False
    return True


def _read_info(checkpoint: Checkpoint, config: bytes) -> TrunkInfo:
    url = redact(checkpoint.url)
    try:
        values = yaml.safe_load(config)
        return TrunkInfo(url, parse_config(values), checkpoint.step, checkpoint.images)
    except (yaml.YAMLError, ConfigError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{url}: its {CONFIG_FILE} is not understood: {reason}") from None


def _trunk_state(content: Any, source: str) -> dict[str, Tensor]:
    state: Mapping[str, Tensor] = content["network"]
    strangers = [name for name in state if not name.startswith((_TRUNK, *_BESIDE_TRUNK))]
    if strangers:
        raise CheckpointError(f"{source}: {_some(strangers)} belongs to no network that is known here")
    return {name.removeprefix(_TRUNK): state[name] for name in state if name.startswith(_TRUNK)}


def _fill(trunk: nn.Module, state: Mapping[str, Tensor], *, source: str) -> None:
    """Load every tensor, or say in one line which do not fit.

    Raises:
        CheckpointError: a tensor is missing, has no place, or has another shape.
    """
    own = trunk.state_dict()
    problems = []
    if missing := [name for name in own if name not in state]:
        problems.append(f"lacks {_some(missing)}")
    if unexpected := [name for name in state if name not in own]:
        problems.append(f"has no place for {_some(unexpected)}")
    if other := [name for name in own if name in state and own[name].shape != state[name].shape]:
        here, there = (list(each[other[0]].shape) for each in (own, state))
        problems.append(f"{_some(other)} should be {here}, is {there}")
    if problems:
        raise CheckpointError(f"{source}: the weights are those of another trunk: {'; '.join(problems)}")
    trunk.load_state_dict(state)


def _some(names: Sequence[str]) -> str:
    first, *others = names
    return f"{first} (and {len(others)} more)" if others else first
