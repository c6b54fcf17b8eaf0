"""What a finetuning run is made of: labels, subset, trunk, heads and optimizer of a configuration."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from streamswav.config import Config
from streamswav.crops import Augment, MultiCrop
from streamswav.crops.rand_augment import RandAugmentCrop
from streamswav.defaults import known
from streamswav.errors import ConfigError, NotFoundError
from streamswav.models import Trunk, build_trunk
from streamswav.stream.labels import Labels, load_labels
from streamswav.stream.manifest import list_manifest
from streamswav.stream.select import Selection
from streamswav.stream.store import Store, join
from streamswav.training.build import AUTOCAST, build_scaler, distribute, prepare_trunk
from streamswav.training.distributed import Ranks
from streamswav.training.feeding import build_selection
from streamswav.training.optim import build_optimizer
from streamswav.transfer.finetuning.mixing import Mixing
from streamswav.transfer.finetuning.network import FinetuneNetwork, head_settings, parameter_groups
from streamswav.transfer.finetuning.task import Finetuning, SupervisedLearner
from streamswav.transfer.measuring.heads import HeadBank
from streamswav.transfer.subsets.folder import CLASSES_FILE
from streamswav.transfer.subsets.subset import SubsetRequest, draw_subset
from streamswav.transfer.weights.trunks import TrunkInfo, open_trunk

SUBSET_FOLDER = "subset"


@dataclass(frozen=True)
class LabelledData:
    """What is trained on, and what is measured on.

    Attributes:
        config: with `labels.classes`, and with the subset's shards if there is a subset.
        train: labels of `stream.urls`.
        test: labels of `test_urls`.
        test_urls: shards that are measured on.
    """

    config: Config
    train: Labels
    test: Labels
    test_urls: tuple[str, ...]


def prepare_data(config: Config, ranks: Ranks, store: Store) -> LabelledData:
    """Read what tells labels, find out how many classes there are, and draw the subset if one is asked for.

    Raises:
        ConfigError: there is nothing to measure on, or nobody knows how many classes there are.
        StreamswavError: labels or subset cannot be read, or drawn.
    """
    section = config.finetune
    test_urls = tuple(section.test or (config.stream.urls if section.test_split else ()))
    if not test_urls:
        hint = "name labelled shards that accuracy is measured on, as --finetune.test s3://bucket/test/"
        raise ConfigError("finetune.test", hint)
    held: list[tuple[Labels, Labels]] = []
    ranks.each(lambda: held.append(load_both(config, store)))
    ((train, test),) = held
    classes = known(train.classes)
    config = _with(config, "labels", classes=classes)
    if train.table is not None and config.stream.samples is None:
        config = _with(config, "stream", samples=int((train.table.codes >= 0).sum()))
    if section.per_class is None and not section.subset:
        return LabelledData(config, train, test, test_urls)
    target, request = subset_of(config)
    chosen: list[Selection] = []
    ranks.each(lambda: chosen.append(build_selection(config, store)))
    drawing = partial(draw_subset, storage=config.storage, labels=train, select=chosen[0], ranks=ranks)
    subset = drawing(config.stream.urls, request, target)
    config = _with(config, "stream", urls=list(subset.urls), samples=subset.samples)
    # The subset's shards have class numbers, whatever told them where it was drawn.
    train = train if train.multi else Labels(classes)
    return LabelledData(config, train, test, test_urls)


def open_for_all(config: Config, ranks: Ranks) -> tuple[Trunk | None, TrunkInfo]:
    """Open the trunk of `model.init` once: on rank 0; `build_finetuning` gives the others its weights.

    Returns:
        The trunk, None on the other ranks, and where it comes from.

    Raises:
        CheckpointError, StorageError: as `load_trunk`, on all ranks.
    """
    opened: list[Trunk] = []

    def read() -> TrunkInfo:
        trunk, info = open_trunk(config.model.init, storage=config.storage)
        opened.append(trunk)
        return info

    info = ranks.lead(read)
    return (opened[0] if ranks.leads else None), info


def build_crop(config: Config) -> MultiCrop:
    """Build what crops a labelled image for training."""
    if not config.finetune.rand_augment:
        return MultiCrop(config.crops, seed=config.stream.seed)
    return RandAugmentCrop(config.crops, config.finetune, seed=config.stream.seed)


def build_finetuning(config: Config, trunk: Trunk | None, ranks: Ranks, *, multi: bool) -> Finetuning:
    """Build the task of a resolved configuration on this rank's device.

    Args:
        config: resolved, on the grid of these ranks.
        trunk: with the weights that it begins with; None: drawn at random. All ranks begin with rank 0's.
        ranks: that share the batches.
        multi: an image may have several labels.
    """
    section, classes, device = config.finetune, known(config.labels.classes), ranks.device
    trunk = trunk or build_trunk(config.model)
    seed = config.stream.seed
    head = HeadBank(trunk.feature_dim, classes, head_settings(config), seed=seed, multi=multi)
    network = FinetuneNetwork(trunk, head, frozen=section.mode == "frozen")
    network.chunks = config.training.micro_batches
    prepare_trunk(trunk, config.training)
    network = network.to(memory_format=torch.channels_last).to(device)
    optimizer = build_optimizer(config.optimizer, parameter_groups(network, config))
    learner = SupervisedLearner(
        distribute(network, config, ranks),
        optimizer,
        label_smoothing=section.label_smoothing,
        scaler=build_scaler(config, ranks),
        autocast=AUTOCAST[config.training.precision],
    )
    if ranks.world_size > 1:
        local, size = known(config.training.batch) // ranks.world_size, config.crops.sizes[0]
        learner.rehearse(torch.zeros(local, 3, size, size, device=device))
    mixing = Mixing(mixup=section.mixup, cutmix=section.cutmix, seed=seed, rank=ranks.rank)
    augment = Augment(config.crops)
    return Finetuning(learner, augment, mixing, classes=classes, multi=multi, device=device)


def subset_of(config: Config) -> tuple[str, SubsetRequest]:
    """Return the folder of the subset that is trained on, and what it is."""
    section = config.finetune
    option = "finetune.subset" if section.subset else "finetune.per_class"
    request = SubsetRequest(section.subset, section.per_class, section.subset_seed, option)
    return section.subset_to or join(config.run.directory, SUBSET_FOLDER), request


def load_both(config: Config, store: Store) -> tuple[Labels, Labels]:
    """Read the labels of the training set and of the test set, with the number of classes.

    Raises:
        ConfigError: nobody knows that number.
        StreamswavError: labels that cannot be read.
    """
    section, split = config.labels, config.labels.split
    train = load_labels(section, store, split="train" if split else "")
    classes = train.classes or _classes_beside(config.stream.urls, store)
    if classes is None:
        reason = "say how many classes there are, or name them by labels.names: the shards do not tell"
        raise ConfigError("labels.classes", reason)
    test = load_labels(section, store, split=(config.finetune.test_split or "test") if split else "")
    return replace(train, classes=classes), replace(test, classes=classes)


def _classes_beside(urls: Sequence[str], store: Store) -> int | None:
    """Read how many classes a `classes.json` beside the shards names, as `streamswav-shards` writes it."""
    folders = {shard.url.rpartition("/")[0] for shard in list_manifest(urls, store).shards}
    if len(folders) > 1:
        return None
    try:
        names = json.loads(store.read(join(folders.pop(), CLASSES_FILE)))
    except (NotFoundError, ValueError):
        return None
    return len(names) if isinstance(names, list | dict) and names else None


def _with(config: Config, section: str, **values: object) -> Config:
    return config.model_copy(update={section: getattr(config, section).model_copy(update=values)})
