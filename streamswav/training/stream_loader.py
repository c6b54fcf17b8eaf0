"""The stream of crops for somebody else's training loop: what `pretrain` reads from, on its own."""

from __future__ import annotations

import os
import sys
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from streamswav.config import (
    Config,
    CropsSection,
    LoaderSection,
    StorageSection,
    StreamSection,
    TrainingSection,
    check_combinations,
)
from streamswav.crops import MultiCrop
from streamswav.defaults import Facts, known, resolve
from streamswav.errors import ConfigError, PositionError
from streamswav.loader import Batch
from streamswav.stream.grid import Grid, fit_grid
from streamswav.stream.manifest import Manifest, list_manifest
from streamswav.stream.open import Urls, passes_of, read_position, url_list
from streamswav.stream.position import Position
from streamswav.stream.store import Store
from streamswav.training.distributed import Ranks
from streamswav.training.feed import Feed, Hooks
from streamswav.training.feeding import begun_grid, build_feed, build_selection

_CROPS = CropsSection()
_STREAM = StreamSection()
_STORAGE = StorageSection()
_LOADER = LoaderSection()
_EVIDENCE = 3  # of what was passed over, for the message should a budget be spent


class StreamLoader:
    """Iterates over batches of crops from tar shards, each sample exactly once a pass, over all ranks.

    All ranks make it, iterate over it, and ask for its state at the same step: it ends on all of them alike.
    Iterated over again, it goes on after the last batch that was given.

    Args:
        urls: one or several prefixes, globs, brace patterns, single tars or `@FILE` lists.
        batch: samples of a global batch, over all ranks; rounded down to what the ranks can share.
        workers: loader processes of this rank; 0 works in this process; by default one a core, up to 12.
        crops: sizes, counts and scales of the crops, and the law of the augmentation's parameters.
        seed: of order and crops.
        passes: over all shards, or one number for each of `urls`.
        window: samples of a lane that are permuted together.
        columns, rows: of the lane grid; by default chosen for the number of shards. Where the ranks divide
            the columns and the workers the rows, batches do not depend on how many there are.
        exclude: files of keys that are not given, one a line.
        where: conditions that a sample must meet, as "json.width >= 256", or "module:function".
        storage: endpoint, region, block size, deadline.
        loader: prefetch, read-ahead and requests; its `workers` give way to the argument.
        memory: bytes of blocks and windows, a worker.
        skip_ratio: share of samples that may be quarantined.
        rank, world_size: by default those of torch.distributed where it is initialised; 0 and 1: this
            process alone reads everything.
        pin_memory: by default where there is CUDA.

    Attributes:
        manifest: the shards.
        batch: samples of a global batch.

    Raises:
        ConfigError: arguments that cannot work.
        ManifestError: there are no shards.
        StorageError: a location that cannot be read.
        StreamswavError: while it is iterated over: as the data or the store deserve, on all ranks.
    """

    def __init__(
        self,
        urls: Urls,
        *,
        batch: int,
        workers: int | None = None,
        crops: CropsSection = _CROPS,
        seed: int = _STREAM.seed,
        passes: int | Sequence[int] = 1,
        window: int = _STREAM.window,
        columns: int | None = None,
        rows: int | None = None,
        exclude: Sequence[str] = (),
        where: Sequence[str] = (),
        storage: StorageSection = _STORAGE,
        loader: LoaderSection = _LOADER,
        memory: int = _STREAM.memory,
        skip_ratio: float = _STREAM.skip_ratio,
        rank: int | None = None,
        world_size: int | None = None,
        pin_memory: bool | None = None,
    ) -> None:
        given = url_list(urls)
        stream = {"urls": given, "seed": seed, "passes": list(passes_of(passes, given)), "window": window}
        stream |= {"columns": columns, "rows": rows}
        stream |= {"exclude": list(exclude), "where": list(where), "memory": memory, "skip_ratio": skip_ratio}
        config = Config(
            stream=StreamSection.model_validate(stream),
            storage=storage,
            crops=crops,
            loader=loader if workers is None else loader.model_copy(update={"workers": workers}),
            training=TrainingSection(batch=batch),
        )
        check_combinations(config)
        self._ranks = _find_ranks(rank, world_size, pin_memory)
        self.manifest = self._ranks.lead(lambda: list_manifest(given, Store(storage)))
        self._config = resolve_stream(config, self.manifest, self._ranks)
        self._batches: Generator[Batch, None, None] | None = None
        self._feed = open_feed(self._config, self.manifest, self._ranks)

    @property
    def batch(self) -> int:
        """Samples of a global batch."""
        return self._feed.position.grid.batch

    @property
    def position(self) -> Position:
        """The position of all ranks as of the last `state_dict`, and of the end."""
        return self._feed.position

    def __iter__(self) -> Iterator[Batch]:
        """Yield this rank's share of every global batch from here on."""
        self.close()
        self._feed.synchronise()
        self._batches = self._give()
        return self._batches

    def state_dict(self) -> dict[str, Any]:
        """Return the position of all ranks after the batches given so far: plain data, fit for JSON.

        What is prefetched is not in it. It is the same on every rank; all must ask at the same step.
        """
        return self._feed.synchronise().to_json()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after a state of these shards, also one of another number of ranks or workers.

        Where these do not divide its lane grid, what is left of the pass is dealt again. Give every rank
        the same state.

        Raises:
            PositionError: it belongs to other shards, to another seed, or is no state.
        """
        position = read_position(state)
        position.covered(self.manifest)
        self.close()
        self._feed = open_feed(self._config, self.manifest, self._ranks, position=position)

    def close(self) -> None:
        """End the loader processes; iterating starts them again."""
        if self._batches is not None:
            self._batches.close()

    def _give(self) -> Generator[Batch, None, None]:
        feed = self._feed
        batches = iter(feed)
        while True:
            with _main_left_alone():
                batch = next(batches, None)
            if batch is None:
                return
            # Given is done: what becomes of it is up to the loop that asked for it.
            feed.commit(batch)
            del feed.unwritten[:-_EVIDENCE]
            yield batch


@contextmanager
def _main_left_alone() -> Iterator[None]:
    """Loader processes started meanwhile do not run the user's script again to find its classes.

    They need none of them, and a script without `if __name__ == "__main__"` would start over in each.
    """
    main = sys.modules["__main__"]
    names = ("__spec__", "__file__")
    hidden: dict[str, Any] = {name: main.__dict__[name] for name in names if name in main.__dict__}
    main.__spec__ = None
    main.__dict__.pop("__file__", None)
    try:
        yield
    finally:
        main.__dict__.update(hidden)


def resolve_stream(config: Config, manifest: Manifest, ranks: Ranks) -> Config:
    """Return the configuration with batch, workers and lane grid chosen; they do not depend on the ranks."""
    facts = Facts(
        world_size=1,
        cores=min(ranks.gather(len(os.sched_getaffinity(0)))) // _ranks_here(ranks) or 1,
        cuda=False,
        bfloat16=False,
        shards=len(manifest.shards),
        samples=manifest.samples,
        run_samples=manifest.total(config.stream.passes_by_url),
        trunk_parameters=0,
        begun=config,
    )
    return resolve(config, facts)[0]


def open_feed(
    config: Config,
    manifest: Manifest,
    ranks: Ranks,
    *,
    position: Position | None = None,
    crop: MultiCrop | None = None,
    hooks: Hooks | None = None,
) -> Feed:
    """Build the feed of a configuration that `resolve_stream` completed.

    Args:
        config: complete.
        manifest: the shards.
        ranks: who shares them.
        position: where to go on; by default at the beginning.
        crop: instead of the configuration's.
        hooks: of the feed.

    Raises:
        PositionError: the position is not this stream's, or the ranks cannot share the batch.
        ConfigError: conditions or lists that cannot be understood, too little memory.
        StorageError: a list that cannot be read.
    """
    begun = begun_grid(config)
    start = position or Position(manifest.digest, begun, config.stream.seed, config.stream.passes_by_url)
    fitted = _fitted(start, begun, manifest, config, ranks)
    select = build_selection(config, Store(config.storage))
    return build_feed(config, manifest, fitted, ranks, select=select, crop=crop, hooks=hooks)


def _fitted(position: Position, begun: Grid, manifest: Manifest, config: Config, ranks: Ranks) -> Position:
    """Return the position with the passes asked for, on a grid for these ranks and workers."""
    if position.seed != config.stream.seed:
        theirs, ours = position.seed, config.stream.seed
        raise PositionError(f"the state was made with seed {theirs}, the loader with {ours}")
    position = position.with_passes(config.stream.passes_by_url)
    # A batch that was rounded down for other ranks is still the same batch; any other is a new wish.
    same = position.grid.batch == begun.batch // position.grid.columns * position.grid.columns
    current = position.grid if same else begun
    workers = known(config.loader.workers)
    return position.on_grid(manifest, fit_grid(current, begun, world_size=ranks.world_size, workers=workers))


def _find_ranks(rank: int | None, world_size: int | None, pin_memory: bool | None) -> Ranks:
    """Return this process among the ranks of torch.distributed, with a group of their own to agree over."""
    pinned = torch.cuda.is_available() if pin_memory is None else pin_memory
    device = torch.device("cuda" if pinned else "cpu")
    up = dist.is_available() and dist.is_initialized()
    ranks = (dist.get_rank(), dist.get_world_size()) if up else (0, 1)
    asked = (ranks[0] if rank is None else rank, ranks[1] if world_size is None else world_size)
    if world_size == 1 and not rank:
        return Ranks(device=device)
    if asked != ranks:
        reason = "the ranks must agree on every batch: call torch.distributed.init_process_group first"
        if up:
            reason = f"torch.distributed says {ranks}; leave both out, or give 0 and 1 to read alone"
        raise ConfigError("rank, world_size", reason, value=asked)
    if ranks[1] == 1:
        return Ranks(device=device)
    control = dist.new_group(backend="gloo")
    assert isinstance(control, dist.ProcessGroup)
    return Ranks(*ranks, device=device, group=dist.group.WORLD, control=control)


def _ranks_here(ranks: Ranks) -> int:
    """Return the number of ranks on this machine."""
    here = os.uname().nodename
    return ranks.gather(here).count(here)
