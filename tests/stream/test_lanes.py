"""Every sample exactly once, whatever the shards, the grid, the topology and the interruptions."""

import io
import itertools
import json
import tarfile
from collections import Counter
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from streamswav.stream.plan import (
    Grid,
    Piece,
    bytes_left,
    deal,
    deal_samples,
    first_deal,
    remaining,
    split_pieces,
)
from streamswav.stream.position import Position
from streamswav.stream.samples import LaneReader, name_samples
from streamswav.stream.tar import read_samples


def make_tar(count: int) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for number in range(count):
            member = tarfile.TarInfo(f"{number:05d}.jpg")
            data = bytes(100 + 37 * number % 900)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def opener(tars: list[bytes]):
    def open_piece(piece: Piece):
        data = tars[piece.shard]
        return read_samples([data[piece.offset :]], size=len(data), start=piece.offset, ordinal=piece.ordinal)

    return open_piece


def take_batch(plan, number, readers, open_piece, cursors):
    """One global batch, or None where a lane cannot fill its share."""
    taken = []
    for column in range(plan.grid.columns):
        lane = plan.grid.lane(number % plan.grid.rows, column)
        reader = readers.setdefault(lane, LaneReader(plan, lane, open_piece, cursors.get(lane)))
        share = list(itertools.islice(reader, plan.grid.share))
        if len(share) < plan.grid.share:
            return None
        taken += share
    return taken


def run_pass(tars, grid, seed, stops, *, restart=True):
    """Read a whole pass as the feed does; after each of `stops` batches through JSON, with fresh readers."""
    open_piece = opener(tars)
    sizes = [len(tar) for tar in tars]
    plan = first_deal(sizes, [], grid=grid, seed=seed, turn=0)
    cursors, batches, number, readers = {}, [], 0, {}
    while True:
        if restart and len(batches) in stops:
            position = Position(
                "m", grid, seed, cursors=cursors, lanes=plan.lanes, generation=plan.generation
            )
            position = Position.from_json(json.loads(json.dumps(position.to_json())))
            plan, cursors, readers = replace(plan, lanes=position.lanes), dict(position.cursors), {}
        batch = take_batch(plan, number, readers, open_piece, cursors)
        if batch is not None:
            for sample in batch:
                cursors[sample.lane] = sample.cursor
            batches.append([(s.id.shard, s.id.ordinal) for s in batch])
            number += 1
            continue
        left = remaining(plan, cursors)
        order = {"grid": grid, "seed": seed, "turn": 0, "generation": plan.generation + 1}
        if number and sum(bytes_left(piece, sizes) for piece in left) > 40_000:
            pieces, piece_sizes = split_pieces(left, sizes, lanes=grid.lanes)
            plan = deal(pieces, piece_sizes, **order)
        else:
            named, damages = name_samples(left, open_piece)
            assert not damages
            rest = [(piece.shard, ordinal) for piece in named for ordinal in piece.named()]
            if len(rest) < grid.batch:
                return batches, rest
            plan = deal_samples(named, **order)
        cursors, number, readers = {}, 0, {}


grids = st.builds(
    lambda share, columns, rows, window: Grid(share * columns, columns, rows, window),
    st.integers(1, 5),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(1, 9),
)


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(0, 60), min_size=1, max_size=8),
    grid=grids,
    seed=st.integers(0, 5),
    stops=st.sets(st.integers(0, 40), max_size=8),
)
def test_every_sample_is_given_exactly_once_or_left_over(counts, grid, seed, stops):
    tars = [make_tar(count) for count in counts]
    batches, rest = run_pass(tars, grid, seed, stops)
    seen = Counter(sample for batch in batches for sample in batch) + Counter(rest)
    assert seen == Counter((shard, n) for shard, count in enumerate(counts) for n in range(count))
    assert len(rest) < grid.batch


@settings(max_examples=30, deadline=None)
@given(
    counts=st.lists(st.integers(0, 60), min_size=1, max_size=6),
    grid=grids,
    stops=st.sets(st.integers(0, 40), min_size=1, max_size=8),
)
def test_interruptions_do_not_change_what_comes_next(counts, grid, stops):
    tars = [make_tar(count) for count in counts]
    assert run_pass(tars, grid, 0, stops) == run_pass(tars, grid, 0, stops, restart=False)


def test_another_pass_and_another_seed_come_in_another_order():
    sizes = [1000] * 40
    grid = Grid(8, 2, 2, 16)
    orders = {
        first_deal(sizes, [], grid=grid, seed=seed, turn=turn).lanes[0][:5]
        for seed, turn in [(0, 0), (1, 0), (0, 1)]
    }
    firsts = {tuple(piece.shard for piece in order) for order in orders}
    assert len(firsts) == 3


def test_lanes_are_balanced_by_bytes():
    sizes = [10_000 * (1 + index % 7) for index in range(200)]
    plan = first_deal(sizes, [], grid=Grid(16, 4, 2, 16), seed=0, turn=0)
    loads = [sum(sizes[piece.shard] for piece in lane) for lane in plan.lanes]
    assert max(loads) - min(loads) <= max(sizes)


def test_the_position_stays_small_however_far_the_run_is():
    tars = [make_tar(50) for _ in range(12)]
    grid = Grid(4, 2, 1, 16)
    plan = first_deal([len(tar) for tar in tars], [], grid=grid, seed=0, turn=0)
    cursors, readers, sizes = {}, {}, []
    for number in range(100):
        for sample in take_batch(plan, number, readers, opener(tars), cursors):
            cursors[sample.lane] = sample.cursor
        sizes.append(len(json.dumps(Position("m", grid, 0, batches=number, cursors=cursors).to_json())))
    assert max(sizes[50:]) <= max(sizes[:50]) + 20
