"""Checks of the data: the first shard's samples are parsed, decoded, measured, selected and labelled."""

from __future__ import annotations

import statistics
from collections import Counter

from streamswav.config import Config
from streamswav.crops import image_size
from streamswav.crops.decode import decode
from streamswav.doctor.case import Case
from streamswav.doctor.finding import Finding, NotLookedAtError, failed, passed, size, warned
from streamswav.doctor.running import Check, Remedies
from streamswav.errors import ConfigError, DecodeError, NotFoundError
from streamswav.loader import Unlabelled, read_label
from streamswav.stream.manifest import list_manifest
from streamswav.stream.select import Selection
from streamswav.stream.store import redact
from streamswav.stream.tar import TarSample
from streamswav.training.feeding import build_selection
from streamswav.transfer.finetuning.finetune import load_both

DECODED = 16
OVERSIZED = 4.0
"""Edge of an image over that of the largest crop from which most decoded pixels are thrown away."""


def check_shard(case: Case) -> Finding:
    """Parse the first samples of the first shard, and look at its end."""
    found = case.specimens.get()
    where = redact(found.shard.url)
    remedy = f"streamswav-shards verify {where} names every stretch; write the shard again"
    if not found.samples:
        reason = found.damages[0].reason if found.damages else "it is empty"
        return failed(f"{where} holds no sample: {reason}", remedy)
    told = f"{len(found.samples)} samples of {where} parsed, {size(found.mean_bytes)} each ({found.members})"
    if found.damages:
        first = found.damages[0]
        return warned(f"{told}; bytes {first.start} to {first.stop}: {first.reason}", remedy)
    if not found.ends:
        return warned(f"{told}; it does not end as an archive does: cut off while it was copied?", remedy)
    return passed(told)


def check_images(case: Case) -> Finding:
    """Decode the first images."""
    config, samples = case.config, _samples(case)[:DECODED]
    reasons: Counter[str] = Counter()
    for sample in samples:
        try:
            _decode(sample, config)
        except DecodeError as error:
            reasons[error.reason] += 1
    bad, told = reasons.total(), ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
    if bad == len(samples):
        return failed(
            f"none of {bad} images can be used: {told} (members: {case.specimens.get().members})",
            "store JPEG, PNG or WebP under one of the extensions that webdataset knows (jpg, png, webp)",
        )
    if bad:
        return warned(
            f"{bad} of {len(samples)} images cannot be used: {told}",
            f"they are quarantined, up to stream.skip_ratio ({config.stream.skip_ratio:g}) of all; "
            "streamswav-shards verify finds them",
        )
    return passed(f"{len(samples)} images decoded")


def check_sizes(case: Case) -> Finding:
    """Hold the images' sizes against the crops and the bound on pixels."""
    config = case.config
    shapes = _shapes(_samples(case), config)
    if not shapes:
        raise NotLookedAtError("no image can be read")
    edge = statistics.median(min(shape) for shape in shapes)
    largest, most = max(config.crops.sizes), config.crops.max_pixels
    told = (
        f"shorter side {edge:.0f} pixels in the median of {len(shapes)} images, crops of {config.crops.sizes}"
    )
    huge = sum(height * width > most for height, width in shapes)
    if huge:
        remedy = f"raise crops.max_pixels ({most}) or store them smaller"
        text = f"{huge} of {len(shapes)} images have more pixels than crops.max_pixels and are quarantined"
        return (failed if 2 * huge > len(shapes) else warned)(text, remedy)
    if edge < largest:
        return warned(
            f"{told}: most images are enlarged for them",
            f"set crops.sizes for such images (largest at most {edge:.0f}), or store them larger",
        )
    if edge > OVERSIZED * largest:
        return warned(
            f"{told}: decoding is mostly thrown away",
            f"store images with a shorter side of about {2 * largest}: fewer bytes, fewer CPU cores",
        )
    return passed(told)


def check_selection(case: Case) -> Finding:
    """Read what is not trained, and judge the first samples by it."""
    stream = case.config.stream
    if not stream.exclude and not stream.where:
        raise NotLookedAtError("stream.exclude and stream.where are empty")
    select, found = build_selection(case.config, case.store), case.specimens.get()
    passed_by = sum(select.judge(each, found.shard.key) is None for each in found.samples)
    text = f"{select.excluded_keys:,} keys are excluded; {passed_by} of {len(found.samples)} samples remain"
    if found.samples and not passed_by:
        return warned(text, "look for a slip of the pen in stream.where and stream.exclude")
    return passed(text)


def check_labels(case: Case) -> Finding:
    """Read what tells labels, and look up those of the first samples."""
    config = case.config
    if config.run.task == "finetune":
        return _check_finetune(case, config)
    if config.evaluation.every is None:
        raise NotLookedAtError("nothing is labelled (finetune, evaluation.every)")
    for key in ("train", "test"):
        list_manifest(getattr(config.evaluation, key), case.store)
    return passed("evaluation.train and evaluation.test are there")


def _check_finetune(case: Case, config: Config) -> Finding:
    train, _ = load_both(config, case.store)
    if not config.finetune.test and not config.finetune.test_split:
        raise ConfigError("finetune.test", "name labelled shards that accuracy is measured on")
    if config.finetune.test:
        list_manifest(config.finetune.test, case.store)
    samples = case.specimens.get().samples
    without = [found for each in samples if isinstance(found := read_label(train, each), Unlabelled)]
    text = f"{len(samples) - len(without)} of {len(samples)} samples have one of {train.classes} classes"
    if not without:
        return passed(text)
    reasons = ", ".join(f"{count} {name}" for name, count in Counter(e.reason for e in without).most_common())
    remedy = f"look at the labels section; {train.needed}"
    return (failed if len(without) == len(samples) else warned)(f"{text}: {reasons}", remedy)


def check_init(case: Case) -> Finding:
    """See that the weights that a new run begins with are there."""
    init = case.config.model.init
    if not init:
        raise NotLookedAtError("the trunk begins at random (model.init)")
    if not case.store.exists(init):
        raise NotFoundError(redact(init), "there is no such run, checkpoint or file")
    return passed(f"{redact(init)} is there")


def _samples(case: Case) -> list[TarSample]:
    """The first samples, without those that were redacted."""
    found, select = case.specimens.get(), Selection.none()
    samples = [each for each in found.samples if select.judge(each, found.shard.key) is None]
    if not samples:
        raise NotLookedAtError("builds upon shard, which found no samples")
    return samples


def _decode(sample: TarSample, config: Config) -> None:
    if sample.image is None:
        raise DecodeError("no_image", sample.key)
    crops = config.crops
    decode(sample.image, max_pixels=crops.max_pixels, exif_orientation=crops.exif_orientation)


def _shapes(samples: list[TarSample], config: Config) -> list[tuple[int, int]]:
    shapes = []
    for sample in samples:
        try:
            if sample.image is not None:
                shapes.append(image_size(sample.image, exif_orientation=config.crops.exif_orientation))
        except DecodeError:
            continue
    return shapes


_GIVEN: Remedies = {ConfigError: "correct the key that is named"}

CHECKS = (
    Check("shard", check_shard, seconds=60),
    Check("images", check_images, seconds=60),
    Check("sizes", check_sizes),
    Check(
        "selection",
        check_selection,
        seconds=120,
        remedies=_GIVEN,
        asks=lambda case: case.config.stream.exclude,
    ),
    Check("labels", check_labels, seconds=120, remedies=_GIVEN),
    Check("init", check_init, asks=lambda case: [case.config.model.init]),
)
