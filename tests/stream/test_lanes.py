"""Every sample exactly once, whatever the shards, the grid, the topology and the interruptions."""

import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated import Simulation, make_tar, manifest_of

from streamswav.errors import PositionError
from streamswav.stream.grid import Grid, fit_grid
from streamswav.stream.pieces import Piece
from streamswav.stream.plan import Deal, gather_pieces
from streamswav.stream.position import Position

TOPOLOGIES = [(1, 1), (1, 2), (2, 1), (2, 2), (4, 1), (4, 3)]

grids = st.builds(
    lambda share, columns, rows, window: Grid(share * columns, columns, rows, window),
    st.integers(1, 5),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(1, 9),
)
counts = st.lists(st.integers(0, 60), min_size=1, max_size=8)


def whole(counts, turns=1):
    each = [(shard, ordinal) for shard, count in enumerate(counts) for ordinal in range(count)]
    return Counter((turn, *sample) for turn in range(turns) for sample in each)


def seen(run):
    return Counter(sample for batch in run.batches for sample in batch)


@settings(max_examples=60, deadline=None)
@given(
    counts=counts,
    grid=grids,
    seed=st.integers(0, 5),
    starts=st.lists(st.tuples(st.integers(0, 9), st.integers(1, 5), st.integers(1, 4)), max_size=6),
    passes=st.integers(1, 2),
)
def test_every_sample_is_given_exactly_once_or_left_over_on_any_ranks_and_workers(
    counts, grid, seed, starts, passes
):
    run = Simulation.of([make_tar(count) for count in counts], grid, seed=seed, passes=(passes,))
    topology = (1, 1)
    for batches, ranks, workers in starts:
        run.run(*topology, batches=batches)
        if run.position.finished:
            break
        topology = (min(ranks, grid.batch), workers)
        run.restart(*topology)
    run.run(*topology)
    assert seen(run) + Counter(run.left) == whole(counts, passes)
    assert len(run.left) < run.position.grid.batch
    assert run.position.trained == sum(map(len, run.batches))


@settings(max_examples=40, deadline=None)
@given(
    counts=counts,
    share=st.integers(1, 3),
    window=st.integers(1, 9),
    starts=st.lists(st.tuples(st.integers(0, 9), st.sampled_from(TOPOLOGIES)), min_size=1, max_size=6),
)
def test_global_batches_are_the_same_sets_on_all_topologies_that_divide_the_grid(
    counts, share, window, starts
):
    tars, grid = [make_tar(count) for count in counts], Grid(4 * share, 4, 6, window)
    undisturbed, run = Simulation.of(tars, grid), Simulation.of(tars, grid)
    undisturbed.run()
    topology = starts[0][1]
    for batches, following in starts:
        run.run(*topology, batches=batches)
        run.restart(*following)
        topology = following
    run.run(*topology)
    assert run.batches == undisturbed.batches
    assert run.left == undisturbed.left
    assert run.position.to_json() == undisturbed.position.to_json()


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_a_whole_run_has_the_same_batches_on(topology):
    tars, grid = [make_tar(count) for count in (40, 3, 0, 61, 17, 1)], Grid(8, 4, 3 * 2, 5)
    one, other = Simulation.of(tars, grid), Simulation.of(tars, grid)
    one.run()
    other.run(*topology)
    assert one.batches == other.batches


@settings(max_examples=25, deadline=None)
@given(
    counts=st.lists(st.integers(1, 30), min_size=3, max_size=8),
    passes=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    grid=grids,
)
def test_every_source_has_its_number_of_passes(counts, passes, grid):
    sources = [number % len(passes) for number in range(len(counts))]
    run = Simulation.of([make_tar(n) for n in counts], grid, passes=passes, sources=sources)
    run.run()
    times = Counter((shard, n) for _, shard, n in seen(run).elements())
    times += Counter((shard, n) for _, shard, n in run.left)
    expected = {
        (shard, n): passes[sources[shard]] for shard, count in enumerate(counts) for n in range(count)
    }
    assert times == expected
    assert set((seen(run) + Counter(run.left)).values()) <= {1}
    by_source = [tally.samples for tally in run.position.tallies.get("trained", [])]
    assert sum(by_source) == sum(map(len, run.batches))


def test_a_source_of_fewer_passes_is_spread_over_the_run():
    manifest = manifest_of([b"x" * 10] * 300, sources=[n % 2 for n in range(300)])
    turns = [manifest.of_turn(turn, (1, 3), seed=0, covered=300) for turn in range(3)]
    mixture = [sum(shard % 2 == 0 for shard in turn) for turn in turns]
    assert sum(mixture) == 150
    assert min(mixture) > 30
    assert all(sum(shard % 2 for shard in turn) == 150 for turn in turns)


def test_another_pass_and_another_seed_come_in_another_order():
    manifest, grid = manifest_of([b"x" * 1000] * 40), Grid(8, 2, 2, 16)
    orders = {
        Position(manifest.digest, grid, seed, (2,), turn=turn).plan(manifest).lanes[0][:5]
        for seed, turn in [(0, 0), (1, 0), (0, 1)]
    }
    assert len({tuple(piece.shard for piece in order) for order in orders}) == 3


def test_lanes_are_balanced_by_bytes():
    manifest = manifest_of([b"x" * 10 * (1 + index % 7) for index in range(200)])
    plan = Position(manifest.digest, Grid(16, 4, 2, 16), 0).plan(manifest)
    loads = [sum(manifest.shards[piece.shard].size for piece in lane) for lane in plan.lanes]
    assert max(loads) - min(loads) <= 70


def test_the_position_stays_small_however_far_the_run_is():
    run, sizes = Simulation.of([make_tar(50) for _ in range(12)], Grid(4, 2, 1, 16)), []
    for _ in range(100):
        run.run(batches=1)
        sizes.append(len(json.dumps(run.position.to_json())))
    assert max(sizes[50:]) <= max(sizes[:50]) + 20


def test_a_new_deal_of_many_untouched_shards_takes_a_bit_each():
    dealt = gather_pieces([Piece(shard, 0) for shard in range(0, 8000, 2)], turn=0)
    assert len(json.dumps(dealt.to_json())) < 2100
    assert Deal.from_json(json.loads(json.dumps(dealt.to_json()))) == dealt


def test_ranks_that_do_not_divide_the_grid_get_the_largest_batch_that_they_can_share():
    begun = Grid(4096, 64, 12, 128)
    fitted = fit_grid(begun, begun, world_size=3, workers=5)
    assert fitted == Grid(4095, 63, 10, 128)
    assert fit_grid(fitted, begun, world_size=9, workers=2) == fitted
    assert fit_grid(fitted, begun, world_size=8, workers=4) == begun


def test_more_ranks_than_samples_in_a_batch_are_refused():
    grid = Grid(16, 4, 1, 8)
    with pytest.raises(PositionError, match="17 ranks cannot share the run's global batch of 16 samples"):
        fit_grid(grid, grid, world_size=17, workers=1)
