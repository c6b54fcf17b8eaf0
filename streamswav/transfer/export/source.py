"""What is exported: all weights of a checkpoint or file, and what is known of how they came about."""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from streamswav.config import StorageSection
from streamswav.errors import ConfigError, NotFoundError
from streamswav.models import Trunk
from streamswav.stream.store import Store, join, redact
from streamswav.transfer.measuring import results_file
from streamswav.transfer.weights.trunks import TrunkInfo, read_weights

RESULTS_FILE = "results.json"

_CHECKPOINTS = "checkpoints"
_MANIFEST = "manifest.json"
_POSITION = "position.json"
_RECIPE = ("crops", "model", "optimizer", "training")
_OF_STREAM = ("seed", "passes", "samples", "columns", "rows", "window")
_HEAD = re.compile(r"head\.(?:heads\.(?P<number>\d+)\.)?(?P<kind>weight|bias)")


@dataclass(frozen=True)
class Source:
    """Weights with their provenance.

    Attributes:
        trunk: in eval mode, float32, on the CPU.
        beside: the network's other tensors as a checkpoint names them: `projection_head.*` and
            `prototypes.weight`, or `head.heads.N.*` after finetuning; empty where the source has none.
        classifier: `weight` [C, F] and `bias` [C] of one of those heads; empty for none.
        info: of the trunk.
        recipe: the run's configuration by section; None for weights that no run of this trainer made.
        data: what it was trained on; empty where nothing is known.
    """

    trunk: Trunk
    beside: Mapping[str, Tensor]
    classifier: Mapping[str, Tensor]
    info: TrunkInfo
    recipe: Mapping[str, Any] | None
    data: Mapping[str, Any]

    @property
    def classes(self) -> int:
        """C of the classifier; 0 where there is none."""
        return len(self.classifier["weight"]) if self.classifier else 0


def read_source(
    path: str, storage: StorageSection, *, head: int | None = None, tell: Callable[[str], object]
) -> Source:
    """Open what is to be exported.

    Args:
        path: whatever `load_trunk` reads.
        storage: how object storage is reached.
        head: which of several classifiers is taken, from 0; by default the only one, and of several none.
        tell: told where several are left out.

    Raises:
        CheckpointError, StorageError: as `load_trunk`.
        ConfigError: there is no such classifier.
    """
    weights = read_weights(path, storage=storage)
    info = weights.info
    known = info.step is not None
    finetuned = any(name.startswith("head.") for name in weights.beside)
    recipe = _recipe(info, "finetune" if finetuned else "swav") if known else None
    data = _describe_data(info, Store(storage)) if known else {}
    classifier = _choose_classifier(weights.beside, head, tell)
    return Source(weights.build_trunk(), weights.beside, classifier, info, recipe, data)


def read_results(urls: Sequence[str], info: TrunkInfo, store: Store) -> list[dict[str, Any]]:
    """Read results of measurements, as given, or as `results.json` in the folder of the run.

    Raises:
        ConfigError: a file that holds none.
        StorageError: a file that cannot be read.
    """
    run = _run_of(info.url)
    if not urls and run and store.exists(place := join(run, RESULTS_FILE)):
        urls = [place]
    return [asdict(results_file.read_results(url, store)) for url in urls]


def without_secrets(value: Any) -> Any:
    """Return plain data with every URL in it redacted."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, Mapping):
        return {key: without_secrets(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [without_secrets(each) for each in value]
    return value


def _choose_classifier(
    beside: Mapping[str, Tensor], head: int | None, tell: Callable[[str], object]
) -> dict[str, Tensor]:
    found: dict[int, dict[str, Tensor]] = {}
    for name, tensor in beside.items():
        if match := _HEAD.fullmatch(name):
            found.setdefault(int(match["number"] or 0), {})[match["kind"]] = tensor.float()
    if head is not None and head not in found:
        there = f"its classifiers are 0 to {max(found)}" if found else "there is no classifier in it"
        raise ConfigError("--head", there, value=head)
    if head is None and len(found) > 1:
        tell(
            f"{len(found)} classifiers were trained side by side, none is exported; --head 0 takes the first"
        )
        return {}
    return found.get(head or 0, {})


def _recipe(info: TrunkInfo, objective: str) -> dict[str, Any]:
    """Return the sections that say how the run trained; `objective` is the section of its loss."""
    values = info.config.model_dump(mode="json")
    stream = {name: values["stream"][name] for name in _OF_STREAM}
    return {"stream": stream, **{name: values[name] for name in (*_RECIPE, objective)}}


def _describe_data(info: TrunkInfo, store: Store) -> dict[str, Any]:
    """Say which shards there were, by the digest that the checkpoint's position is bound to."""
    data: dict[str, Any] = {"urls": list(info.config.stream.urls)}
    run = _run_of(info.url)
    position = _read_json(join(info.url, _POSITION), store)
    manifest = _read_json(join(run, _MANIFEST), store) if run else {}
    if digest := position.get("manifest") or manifest.get("digest"):
        data["manifest_digest"] = digest
    if manifest:
        sizes = [size for _, _, size, *_ in manifest["shards"]]
        data |= {"shards": len(sizes), "bytes": sum(sizes)}
    return data


def _read_json(url: str, store: Store) -> dict[str, Any]:
    """Return what a file of the run holds; a checkpoint may have been copied without the run."""
    try:
        return dict(json.loads(store.read(url)))
    except NotFoundError:
        return {}


def _run_of(checkpoint: str) -> str:
    """Return the run's folder, where the checkpoint lies in one."""
    folder = posixpath.dirname(checkpoint.rstrip("/"))
    return posixpath.dirname(folder) if posixpath.basename(folder) == _CHECKPOINTS else ""
