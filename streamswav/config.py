"""The configuration: one frozen pydantic model a section, read from YAML, environment and command line.

A value left at `None` is chosen at start by a rule (`streamswav/defaults.py`) that is printed with its
reason. Later sources win: file, then `STREAMSWAV_SECTION__KEY`, then `--section.key value`.
"""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, LiteralString, Self

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from streamswav.errors import ConfigError

ENVIRONMENT_PREFIX = "STREAMSWAV_"

_REFUSAL: LiteralString = "refusal"

Ratio = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]


def _read_whole(value: object) -> object:
    """Read `1e6`, which is text to YAML, as the whole number it is; anything else is left to pydantic."""
    if not isinstance(value, str):
        return value
    try:
        number = float(value)
    except ValueError:
        return value
    return int(number) if number.is_integer() and abs(number) < _EXACT else value


def _list_one(value: object) -> object:
    """A single text where a list is wanted is a list of one: `urls: s3://bucket/shards/`."""
    return [value] if isinstance(value, str) else value


_RENAMED = {"loader.memory": "stream.memory"}
_NO_ACCUMULATION = (
    "gradients are not accumulated: codes are those of the batch that is embedded together, so the gradients "
    "of small batches add up to another objective; micro_batches keeps the objective and saves the memory"
)
_EXACT = 1 << 53  # up to here a float is every whole number
_Whole = BeforeValidator(_read_whole)
PositiveInt = Annotated[int, Field(gt=0), _Whole]
NonNegativeInt = Annotated[int, Field(ge=0), _Whole]
Texts = Annotated[list[str], BeforeValidator(_list_one, json_schema_input_type=list[str] | str)]


class Section(BaseModel):
    """Base of all sections: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, coerce_numbers_to_str=True)


class RunSection(Section):
    """Where the run lives."""

    directory: str = Field("", description="folder or s3:// prefix for checkpoints, configuration and logs")
    task: Literal["pretrain", "finetune"] = Field(
        "pretrain", description="what is trained; the command sets it"
    )


class StreamSection(Section):
    """What is read, and in which order."""

    urls: Texts = Field([], description="shards: prefixes, globs, brace patterns, single tars, @list files")
    seed: NonNegativeInt = Field(0, description="seed of order, crops and weights")
    passes: PositiveInt | list[PositiveInt] = Field(
        1, description="passes, each in another order; a list has one entry for each of stream.urls"
    )
    samples: PositiveInt | None = Field(None, description="samples in one pass, where the producer knows")
    window: PositiveInt = Field(128, description="samples that are permuted together in a lane")
    columns: PositiveInt | None = Field(
        None, description="V, columns of the lane grid; divides training.batch"
    )
    rows: PositiveInt | None = Field(None, description="R, rows of the lane grid; a multiple of the workers")
    memory: PositiveInt = Field(2 << 30, description="bytes of blocks and windows, a worker")
    skip_ratio: Ratio = Field(0.01, description="share of samples that may be quarantined")
    skip_probation: NonNegativeInt = Field(1000, description="samples before the share is looked at")
    shard_ratio: Ratio = Field(0.001, description="share of bytes in shards that may be missing or changed")
    exclude: Texts = Field([], description="files of keys that are not trained, one a line; local or s3://")
    where: Texts = Field(
        [], description="conditions to train a sample: json.width >= 256, or module:function"
    )
    follow: bool = Field(False, description="go on with shards that are added while the run goes on")
    follow_seconds: Positive = Field(60.0, description="between two listings of a stream that is followed")
    follow_idle_seconds: Positive | None = Field(
        None, description="end a followed stream where nothing new came for so long; default: wait for ever"
    )

    @property
    def passes_by_url(self) -> tuple[int, ...]:
        """Passes over each of the URLs."""
        if isinstance(self.passes, int):
            return (self.passes,) * len(self.urls)
        return tuple(self.passes)

    @property
    def turns(self) -> int:
        """Passes of the whole run: those over the URL that has most."""
        return self.passes if isinstance(self.passes, int) else max(self.passes)


class StorageSection(Section):
    """How object storage is reached. Credentials come by the usual AWS chain, never from here."""

    endpoint_url: str | None = Field(None, description="S3 endpoint other than AWS (MinIO, Ceph, rclone)")
    region: str | None = Field(None, description="region; by default the AWS chain's")
    path_style: bool | None = Field(None, description="bucket in the path; by default with an endpoint_url")
    anonymous: bool = Field(False, description="do not sign requests (public buckets)")
    ca_bundle: str | None = Field(None, description="file of certificate authorities for the endpoint")
    block_bytes: PositiveInt = Field(4 << 20, description="bytes of one ranged read")
    deadline_seconds: Positive = Field(300.0, description="how long transient failures are retried")
    timeout_seconds: Positive = Field(30.0, description="connect and read timeout of one request")
    cache: str = Field(
        "", description="folder on a local disk that keeps blocks of remote shards; default: none"
    )
    cache_bytes: PositiveInt = Field(100 << 30, description="most bytes in that folder, of all processes")
    cache_free_ratio: Ratio = Field(0.05, description="share of that folder's disk that stays free")


class LoaderSection(Section):
    """The processes that read, decode and crop."""

    workers: NonNegativeInt | None = Field(None, description="loader processes a rank; 0 works in the rank")
    prefetch: PositiveInt = Field(2, description="batches ahead, a worker")
    read_ahead: PositiveInt = Field(2, description="blocks ahead, a shard")
    requests: PositiveInt = Field(8, description="ranged reads in flight, a worker")


class CropsSection(Section):
    """Multi-crop (paper, section 3.2 and appendix A.2). One entry a resolution in each of the lists."""

    sizes: list[PositiveInt] = Field([224, 96], description="edge of the crops in pixels, a resolution")
    counts: list[PositiveInt] = Field([2, 6], description="crops an image, a resolution")
    scales: list[tuple[Positive, Ratio]] = Field(
        [(0.14, 1.0), (0.05, 0.14)], description="share of the image's area, smallest and largest"
    )
    aspect: tuple[Positive, Positive] = Field((3 / 4, 4 / 3), description="width over height of a box")
    flip: Ratio = Field(0.5, description="probability of a horizontal flip")
    jitter: Ratio = Field(0.8, description="probability of colour jitter")
    brightness: float = Field(0.8, ge=0, description="strength of the brightness jitter")
    contrast: float = Field(0.8, ge=0, description="strength of the contrast jitter")
    saturation: float = Field(0.8, ge=0, description="strength of the saturation jitter")
    hue: Annotated[float, Field(ge=0, le=0.5)] = Field(0.2, description="strength of the hue jitter")
    grayscale: Ratio = Field(0.2, description="probability of grayscale")
    blur: Ratio = Field(0.5, description="probability of Gaussian blur")
    blur_sigma: tuple[Positive, Positive] = Field((0.1, 2.0), description="standard deviation in pixels")
    mean: tuple[float, float, float] = Field((0.485, 0.456, 0.406), description="normalisation, of 0 to 1")
    std: tuple[Positive, Positive, Positive] = Field((0.228, 0.224, 0.225), description="normalisation")
    max_pixels: PositiveInt = Field(178_956_970, description="larger images are quarantined undecoded")
    exif_orientation: bool = Field(False, description="turn images by their EXIF orientation")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.sizes:
            raise _refusal("crops.sizes", "at least one resolution is needed", self.sizes)
        for name in ("counts", "scales"):
            if len(getattr(self, name)) != len(self.sizes):
                reason = f"needs one entry for each of the {len(self.sizes)} crops.sizes"
                raise _refusal(f"crops.{name}", reason, getattr(self, name))
        ranges = [("aspect", self.aspect), ("blur_sigma", self.blur_sigma)]
        for name, (low, high) in [*ranges, *(("scales", scale) for scale in self.scales)]:
            if low > high:
                raise _refusal(f"crops.{name}", "the first number must not be the larger", [low, high])
        return self


def _refusal(key: str, reason: str, value: object) -> PydanticCustomError:
    """A ValueError of which `parse_config` makes a ConfigError."""
    shown = {"key": key, "reason": reason, "value": value}
    return PydanticCustomError(_REFUSAL, "{key}: {reason}", shown)


class ModelSection(Section):
    """Trunk, projection head and prototypes' dimension."""

    trunk: str = Field("resnet50", description="resnet8 to resnet152, resnext50_32x4d, resnext101_32x8d, ...")
    width: Positive = Field(1.0, description="multiplies every stage (w2, w4, w5 of the paper: 2, 4, 5)")
    stem: Literal["imagenet", "small", "strided"] = Field(
        "imagenet", description="small, strided: 3x3 of stride 1 or 2 without max-pooling, for small images"
    )
    head_hidden: NonNegativeInt = Field(2048, description="hidden width of the projection head; 0: one layer")
    head_batch_norm: bool = Field(True, description="BatchNorm inside the projection head")
    embedding: PositiveInt = Field(128, description="D, dimension of the embeddings")
    init: str = Field(
        "", description="weights that the trunk begins with: a run, a checkpoint or a file; default: none"
    )


class SwavSection(Section):
    """The objective (paper, section 3.1)."""

    prototypes: Annotated[int, Field(ge=2), _Whole] | None = Field(None, description="K")
    epsilon: Annotated[float, Field(ge=0.001)] | None = Field(None, description="Sinkhorn's regularisation")
    iterations: NonNegativeInt | None = Field(None, description="Sinkhorn's iterations")
    temperature: Positive = Field(0.1, description="of the softmax over prototypes")
    assigned_crops: list[NonNegativeInt] = Field([0, 1], description="crops whose codes are predicted")
    hard_codes: bool = Field(False, description="round codes to the best prototype (paper, appendix C.3)")
    learn_prototypes: bool = Field(True, description="false: random prototypes stay (paper, appendix C.2)")
    freeze_prototypes_images: NonNegativeInt | None = Field(None, description="prototypes stay until then")
    queue_length: NonNegativeInt | None = Field(None, description="past embeddings an assigned crop; 0: none")
    queue_start_images: NonNegativeInt | None = Field(None, description="the queue is used from then on")


class OptimizerSection(Section):
    """Optimizer and schedule. Everything counts images; a stream has no epochs."""

    name: Literal["lars", "sgd", "adamw"] = Field("lars", description="optimizer")
    rate: Positive | None = Field(None, description="base learning rate")
    start_rate: float | None = Field(None, ge=0, description="learning rate at the start of the warm-up")
    final_rate: float | None = Field(None, ge=0, description="learning rate at the end of the cosine")
    weight_decay: float = Field(1e-6, ge=0, description="L2 penalty (AdamW: decoupled)")
    momentum: Ratio = Field(0.9, description="of LARS and SGD")
    betas: tuple[Ratio, Ratio] = Field((0.9, 0.999), description="of AdamW")
    trust: Positive = Field(0.001, description="LARS' trust coefficient")
    warmup_images: NonNegativeInt | None = Field(None, description="images of linear warm-up")
    schedule: Literal["cosine", "constant", "step"] | None = Field(None, description="after the warm-up")
    milestones: list[Ratio] = Field(
        [0.6, 0.8], description="shares of the run at which a step schedule multiplies the rate"
    )
    factor: Positive = Field(0.2, description="by which it does so, each time")
    cooldown_images: NonNegativeInt = Field(
        0, description="last images, over which a constant rate falls to final_rate"
    )


class TrainingSection(Section):
    """The loop and what it runs on."""

    batch: PositiveInt | None = Field(None, description="G, images a step over all ranks")
    images: PositiveInt | None = Field(None, description="stop after so many images (default: all passes)")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where the model lives")
    precision: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="autocast type")
    deterministic: bool = Field(False, description="deterministic kernels on a GPU (slower)")
    sync_batch_norm: NonNegativeInt | None = Field(
        None, description="ranks that share batch statistics; 1: none, 0: all"
    )
    topology_invariant: bool = Field(False, description="whole-batch statistics on any number of ranks")
    threads: NonNegativeInt = Field(0, description="CPU threads of a rank; 0: the cores divided by the ranks")
    micro_batches: PositiveInt = Field(
        1, description="pieces of a rank's batch through the trunk, each computed twice, to save memory"
    )
    activation_checkpointing: bool = Field(
        False, description="keep only the inputs of residual blocks for the backward pass"
    )
    compile: bool = Field(False, description="torch.compile the residual blocks of the trunk")
    nonfinite_in_a_row: PositiveInt = Field(
        10, description="steps in a row that are skipped as not finite before the run stops"
    )
    nonfinite_ratio: Ratio = Field(
        0.01, description="share of the steps that may be skipped as not finite, from the 1,000th on"
    )


class CheckpointSection(Section):
    """When the run is saved, and what is kept."""

    minutes: Positive | None = Field(10.0, description="between checkpoints")
    images: PositiveInt | None = Field(None, description="between checkpoints, beside the minutes")
    keep: PositiveInt = Field(3, description="newest checkpoints that are kept")
    keep_every_images: PositiveInt | None = Field(None, description="one in so many images is kept for good")
    deadline_seconds: Positive = Field(
        3600.0, description="without a checkpoint that could be written until the run ends"
    )
    lease_seconds: Annotated[float, Field(ge=0)] = Field(
        60.0, description="until another process may take over from one that is silent; 0: no lease"
    )
    copy_to: str = Field("", description="folder or s3:// prefix for a copy of the run and its checkpoints")


class WatchdogSection(Section):
    """Seconds that a phase may take before the run counts as hung; 0: as long as it likes."""

    startup_seconds: Annotated[float, Field(ge=0)] = Field(
        1800.0, description="from the start to the end of the first step (listing, compiling, joining)"
    )
    step_seconds: Annotated[float, Field(ge=0)] = Field(
        900.0, description="a step with the wait for its batch; keep it above storage.deadline_seconds"
    )
    checkpoint_seconds: Annotated[float, Field(ge=0)] = Field(1800.0, description="saving a checkpoint")
    evaluation_seconds: Annotated[float, Field(ge=0)] = Field(3600.0, description="measuring the trunk")


class HealthSection(Section):
    """The verdict on the representation of a pretraining run (`ops/health.md`)."""

    verdict: bool = Field(True, description="judge the run at each log line, and keep the history")
    warmup_images: NonNegativeInt | None = Field(
        None, description="images without a verdict; default: twice the frozen prototypes' and 200 steps"
    )
    hold_steps: NonNegativeInt = Field(
        30, description="steps, and three log lines, that a condition holds before it is the verdict"
    )
    stop: bool = Field(False, description="end the run, saved, with exit code 78 after a bad verdict")
    stop_steps: NonNegativeInt = Field(1000, description="steps that a bad verdict holds before that")


class LabelsSection(Section):
    """Where labels come from: the samples themselves, or a table by their keys."""

    member: str = Field("cls", description="member of a sample that holds its label: cls, or json.A.B")
    names: str = Field("", description="file of class names in the order of their numbers; local or s3://")
    classes: PositiveInt | None = Field(None, description="number of classes, where labels are numbers")
    multi_label: bool = Field(False, description="an image may have several labels")
    separator: str = Field("", description="between the labels of an image in one text; means multi_label")
    file: str = Field(
        "", description="table of labels by key: .csv, .tsv (gzip too), .parquet; local or s3://"
    )
    key: str = Field("key", description="column of keys, or of file names")
    label: Texts = Field(["label"], description="column of labels; several: 0/1 columns, a class each")
    unknown: str = Field(
        "", description="in 0/1 columns: a class that is neither counted nor not (VOC's difficult): 0 or -1"
    )
    split: str = Field("", description="column that tells the split of a sample; default: all are in each")
    train_split: Texts = Field(["train"], description="what that column calls training samples")
    val_split: Texts = Field(["val"], description="what it calls validation samples")
    test_split: Texts = Field(["test"], description="what it calls test samples")


class EvaluationSection(Section):
    """Probes while pretraining: what the trunk is worth on labelled images beside the stream."""

    every: PositiveInt | None = Field(None, description="images trained between two probes; default: none")
    train: Texts = Field([], description="labelled shards that neighbours and classifier come from")
    test: Texts = Field([], description="labelled shards that are classified")
    limit: PositiveInt | None = Field(25_000, description="images used of each, about; null: all")
    neighbours: PositiveInt = Field(20, description="k of the kNN probe")
    linear_epochs: NonNegativeInt = Field(10, description="of the linear probe, over the features; 0: none")


class FinetuneSection(Section):
    """Supervised training of a trunk and a linear head (`streamswav finetune`); below it, 0 means none."""

    mode: Literal["full", "frozen"] = Field(
        "full", description="what is trained: trunk and head, or heads on a trunk that stays as it is"
    )
    test: Texts = Field([], description="labelled shards that accuracy is measured on")
    test_split: str = Field(
        "", description="split of labels.split to measure on; without finetune.test, of stream.urls"
    )
    evaluate_every: PositiveInt | None = Field(
        None, description="passes between two measurements; default: only at the end"
    )
    per_class: PositiveInt | None = Field(None, description="train on so many images of each class")
    subset: str = Field("", description="train on the keys in this file, one a line; local or s3://")
    subset_seed: NonNegativeInt = Field(0, description="of the draw of finetune.per_class")
    subset_to: str = Field("", description="folder for the subset's shards; default: below run.directory")
    rates: list[Positive] = Field(
        [], description="learning rates of the head; several only with a frozen trunk, side by side"
    )
    weight_decays: list[Annotated[float, Field(ge=0)]] = Field(
        [], description="weight decays of the head; with a frozen trunk each with each of the rates"
    )
    layer_decay: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="the trunk's rate times this for each residual block below the last"
    )
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="share of the target that is spread over all classes"
    )
    mixup: Annotated[float, Field(ge=0)] = Field(
        0.0, description="a and b of the beta distribution of mixup's shares"
    )
    cutmix: Annotated[float, Field(ge=0)] = Field(
        0.0, description="a and b of the beta distribution of cutmix's shares; with mixup: by turns"
    )
    rand_augment: NonNegativeInt = Field(0, description="RandAugment: operations an image")
    rand_augment_magnitude: Annotated[int, Field(ge=0, le=30)] = Field(
        9, description="RandAugment: their strength, 0 to 30"
    )
    resize: PositiveInt | None = Field(
        None, description="shorter side of test images; default: 256/224 of the crop, small ones the crop"
    )
    crop: PositiveInt | None = Field(None, description="centre crop of test images; default: crops.sizes")


class LowshotSection(Section):
    """The grid of `streamswav lowshot`: each cell is a finetuning run of its own."""

    per_class: list[PositiveInt] = Field([13, 128], description="n, images of each class")
    seeds: list[NonNegativeInt] = Field(
        [0, 1, 2, 3, 4], description="of the draw of the images and of the training"
    )
    baselines: list[Literal["scratch"]] = Field(
        [], description="scratch: the same trunk from random weights, with the same images and passes"
    )
    scratch: dict[str, Any] = Field(
        {}, description="keys that are others from scratch, as {optimizer.rate: 0.1}"
    )


class TelemetrySection(Section):
    """Logs and metrics."""

    port: Annotated[int, Field(ge=0, le=65535), _Whole] = Field(
        9404, description="of /metrics, /healthz, /readyz and /status; 0: none"
    )
    bind: str = Field("0.0.0.0", description="address of these")  # noqa: S104 - scraped from outside the pod
    log_seconds: Positive = Field(10.0, description="between log lines")
    log_format: Literal["auto", "json", "human"] = Field(
        "auto", description="of the log: JSON lines, lines for people, or by whether stderr is a terminal"
    )
    sinks: Annotated[list[Literal["tensorboard", "wandb"]], BeforeValidator(_list_one)] = Field(
        [], description="where readings and events go beside log and metrics: tensorboard, wandb"
    )
    sink_folder: str = Field(
        "", description="folder of this machine for what sinks keep; default: run.directory, if it is local"
    )
    wandb_project: str = Field("streamswav", description="project of Weights & Biases")
    linger_seconds: Annotated[float, Field(ge=0)] = Field(
        30.0,
        description="how long a launcher that was scraped waits at the end for one more scrape, which sees "
        "how the run ended; after a signal at most 2",
    )


class Config(Section):
    """The whole configuration of a run."""

    run: RunSection = RunSection()
    stream: StreamSection = StreamSection()
    storage: StorageSection = StorageSection()
    loader: LoaderSection = LoaderSection()
    crops: CropsSection = CropsSection()
    model: ModelSection = ModelSection()
    swav: SwavSection = SwavSection()
    optimizer: OptimizerSection = OptimizerSection()
    training: TrainingSection = TrainingSection()
    checkpoint: CheckpointSection = CheckpointSection()
    watchdog: WatchdogSection = WatchdogSection()
    health: HealthSection = HealthSection()
    labels: LabelsSection = LabelsSection()
    evaluation: EvaluationSection = EvaluationSection()
    finetune: FinetuneSection = FinetuneSection()
    lowshot: LowshotSection = LowshotSection()
    telemetry: TelemetrySection = TelemetrySection()


def keys(model: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    """Return every dotted key of the configuration, in order."""
    found = []
    for name, field in model.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            found += keys(inner, f"{prefix}{name}.")
        else:
            found.append(prefix + name)
    return found


def load_config(
    file: Path | None = None,
    environment: Mapping[str, str] = types.MappingProxyType({}),
    arguments: Sequence[str] = (),
    *,
    base: Mapping[str, Mapping[str, Any]] = types.MappingProxyType({}),
) -> Config:
    """Merge file, environment and `--section.key value` arguments, later ones winning.

    Args:
        file: YAML.
        environment: of the process.
        arguments: of the command line.
        base: a command's own defaults, by section; like all defaults they are not in `model_fields_set`.

    Raises:
        ConfigError: an unknown key, a value of the wrong type, an impossible combination.
    """
    merged = _read_yaml(file) if file else {}
    for key, text in _environment_items(environment):
        _assign(merged, key, _parse(key, text))
    for key, text in _argument_items(arguments):
        _assign(merged, key, _parse(key, text))
    if not base:
        return parse_config(merged)
    return _without_given(parse_config(_above(merged, base)), merged, base)


def _above(values: Mapping[str, Any], base: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Put values over defaults; what is no section is left for validation to refuse."""
    below = {name: dict(section) for name, section in base.items()}
    for name, section in values.items():
        below[name] = below.get(name, {}) | section if isinstance(section, dict) else section
    return below


def _without_given(
    config: Config, values: Mapping[str, Any], base: Mapping[str, Mapping[str, Any]]
) -> Config:
    """Return the configuration with only what was given beyond the base counted as set."""
    sections = {}
    for name, defaults in base.items():
        section = getattr(config, name)
        given = set(values.get(name, {}))
        kept = section.model_fields_set - (set(defaults) - given)
        sections[name] = type(section).model_construct(_fields_set=kept, **dict(section))
    return config.model_copy(update=sections)


def parse_config(values: Mapping[str, Any]) -> Config:
    """Validate a nested mapping.

    Raises:
        ConfigError: as `load_config`.
    """
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        raise _explain(error) from None
    check_combinations(config)
    return config


def dump_config(config: Config) -> str:
    """Return the configuration as YAML that `load_config` reads back to an equal object."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, width=110)


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
    _check_grid(config)
    _check_stream(config)
    _check_cache(config)
    _check_labels(config)
    _check_evaluation(config)


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


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(file.read_text())
    except FileNotFoundError:
        raise ConfigError("--config", "there is no such file", value=str(file)) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("--config", f"cannot be read ({error})", value=str(file)) from None
    except yaml.YAMLError as error:
        where = " ".join(str(error).split())
        raise ConfigError("--config", f"is not YAML: {where}", value=str(file)) from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(
            "--config", "must hold sections, as `stream:`, with keys below them", value=str(file)
        )
    return values


def _environment_items(environment: Mapping[str, str]) -> Iterable[tuple[str, str]]:
    """Only names with a double underscore are keys; `STREAMSWAV_HOME` and the like are others' business."""
    for name, text in sorted(environment.items()):
        if name.startswith(ENVIRONMENT_PREFIX) and "__" in name:
            yield name.removeprefix(ENVIRONMENT_PREFIX).lower().replace("__", "."), text


def _argument_items(arguments: Sequence[str]) -> Iterable[tuple[str, str]]:
    rest = list(arguments)
    while rest:
        name = rest.pop(0)
        if not name.startswith("--") or "." not in name:
            raise ConfigError(name, "is not understood; keys are given as --section.key value")
        key, equals, text = name.removeprefix("--").partition("=")
        if not equals:
            if not rest:
                raise ConfigError(key, "has no value; keys are given as --section.key value")
            text = rest.pop(0)
        yield key.replace("-", "_"), text


def _parse(key: str, text: str) -> Any:
    """Read a value as YAML, so that lists, numbers and null can be written; any other text is itself.

    Where a text is wanted, what YAML takes for a number, a date or the like is text as well.
    """
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):  # the latter for a date that no calendar has
        return text
    return value if key not in _TEXT_KEYS or isinstance(value, str | list | None) else text


def _assign(values: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    for section in sections:
        inner = values.setdefault(section, {})
        if not isinstance(inner, dict):
            raise ConfigError(section, "is a section, not a value", value=inner)
        values = inner
    values[last] = value


def _explain(error: ValidationError) -> ConfigError:
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"] if isinstance(part, str))
    if first["type"] == "extra_forbidden":
        if "accumul" in key:
            return ConfigError(key, _NO_ACCUMULATION, value=first["input"], nearest="training.micro_batches")
        return ConfigError(key, "there is no such key", value=first["input"], nearest=_nearest(key))
    if first["type"] == "model_type":
        return ConfigError(key, f"is a section; its keys stand below it, as {key}.KEY", value=first["input"])
    if first["type"] == _REFUSAL:
        return ConfigError(**first["ctx"])
    return ConfigError(key, first["msg"].removeprefix("Value error, "), value=first["input"])


def _nearest(key: str) -> str | None:
    """The valid key that is closest: by the whole name first, then by the last part alone."""
    if key in _RENAMED:
        return _RENAMED[key]
    known = [*keys(), *Config.model_fields]
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    if close:
        return close[0]
    last = key.rpartition(".")[2]
    by_last = {name.rpartition(".")[2]: name for name in known}
    close = difflib.get_close_matches(last, by_last, n=1, cutoff=0.6)
    return by_last[close[0]] if close else None


def _text_keys() -> frozenset[str]:
    found = set()
    for key in keys():
        section, name = key.split(".")
        model = typing.cast("type[BaseModel]", Config.model_fields[section].annotation)
        if model.model_fields[name].annotation in (str, str | None, list[str]):
            found.add(key)
    return frozenset(found)


_TEXT_KEYS = _text_keys()
