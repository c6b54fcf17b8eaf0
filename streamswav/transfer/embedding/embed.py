"""What a trained network says of every image of a stream of shards, as tables that others read."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from streamswav.config import Config
from streamswav.errors import ConfigError, ManifestError
from streamswav.stream.labels import load_labels
from streamswav.stream.manifest import Manifest, list_manifest
from streamswav.stream.reader import ShardReader
from streamswav.stream.store import Store, join, redact
from streamswav.telemetry.progress import Reporter
from streamswav.training.distributed import Ranks
from streamswav.training.feeding import agree_on_selection
from streamswav.transfer.embedding.account import EmbedAccount, Summary, Totals, check_whole
from streamswav.transfer.embedding.embedder import Embedder, Wanted, open_embedder, output_names
from streamswav.transfer.extraction.features import describe, digest_module
from streamswav.transfer.extraction.jobs import Job
from streamswav.transfer.extraction.part_folder import PartFolder
from streamswav.transfer.extraction.part_formats import LAYOUTS, Layout, check_layout
from streamswav.transfer.extraction.preprocessing import choose_preprocessing
from streamswav.transfer.extraction.reading import ImageSource
from streamswav.transfer.extraction.stretches import Stretch
from streamswav.transfer.weights.trunks import TrunkInfo, open_alike

QUARANTINE_FILE = "quarantined.jsonl"

_OPTION = "--to"
_FEATURES = Wanted()


@dataclass(frozen=True)
class EmbedSettings:
    """How images are embedded.

    Attributes:
        wanted: what of them.
        layout: `npy` or `parquet`.
        part: samples of a shard that make a part.
        resize: shorter side in pixels; None: from the crop.
        crop: centre crop in pixels; None: the first of the run's crop sizes.
        batch: images through the network at once.
        workers: processes of each rank that decode; 0: the rank does.
    """

    wanted: Wanted = _FEATURES
    layout: str = "npy"
    part: int = 4096
    resize: int | None = None
    crop: int | None = None
    batch: int = 256
    workers: int = 0

    def check(self) -> Layout:
        """Refuse what cannot work, and return the layout.

        Raises:
            ConfigError: naming the option.
        """
        self.wanted.check()
        if self.layout not in LAYOUTS:
            raise ConfigError("--layout", f"must be one of {', '.join(LAYOUTS)}", value=self.layout)
        layout: Layout = "parquet" if self.layout == "parquet" else "npy"
        check_layout(layout)
        return layout


def embed(
    checkpoint: str,
    urls: Sequence[str],
    to: str,
    *,
    settings: EmbedSettings,
    config: Config,
    ranks: Ranks,
    reporter: Reporter,
    give_up: Callable[[], bool] = lambda: False,
    alive: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Embed every image of the shards once, into a folder; what is there already is not computed again.

    What is written, to the last byte, depends neither on ranks and workers nor on interruptions, where torch
    computes a batch twice alike; the same number of threads (`training.threads`) is part of that.

    Args:
        checkpoint: a run, a checkpoint, or a file of weights.
        urls: shards, in any form that `stream.urls` may have; labels are not needed.
        to: folder, local or s3://.
        settings: what is written of each image, and how.
        config: its `storage` (fields that are set override the checkpoint's), `labels`, `stream.where`,
            `stream.exclude`, `stream.skip_ratio`, `stream.skip_probation`, `telemetry.log_seconds`.
        ranks: that share the work, each on its device; all call this alike.
        reporter: is told how far it is.
        give_up: whether this rank was asked to stop.
        alive: called after each batch.

    Returns:
        What was done, as plain data, on all ranks.

    Raises:
        BudgetSpentError: more samples cannot be used than `stream.skip_ratio` allows.
        CheckpointError: there is no such checkpoint, or none with head and prototypes where they are needed.
        ConfigError: something that cannot work, or a folder with something else in it.
        ManifestError: there are no shards, or not one image in them.
        DrainedError: a rank was asked to stop; the same call goes on.
        StorageError: something cannot be read or written, or a shard was replaced meanwhile.
    """
    began = time.monotonic()
    layout = settings.check()
    if not urls:
        raise ConfigError("embed", "say where the shards are, as streamswav embed ... s3://bucket/shards/")
    embedder, info, digest = _open(checkpoint, settings.wanted, config, ranks)
    reporter.event("weights", f"{info.url}: {info.report}", layout=info.layout)
    crops = info.config.crops
    preprocessing = choose_preprocessing(crops, resize=settings.resize, crop=settings.crop)
    storage = info.config.storage.model_copy(update=config.storage.model_dump(exclude_unset=True))
    store = Store(storage)
    manifest = ranks.lead(lambda: list_manifest(urls, store))
    labels = ranks.lead(lambda: load_labels(config.labels, store))
    select = agree_on_selection(config.model_copy(update={"crops": crops}), store, ranks)
    reader = ShardReader(manifest, storage, read_ahead=2)
    source = ImageSource(reader, preprocessing, labels, labelled=False, select=select, samples=settings.part)
    about = {**describe(source), **embedder.describe(), "network": digest, "layout": layout}
    folder = PartFolder(to, store, about, option=_OPTION)
    notes = _notes(info, settings)
    ranks.lead(lambda: folder.begin(notes))
    account = EmbedAccount(
        manifest, config.stream, reporter, seconds=config.telemetry.log_seconds, alive=alive
    )
    job = Job(
        source,
        embedder.to(ranks.device),
        ranks,
        workers=settings.workers,
        batch=settings.batch,
        device=ranks.device,
        stops=[None] * len(manifest.shards),
        folder=folder,
        layout=layout,
    )
    job.run(account, give_up=give_up)
    told = ranks.gather(account.facts())
    totals = sum((each.totals for each in told), Totals())
    parts = sorted((each for own in ranks.collect(account.parts) for each in own), key=_place)
    ranks.lead(lambda: _finish(folder, store, manifest, parts=parts, totals=totals, notes=notes))
    seconds, images = time.monotonic() - began, sum(each.computed for each in told)
    reporter.event("embedded", f"{redact(to)}: {totals.balance()}", images=totals.images)
    return {
        "to": redact(to),
        "what": output_names(settings.wanted.what),
        "layout": layout,
        "shards": len(manifest.shards),
        **totals.to_json(),
        "computed_now": images,
        "seconds": round(seconds, 2),
        "images_per_second": round(images / seconds, 1),
    }


def _open(checkpoint: str, wanted: Wanted, config: Config, ranks: Ranks) -> tuple[Embedder, TrunkInfo, str]:
    """Open the network on every rank, and make sure that it is the same one."""
    opening = partial(open_embedder, wanted=wanted, storage=config.storage)
    embedder, info = open_alike(checkpoint, opening, ranks)
    digests = ranks.gather(digest_module(embedder))
    if len(set(digests)) > 1:
        reason = "the ranks read other weights: put them where all of them find the same"
        raise ConfigError("--checkpoint", reason, value=checkpoint)
    return embedder, info, digests[0]


def _notes(info: TrunkInfo, settings: EmbedSettings) -> dict[str, Any]:
    model = info.config.model
    return {
        "checkpoint": info.url,
        "trunk": model.trunk,
        "width": model.width,
        "step": info.step,
        "images_trained": info.images,
        "batch": settings.batch,
    }


def _finish(
    folder: PartFolder,
    store: Store,
    manifest: Manifest,
    *,
    parts: Sequence[Summary],
    totals: Totals,
    notes: Mapping[str, Any],
) -> None:
    """List what could not be used, and say that all is there.

    Raises:
        ManifestError: there is not one image.
    """
    check_whole(parts, manifest)
    balance = totals.balance()
    if not totals.images:
        raise ManifestError(f"{redact(folder.url)}: not one image could be embedded: {balance}")
    if any(each.quarantined for each in parts):
        with store.writing(join(folder.url, QUARANTINE_FILE)) as file:
            for each in parts:
                if each.quarantined:
                    for line in folder.read_quarantined(each.stretch):
                        file.write(json.dumps(line).encode() + b"\n")
    listed = [(each.stretch, manifest.shards[each.stretch.shard].key, each.images) for each in parts]
    folder.finish(notes, totals.to_json(), listed)


def _place(part: Summary) -> Stretch:
    return part.stretch
