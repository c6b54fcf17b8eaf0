"""Features of labelled images: one exact pass over tar shards, every image once, in the shards' order."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from streamswav.config import StorageSection
from streamswav.stream.labels import Labels
from streamswav.stream.manifest import Manifest, list_manifest
from streamswav.stream.reader import ShardReader
from streamswav.stream.select import Selection
from streamswav.stream.store import Store
from streamswav.training.distributed import Ranks
from streamswav.transfer.extraction.collected import Collected, Features
from streamswav.transfer.extraction.gathering import gather_bytes, gather_rows
from streamswav.transfer.extraction.jobs import Job
from streamswav.transfer.extraction.part_folder import PartFolder, describe_shards
from streamswav.transfer.extraction.preprocessing import Preprocessing
from streamswav.transfer.extraction.reading import ImageSource
from streamswav.transfer.extraction.stretches import first_of_each

_FROM_SHARDS = Labels.from_shards()
_ALONE = Ranks()


def extract(
    trunk: nn.Module,
    urls: Sequence[str],
    *,
    preprocessing: Preprocessing,
    storage: StorageSection,
    labels: Labels = _FROM_SHARDS,
    ranks: Ranks = _ALONE,
    keep: str = "",
    part: int = 1024,
    workers: int = 0,
    batch: int = 256,
    device: torch.device | str = "cpu",
    limit: int | None = None,
    dtype: torch.dtype = torch.float32,
    give_up: Callable[[], bool] = lambda: False,
    on_images: Callable[[int], None] = lambda _: None,
) -> Features:
    """Compute the features of every labelled image once; every rank is given those of its own share.

    Batches end with every `part` samples of a shard, so the result depends neither on `workers` nor on the
    number of ranks, nor on where an earlier call with the same `keep` was interrupted: not in the last bit,
    where torch computes a batch twice alike. Only the shares depend on them.

    Args:
        trunk: images [B, 3, S, S] to features [B, F]; moved to `device`, used in the mode it is in.
        urls: labelled shards, in any form that the training's `stream.urls` may have.
        preprocessing: of the images.
        storage: how object storage is reached.
        labels: tell the label of a sample; by default its `.cls` member.
        ranks: that share the work; all call this alike.
        keep: folder, local or s3://, for parts as they are done. Those that are there are not computed again.
            Empty: nothing is kept.
        part: samples of a shard that make a part; most of them are on their way in each worker.
        workers: processes of each rank that read and decode; 0: the rank does.
        batch: images through the trunk at once, at most `part`. Another number rounds otherwise.
        device: of the trunk.
        limit: use only about so many images, the first ones of every shard.
        dtype: that features are held in; those that are kept are float32.
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
    source = ImageSource(
        ShardReader(manifest, storage, read_ahead=2),
        preprocessing,
        labels,
        labelled=True,
        select=Selection.none(),
        samples=part,
    )
    notes = {"batch": batch}
    folder = _open_folder(keep, store, source, trunk, ranks, limit=limit, notes=notes) if keep else None
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
    collected = Collected(on_images, dtype)
    job.run(collected, give_up=give_up)
    if folder is not None:
        _finish_folder(folder, collected, manifest, ranks, notes=notes)
    return collected.join(labels, ranks)


def _open_folder(
    url: str,
    store: Store,
    source: ImageSource,
    trunk: nn.Module,
    ranks: Ranks,
    *,
    limit: int | None,
    notes: Mapping[str, Any],
) -> PartFolder:
    """Find or begin the folder of kept features.

    Raises:
        ConfigError: it holds those of something else.
    """
    about = {
        **describe(source),
        "what": ["features"],
        "layout": "npy",
        "network": ranks.lead(lambda: digest_module(trunk)),
        "limit": limit,
    }
    folder = PartFolder(url, store, about, option="keep (--features)")
    ranks.lead(lambda: folder.begin(notes))
    return folder


def _finish_folder(
    folder: PartFolder, collected: Collected, manifest: Manifest, ranks: Ranks, *, notes: Mapping[str, Any]
) -> None:
    """Say in the folder that all is there."""
    own = [
        (stretch, manifest.shards[stretch.shard].key, len(rows))
        for stretch, (_, rows) in collected.parts.items()
    ]
    parts = sorted(part for each in ranks.collect(own) for part in each)
    skipped = _add(ranks.gather(dict(collected.skipped)))
    totals = {"images": sum(part[2] for part in parts), "skipped": skipped}
    ranks.lead(lambda: folder.finish(notes, totals, parts))


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
    skipped = _add(ranks.gather(dict(features.skipped)))
    if places is None or order is None:
        return None
    keys = [key for each in lists for key in json.loads(each)]
    values, labels = gathered
    assert values is not None
    assert labels is not None
    return Features(values, labels, tuple(keys[index] for index in order.tolist()), skipped, places[order])


def describe(source: ImageSource) -> dict[str, object]:
    """Return what decides the parts of a folder, beside what computes them."""
    return {
        "shards": describe_shards(source.reader.manifest),
        "preprocessing": asdict(source.preprocessing),
        "labels": source.labels.digest,
        "selection": source.select.digest,
        "part_samples": source.samples,
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


def _sorted(places: Tensor) -> Tensor:
    """Return the order in which places grow."""
    by_ordinal = places[:, 1].argsort(stable=True)
    return by_ordinal[places[by_ordinal, 0].argsort(stable=True)]


def _add(counts: Sequence[Mapping[str, int]]) -> dict[str, int]:
    """Add up counts by reason, sorted."""
    return dict(sorted(sum((Counter(each) for each in counts), Counter[str]()).items()))
