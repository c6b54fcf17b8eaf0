"""The account of a run: outcomes that tile every shard, digests that add up, lists that are held to it."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated import Simulation, make_tar, manifest_of

from streamswav.stream.account import LEFT, Claims, Range, account_for, begun_parts, list_left
from streamswav.stream.grid import Grid
from streamswav.stream.listed import SideLists
from streamswav.stream.outcomes import PassedOver, Tally, sample_digest, tally_one
from streamswav.stream.pieces import Piece, by_part
from streamswav.stream.tar import Damage, read_samples

DIVIDING = [(1, 1), (1, 2), (2, 1), (2, 3), (4, 2)]


def recount(run):
    """Tallies by outcome over all that a simulated run has begun; every byte must have an outcome."""
    left = by_part(run.position.left(run.manifest))
    totals: dict[str, Tally] = {}
    begun = begun_parts(run.position, run.manifest)
    assert len({*begun}) == len(begun)
    assert {*left} <= {*begun}
    for index, turn in begun:
        shard, claims = run.manifest.shards[index], Claims(turn, tuple(left.get((index, turn), ())))
        items = read_samples([run.tars[index]], size=shard.size, limit=0)
        (account,) = account_for(shard, items, [claims], ranges=True)
        assert account.problems == []
        edges = [0, *(each.stop for each in account.ranges)]
        assert edges == [*(each.start for each in account.ranges), shard.size]
        for outcome, tally in account.tallies.items():
            totals[outcome] = totals.get(outcome, Tally()) + tally
    return totals


def digest_of_all(run):
    both = recount(run)
    return (both.get("trained", Tally()) + both.get(LEFT, Tally())).digest


@settings(max_examples=40, deadline=None)
@given(
    counts=st.lists(st.integers(0, 40), min_size=1, max_size=6),
    grid=st.builds(
        lambda share, columns, rows, window: Grid(share * columns, columns, rows, window),
        st.integers(1, 4),
        st.integers(1, 4),
        st.integers(1, 3),
        st.integers(1, 9),
    ),
    starts=st.lists(st.tuples(st.integers(0, 6), st.integers(1, 5), st.integers(1, 4)), max_size=4),
    passes=st.lists(st.integers(1, 3), min_size=1, max_size=2),
)
def test_outcomes_tile_every_shard_after_any_interruption_and_on_any_ranks(counts, grid, starts, passes):
    tars, sources = [make_tar(count) for count in counts], [n % len(passes) for n in range(len(counts))]
    passes = passes[: max(sources) + 1]
    undisturbed, run = (Simulation.of(tars, grid, passes=passes, sources=sources) for _ in range(2))
    undisturbed.run()
    topology = (1, 1)
    for batches, ranks, workers in starts:
        run.run(*topology, batches=batches)
        assert recount(run).get("trained", Tally()) == run.position.total("trained")
        if run.position.finished:
            break
        topology = (min(ranks, grid.batch), workers)
        run.restart(*topology)
    run.run(*topology)
    assert recount(run).get("trained", Tally()) == run.position.total("trained")
    assert digest_of_all(run) == digest_of_all(undisturbed)


@settings(max_examples=20, deadline=None)
@given(
    counts=st.lists(st.integers(0, 40), min_size=1, max_size=6),
    share=st.integers(1, 3),
    starts=st.lists(st.tuples(st.integers(0, 9), st.sampled_from(DIVIDING)), min_size=1, max_size=5),
)
def test_topologies_that_divide_the_grid_train_the_same_samples_by_their_digest(counts, share, starts):
    tars, grid = [make_tar(count) for count in counts], Grid(4 * share, 4, 6, 5)
    undisturbed, run = Simulation.of(tars, grid), Simulation.of(tars, grid)
    undisturbed.run()
    topology = starts[0][1]
    for batches, following in starts:
        run.run(*topology, batches=batches)
        run.restart(*following)
        topology = following
    run.run(*topology)
    assert recount(run) == recount(undisturbed)


def test_shards_that_joined_after_the_checkpoint_are_not_begun():
    run = Simulation.of([make_tar(9), make_tar(8)], Grid(4, 2, 1, 4))
    run.run(batches=1)
    later = manifest_of([make_tar(n) for n in (9, 8, 7)]).shards[2:]
    grown = run.manifest.grown(later, (None,))
    assert begun_parts(run.position, grown) == [(0, 0), (1, 0)]
    assert {shard for shard, _ in by_part(run.position.left(grown))} == {0, 1}


def test_what_is_left_is_listed_in_order_with_keys_and_places():
    run = Simulation.of([make_tar(count) for count in (11, 30, 10)], Grid(8, 2, 2, 4))
    run.run()
    listed = list(list_left(run.position.left(run.manifest), run.open))
    assert [(each.shard, each.turn, each.ordinal) for each in listed] == sorted(
        (shard, turn, ordinal) for turn, shard, ordinal in run.left
    )
    assert len(listed) == 51 % 8
    tallies = (
        tally_one(run.manifest.shards[each.shard].digest, each.turn, each.ordinal, each.start, each.stop)
        for each in listed
    )
    assert sum(tallies, Tally()) == recount(run)[LEFT]
    assert [each.key for each in listed] == [f"{each.ordinal:05d}" for each in listed]
    assert listed[0].to_json(run.manifest)["shard"] == run.manifest.shards[listed[0].shard].key


def test_what_is_left_in_mid_run_is_listed_whole():
    run = Simulation.of([make_tar(count) for count in (11, 30, 10)], Grid(8, 2, 2, 4))
    run.run(batches=3)
    listed = {
        (each.turn, each.shard, each.ordinal) for each in list_left(run.position.left(run.manifest), run.open)
    }
    assert len(listed) == 51 - 24
    assert not listed & {sample for batch in run.batches for sample in batch}


def test_what_is_left_of_a_shard_that_is_gone_is_listed_by_number():
    named = Piece(0, 2, offset=1024, ordinal=2, done=~0b101)
    (one, other) = list_left([named], lambda piece: iter([Damage("missing_shard", piece.offset, 5000)]))
    assert [(each.turn, each.ordinal, each.start, each.stop, each.key) for each in (one, other)] == [
        (2, 2, None, None, ""),
        (2, 4, None, None, ""),
    ]


TAR = make_tar(6, lambda _: 100)  # 1,024 bytes a sample
SHARD = manifest_of([TAR]).shards[0]


def passed(ordinal, outcome="excluded", reason="list", start=None, stop=None):
    start = 1024 * ordinal if start is None else start
    return PassedOver(0, 0, reason, start, stop or start + 1024, f"{ordinal:05d}", ordinal, outcome)


def account(data=TAR, **claims):
    (found,) = account_for(SHARD, read_samples([data], size=len(data)), [Claims(0, **claims)], ranges=True)
    return found


def test_neighbours_of_one_outcome_and_reason_are_one_range():
    found = account(passed=(passed(1), passed(2), passed(3, reason="other")), left=(Piece(0, 0, 5120, 5),))
    assert found.ranges == [
        Range(0, 1024, "trained"),
        Range(1024, 3072, "excluded", "list"),
        Range(3072, 4096, "excluded", "other"),
        Range(4096, 5120, "trained"),
        Range(5120, 6144, "left"),
        Range(6144, SHARD.size, "archive_end"),
    ]
    assert {outcome: tally.samples for outcome, tally in found.tallies.items()} == {
        "trained": 2,
        "excluded": 3,
        "left": 1,
    }
    assert found.tallies["left"].digest == sample_digest(SHARD.digest, 0, 5, 5120, 6144)
    assert found.problems == []


@pytest.mark.parametrize(
    ("claims", "words"),
    [
        ({"passed": (passed(2, start=2000),)}, "sample 2 is listed at bytes 2000 to 3024, and lies at 2048"),
        ({"passed": (passed(9),)}, "sample 9 is listed as excluded, and the shard has no such sample"),
        ({"left": (Piece(0, 0), Piece(0, 0, 5120, 5))}, "sample 5 would be given 2 times"),
        ({"damages": (PassedOver(0, 0, "bad_header", 1024, 2048),)}, "bytes 1024 to 2048: the run found"),
    ],
)
def test_what_does_not_fit_is_named(claims, words):
    (problem,) = account(**claims).problems
    assert words in problem


def damaged():
    return TAR[:2048] + b"\xff" * 512 + TAR[2560:]


def test_a_damage_must_have_been_met_where_its_bytes_were_read():
    (damage,) = (each for each in read_samples([damaged()], size=SHARD.size) if isinstance(each, Damage))
    (problem,) = account(damaged()).problems
    assert problem == "bytes 2048 to 3072 are bad_header, and the run has read them whole"
    met = PassedOver(0, 0, damage.reason, damage.start, damage.stop)
    assert account(damaged(), damages=(met,)).problems == []
    assert account(damaged(), left=(Piece(0, 0, 1024, 1),)).problems == []
    other = PassedOver(0, 0, "truncated", damage.start, damage.stop)
    (problem,) = account(damaged(), damages=(other,)).problems
    assert "the run found truncated up to 3072" in problem


def lists(*entries, outcome="excluded"):
    found = SideLists(manifest_of([TAR]))
    lines = (
        json.dumps({**entry, "shard": "0000.tar"}) if isinstance(entry, dict) else entry for entry in entries
    )
    found.read("step-1.jsonl", outcome, "\n".join(lines).encode())
    return found


def entry(ordinal, **changes):
    row = passed(ordinal or 0)
    names = ("turn", "reason", "start", "stop", "key", "ordinal", "outcome")
    return {name: getattr(row, name) for name in names} | {"ordinal": ordinal} | changes


def test_entries_that_are_alike_count_once_and_those_that_are_left_do_not():
    found = lists(entry(1), entry(4), entry(1), entry(5))
    tallies, reasons = found.add_up(lambda part, ordinal: ordinal == 5)
    expected = sum((tally_one(SHARD.digest, 0, n, 1024 * n, 1024 * (n + 1)) for n in (1, 4)), Tally())
    assert tallies == {"excluded": (expected,)}
    assert reasons == {"list": 2}
    assert found.problems == []
    assert [each.ordinal for each in found.of((0, 0))] == [1, 4, 5]


def test_two_entries_of_one_sample_that_differ_are_a_problem():
    found = lists(entry(1), entry(1, reason="other"))
    found.add_up(lambda part, ordinal: False)
    (problem,) = found.problems
    assert "0000.tar, pass 1, sample 1 is listed as excluded (list" in problem
    assert "and as excluded (other" in problem


@pytest.mark.parametrize(
    "line",
    ["{", "[]", "7", entry(1, outcome="filtered"), entry(1, start="0"), entry(-1), {"turn": 0}],
)
def test_an_entry_that_makes_no_sense_is_a_problem_with_its_line(line):
    assert lists(entry(0), line).problems == ["step-1.jsonl, line 2 cannot be understood"]


def test_damages_are_kept_apart():
    found = lists(
        entry(None, start=5, stop=9, reason="bad_header"), entry(None, start=5, stop=9, reason="bad_header")
    )
    assert found.damages == {(0, 0, 5, 9, "bad_header")}
    assert found.add_up(lambda part, ordinal: False) == ({}, {})
