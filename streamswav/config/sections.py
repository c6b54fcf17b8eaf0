"""The keys: one frozen pydantic model a section, what each value may be, and what it is for.

A value left at `None` is chosen at start by a rule (`streamswav/defaults.py`) that is printed with
its reason.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, LiteralString, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

REFUSAL: LiteralString = "refusal"

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
    return PydanticCustomError(REFUSAL, "{key}: {reason}", shown)


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
