"""How lanes are read: side by side where they open, within a bounded memory, and always in one order."""

import time
from pathlib import Path

import pytest

from shards.cli import main
from streamswav.config import CropsSection, StorageSection
from streamswav.crops import MultiCrop
from streamswav.errors import UnavailableError
from streamswav.loader import LaneBatches
from streamswav.stream.grid import Grid
from streamswav.stream.manifest import list_manifest
from streamswav.stream.outcomes import PassedOver
from streamswav.stream.pieces import Cursor, Piece
from streamswav.stream.plan import Plan
from streamswav.stream.position import Position
from streamswav.stream.reader import ShardReader
from streamswav.stream.samples import LaneReader
from streamswav.stream.select import Selection
from streamswav.stream.store import Store

MiB = 1 << 20


def plan_of(manifest, grid):
    return Position(manifest.digest, grid, 0).plan(manifest)


def test_the_lanes_of_a_row_wait_for_their_first_bytes_together(make_shards, web):
    paths = make_shards(web.folder, counts=[3] * 6)
    storage = StorageSection()
    manifest = list_manifest([f"{web.url}/{path.name}" for path in paths], Store(storage))
    plan = plan_of(manifest, Grid(batch=6, columns=6, rows=1, window=2))
    crop = MultiCrop(CropsSection(sizes=[8], counts=[2], scales=[(0.3, 1.0)]), seed=0)
    reader = ShardReader(manifest, storage, read_ahead=1, requests=6)
    web.faults.extend([("hang", 1.0)] * 6)
    began = time.monotonic()
    batches = LaneBatches(plan, {}, 0, range(6), manifest, reader, Selection.none(), crop)
    batch = next(iter(batches))
    assert time.monotonic() - began < 3 * 1.0
    assert not web.faults
    assert len(batch.ids) == 6


@pytest.mark.parametrize(("lanes", "size"), [(1, 4 * MiB), (32, 4 * MiB), (256, 784_000), (8000, 75_500)])
def test_blocks_shrink_with_the_lanes_to_the_memory_of_a_worker(make_shards, tmp_path, lanes, size):
    make_shards(tmp_path, counts=[1])
    manifest = list_manifest([str(tmp_path)], Store())
    reader = ShardReader(manifest, StorageSection(), read_ahead=2, memory=2048 * MiB)
    assert reader.share_among(lanes, window=16) == pytest.approx(size, rel=0.1)
    small = ShardReader(manifest, StorageSection(block_bytes=1000), read_ahead=2)
    assert small.share_among(lanes, window=16) == 1000


def test_neither_requests_nor_what_was_begun_change_the_order(make_shards, tmp_path):
    make_shards(tmp_path, counts=[9, 7, 8], image=lambda number: bytes([number]) * 150_000)
    manifest = list_manifest([str(tmp_path)], Store())
    plan = plan_of(manifest, Grid(batch=2, columns=2, rows=2, window=4))

    def read(*, begin, requests=8, read_ahead=2):
        reader = ShardReader(manifest, StorageSection(), read_ahead=read_ahead, requests=requests)
        reader.share_among(plan.grid.lanes)
        lanes = [LaneReader(plan, lane, reader.open) for lane in range(plan.grid.lanes)]
        for lane in lanes:
            if begin and (piece := lane.next_piece):
                reader.begin(piece)
        return [[(sample.id, sample.image, sample.cursor) for sample in lane] for lane in lanes]

    expected = read(begin=False)
    assert sum(map(len, expected)) == 24
    assert read(begin=True) == expected
    assert read(begin=True, requests=1, read_ahead=0) == expected


@pytest.fixture
def two_shards(make_shards, web):
    """Two shards of 8 samples of 20 kB on a web server, and the manifest."""
    paths = make_shards(web.folder, counts=[8, 8], image=lambda number: bytes([number]) * 20_000)
    return paths, list_manifest([f"{web.url}/{path.name}" for path in paths], Store())


def one_lane(manifest, *, window, cursor=None, memory=2048 * MiB):
    """A lane that reads the first shard, then the second."""
    storage = StorageSection(block_bytes=30_000, deadline_seconds=2)
    reader = ShardReader(manifest, storage, read_ahead=1, requests=2, memory=memory)
    reader.share_among(1, window)
    plan = Plan(Grid(1, 1, 1, window), 0, 0, 0, ((Piece(0, 0), Piece(1, 0)),))
    return LaneReader(plan, 0, reader.open, cursor, shelf=reader.shelf)


def places(samples):
    return [(sample.id.shard, sample.id.ordinal) for sample in samples]


def whole(shard, count=8):
    return [(shard, ordinal) for ordinal in range(count)]


def test_a_shard_that_is_gone_is_one_damage_and_the_next_is_read(two_shards):
    paths, manifest = two_shards
    paths[0].unlink()
    lane = one_lane(manifest, window=4)
    assert sorted(places(lane)) == whole(1)
    assert lane.take_damages() == [PassedOver(0, 0, "missing_shard", 0, manifest.shards[0].size)]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (Path.unlink, "missing_shard"),
        (lambda path: path.write_bytes(path.read_bytes()), "changed_shard"),
        (lambda path: path.write_bytes(path.read_bytes()[:100_000]), "changed_shard"),
        (lambda path: path.write_bytes(b""), "changed_shard"),
    ],
    ids=["gone", "written again", "cut", "emptied"],
)
def test_a_shard_lost_in_the_middle_ends_after_the_last_sample_that_was_read(two_shards, change, reason):
    paths, manifest = two_shards
    lane = one_lane(manifest, window=2)
    first = [next(lane), next(lane)]
    change(paths[0])
    rest = list(lane)
    (damage,) = lane.take_damages()
    read = [sample for sample in (*first, *rest) if sample.id.shard == 0]
    assert 2 <= len(read) < 8
    assert sorted(places(read)) == whole(0, len(read))
    assert sorted(places(rest)[-8:]) == whole(1)
    assert (damage.shard, damage.reason) == (0, reason)
    assert (damage.start, damage.stop) == (max(each.stop for each in read), manifest.shards[0].size)


def test_a_shard_lost_after_a_restart_costs_no_other_sample(two_shards):
    paths, manifest = two_shards
    lane = one_lane(manifest, window=12)
    first = [next(lane) for _ in range(5)]
    paths[0].unlink()
    again = one_lane(manifest, window=12, cursor=first[-1].cursor)
    rest = list(again)
    assert {each.reason for each in again.take_damages()} == {"missing_shard"}
    both = [place for place in places([*first, *rest]) if place[0] == 1]
    assert sorted(both) == whole(1)


def test_storage_that_does_not_answer_is_no_reason_to_pass_over_a_shard(two_shards, web):
    _, manifest = two_shards
    lane = one_lane(manifest, window=2)
    next(lane)
    web.faults.extend([500] * 100)
    with pytest.raises(UnavailableError):
        list(lane)
    assert lane.take_damages() == []


@pytest.mark.parametrize(("window", "memory"), [(3, 2048 * MiB), (24, 600_000)], ids=["ahead", "read again"])
def test_a_redacted_shard_is_read_on_and_the_others_stay(make_shards, tmp_path, window, memory):
    make_shards(tmp_path, counts=[24, 2], image=lambda number: bytes([number]) * 20_000)
    manifest = list_manifest([str(tmp_path)], Store())
    expected = list(one_lane(manifest, window=window))
    late = [each.id.ordinal for each in expected if each.id.shard == 0 and each.id.ordinal > 15][-1]
    lane = one_lane(manifest, window=window, memory=memory)
    first = [next(lane) for _ in range(3)]
    assert main(["redact", str(tmp_path), "--key", f"0_{late}"]) == 0
    given = [*first, *lane]
    assert places(given) == places(expected)
    assert [each.cursor for each in given] == [each.cursor for each in expected]
    assert lane.take_damages() == []
    (gone,) = (each for each in given if "tombstone" in each.members)
    assert (gone.id.ordinal, gone.key) == (late, f"redacted-{late:08}")
    kept = [(each.id, each.members) for each in given if each is not gone]
    assert kept == [(each.id, each.members) for each in expected if each.id != gone.id]


def test_samples_that_were_to_be_read_again_are_named_when_their_shard_goes(two_shards):
    paths, manifest = two_shards
    lane = one_lane(manifest, window=16, memory=600_000)
    first = next(lane)
    paths[1].unlink()
    rest = list(lane)
    lost = lane.take_damages()
    assert lost
    assert {(each.shard, each.reason, each.outcome) for each in lost} == {(1, "missing_shard", "quarantined")}
    given = [*places([first, *rest]), *((each.shard, each.ordinal) for each in lost)]
    assert sorted(given) == whole(0) + whole(1)
    assert lane.cursor == Cursor(1, lane.cursor.offset, 8, 1)
