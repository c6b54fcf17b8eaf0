"""A run without a trainer: ranks and workers in turn, positions that go through JSON, tars in memory."""

import io
import itertools
import json
import tarfile
from dataclasses import dataclass, field

from streamswav.stream.grid import Grid, fit_grid
from streamswav.stream.manifest import Manifest, Shard
from streamswav.stream.outcomes import tally_one
from streamswav.stream.pieces import Piece
from streamswav.stream.plan import Deal, bytes_left, gather_pieces, remaining
from streamswav.stream.position import Position
from streamswav.stream.samples import LaneReader, name_samples
from streamswav.stream.tar import read_samples


def make_tar(count: int, sizes=lambda number: 100 + 37 * number % 900) -> bytes:
    """A tar of so many samples of these sizes."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for number in range(count):
            member = tarfile.TarInfo(f"{number:05d}.jpg")
            member.size = sizes(number)
            tar.addfile(member, io.BytesIO(bytes(member.size)))
    return buffer.getvalue()


def manifest_of(tars, sources=None) -> Manifest:
    """A manifest of tars in memory; `sources` gives each one's number."""
    sources = sources or [0] * len(tars)
    shards = tuple(
        Shard(f"{number:04d}.tar", f"mem/{number:04d}.tar", len(tar), "", source)
        for number, (tar, source) in enumerate(zip(tars, sources, strict=True))
    )
    return Manifest(shards, (None,) * (max(sources) + 1))


@dataclass
class Simulation:
    """Goes through a stream as the feed does, on ranks and workers that may change at every restart.

    Attributes:
        batches: the global batches so far: sets of (turn, shard, ordinal).
        left: what is left over at the end.
    """

    tars: list[bytes]
    grid: Grid
    manifest: Manifest
    position: Position
    batches: list[frozenset] = field(default_factory=list)

    @staticmethod
    def of(tars, grid, *, seed=0, passes=(1,), sources=None):
        manifest = manifest_of(tars, sources)
        return Simulation(tars, grid, manifest, Position(manifest.digest, grid, seed, tuple(passes)))

    def open(self, piece: Piece):
        data = self.tars[piece.shard]
        return read_samples([data[piece.offset :]], size=len(data), start=piece.offset, ordinal=piece.ordinal)

    def restart(self, ranks: int, workers: int) -> None:
        """Throw away all but the position, and go on with another topology."""
        position = Position.from_json(json.loads(json.dumps(self.position.to_json())))
        fitted = fit_grid(position.grid, self.grid, world_size=ranks, workers=workers)
        self.position = position.on_grid(self.manifest, fitted)

    def run(self, ranks=1, workers=1, *, batches=None) -> None:
        """Go on for so many batches, or to the end."""
        goal = None if batches is None else len(self.batches) + batches
        while not self.position.finished and (goal is None or len(self.batches) < goal):
            plan = self.position.plan(self.manifest)
            first, readers = self.position.batches, {}
            while goal is None or len(self.batches) < goal:
                taken = self._batch(plan, first, ranks, workers, readers)
                if taken is None:
                    self._deal_again(plan)
                    break
                self._commit(taken)

    def _batch(self, plan, first, ranks, workers, readers):
        """The next global batch: every rank's columns, from the worker whose turn it is."""
        number, share, taken = self.position.batches, plan.grid.columns // ranks, []
        worker = (number - first) % workers
        for rank in range(ranks):
            for column in range(rank * share, (rank + 1) * share):
                lane = plan.grid.lane(number % plan.grid.rows, column)
                place = (rank, worker, lane)
                if place not in readers:
                    assert lane not in {other for _, _, other in readers}, "two workers read one lane"
                    readers[place] = LaneReader(plan, lane, self.open, self.position.cursors.get(lane))
                part = list(itertools.islice(readers[place], plan.grid.share))
                if len(part) < plan.grid.share:
                    return None
                taken += part
        return taken

    def _commit(self, taken):
        position = self.position.advance({sample.lane: sample.cursor for sample in taken}, batches=1)
        tallies = []
        for sample in taken:
            shard, each = self.manifest.shards[sample.id.shard], sample.id
            tallies.append(
                (shard.source, tally_one(shard.digest, each.turn, each.ordinal, sample.start, sample.stop))
            )
        self.position = position.count("trained", tallies)
        self.batches.append(frozenset((s.id.turn, s.id.shard, s.id.ordinal) for s in taken))

    def _deal_again(self, plan):
        left, grid = remaining(plan, self.position.cursors), plan.grid
        sizes = [len(tar) for tar in self.tars]
        if self.position.batches and sum(bytes_left(each, sizes) for each in left) > 40_000:
            self.position = self.position.deal_again(gather_pieces(left, turn=plan.turn))
            return
        named, damages = name_samples(left, self.open)
        assert not damages
        if sum(len(piece.named()) for piece in named) >= grid.batch:
            self.position = self.position.deal_again(Deal(pieces=tuple(named), one_by_one=True))
        else:
            self.position = self.position.next_turn(named)

    @property
    def left(self):
        return [
            (piece.turn, piece.shard, ordinal) for piece in self.position.carried for ordinal in piece.named()
        ]
