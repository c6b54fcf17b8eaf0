"""The ranks of a run: who they are, and what they agree upon over the CPU."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from streamswav.errors import ConfigError, PeerError, StreamswavError
from streamswav.heartbeat import FOLDER_VARIABLE, Heartbeat, find_heartbeat
from streamswav.telemetry.metrics import Role

# What gloo and NCCL say when the other end is no more, or never was.
_LOST = (
    "closed by peer",
    "reset by peer",
    "Broken pipe",
    "onnection refused",
    "onnection was closed",
    "remote process exited",
    "Timed out waiting",
)

# With these cuBLAS works with one workspace a stream, and always in the same order.
_CUBLAS_VARIABLE, _CUBLAS_REPEATABLE = "CUBLAS_WORKSPACE_CONFIG", (":4096:8", ":16:8")

_COMMIT_VARIABLE = "STREAMSWAV_GIT_SHA"
_LEADER_FIRST_SECONDS = 2.0

Plain = TypeVar("Plain")


@dataclass(frozen=True)
class Ranks:
    """This process among the ranks.

    Attributes:
        rank: 0 to world_size - 1.
        world_size: number of ranks.
        local_rank: number on this machine.
        device: where the model lives.
        group: for the tensors of the model (NCCL or gloo); None for one rank.
        control: gloo, for agreements that must not wait for the device; None for one rank.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    group: dist.ProcessGroup | None = None
    control: dist.ProcessGroup | None = None

    @property
    def leads(self) -> bool:
        """Rank 0 decides and writes for all."""
        return self.rank == 0

    def total(self, values: Sequence[int]) -> list[int]:
        """Add up integers over all ranks."""
        if self.control is None:
            return list(values)
        summed = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(summed, group=self.control)
        return [int(value) for value in summed]

    def add_up(self, values: Tensor) -> Tensor:
        """Add up a tensor on the CPU over all ranks."""
        if self.control is None:
            return values
        summed = values.clone()
        dist.all_reduce(summed, group=self.control)
        return summed

    def gather(self, value: Plain) -> list[Plain]:
        """Return every rank's value, in their order, on all ranks."""
        if self.control is None:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def collect(self, value: Plain) -> list[Plain]:
        """Return every rank's value on rank 0, an empty list on the others."""
        if self.control is None:
            return [value]
        values: list[Any] | None = [None] * self.world_size if self.leads else None
        dist.gather_object(value, values, dst=0, group=self.control)
        return values or []

    def each(self, work: Callable[[], Plain]) -> list[Plain]:
        """Let every rank do something of its own; all return all answers, or raise the first error."""
        answer: Plain | None = None
        error: StreamswavError | None = None
        try:
            answer = work()
        except StreamswavError as raised:
            error = raised
        results = self.gather((answer, error))
        for _, found in results:
            if found is not None:
                raise found
        return [cast("Plain", each) for each, _ in results]

    def lead(self, work: Callable[[], Plain]) -> Plain:
        """Let rank 0 do something once for all; every rank returns its answer, or raises its error."""
        answer: Any = None
        error: StreamswavError | None = None
        if self.leads:
            try:
                answer = work()
            except StreamswavError as raised:
                error = raised
        if self.control is not None:
            values = [answer, error]
            dist.broadcast_object_list(values, src=0, group=self.control)
            answer, error = values
        if error is not None:
            raise error
        result: Plain = answer
        return result


def copy_from_leader(module: nn.Module, ranks: Ranks) -> None:
    """Give every rank rank 0's parameters and buffers of a module, in place."""
    if ranks.group is None:
        return
    for tensor in module.state_dict().values():
        copy = tensor.detach().contiguous()
        dist.broadcast(copy, src=0, group=ranks.group)
        tensor.detach().copy_(copy)


@contextmanager
def join_ranks(device: str) -> Iterator[Ranks]:
    """Join the ranks that torchrun started, or be the only one.

    Args:
        device: `auto`, `cpu` or `cuda`.

    Raises:
        ConfigError: CUDA is asked for and not there, or has fewer devices than this machine has ranks.
        PeerError: another rank ended, or never came.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    place = _pick_device(device, local_rank)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Ranks(device=place)
        return
    with _naming_lost_peers():
        yield from _joined(local_rank, place)


def _joined(local_rank: int, place: torch.device) -> Iterator[Ranks]:
    dist.init_process_group("nccl" if place.type == "cuda" else "gloo")
    try:
        rank, world_size = dist.get_rank(), dist.get_world_size()
        control = dist.new_group(backend="gloo")
        assert isinstance(control, dist.ProcessGroup)
        yield Ranks(rank, world_size, local_rank, place, dist.group.WORLD, control)
    finally:
        dist.destroy_process_group()


@contextmanager
def leader_tells(ranks: Ranks) -> Iterator[None]:
    """Let rank 0 alone tell of an error that all ranks have, since they agree on every one.

    It does so in time: a launcher ends the others as soon as one has gone.
    """
    try:
        yield
    except StreamswavError as error:
        if ranks.leads:
            raise
        time.sleep(_LEADER_FIRST_SECONDS)
        raise SystemExit(error.exit_code) from None


@contextmanager
def _naming_lost_peers() -> Iterator[None]:
    """Make one line of what torch says where a connection to another rank broke."""
    try:
        yield
    except RuntimeError as error:  # gloo has no kind of its own
        if not isinstance(error, dist.DistError) and not any(each in str(error) for each in _LOST):
            raise
        # Without the place in gloo's source before it and its advice after it.
        line = str(error).strip().partition("\n")[0]
        rank, reason = own_rank(), line.rpartition("] ")[2].partition(". ")[0]
        raise PeerError(
            f"rank {rank} lost the other ranks, which tell why on their machines ({reason})"
        ) from None


def own_rank() -> int:
    """Return this process' number among the ranks, before it has joined them."""
    return int(os.environ.get("RANK", "0"))


def own_role() -> Role:
    """Return what this process is for metrics: under a launcher that one keeps those of the pod."""
    if own_rank() != 0:
        return Role.RANK
    return Role.ALONE if own_folder() is None else Role.LEADER


def own_attempt() -> int:
    """Return how often the launcher has started the ranks of this machine before."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def own_commit() -> str:
    """Return the commit that this code is of: as the image was told, or as git says; else `unknown`."""
    if told := os.environ.get(_COMMIT_VARIABLE):
        return told
    here = Path(__file__).resolve().parents[2]
    if not (here / ".git").exists():
        return "unknown"
    with suppress(OSError, subprocess.SubprocessError):
        command = ["git", "-C", str(here), "rev-parse", "--short=12", "HEAD"]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=10).stdout.strip()  # noqa: S603
    return "unknown"


def own_folder() -> Path | None:
    """Return the folder that this rank shares with its launcher; None: there is no launcher."""
    folder = os.environ.get(FOLDER_VARIABLE)
    return Path(folder) if folder else None


def own_heartbeat() -> Heartbeat | None:
    """Return where the launcher looks for the phase of this rank; None: there is no launcher."""
    folder = own_folder()
    return find_heartbeat(folder, int(os.environ.get("LOCAL_RANK", "0"))) if folder else None


def local_world_size() -> int:
    """Return the number of ranks on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def own_cores() -> int:
    """Return the number of CPU cores that a rank of this machine can use."""
    return max(1, len(os.sched_getaffinity(0)) // local_world_size())


def _pick_device(device: str, local_rank: int) -> torch.device:
    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise ConfigError("training.device", "no CUDA device is visible here; use cpu or auto", value=device)
    if device == "cpu" or not available:
        return torch.device("cpu")
    if local_world_size() > (gpus := torch.cuda.device_count()):
        reason = f"{local_world_size()} ranks on this machine have {gpus} CUDA devices: start fewer"
        raise ConfigError("training.device", reason, value=device)
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def compute_repeatably() -> None:
    """Let torch, cuDNN and cuBLAS give the same bits for the same input, from here on; TF32 stays as it is.

    To be called before the first product of matrices on a GPU: what cuBLAS is told then holds for good.
    """
    if os.environ.get(_CUBLAS_VARIABLE) not in _CUBLAS_REPEATABLE:
        os.environ[_CUBLAS_VARIABLE] = _CUBLAS_REPEATABLE[0]
    torch.use_deterministic_algorithms(True)
    # It would fill what torch.empty returns, which costs a pass; nothing here reads what it has not written.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a property
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
