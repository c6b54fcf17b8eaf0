"""Between two log lines nothing waits for the device: no value is read from it, none is sent with a wait.

On the CPU a whole run is watched, from the crops to the bookkeeping. What a CPU cannot show, a tensor that
is sent over while the host waits, is looked for on a GPU that does not exist: tensors that are nothing but
shapes. `ops/certify-gpu` asks a real one (`torch.cuda.set_sync_debug_mode`).
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import arguments
from tiny_run import PROTOTYPES, tiny_config
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

from streamswav import cli
from streamswav.config import CropsSection
from streamswav.crops import Augment, augment
from streamswav.errors import EXIT_DONE
from streamswav.loader import Batch
from streamswav.models import build_network
from streamswav.swav import FeatureQueue, SwAVLoss
from streamswav.telemetry.metrics import Metrics
from streamswav.telemetry.progress import Reporter
from streamswav.training import trainer as loop
from streamswav.training.distributed import Ranks
from streamswav.training.learner import Learner, StepResult
from streamswav.training.monitor import Monitor
from streamswav.training.open_steps import OpenSteps
from streamswav.training.optim import LARS
from streamswav.training.pace import Stride
from streamswav.training.pretraining import Calendar, Pretraining
from streamswav.training.saver import Saver
from streamswav.training.swav_learner import SwAVLearner
from streamswav.training.trainer import Trainer

STEPS = 10
READS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "unique_dim"}
READERS = {Tensor.tolist, Tensor.numpy, Tensor.__array__}


class Reads(TorchDispatchMode):
    """Takes note of every value that is read, unless it is `allowed`; `steps` were watched."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.allowed = 0
        self.steps = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::").partition(".")[0]
        masks = name in ("index", "index_put", "index_put_") and any(
            isinstance(each, Tensor) and each.dtype in (torch.bool, torch.uint8) for each in args[1]
        )
        if name in READS or masks:
            self.note(name)
        return func(*args, **(kwargs or {}))

    def note(self, name: str) -> None:
        if not self.allowed:
            ours = [each for each in traceback.extract_stack() if "/streamswav/" in each.filename]
            self.found.append(f"{name}: {ours[-1].line if ours else '?'}")

    def allow(self, patch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
        """Allow what a function reads."""
        original = getattr(owner, name)

        def reading(*given: Any, **named: Any) -> Any:
            self.allowed += 1
            try:
                return original(*given, **named)
            finally:
                self.allowed -= 1

        patch.setattr(owner, name, reading)


class Readers(TorchFunctionMode):
    """Catches the ways to read that torch's dispatcher never sees on a CPU."""

    def __init__(self, reads: Reads) -> None:
        super().__init__()
        self._reads = reads

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in READERS:
            self._reads.note(func.__name__)
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def shards(make_shards: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    make_shards(folder, counts=[STEPS * 8, STEPS * 8], labels=False)
    return folder


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    """Watches the loop of a run in this process, from the second step on."""
    reads = Reads()
    train, stepped = Trainer.train, Monitor.stepped

    def watched(self: Trainer) -> None:
        reads.allowed += 1  # the first step is logged at once
        with reads, Readers(reads):
            train(self)

    def counted(self: Monitor, *given: Any, **named: Any) -> None:
        stepped(self, *given, **named)
        reads.allowed -= not reads.steps
        reads.steps += 1

    monkeypatch.setattr(Trainer, "train", watched)
    monkeypatch.setattr(Monitor, "stepped", counted)
    # At logs and saves reading is what is wanted; parameters of the augmentation, and the seed that a
    # loader draws and has no use for, never leave the CPU.
    for owner, name in (
        (Monitor, "log"),
        (OpenSteps, "settle"),
        (Saver, "save"),
        (loop, "refuse_unbounded"),
        (augment, "_plan"),
        (DataLoader, "__iter__"),
    ):
        reads.allow(monkeypatch, owner, name)
    return reads


def run(shards: Path, folder: Path, *more: str) -> int:
    given = arguments(
        run={"directory": folder},
        stream={"urls": shards, "samples": STEPS * 16},
        swav={"queue_length": 32, "queue_start_images": 0, "freeze_prototypes_images": 32},
        loader={"workers": 1},
        telemetry={"log_seconds": 1e9},
    )
    return cli.main([*given, *more])


@pytest.mark.parametrize(
    "more",
    [
        (),
        ("--training.precision", "bfloat16", "--optimizer.name", "sgd", "--training.deterministic", "true"),
        ("--training.precision", "float16", "--optimizer.name", "adamw", "--training.micro_batches", "2"),
    ],
    ids=["plain", "bfloat16", "float16"],
)
def test_a_run_reads_nothing_between_two_log_lines(
    shards: Path, tmp_path: Path, reads: Reads, plain_torch: None, more: tuple[str, ...]
) -> None:
    assert run(shards, tmp_path / "run", *more) == EXIT_DONE
    assert reads.steps == STEPS
    assert reads.found == []


@pytest.mark.parametrize(
    "read",
    [
        float,
        bool,
        lambda loss: loss.tolist(),
        lambda loss: loss.reshape(1).numpy(),
        lambda loss: loss[loss > 0],
    ],
    ids=["float", "if", "tolist", "numpy", "mask"],
)
def test_the_guard_finds_a_value_that_is_read(
    shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    reads: Reads,
    read: Callable[[Tensor], object],
) -> None:
    add = OpenSteps.add

    def reading(self: OpenSteps, batch: Batch, result: StepResult) -> None:
        read(result.loss)
        add(self, batch, result)

    monkeypatch.setattr(OpenSteps, "add", reading)
    run(shards, tmp_path / "run", "--training.images", "48")
    assert len(reads.found) == reads.steps - 1 == 2


@pytest.fixture
def plain_torch() -> Iterator[None]:
    """Takes back what `training.deterministic` says to torch."""
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic = False
    torch.utils.deterministic.fill_uninitialized_memory = True


class Transfers(TorchDispatchMode):
    """Takes note of tensors that go from one device to another, or are read, while the host waits."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.on_gpu = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        result = func(*args, **kwargs)
        made = [each for each in tree_leaves(result) if isinstance(each, Tensor)]
        # Numbers travel with the kernel.
        places = {each.device.type for each in (*given, *made) if each.dim()}
        self.on_gpu += "cuda" in places
        name = func.name().removeprefix("aten::").partition(".")[0]
        if name in READS or (len(places) > 1 and not kwargs.get("non_blocking")):
            self.found.append(f"{name} of {[(each.device.type, tuple(each.shape)) for each in given]}")
        return result


@contextmanager
def on_a_gpu_of_shapes(patch: pytest.MonkeyPatch) -> Iterator[Transfers]:
    """A GPU whose tensors have no memory. It has no streams either, so nothing can go backward on it."""

    def backward(self: Learner, loss: Tensor) -> None:
        self._scaler.scale(loss)
        for parameter in self.module.parameters():
            parameter.grad = torch.zeros_like(parameter)

    patch.setattr(Learner, "_backward", backward)
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield Transfers()


def test_a_step_sends_nothing_to_the_gpu_while_the_host_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Ranks(device=torch.device("cuda"))
    with on_a_gpu_of_shapes(monkeypatch) as transfers:
        with torch.device("cuda"):
            network = build_network(tiny_config().model, prototypes=PROTOTYPES)
            queue = FeatureQueue(length=16, dim=8, crops=2)
        optimizer = LARS(network.parameters(), 0.0)
        student = SwAVLearner(network, SwAVLoss(), optimizer, crops=3, queue=queue)
        task = Pretraining(
            student,
            Augment(CropsSection()),
            Calendar(freeze_until=1, queue_from=0),
            prototypes=PROTOTYPES,
            ranks=ranks,
        )
        monitor = Monitor(Metrics(), Reporter(silent=True), ranks, log_seconds=1e9)
        monitor.begin(step=0, images=0, loss_first=5.0)
        for step in range(4):
            crops = [torch.randn(n * 8, 3, size, size, device="cuda") for n, size in ((2, 16), (1, 8))]
            with transfers:
                result = task.step(crops, Stride(rate=0.1, images=8 * step, done=8 * step))
                monitor.stepped(result, step=step, images=8, rate=0.1, watch=task.watch)
    assert transfers.on_gpu
    assert transfers.found == []


def test_the_augmentation_sends_its_parameters_without_a_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    section = CropsSection(sizes=[32], counts=[2], scales=[(0.3, 1.0)])
    parameters = torch.zeros(2, 4, len(augment.Column))
    parameters[0, :, augment.Column.SIGMA] = 1.0
    parameters[:, 1:3, augment.Column.GRAYSCALE] = 1
    planned = augment._plan(parameters.flatten(0, 1))  # its tensors are real, as on a machine with a GPU
    monkeypatch.setattr(augment, "_plan", lambda _: planned)
    with on_a_gpu_of_shapes(monkeypatch) as transfers:
        work = Augment(section)
        pixels = torch.zeros(2, 4, 32, 32, 3, dtype=torch.uint8, device="cuda")
        work(pixels, parameters)  # the blur lays out its bands once
        with transfers:
            work(pixels, parameters)
    assert transfers.on_gpu
    assert transfers.found == []


def test_an_index_that_is_a_list_is_found_on_its_way_to_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    with on_a_gpu_of_shapes(monkeypatch) as transfers:
        scores = torch.zeros(4, 3, device="cuda")
        with transfers:
            scores[[0, 1]]
    assert len(transfers.found) == 1
