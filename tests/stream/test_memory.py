"""Blocks and windows of a worker stay within `stream.memory`; the order never follows from it."""

import itertools
import json
import re
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamswav.config import CropsSection, StorageSection
from streamswav.crops import MultiCrop
from streamswav.errors import ConfigError
from streamswav.loader import LaneBatches
from streamswav.processes import Failed
from streamswav.stream.grid import Grid
from streamswav.stream.manifest import list_manifest
from streamswav.stream.memory import share_memory
from streamswav.stream.position import Position
from streamswav.stream.reader import ShardReader
from streamswav.stream.samples import LaneReader, name_samples
from streamswav.stream.select import Selection
from streamswav.stream.store import Store

KiB, MiB = 1 << 10, 1 << 20
AMPLE = 2048 * MiB


@settings(max_examples=200, deadline=None)
@given(
    memory=st.integers(1 * MiB, 4096 * MiB),
    lanes=st.integers(1, 3000),
    window=st.integers(1, 512),
    block=st.integers(1, 8 * MiB),
    read_ahead=st.integers(1, 4),
    requests=st.integers(1, 32),
)
def test_the_shares_of_a_budget_never_exceed_it(memory, lanes, window, block, read_ahead, requests):
    settings = {"lanes": lanes, "window": window, "block": block, "read_ahead": read_ahead}
    try:
        shares = share_memory(memory, **settings, requests=requests)
    except ConfigError as error:
        assert error.key == "stream.memory"
        needed = int(re.search(r"needs (\d+) bytes", str(error))[1])
        assert needed > memory
        assert share_memory(needed, **settings, requests=requests).read_ahead == 0
        return
    assert min(block, 64 * KiB) <= shares.block <= block
    assert 0 <= shares.read_ahead <= read_ahead
    blocks = shares.block * (lanes * (shares.read_ahead + 1) + requests)
    assert blocks + shares.held + shares.ahead + 3 * shares.largest + 128 * lanes * window <= memory


@pytest.fixture(scope="module")
def shards(make_shards, tmp_path_factory):
    """Samples of 5 to 25 kB; sample 7 of the second shard has a damaged header."""
    folder = tmp_path_factory.mktemp("shards")
    paths = make_shards(
        folder,
        counts=[60, 45, 70, 31],
        image=lambda number: bytes([number % 256]) * (5000 + number * 997 % 20_000),
    )
    data = bytearray(paths[1].read_bytes())
    data[data.index(b"1_7.cls") + 148] ^= 1
    paths[1].write_bytes(data)
    return list_manifest([str(folder)], Store())


def plan_of(manifest, grid):
    return Position(manifest.digest, grid, seed=1).plan(manifest)


def open_lanes(manifest, plan, memory, cursors=None):
    reader = ShardReader(
        manifest, StorageSection(block_bytes=128 * KiB), read_ahead=2, requests=2, memory=memory
    )
    reader.share_among(plan.grid.lanes, plan.grid.window)
    lanes = [
        LaneReader(plan, lane, reader.open, (cursors or {}).get(lane), shelf=reader.shelf)
        for lane in range(plan.grid.lanes)
    ]
    return reader, lanes


def read_in_turns(lanes, share, turns=10**6):
    """What the lanes give, `share` samples in turn, and what they pass over."""
    given = []
    for _ in range(turns):
        taken = [each for lane in lanes for each in itertools.islice(lane, share)]
        if not taken:
            break
        given += [(each.lane, each.id, each.key, each.members, each.cursor) for each in taken]
    return given, [lane.take_damages() for lane in lanes]


GRIDS = [Grid(8, 4, 1, 32), Grid(6, 2, 3, 16), Grid(2, 2, 1, 100)]


@pytest.mark.parametrize("grid", GRIDS)
def test_order_cursors_and_damages_are_the_same_whatever_the_budget(shards, grid):
    plan = plan_of(shards, grid)
    expected = read_in_turns(open_lanes(shards, plan, AMPLE)[1], grid.share)
    assert len(expected[0]) == 60 + 45 + 70 + 31
    assert any(expected[1])
    reader, lanes = open_lanes(shards, plan, 3 * MiB)
    assert read_in_turns(lanes, grid.share) == expected
    assert reader.shelf.read_again > 0


def test_a_lane_goes_on_within_its_window_with_another_budget(shards):
    grid = Grid(2, 2, 1, 64)
    plan = plan_of(shards, grid)
    whole, damages = read_in_turns(open_lanes(shards, plan, AMPLE)[1], 1)
    _, lanes = open_lanes(shards, plan, 3 * MiB)
    first, met = read_in_turns(lanes, 1, turns=41)
    reader, lanes = open_lanes(shards, plan, 2 * MiB, {lane: each.cursor for lane, each in enumerate(lanes)})
    rest, later = read_in_turns(lanes, 1)
    assert first + rest == whole
    assert [{*one, *other} for one, other in zip(met, later, strict=True)] == [set(each) for each in damages]
    assert reader.shelf.read_again > 0


@pytest.mark.parametrize("memory", [2 * MiB, 3 * MiB, 6 * MiB])
def test_windows_hold_no_more_than_their_share_and_give_it_back(shards, memory):
    grid = Grid(4, 4, 1, 128)
    reader, lanes = open_lanes(shards, plan_of(shards, grid), memory)
    shares = share_memory(memory, lanes=4, window=128, block=128 * KiB, read_ahead=2, requests=2)
    assert shares.held < sum(shard.size for shard in shards.shards)
    read_in_turns(lanes, 1)
    assert shares.held * 0.9 < reader.shelf.peak < shares.held + shares.ahead + shares.largest
    assert reader.shelf.used == 0


def test_what_a_lane_needs_in_its_turn_is_asked_for_together(shards):
    reader, (lane,) = open_lanes(shards, plan_of(shards, Grid(1, 1, 1, 150)), 2 * MiB)
    next(lane)
    used = reader.shelf.used
    lane.ask(8)
    assert reader.shelf.used > used + 3 * 5000
    expected = itertools.islice(open_lanes(shards, plan_of(shards, Grid(1, 1, 1, 150)), AMPLE)[1][0], 1, None)
    assert [sample.members for sample in lane] == [sample.members for sample in expected]
    assert reader.shelf.used == 0


def test_between_two_windows_a_lane_holds_blocks_and_no_sample(make_shards, tmp_path):
    make_shards(tmp_path, counts=[6], image=lambda number: bytes([number]) * 4 * MiB)
    manifest = list_manifest([str(tmp_path)], Store())
    _, (lane,) = open_lanes(manifest, plan_of(manifest, Grid(1, 1, 1, 2)), AMPLE)
    tracemalloc.start()
    try:
        for _ in range(2):
            assert next(lane).image is not None
            assert next(lane).image is not None
            assert tracemalloc.get_traced_memory()[0] < 5 * 128 * KiB
    finally:
        tracemalloc.stop()


def test_a_sample_that_is_too_large_is_named_and_passed_over_unbuffered(make_shards, tmp_path):
    sizes = [2000, 3000, 40 * MiB, 3000, 2000, 1000]
    make_shards(tmp_path, counts=[6], image=lambda number: bytes([number]) * sizes[number])
    manifest = list_manifest([str(tmp_path)], Store())
    plan = plan_of(manifest, Grid(1, 1, 1, 3))
    expected, _ = read_in_turns(open_lanes(manifest, plan, AMPLE)[1], 1)
    _, lanes = open_lanes(manifest, plan, 16 * MiB)
    tracemalloc.start()
    try:
        given, [(passed,)] = read_in_turns(lanes, 1)
        assert tracemalloc.get_traced_memory()[1] < 2 * MiB
    finally:
        tracemalloc.stop()
    assert given == [each for each in expected if each[1].ordinal != 2]
    assert (passed.key, passed.ordinal, passed.reason, passed.outcome) == (
        "0_2",
        2,
        "too_large",
        "quarantined",
    )
    assert passed.stop - passed.start > 40 * MiB
    reader, _ = open_lanes(manifest, plan, 16 * MiB)
    named, found = name_samples(plan.lanes[0], reader.open)
    assert found == [passed]
    assert [ordinal for piece in named for ordinal in piece.named()] == [0, 1, 3, 4, 5]


def batches_of(manifest, memory, *, window=64):
    reader = ShardReader(manifest, StorageSection(), read_ahead=2, memory=memory)
    crop = MultiCrop(CropsSection(sizes=[8], counts=[2], scales=[(0.3, 1.0)]), seed=0)
    plan = plan_of(manifest, Grid(8, 4, 2, window))
    return reader, list(LaneBatches(plan, {}, 0, range(4), manifest, reader, Selection.none(), crop))


def test_batches_are_the_same_whatever_the_budget(make_shards, tmp_path):
    make_shards(tmp_path, counts=[120, 130], image=(240, 180))
    manifest = list_manifest([str(tmp_path)], Store())
    ample, expected = batches_of(manifest, AMPLE)
    short, given = batches_of(manifest, 4 * MiB)
    assert ample.shelf.read_again == 0 < short.shelf.read_again
    assert len(given) == len(expected) > 20
    for one, other in zip(given[:-1], expected[:-1], strict=True):
        assert (one.ids, one.keys, one.cursors) == (other.ids, other.keys, other.cursors)
        assert all(mine.equal(theirs) for mine, theirs in zip(one.pixels, other.pixels, strict=True))


def test_a_budget_that_cannot_do_is_refused_before_anything_is_read(shards):
    reader, (failed,) = batches_of(shards, 2_400_000, window=1000)
    assert isinstance(failed, Failed)
    assert isinstance(failed.error, ConfigError)
    assert "stream.memory = 2400000: a worker needs" in str(failed.error)
    assert "8 lanes and windows of 1000 samples" in str(failed.error)
    assert reader.fetch_seconds == 0
    with pytest.raises(ConfigError, match=r"stream\.memory = 1000: a worker needs"):
        ShardReader(shards, StorageSection(), read_ahead=2, memory=1000)


def test_the_memory_of_a_loader_process_stays_within_the_budget(tmp_path):
    script, result = Path(__file__).parents[2] / "ops/benchmarks/memory.py", tmp_path / "memory.json"
    sizes = ["--lanes", "48", "--budget", str(96 * MiB), "--window", "64", "--size", "50000"]
    command = [sys.executable, script, *sizes, "--json", result]
    ended = subprocess.run(command, check=False, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    (row,) = json.loads(result.read_text())["results"]
    assert row["samples"] == 48 * 128
    assert row["held_at_most"] < row["peak_over_base"] < 96 * MiB
    assert row["read"] > 1
