"""What is exported: all weights of a checkpoint, and what is known of how they came about."""

from __future__ import annotations

import json
import posixpath
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from streamswav.config import StorageSection
from streamswav.errors import ConfigError, NotFoundError
from streamswav.models import Trunk
from streamswav.stream.store import Store, join, redact
from streamswav.training.checkpoint import read_checkpoint, unpack
from streamswav.transfer.weights import MODEL_FILE, TrunkInfo, open_trunk

RESULTS_FILE = "results.json"

_TRUNK = "trunk."
_CHECKPOINTS = "checkpoints"
_MANIFEST = "manifest.json"
_POSITION = "position.json"
_RECIPE = ("crops", "model", "swav", "optimizer", "training", "finetune")
_OF_STREAM = ("seed", "passes", "samples", "columns", "rows", "window")


@dataclass(frozen=True)
class Source:
    """Weights with their provenance.

    Attributes:
        trunk: in eval mode, float32, on the CPU.
        beside: the network's other tensors as a checkpoint names them: `projection_head.*` and
            `prototypes.*`, or `head.*` after finetuning; empty where the source has none.
        info: of the trunk.
        recipe: the run's configuration by section; None for weights that no run of this trainer made.
        data: what it was trained on; empty where nothing is known.
    """

    trunk: Trunk
    beside: Mapping[str, Tensor]
    info: TrunkInfo
    recipe: Mapping[str, Any] | None
    data: Mapping[str, Any]

    @property
    def classifier(self) -> dict[str, Tensor]:
        """`weight` and `bias` of the classifier of a finetuned network; empty where there is none."""
        return {
            name.removeprefix("head."): each for name, each in self.beside.items() if name.startswith("head.")
        }

    @property
    def classes(self) -> int:
        """C of the classifier; 0 where there is none."""
        classifier = self.classifier
        return len(classifier["weight"]) if classifier else 0


def read_source(path: str, storage: StorageSection) -> Source:
    """Open what is to be exported.

    Raises:
        CheckpointError, StorageError: as `open_trunk`.
    """
    trunk, info = open_trunk(path, storage=storage)
    store = Store(storage)
    _, files = read_checkpoint(info.url, store, only=(MODEL_FILE, _POSITION))
    state = unpack(files[MODEL_FILE])["network"]
    beside = {name: tensor for name, tensor in state.items() if not name.startswith(_TRUNK)}
    return Source(
        trunk, beside, info, _recipe(info), _describe_data(info, files.get(_POSITION, b"{}"), store)
    )


def read_results(urls: Sequence[str], info: TrunkInfo, store: Store) -> list[dict[str, Any]]:
    """Read results of evaluations, as given, or as `results.json` in the folder of the run.

    Raises:
        ConfigError: a file that holds none.
        NotFoundError: a file that was given and is not there.
    """
    if urls:
        return [_read_results(url, store) for url in urls]
    run = _run_of(info.url)
    place = join(run, RESULTS_FILE) if run else ""
    return [_read_results(place, store)] if place and store.exists(place) else []


def without_secrets(value: Any) -> Any:
    """Return plain data with every URL in it redacted."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, Mapping):
        return {key: without_secrets(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [without_secrets(each) for each in value]
    return value


def _read_results(url: str, store: Store) -> dict[str, Any]:
    try:
        found = json.loads(store.read(url))
    except ValueError:
        found = None
    if not isinstance(found, dict) or not isinstance(found.get("values"), list):
        raise ConfigError("--results", "no results of an evaluation", value=redact(url))
    return found


def _recipe(info: TrunkInfo) -> dict[str, Any]:
    values = info.config.model_dump(mode="json")
    stream = {name: values["stream"][name] for name in _OF_STREAM}
    return {"stream": stream, **{name: values[name] for name in _RECIPE if name in values}}


def _describe_data(info: TrunkInfo, position: bytes, store: Store) -> dict[str, Any]:
    """Say which shards there were, by the digest that the checkpoint's position is bound to."""
    data: dict[str, Any] = {"urls": list(info.config.stream.urls)}
    if digest := json.loads(position).get("manifest"):
        data["manifest_digest"] = digest
    run = _run_of(info.url)
    try:
        manifest = json.loads(store.read(join(run, _MANIFEST))) if run else {}
    except NotFoundError:
        manifest = {}
    if manifest:
        sizes = [size for _, _, size, *_ in manifest["shards"]]
        data |= {"shards": len(sizes), "bytes": sum(sizes)}
        data.setdefault("manifest_digest", manifest["digest"])
    return data


def _run_of(checkpoint: str) -> str:
    """The run's folder, where the checkpoint lies in one."""
    folder = posixpath.dirname(checkpoint.rstrip("/"))
    return posixpath.dirname(folder) if posixpath.basename(folder) == _CHECKPOINTS else ""
