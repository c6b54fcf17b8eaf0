"""What is ahead of a stream, beside the count of what is really left."""

import dataclasses

import pytest

from streamswav.stream.grid import Grid
from streamswav.stream.manifest import list_manifest
from streamswav.stream.open import open_stream
from streamswav.stream.pieces import Cursor, Piece
from streamswav.stream.plan import Plan
from streamswav.stream.store import Store
from streamswav.training.outlook import LaneBytes, look_ahead

GRID = Grid(batch=2, columns=2, rows=1, window=4)
SIZES = [1000, 600, 400]


def plan(*lanes):
    return Plan(GRID, 0, 0, 0, tuple(lanes))


def test_lanes_hold_what_is_beyond_their_cursors():
    lanes = LaneBytes(
        plan((Piece(0, 0), Piece(2, 0)), (Piece(1, 0, stride=2), Piece(0, 0, offset=800))), SIZES
    )
    assert lanes.left({}) == [1400, 300 + 200]
    assert lanes.left({0: Cursor(1, offset=100), 1: Cursor(0, offset=400)}) == [300, 100 + 200]
    assert lanes.left({0: Cursor(2)})[0] == 0


def test_lanes_that_were_dealt_to_end_together_have_no_lag():
    assert LaneBytes(plan((Piece(0, 0, done=~0b11),), ()), SIZES).left({}) == []


@pytest.mark.parametrize("known", [True, False])
def test_the_samples_left_are_told_by_count_or_by_bytes(make_shards, tmp_path, known):
    make_shards(tmp_path, counts=[30, 30, 30, 30], image=(200, 160))
    manifest = list_manifest([str(tmp_path)], Store())
    total = manifest.total_bytes((1,))
    if known:
        manifest = dataclasses.replace(manifest, counts=(120,))
    stream = open_stream([str(tmp_path)], seed=0)
    for _ in range(45):
        next(stream)
    outlook = look_ahead(stream.position, manifest, run_bytes=total, lanes=None)
    assert outlook.samples == pytest.approx(75, abs=0 if known else 5)
    assert outlook.lags == []
