"""The run that is asked about, and what several checks want to know of it, each found out once."""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Generic, TypeVar

import torch

from streamswav.commands.pretrain import resolve_open
from streamswav.commands.run_folder import checkpoints_of, read_begun
from streamswav.config import Config
from streamswav.defaults import Facts, resolve
from streamswav.doctor.finding import NO_CONFIGURATION, NotLookedAtError
from streamswav.doctor.machine import Machine
from streamswav.doctor.specimens import Specimens, take_specimens
from streamswav.errors import ConfigError, StorageError, StreamswavError, UnavailableError
from streamswav.launch import count_ranks
from streamswav.launch_options import LaunchOptions
from streamswav.planning import GPUS, Gpu, Plan, Request, make_plan, recognise, trunk_parameters
from streamswav.stream.manifest import Manifest, list_manifest
from streamswav.stream.position import Position
from streamswav.stream.store import CREDENTIALS, IdentityError, Store
from streamswav.training.checkpoint import Checkpoint
from streamswav.training.distributed import Ranks
from streamswav.transfer.finetuning.defaults import complete, rules_that_hold
from streamswav.transfer.finetuning.finetune import load_both

TRAINING = ("pretrain", "finetune", "lowshot", "cooldown")
PATIENCE_SECONDS = 15.0
"""How long storage is asked again: a run has more patience, but whoever waits for this has less."""

_MANY_SHARDS = 1_000_000
_PLANNED_GPU = "A100-80GB"

Found = TypeVar("Found")


class Once(Generic[Found]):
    """Something that is found out at the first asking, in the checks' threads.

    Whoever asks first has the failure; for those after it there is nothing to look at.
    """

    def __init__(self, name: str, work: Callable[[], Found]) -> None:
        self._work = work
        self._lock = threading.Lock()
        self._asked = False
        self._why = f"builds upon {name}, which failed"
        self._found: list[Found] = []

    def get(self) -> Found:
        """Return it.

        Raises:
            NotLookedAtError: it could not be found out before, or is still waited for.
            Exception: what `work` raises.
        """
        with self._lock:
            asked, self._asked = self._asked, True
        if not asked:
            try:
                self._found.append(self._work())
            except NotLookedAtError as error:
                self._why = str(error)
        if not self._found:
            raise NotLookedAtError(self._why)
        return self._found[0]

    def known(self) -> Found | None:
        """Return it if it was found out; nothing is begun."""
        return self._found[0] if self._found else None


@dataclass
class Case:
    """What is asked about.

    Attributes:
        command: that the run will be started by.
        given: its configuration, or why there is none.
        launch: where its ranks are, or why that is not known.
        environment: of the process.
        machine: where to look at it.
        seconds: for what measures; 0: nothing does.
        gpu_type: of the planning's table, where the GPU is not in this machine.
        failures: names of the checks that failed so far.
    """

    command: str
    given: Config | StreamswavError
    launch: LaunchOptions | StreamswavError = field(default_factory=LaunchOptions)
    environment: Mapping[str, str] = field(default_factory=dict)
    machine: Machine = field(default_factory=Machine)
    seconds: float = 5.0
    gpu_type: Gpu | None = None

    def __post_init__(self) -> None:
        self.failures: set[str] = set()
        self._lost: dict[tuple[str, type[StorageError]], str] = {}
        self.listing = Once("listing", self._list)
        self.specimens: Once[Specimens] = Once(
            "shard", lambda: take_specimens(self.shards.shards[0], self.store)
        )
        self._begun = Once("run", lambda: read_begun(self.config, self.store) if self.trains else None)
        self._newest = Once("run", self._read_newest)
        self._resolved = Once("settings", self._resolve)
        self._plan = Once("settings", self._make_plan)

    @property
    def config(self) -> Config:
        """The configuration.

        Raises:
            NotLookedAtError: there is none.
        """
        if isinstance(self.given, StreamswavError):
            raise NotLookedAtError(NO_CONFIGURATION)
        return self.given

    @property
    def options(self) -> LaunchOptions:
        """Where the ranks are.

        Raises:
            NotLookedAtError: that is not known.
        """
        if isinstance(self.launch, StreamswavError):
            raise NotLookedAtError(NO_CONFIGURATION)
        return self.launch

    @property
    def trains(self) -> bool:
        """Whether a run with a folder of its own is begun or continued."""
        return self.command in TRAINING and bool(self.config.run.directory)

    @property
    def urls(self) -> list[str]:
        """The shards' URLs.

        Raises:
            NotLookedAtError: there are none.
        """
        if not self.config.stream.urls:
            raise NotLookedAtError("stream.urls names no shards")
        return self.config.stream.urls

    @property
    def directory(self) -> str:
        """The run's folder.

        Raises:
            NotLookedAtError: there is none.
        """
        if not self.trains:
            raise NotLookedAtError("no run is written (run.directory)")
        return self.config.run.directory

    @cached_property
    def store(self) -> Store:
        """Storage as the run sees it, with less patience."""
        section = self.config.storage
        return Store(
            section.model_copy(
                update={
                    "deadline_seconds": min(section.deadline_seconds, PATIENCE_SECONDS),
                    "timeout_seconds": min(section.timeout_seconds, PATIENCE_SECONDS),
                }
            )
        )

    @property
    def shards(self) -> Manifest:
        """The shards as they were listed."""
        return self.listing.get()

    @property
    def begun(self) -> Config | None:
        """The configuration of the run that is continued; None: a new one."""
        return self._begun.get()

    @property
    def newest(self) -> tuple[Checkpoint, Position, list[str]] | None:
        """The newest checkpoint that is whole, where it stands, and what was passed over for it."""
        return self._newest.get()

    @property
    def cuda(self) -> bool:
        """Whether the model will live on a GPU of this machine."""
        return self.config.training.device != "cpu" and torch.cuda.is_available()

    @property
    def on_gpu(self) -> bool:
        """Whether the run's model lives on a GPU, here or elsewhere."""
        return self.cuda or self.gpu_type is not None or self.config.training.device == "cuda"

    def after(self, name: str) -> None:
        """Look no further where this check has failed.

        Raises:
            NotLookedAtError: it has.
        """
        if name in self.failures:
            raise NotLookedAtError(f"builds upon {name}, which failed")

    def learn(self, error: StreamswavError, name: str) -> None:
        """Keep in mind, where a check failed by it, that storage is out of reach or refuses the identity."""
        if isinstance(error, UnavailableError | IdentityError):
            kind = IdentityError if isinstance(error, IdentityError) else UnavailableError
            self._lost.setdefault((_server(error.url), kind), name)

    def reach(self, *urls: str, signed: bool = True) -> None:
        """Look no further where a check before did not get through to the storage of one of these URLs.

        Args:
            urls: that are to be asked.
            signed: whether it matters who asks.

        Raises:
            NotLookedAtError: it did not.
        """
        kinds = (UnavailableError, IdentityError) if signed else (UnavailableError,)
        for url in urls:
            for kind in kinds:
                if name := self._lost.get((_server(url), kind)):
                    raise NotLookedAtError(f"builds upon {name}, which failed")

    @property
    def ranks_here(self) -> int:
        """Ranks of this machine."""
        return count_ranks(self.options.ranks)

    @property
    def world_size(self) -> int:
        """Ranks of the run, taken that all machines have as many."""
        return self.options.nodes * self.ranks_here

    @property
    def resolved(self) -> Config:
        """The configuration with everything chosen that was left open.

        Raises:
            ConfigError: it cannot work with these ranks.
        """
        return self._resolved.get()

    @property
    def plan(self) -> Plan:
        """What planning says of the run.

        Raises:
            NotLookedAtError: it is no pretraining.
        """
        return self._plan.get()

    @property
    def gpu(self) -> Gpu | None:
        """The type of the GPUs: as told, or as found here."""
        if self.gpu_type is not None or not self.cuda:
            return self.gpu_type
        device = torch.cuda.get_device_properties(0)
        return recognise(device.name, device.total_memory)

    def _list(self) -> Manifest:
        self.reach(*self.urls)
        return list_manifest(self.urls, self.store)

    def _read_newest(self) -> tuple[Checkpoint, Position, list[str]] | None:
        told: list[str] = []
        found = checkpoints_of(self.config, self.store, told.append).newest(only={"position.json"})
        if found is None:
            return None
        checkpoint, files = found
        return checkpoint, Position.from_json(json.loads(files["position.json"])), told

    def _resolve(self) -> Config:
        config, facts = self.config, self._facts()
        if self.command in ("pretrain", "cooldown"):
            device = torch.device("cuda", 0) if facts.cuda else torch.device("cpu")
            return resolve_open(config, facts, Ranks(device=device))[0]
        if config.run.task == "finetune":
            labels, _ = load_both(config, self.store)
            table = config.labels.model_copy(update={"classes": labels.classes})
            config = config.model_copy(update={"labels": table})
            config, _ = complete(config, facts.begun, rules_that_hold(config, facts))
        return resolve(config, facts)[0]

    def _facts(self) -> Facts:
        """As a run finds them; where the shards are not listed there are many."""
        config, manifest = self.config, self.listing.known()
        begun = None
        with contextlib.suppress(NotLookedAtError, StreamswavError):
            begun = self.begun
        return Facts(
            world_size=self.world_size,
            cores=max(1, len(os.sched_getaffinity(0)) // self.ranks_here),
            cuda=self.cuda,
            bfloat16=self.cuda and torch.cuda.is_bf16_supported(including_emulation=False),
            shards=len(manifest.shards) if manifest else _MANY_SHARDS,
            samples=manifest.samples if manifest else None,
            run_samples=manifest.total(config.stream.passes_by_url) if manifest else None,
            trunk_parameters=trunk_parameters(config),
            begun=begun,
        )

    def _make_plan(self) -> Plan:
        """Plan the run as it is chosen here; for a GPU that is elsewhere, as it would be chosen there."""
        if self.command not in ("pretrain", "cooldown"):
            raise NotLookedAtError(f"planning knows no {self.command}")
        manifest, gpu = self.listing.known(), self.gpu
        elsewhere = gpu is not None and not self.cuda
        request = Request(
            config=self.config if elsewhere else self.resolved,
            gpus=self.world_size,
            gpu=gpu or GPUS[_PLANNED_GPU],
        )
        if manifest is not None:
            passes = self.config.stream.passes_by_url
            sizes = [(shard.size, passes[shard.source]) for shard in manifest.shards]
            request = replace(request, sizes=sizes, samples=(manifest.samples, manifest.total(passes)))
        try:
            return make_plan(request)
        except ConfigError as error:
            raise NotLookedAtError(f"planning cannot tell: {error}") from None


def _server(url: str) -> str:
    """Where a URL lies: all of S3 is one server with one identity, and local folders are each their own."""
    scheme, mark, rest = url.removeprefix("@").partition("://")
    if url == CREDENTIALS or scheme == "s3":
        return "s3"
    if not mark or scheme == "file":
        return url
    return f"{scheme}://{rest.partition('/')[0]}"


def config_of(case: Case) -> Config:
    """Return the configuration, or raise why there is none: for the check that is about it."""
    if isinstance(case.given, StreamswavError):
        raise case.given
    if isinstance(case.launch, StreamswavError):
        raise case.launch
    return case.given
