"""`model.init` for pretraining: rank 0 reads the weights, and all begin with what it has read."""

from __future__ import annotations

from streamswav.commands.program import Start
from streamswav.commands.run_folder import Run
from streamswav.config import Config
from streamswav.models import SwAVNetwork
from streamswav.training.distributed import copy_from_leader
from streamswav.transfer.weights.initial import begin_with, read_initial
from streamswav.transfer.weights.trunks import Weights


class Initial:
    """What a new run begins with, from before its shards are listed until its network is built.

    A run that goes on has its own weights: nothing is read.
    """

    def __init__(self) -> None:
        self._weights: Weights | None = None

    def prepare(self, config: Config, start: Start) -> Config:
        """Read the weights and hold them against the configuration, on rank 0 for all.

        Raises:
            CheckpointError, ConfigError, StorageError: as `read_initial`.
        """
        if config.model.init and start.begun is None:
            start.ranks.lead(lambda: self._read(config))
        return config

    def give(self, network: SwAVNetwork, run: Run) -> None:
        """Let the network of every rank begin with them, and say with what.

        Raises:
            CheckpointError: as `begin_with`.
        """
        if not run.ranks.lead(lambda: self._weights is not None):
            return
        run.ranks.lead(lambda: self._give(network, run))
        copy_from_leader(network, run.ranks)
        self._weights = None

    def _read(self, config: Config) -> None:
        self._weights = read_initial(config.model.init, config.model, storage=config.storage)

    def _give(self, network: SwAVNetwork, run: Run) -> None:
        assert self._weights is not None
        info, told = self._weights.info, begin_with(network, self._weights)
        text = "; ".join([f"the run begins with {info.url}: {info.report}", *told])
        run.reporter.event("init", text, layout=info.layout, url=info.url)
