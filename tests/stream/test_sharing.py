"""Lanes of one process that stride a shard fetch and parse it once, and get what each would get alone."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamswav.config import StorageSection
from streamswav.stream.grid import Grid
from streamswav.stream.manifest import list_manifest
from streamswav.stream.outcomes import PassedOver
from streamswav.stream.pieces import Piece
from streamswav.stream.plan import Plan
from streamswav.stream.reader import ShardReader
from streamswav.stream.samples import LaneReader
from streamswav.stream.store import Store

MiB = 1 << 20
AMPLE, TIGHT = 2048 * MiB, 4 * MiB
LANES = 4


def shards_of(make_shards, folder, size):
    """Two shards of 90 samples with a damaged header in the first."""
    paths = make_shards(folder, counts=[90, 90], image=lambda number: bytes([number]) * (size + number))
    data = bytearray(paths[0].read_bytes())
    data[data.index(b"0_31.cls") + 148] ^= 1
    paths[0].write_bytes(data)
    return paths


@pytest.fixture(scope="module", params=[60_000, 9_000], ids=["large", "small"])
def shards(request, make_shards, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    shards_of(make_shards, folder, request.param)
    return list_manifest([str(folder)], Store())


def plan_of(window=16, orders=((0, 1), (0, 1), (1, 0), (0, 1))):
    """Four lanes, each with every fourth sample of two shards."""
    lanes = tuple(
        tuple(Piece(shard, 0, stride=LANES, residue=lane) for shard in order)
        for lane, order in enumerate(orders)
    )
    return Plan(Grid(LANES, LANES, 1, window), 0, 0, 0, lanes)


def open_lanes(manifest, plan, memory, cursors=(None,) * LANES, *, shared=True):
    storage = StorageSection(block_bytes=200_000, deadline_seconds=2)
    reader = ShardReader(manifest, storage, read_ahead=2, requests=2, memory=memory)
    reader.share_among(LANES, plan.grid.window)
    shelf = reader.shelf if shared else None
    lanes = [LaneReader(plan, lane, reader.open, cursors[lane], shelf=shelf) for lane in range(LANES)]
    for lane in lanes:
        if piece := lane.next_piece:
            reader.begin(piece)
    return reader, lanes


def read_in_turns(lanes, turns=10**6):
    given = [[] for _ in lanes]
    for _ in range(turns):
        taken = [(number, each) for number, lane in enumerate(lanes) for each in itertools.islice(lane, 1)]
        if not taken:
            break
        for number, each in taken:
            given[number].append((each.id, each.key, each.start, each.stop, each.members, each.cursor))
    return given


@pytest.mark.parametrize("memory", [AMPLE, TIGHT, 3 * MiB])
def test_lanes_that_share_a_shard_give_what_each_gives_alone(shards, memory):
    _, alone = open_lanes(shards, plan_of(), AMPLE, shared=False)
    reader, together = open_lanes(shards, plan_of(), memory)
    expected, given = read_in_turns(alone), read_in_turns(together)
    assert sum(map(len, expected)) == 180
    assert given == expected
    assert [lane.take_damages() for lane in together] == [lane.take_damages() for lane in alone]
    assert reader.shelf.used == 0


@settings(max_examples=15, deadline=None)
@given(turns=st.integers(0, 45), window=st.integers(1, 40), memory=st.sampled_from([AMPLE, TIGHT]))
def test_lanes_go_on_together_from_wherever_each_is(shards, turns, window, memory):
    plan = plan_of(window)
    expected = read_in_turns(open_lanes(shards, plan, AMPLE, shared=False)[1])
    _, lanes = open_lanes(shards, plan, memory)
    first = read_in_turns(lanes, turns)
    _, lanes = open_lanes(shards, plan, memory, [lane.cursor for lane in lanes])
    rest = read_in_turns(lanes)
    assert [one + other for one, other in zip(first, rest, strict=True)] == expected


def bytes_asked(web):
    spans = (span.removeprefix("bytes=").split("-") for _, _, span in web.requests if span)
    return sum(int(last) + 1 - int(first) for first, last in spans)


@pytest.mark.parametrize(("memory", "most"), [(AMPLE, 1.0), (TIGHT, 2.0)], ids=["ample", "tight"])
def test_a_shard_that_all_lanes_stride_is_fetched_once(make_shards, web, memory, most):
    paths = shards_of(make_shards, web.folder, 60_000)
    manifest = list_manifest([f"{web.url}/{path.name}" for path in paths], Store())
    read_in_turns(open_lanes(manifest, plan_of(orders=((0, 1),) * LANES), memory)[1])
    assert 1.0 <= bytes_asked(web) / manifest.size <= most


def test_every_lane_hears_of_a_shared_shard_that_is_lost(make_shards, web):
    paths = shards_of(make_shards, web.folder, 60_000)
    manifest = list_manifest([f"{web.url}/{path.name}" for path in paths], Store())
    _, lanes = open_lanes(manifest, plan_of(window=2, orders=((0, 1),) * LANES), AMPLE)
    first = read_in_turns(lanes, 1)
    paths[0].unlink()
    rest = read_in_turns(lanes)
    assert sum(each[0].shard == 1 for given in rest for each in given) == 90
    read = [each for given in (*first, *rest) for each in given if each[0].shard == 0]
    assert 4 <= len(read) < 60
    lost = {each for lane in lanes for each in lane.take_damages() if each.reason == "missing_shard"}
    (damage,) = lost
    assert damage == PassedOver(0, 0, "missing_shard", damage.start, manifest.shards[0].size)
    assert damage.start >= max(each[3] for each in read)
