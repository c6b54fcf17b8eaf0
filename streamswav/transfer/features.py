"""Features of labelled images: one exact pass over tar shards, every image once, in the shards' order."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor, nn

from streamswav.config import StorageSection
from streamswav.errors import ManifestError
from streamswav.stream.labels import Label, Labels
from streamswav.stream.manifest import Manifest, list_manifest
from streamswav.stream.reader import ShardReader
from streamswav.stream.select import Selection
from streamswav.stream.store import Store
from streamswav.training.distributed import Ranks
from streamswav.transfer.extraction import Part
from streamswav.transfer.gathering import gather_bytes, gather_rows
from streamswav.transfer.jobs import Job
from streamswav.transfer.part_folder import PartFolder, Record, describe_shards
from streamswav.transfer.part_formats import decode_part
from streamswav.transfer.reading import Account, ImageSource, Preprocessing, Rows
from streamswav.transfer.stretches import Stretch, first_of_each

__all__ = ["Features", "Preprocessing", "digest_module", "extract", "gather_features"]

_STRETCH_SAMPLES = 1024
_FROM_SHARDS = Labels.from_shards()
_ALONE = Ranks()


@dataclass(frozen=True)
class Features:
    """Features of N images, sorted by shard and place in the shard.

    Attributes:
        features: float32 [N, F] on the CPU, as they leave the trunk (not normalised).
        labels: int64 [N]; bool [N, C] where an image may have several.
        keys: N names.
        skipped: samples and unreadable stretches that were not used, by reason.
        places: int64 [N, 2], of each image the index of its shard and its number in the shard.
    """

    features: Tensor
    labels: Tensor
    keys: tuple[str, ...]
    skipped: Mapping[str, int]
    places: Tensor


def extract(
    trunk: nn.Module,
    urls: Sequence[str],
    *,
    preprocessing: Preprocessing,
    storage: StorageSection,
    labels: Labels = _FROM_SHARDS,
    ranks: Ranks = _ALONE,
    keep: str = "",
    workers: int = 0,
    batch: int = 256,
    device: torch.device | str = "cpu",
    limit: int | None = None,
    give_up: Callable[[], bool] = lambda: False,
    on_images: Callable[[int], None] = lambda _: None,
) -> Features:
    """Compute the features of every labelled image once; every rank is given those of its own share.

    Batches end with every 1024th sample of a shard, so the result depends neither on `workers` nor on the
    number of ranks, nor on where an earlier call with the same `keep` was interrupted: not in the last bit,
    where torch computes a batch twice alike. Only the shares depend on them.

    Args:
        trunk: images [B, 3, S, S] to features [B, F]; moved to `device`, used in the mode it is in.
        urls: labelled shards, in any form that the training's `stream.urls` may have.
        preprocessing: of the images.
        storage: how object storage is reached.
        labels: tell the label of a sample; by default its `.cls` member.
        ranks: that share the work; all call this alike.
        keep: folder, local or s3://, for parts of 1024 samples as they are done. Those that are there are not
            computed again. Empty: nothing is kept.
        workers: processes of each rank that read and decode; 0: the rank does.
        batch: images through the trunk at once, at most 1024. Another number rounds otherwise.
        device: of the trunk.
        limit: use only about so many images, the first ones of every shard.
        give_up: whether to stop; asked on every rank after each batch.
        on_images: called with the number of images that this rank has done, after each batch.

    Raises:
        ConfigError: `keep` holds features of something else; says what differs.
        DrainedError: `give_up` said so on a rank.
        ManifestError: there are no shards, or no sample has a label and an image that can be decoded.
        NonFiniteError: the trunk gives features that are not numbers.
        StorageError: something cannot be read or written, or a shard was replaced meanwhile.
    """
    store = Store(storage)
    manifest = ranks.lead(lambda: list_manifest(urls, store))
    trunk = trunk.to(device)
    folder = None
    if keep:
        about = {
            **describe(manifest, preprocessing, labels, Selection.none(), samples=_STRETCH_SAMPLES),
            "trunk": ranks.lead(lambda: digest_module(trunk)),
            "limit": limit,
        }
        folder = PartFolder(keep, store, about, option="keep")
        ranks.lead(lambda: folder.begin({"what": ["features"], "layout": "npy", "batch": batch}))
    source = ImageSource(
        ShardReader(manifest, storage, read_ahead=2),
        preprocessing,
        labels,
        labelled=True,
        select=Selection.none(),
        samples=_STRETCH_SAMPLES,
    )
    job = Job(
        source,
        lambda images: {"features": trunk(images).float()},
        ranks,
        workers=workers,
        batch=batch,
        device=torch.device(device),
        stops=first_of_each(limit, len(manifest.shards)),
        folder=folder,
    )
    collected = _Collected(on_images)
    job.run(collected, give_up=give_up)
    return collected.join(labels, ranks)


def gather_features(features: Features, ranks: Ranks) -> Features | None:
    """Bring the shares of all ranks to rank 0, in the order of the shards.

    Rank 0 needs memory for all features, its own share and 64 MiB.

    Returns:
        Everything on rank 0, what was skipped added up; None on the others.
    """
    if ranks.world_size == 1:
        return features
    counts = ranks.gather(len(features.keys))
    places = gather_rows(features.places, None, counts, ranks)
    order = place = None
    if places is not None:
        order = _sorted(places)
        place = order.argsort()
    gathered = [gather_rows(each, place, counts, ranks) for each in (features.features, features.labels)]
    lists = gather_bytes(json.dumps(features.keys).encode(), ranks)
    skipped = sum((Counter(each) for each in ranks.gather(dict(features.skipped))), Counter[str]())
    if places is None or order is None:
        return None
    keys = [key for each in lists for key in json.loads(each)]
    values, all_labels = gathered
    assert values is not None
    assert all_labels is not None
    return Features(
        values,
        all_labels,
        tuple(keys[index] for index in order.tolist()),
        dict(sorted(skipped.items())),
        places[order],
    )


def describe(
    manifest: Manifest, preprocessing: Preprocessing, labels: Labels, select: Selection, *, samples: int
) -> dict[str, object]:
    """Return what decides the parts of a folder, beside what computes them."""
    return {
        "shards": describe_shards(manifest),
        "preprocessing": asdict(preprocessing),
        "labels": labels.digest,
        "selection": select.digest,
        "part_samples": samples,
    }


def digest_module(module: nn.Module) -> str:
    """Return a short hash over the layers of a module and all its tensors."""
    whole = hashlib.blake2b(digest_size=16)
    for name, each in module.named_modules():
        whole.update(f"{name} {type(each).__name__} {each.extra_repr()} {each.training}\n".encode())
    for name, tensor in module.state_dict().items():
        whole.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        whole.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return whole.hexdigest()


@dataclass
class _Collected:
    """The parts of a rank, in the order of their arrival."""

    on_images: Callable[[int], None]
    parts: dict[Stretch, tuple[Tensor | None, Rows]] = field(default_factory=dict)
    skipped: Counter[str] = field(default_factory=Counter)
    images: int = 0

    def found(self, record: Record, files: Mapping[str, bytes]) -> None:
        rows, arrays = decode_part(files)
        features = torch.from_numpy(arrays["features"]) if arrays else None
        self._add(record.stretch, features, rows, record.account)

    def computed(self, part: Part) -> None:
        self._add(part.stretch, part.outputs.get("features"), part.rows, part.account)

    def on_batch(self, images: int) -> None:
        self.images += images
        if images:
            self.on_images(self.images)

    def facts(self) -> int:
        return self.images

    def on_facts(self, facts: Sequence[int]) -> None:
        """Nothing follows from them."""

    def _add(self, stretch: Stretch, features: Tensor | None, rows: Rows, account: Account) -> None:
        self.parts[stretch] = features, rows
        for (_, reason), count in account.passed.items():
            self.skipped[reason] += count
        self.skipped.update(account.damages)

    def join(self, labels: Labels, ranks: Ranks) -> Features:
        """Join the parts in the shards' order; each is let go as soon as its rows are placed.

        Raises:
            ManifestError: no rank has any.
        """
        stretches = sorted(self.parts)
        rows = [self.parts[stretch][1] for stretch in stretches]
        count = sum(map(len, rows))
        width = max((each.shape[1] for each, _ in self.parts.values() if each is not None), default=0)
        all_labels = [label for each in rows for label in each.labels]
        highest = max(
            (max(label, default=-1) for label in all_labels if isinstance(label, tuple)), default=-1
        )
        told = ranks.gather((count, width, highest, dict(self.skipped)))
        if not any(each[0] for each in told):
            raise ManifestError(_explain_nothing([each[3] for each in told], labels))
        features = torch.empty(count, max(each[1] for each in told))
        begin = 0
        for stretch in stretches:
            part = self.parts.pop(stretch)[0]
            if part is not None:
                features[begin : begin + len(part)] = part
                begin += len(part)
        places = [
            (stretch.shard, ordinal)
            for stretch, each in zip(stretches, rows, strict=True)
            for ordinal in each.ordinals
        ]
        classes = labels.classes or 1 + max(each[2] for each in told)
        return Features(
            features,
            _to_tensor(all_labels, classes if labels.multi else None),
            tuple(key for each in rows for key in each.keys),
            dict(sorted(self.skipped.items())),
            torch.tensor(places, dtype=torch.int64).reshape(-1, 2),
        )


def _to_tensor(labels: Sequence[Label | None], classes: int | None) -> Tensor:
    """Return int64 [N], or of several labels an image bool [N, C]."""
    if classes is None:
        return torch.tensor(labels, dtype=torch.int64)
    hot = torch.zeros(len(labels), classes, dtype=torch.bool)
    for row, label in zip(hot, labels, strict=True):
        row[list(label) if isinstance(label, tuple) else []] = True
    return hot


def _sorted(places: Tensor) -> Tensor:
    """Return the order in which places grow."""
    by_ordinal = places[:, 1].argsort(stable=True)
    return by_ordinal[places[by_ordinal, 0].argsort(stable=True)]


def _explain_nothing(skipped: Sequence[Mapping[str, int]], labels: Labels) -> str:
    total = sum((Counter(each) for each in skipped), Counter[str]())
    counts = ", ".join(f"{count} {reason}" for reason, count in sorted(total.items()))
    return f"no image to evaluate with ({counts or 'there are no samples'}); {labels.needed}"
