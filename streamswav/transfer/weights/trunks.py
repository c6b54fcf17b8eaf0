"""Weights in: trunks and whole networks out of checkpoints and files of many makers, all of it or nothing.

a folder   of a run, its `checkpoints` or one `step-*`: as its configuration says
a file     files           tensors by name, nothing executed
           layouts         where the trunk lies among them, and whose layout that is
           architecture    which trunk it is, by names and shapes
           heads           projection head and prototypes, where a network has a place for them
           facts           what an export says beside that
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
import yaml
from torch import Tensor, nn

from streamswav.config import Config, StorageSection, parse_config
from streamswav.errors import CheckpointError, ConfigError
from streamswav.models import SwAVNetwork, Trunk, build_network, build_trunk
from streamswav.stream.store import Store, join, redact
from streamswav.training.checkpoint import Checkpoint, find_checkpoint, read_checkpoint, unpack
from streamswav.training.distributed import Ranks
from streamswav.transfer.weights.architecture import Match, compare, find_architecture
from streamswav.transfer.weights.facts import Facts, configure, images_seen, read_facts
from streamswav.transfer.weights.files import is_file, read_tensors
from streamswav.transfer.weights.heads import read_heads
from streamswav.transfer.weights.layouts import Found, find_trunk, group_of
from streamswav.transfer.weights.names import from_detectron2
from streamswav.transfer.weights.report import Report
from streamswav.transfer.weights.tensors import COUNTER, Tensors, fill, flatten, one_line, shapes_of, to_float

MODEL_FILE = "model.pt"
CONFIG_FILE = "config.yaml"
LIST_FILE = "checkpoint.json"

Path = str | os.PathLike[str]
Opened = TypeVar("Opened", bound=nn.Module)

_NETWORK = "network."
_OF_NETWORK = ("projection_head.", "prototypes.", "head.")
_DEFAULT_STORAGE = StorageSection()


@dataclass(frozen=True)
class TrunkInfo:
    """Where a trunk comes from.

    Attributes:
        url: the checkpoint's folder, or the file, without query string.
        config: the run's configuration; for a file, the trunk that it holds, and defaults.
        step: optimizer steps it was trained for; None where nobody says.
        images: images it was trained on; None where nobody says.
        layout: whose way to lay down weights it is.
        report: what was loaded, and what was not.
    """

    url: str
    config: Config
    step: int | None
    images: int | None
    layout: str
    report: Report


@dataclass(frozen=True)
class Weights:
    """Weights that were read, of a trunk that can be built here.

    Attributes:
        trunk: all its tensors, in float32, on the CPU, finite.
        beside: other tensors of a network as a checkpoint names them, as they were found:
            `projection_head.*` and `prototypes.weight`, or `head.*` after finetuning.
        info: where they come from.
    """

    trunk: Mapping[str, Tensor]
    beside: Mapping[str, Tensor]
    info: TrunkInfo

    def build_trunk(self) -> Trunk:
        """Return the trunk in eval mode; it takes the tensors, not copies of them."""
        with torch.device("meta"):
            trunk = build_trunk(self.info.config.model)
        return fill(trunk, self.trunk)

    def build_network(self) -> SwAVNetwork:
        """Return trunk, projection head and prototypes in eval mode.

        Raises:
            CheckpointError: head or prototypes are not there, or not such as this network has.
        """
        prototypes = self.beside.get("prototypes.weight")
        if prototypes is None or "projection_head.0.weight" not in self.beside:
            lacking = "no projection head with prototypes that fits"
            raise CheckpointError(f"{self.info.url}: there is {lacking}, only {self.info.report.trunk}")
        with torch.device("meta"):
            network = build_network(self.info.config.model, prototypes=len(prototypes))
        trunk = {f"trunk.{name}": tensor for name, tensor in self.trunk.items()}
        state = {**trunk, **to_float(self.beside, self.info.url)}
        found = shapes_of(state)
        own = shapes_of(network.state_dict())
        for name in {**own, **found}:
            if found.get(name, () if name.endswith(COUNTER) else None) != own.get(name):
                raise CheckpointError(f"{self.info.url}: {name} is not that of its configuration's network")
        return fill(network, state)


def load_trunk(path: Path, *, storage: StorageSection = _DEFAULT_STORAGE) -> nn.Module:
    """Return a trained trunk in eval mode, on the CPU: images [B, 3, S, S] to features [B, F].

    Args:
        path: the folder of a run, of its checkpoints, or of one checkpoint; or a file of weights: an export,
            or what SwAV's authors, VISSL, torchvision, timm, DINO and MoCo write. Local, s3:// or https://.
        storage: how object storage is reached.

    Raises:
        CheckpointError: there is nothing, it is damaged, it would have to be executed, or it is less or
            other than a whole trunk; then the message names the nearest one.
        StorageError: a location that cannot be read.
    """
    return open_trunk(path, storage=storage)[0]


def open_trunk(path: Path, *, storage: StorageSection = _DEFAULT_STORAGE) -> tuple[Trunk, TrunkInfo]:
    """Return what `load_trunk` does, and where it comes from.

    Raises:
        CheckpointError, StorageError: as `load_trunk`.
    """
    weights = read_weights(path, storage=storage)
    return weights.build_trunk(), weights.info


def open_network(path: Path, *, storage: StorageSection = _DEFAULT_STORAGE) -> tuple[SwAVNetwork, TrunkInfo]:
    """Return trunk, projection head and prototypes in eval mode, on the CPU, and where they come from.

    Raises:
        CheckpointError, StorageError: as `load_trunk`; also where head and prototypes are not there.
    """
    weights = read_weights(path, storage=storage)
    return weights.build_network(), weights.info


def open_alike(
    checkpoint: str, open_it: Callable[[str], tuple[Opened, TrunkInfo]], ranks: Ranks
) -> tuple[Opened, TrunkInfo]:
    """Open on every rank the weights that rank 0 finds: a run may save newer ones meanwhile.

    Args:
        checkpoint: a path, as `load_trunk` has it.
        open_it: opens one, as `open_trunk` does.
        ranks: all call this alike.

    Raises:
        CheckpointError, StorageError: as `open_it`, on all ranks.
    """
    opened: list[tuple[Opened, TrunkInfo]] = []

    def find(path: str) -> str:
        opened.append(open_it(path))
        return opened[0][1].url

    url = ranks.lead(lambda: find(checkpoint))
    if ranks.world_size > 1:
        path = checkpoint if url == redact(checkpoint) else url
        ranks.each(lambda: None if ranks.leads else find(path))
    return opened[0]


def read_weights(path: Path, *, storage: StorageSection = _DEFAULT_STORAGE) -> Weights:
    """Read what `load_trunk` does, and what lies beside it, without building a network.

    Raises:
        CheckpointError, StorageError: as `load_trunk`.
    """
    store, path = Store(storage), os.fspath(path)
    if not is_file(path, store):
        if not store.exists(path):
            raise CheckpointError(f"{redact(path)}: there is neither a checkpoint nor a file of weights")
        return _read_run(*find_checkpoint(path, store, only=(MODEL_FILE, CONFIG_FILE)))
    folder, _, name = path.rpartition("/")
    if name == MODEL_FILE and is_file(join(folder, LIST_FILE), store):
        return _read_run(*read_checkpoint(folder, store, only=(MODEL_FILE, CONFIG_FILE)))
    tensors, about = read_tensors(path, store)
    try:
        return _read_file(tensors, read_facts(path, about, store), redact(path))
    except CheckpointError as error:
        raise CheckpointError(one_line(str(error))) from None


def untrained_trunk(config: Config, seed: int) -> Trunk:
    """Return the trunk in eval mode as a run with this configuration and seed draws it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        trunk = build_trunk(config.model)
    trunk.eval()
    return trunk


def _read_run(checkpoint: Checkpoint, files: Mapping[str, bytes]) -> Weights:
    """Read a checkpoint of this trainer: what its configuration says, and nothing that it does not know."""
    url = redact(checkpoint.url)
    for name in (MODEL_FILE, CONFIG_FILE):
        if name not in files:
            raise CheckpointError(f"{url}: there is no {name} in this checkpoint")
    config = _read_config(files[CONFIG_FILE], url)
    found = _find(flatten(unpack(files[MODEL_FILE])), url)
    match = compare(shapes_of(found.trunk), config.model.trunk, config.model.width, config.model.stem)
    if not match.exact:
        raise CheckpointError(f"{url}: its trunk is not the {match} of its {CONFIG_FILE}: {match.explain()}")
    own = [name for name in found.rest if name.startswith(_NETWORK)]
    taken = [name for name in own if name.removeprefix(_NETWORK).startswith(_OF_NETWORK)]
    if strangers := [name for name in own if name not in taken]:
        raise CheckpointError(f"{url}: {_some(strangers)} belongs to no network that is known here")
    beside = {name.removeprefix(_NETWORK): found.rest[name] for name in taken}
    info = TrunkInfo(
        url, config, checkpoint.step, checkpoint.images, found.layout, _report(found, match, taken)
    )
    return Weights(to_float(found.trunk, url), beside, info)


def _read_file(tensors: Tensors, facts: Facts, url: str) -> Weights:
    """Read a file by its tensors, and by what an export says of itself."""
    renamed = from_detectron2(tensors)
    found = replace(_find(renamed, url), layout="detectron2") if renamed else _find(tensors, url)
    match = find_architecture(shapes_of(found.trunk))
    _refuse_other(found, match, url)
    beside, taken, head = read_heads(found.rest, features=match.features)
    prototypes = beside.get("prototypes.weight")
    model = {"trunk": match.trunk, "width": match.width, "stem": match.stem, **head}
    config = configure(model, None if prototypes is None else len(prototypes), facts)
    notes = []
    if renamed and not facts:
        notes.append("blocks are taken to have their stride in the 3x3 convolution (STRIDE_IN_1X1: false)")
    if match.stem != "imagenet" and facts.get("stem") != config.model.stem:
        notes.append("the stride of the 3x3 stem is not seen in a file: 1 is assumed, as of model.stem small")
    report = _report(found, replace(match, stem=config.model.stem), taken, notes)
    return Weights(
        to_float(found.trunk, url),
        beside,
        TrunkInfo(url, config, None, images_seen(facts), found.layout, report),
    )


def _find(tensors: Tensors, url: str) -> Found:
    try:
        return find_trunk(tensors)
    except CheckpointError as error:
        raise CheckpointError(f"{url}: {error}") from None


def _refuse_other(found: Found, match: Match, url: str) -> None:
    """Refuse less and other than a whole trunk that can be built here, naming what it is nearest to.

    Raises:
        CheckpointError: that.
    """
    where = f"a trunk in the layout of {found.layout}"
    if not match.exact:
        raise CheckpointError(f"{url}: {where}, closest to {match}, but {match.explain()}")
    if not match.built_here:
        reason = "its 3x3 convolutions alone are wider, unlike those of model.width; it is not built here"
        raise CheckpointError(f"{url}: {where}, but it is torchvision's {match.trunk}: {reason}")


def _report(found: Found, match: Match, taken: Sequence[str], notes: Sequence[str] = ()) -> Report:
    counters = match.counters
    left = [name for name in found.rest if name not in {*taken}]
    cast = [
        str(each.dtype).removeprefix("torch.") for each in found.trunk.values() if each.is_floating_point()
    ]
    return Report(
        found.layout,
        found.prefix,
        str(match),
        len(found.trunk),
        beside=dict(Counter(map(group_of, taken))),
        left_over=found.count(left),
        missing=tuple(name for name in counters if name not in found.trunk),
        cast={kind: count for kind, count in Counter(cast).items() if kind != "float32"},
        notes=tuple(notes),
    )


def _read_config(data: bytes, url: str) -> Config:
    try:
        return parse_config(yaml.safe_load(data))
    except (yaml.YAMLError, ConfigError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{url}: its {CONFIG_FILE} is not understood: {reason}") from None


def _some(names: Sequence[str]) -> str:
    first, *others = names
    return f"{first} (and {len(others)} more)" if others else first
