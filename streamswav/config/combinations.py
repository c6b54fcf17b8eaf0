"""What single keys cannot tell: values that do not go together."""

from __future__ import annotations

from urllib.parse import urlsplit

from streamswav.config.sections import Config, StorageSection
from streamswav.errors import ConfigError
from streamswav.redact import redact


def check_combinations(config: Config) -> None:
    """Refuse what cannot work together, naming the key to change.

    Raises:
        ConfigError: the first impossible combination found.
    """
    if config.run.task == "pretrain":
        _check_objective(config)
    else:
        _check_finetune(config)
    _check_statistics(config)
    _check_places(config)
    _check_grid(config)
    _check_stream(config)
    _check_cache(config)
    _check_labels(config)
    _check_evaluation(config)


def check_endpoint(storage: StorageSection) -> None:
    """Refuse an endpoint that is no address of a server, or names a user.

    Raises:
        ConfigError: it is one.
    """
    endpoint = storage.endpoint_url
    if endpoint is None:
        return
    if not (endpoint.startswith(("http://", "https://")) and urlsplit(endpoint).hostname):
        reason = "must be http://HOST:PORT or https://HOST"
        raise ConfigError("storage.endpoint_url", reason, value=redact(endpoint))
    if "@" in urlsplit(endpoint).netloc:  # requests are signed, or go without
        reason = "holds a user, which S3 does not know; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        raise ConfigError("storage.endpoint_url", reason, value=redact(endpoint))


def _check_objective(config: Config) -> None:
    swav, batch, total = config.swav, config.training.batch, sum(config.crops.counts)
    if total < 2:
        reason = "swapped prediction needs at least two crops"
        raise ConfigError("crops.counts", reason, value=config.crops.counts)
    if not swav.assigned_crops or len(set(swav.assigned_crops)) != len(swav.assigned_crops):
        raise ConfigError("swav.assigned_crops", "name each assigned crop once", value=swav.assigned_crops)
    if max(swav.assigned_crops) >= total:
        reason = f"there are only {total} crops (0 to {total - 1})"
        raise ConfigError("swav.assigned_crops", reason, value=swav.assigned_crops)
    if batch and swav.queue_length and swav.queue_length < batch:
        reason = f"shorter than the global batch ({batch}): the queue would be empty; 0 means no queue"
        raise ConfigError("swav.queue_length", reason, value=swav.queue_length)


def _check_finetune(config: Config) -> None:
    section, crops = config.finetune, config.crops
    if crops.counts != [1]:
        raise ConfigError("crops.counts", "finetuning takes one crop an image: [1]", value=crops.counts)
    if section.mode == "full":
        for name in ("rates", "weight_decays"):
            if len(getattr(section, name)) > 1:
                reason = "several heads can only share a trunk that stays as it is: finetune.mode frozen"
                raise ConfigError(f"finetune.{name}", reason, value=getattr(section, name))
    elif section.layer_decay != 1:
        reason = "the trunk is frozen and has no rate"
        raise ConfigError("finetune.layer_decay", reason, value=section.layer_decay)
    if section.test_split and not config.labels.split:
        reason = "needs labels.file and labels.split, which say what split a sample is in"
        raise ConfigError("finetune.test_split", reason, value=section.test_split)
    if config.labels.multi_label and section.label_smoothing:
        reason = "is for one label an image, not for labels.multi_label"
        raise ConfigError("finetune.label_smoothing", reason, value=section.label_smoothing)
    if config.stream.follow:
        raise ConfigError("stream.follow", "finetuning has an end: shards are not followed", value=True)


def _check_statistics(config: Config) -> None:
    training = config.training
    if training.topology_invariant and training.sync_batch_norm:
        reason = "with topology_invariant all ranks share batch statistics: 0"
        raise ConfigError("training.sync_batch_norm", reason, value=training.sync_batch_norm)
    if training.topology_invariant and training.micro_batches > 1:
        reason = "the trunk's batch statistics are those of a piece of the batch; not with topology_invariant"
        raise ConfigError("training.micro_batches", reason, value=training.micro_batches)


def _check_places(config: Config) -> None:
    check_endpoint(config.storage)
    for key, place in (
        *(("stream.urls", url) for url in config.stream.urls),
        ("run.directory", config.run.directory),
        ("checkpoint.copy_to", config.checkpoint.copy_to),
    ):
        scheme, found, rest = place.removeprefix("@").partition("://")
        if scheme == "s3" and found and not rest.strip("/"):
            raise ConfigError(key, "names no bucket, as in s3://BUCKET/PREFIX", value=redact(place))
        if key != "stream.urls" and found and scheme not in ("s3", "file"):
            reason = "cannot be written to; use a folder or s3://BUCKET/PREFIX"
            raise ConfigError(key, reason, value=redact(place))


def _check_grid(config: Config) -> None:
    columns, batch = config.stream.columns, config.training.batch
    if batch and columns and batch % columns:
        raise ConfigError("stream.columns", f"must divide training.batch ({batch})", value=columns)


def _check_stream(config: Config) -> None:
    stream = config.stream
    if isinstance(stream.passes, list) and len(stream.passes) != len(stream.urls):
        reason = f"needs one entry for each of the {len(stream.urls)} stream.urls, or be one number"
        raise ConfigError("stream.passes", reason, value=stream.passes)
    if stream.follow and stream.turns > 1:
        reason = "a stream that is followed goes by once: set stream.passes to 1, or stream.follow to false"
        raise ConfigError("stream.follow", reason, value=True)
    if stream.follow and config.optimizer.schedule == "cosine" and not config.training.images:
        reason = "a followed stream has no end to anneal to: use constant, or give training.images"
        raise ConfigError("optimizer.schedule", reason, value="cosine")


def _check_cache(config: Config) -> None:
    cache = config.storage.cache
    if "://" in cache.removeprefix("file://"):
        raise ConfigError("storage.cache", "must be a folder on a disk of this machine", value=cache)


def _check_labels(config: Config) -> None:
    labels = config.labels
    if labels.split and not labels.file:
        raise ConfigError(
            "labels.split", "is a column of labels.file, which is not given", value=labels.split
        )
    if not labels.label or len(set(labels.label)) != len(labels.label):
        raise ConfigError("labels.label", "name each column once", value=labels.label)
    if len(labels.label) > 1 and not labels.file:
        raise ConfigError(
            "labels.label", "are columns of labels.file, which is not given", value=labels.label
        )
    if len(labels.label) > 1 and labels.separator:
        reason = "several columns of labels are a class each; a separator parts the labels of one column"
        raise ConfigError("labels.separator", reason, value=labels.separator)
    if labels.unknown not in ("", "0", "-1"):
        raise ConfigError("labels.unknown", "is 0 or -1, in 0/1 columns", value=labels.unknown)
    if labels.unknown and len(labels.label) == 1:
        reason = "is about 0/1 columns: name them in labels.label, a class each"
        raise ConfigError("labels.unknown", reason, value=labels.unknown)


def _check_evaluation(config: Config) -> None:
    evaluation = config.evaluation
    for key in ("train", "test"):
        if evaluation.every and not getattr(evaluation, key):
            raise ConfigError(f"evaluation.{key}", "evaluation.every needs labelled shards to measure with")
