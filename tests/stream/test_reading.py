"""How lanes are read: side by side where they open, within a bounded memory, and always in one order."""

import time

import pytest

from streamswav.config import CropsSection, StorageSection
from streamswav.crops import MultiCrop
from streamswav.loader import LaneBatches
from streamswav.stream.manifest import list_manifest
from streamswav.stream.plan import Grid
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
    web.faults.extend([("hang", 0.4)] * 6)
    began = time.monotonic()
    batches = LaneBatches(plan, {}, 0, range(6), manifest, reader, Selection.none(), crop)
    batch = next(iter(batches))
    assert time.monotonic() - began < 3 * 0.4
    assert not web.faults
    assert len(batch.ids) == 6


@pytest.mark.parametrize(
    ("lanes", "size"), [(1, 4 * MiB), (128, 4 * MiB), (256, 2 * MiB), (512, MiB), (10**6, MiB // 4)]
)
def test_blocks_shrink_with_the_lanes_to_the_memory_of_a_worker(make_shards, tmp_path, lanes, size):
    make_shards(tmp_path, counts=[1])
    manifest = list_manifest([str(tmp_path)], Store())
    reader = ShardReader(manifest, StorageSection(), read_ahead=2, memory=2048 * MiB)
    assert reader.share_among(lanes) == size
    assert ShardReader(manifest, StorageSection(block_bytes=1000), read_ahead=2).share_among(lanes) == 1000


def test_neither_memory_nor_requests_change_the_order(make_shards, tmp_path):
    make_shards(tmp_path, counts=[9, 7, 8], image=lambda number: bytes([number]) * 150_000)
    manifest = list_manifest([str(tmp_path)], Store())
    plan = plan_of(manifest, Grid(batch=2, columns=2, rows=2, window=4))

    def read(*, begin, **limits):
        reader = ShardReader(manifest, StorageSection(), read_ahead=2, **limits)
        reader.share_among(plan.grid.lanes)
        lanes = [LaneReader(plan, lane, reader.open) for lane in range(plan.grid.lanes)]
        for lane in lanes:
            if begin and (piece := lane.next_piece):
                reader.begin(piece)
        return [[(sample.id, sample.image, sample.cursor) for sample in lane] for lane in lanes]

    expected = read(begin=False)
    assert sum(map(len, expected)) == 24
    assert read(begin=True) == expected
    assert read(begin=True, memory=1, requests=1) == expected
