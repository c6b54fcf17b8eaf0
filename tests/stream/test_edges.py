"""Rare meetings of faults, restarts and small numbers: each once lost or stalled something."""

import json
import pickle

import pytest
from conftest import encode_image
from runs import arguments, start_ranks

from streamswav.commands.audit_checks import check_counts
from streamswav.config import CropsSection, StorageSection, parse_config
from streamswav.crops import MultiCrop
from streamswav.errors import EXIT_CONFIG, BudgetSpentError
from streamswav.loader import Exhausted, LaneBatches
from streamswav.stream.grid import Grid
from streamswav.stream.manifest import list_manifest
from streamswav.stream.outcomes import PassedOver, Tally
from streamswav.stream.pieces import Piece
from streamswav.stream.plan import Deal, Plan
from streamswav.stream.position import Position
from streamswav.stream.reader import ShardReader
from streamswav.stream.samples import LaneReader, name_samples
from streamswav.stream.select import Selection
from streamswav.stream.store import Store
from streamswav.telemetry.secrecy import without_secrets
from streamswav.training.budgets import Budgets
from streamswav.training.distributed import Ranks
from streamswav.training.feed import Feed, FeedSettings

GRID = Grid(16, 2, 1, 8)


def open_manifest(folder):
    storage = StorageSection()
    manifest = list_manifest([str(folder)], Store(storage))
    return manifest, ShardReader(manifest, storage, read_ahead=1)


def make_feed(manifest, reader, position, select=None):
    return Feed(
        manifest,
        position,
        settings=FeedSettings(0, 1, Budgets(1.0, 0, 1.0)),
        reader=reader,
        crop=MultiCrop(CropsSection(sizes=[8], counts=[2], scales=[(0.3, 1.0)]), seed=3),
        ranks=Ranks(),
        select=select,
    )


@pytest.mark.parametrize("lost", [40, 24])
def test_a_shard_that_is_lost_after_its_samples_were_named_does_not_stall_the_run(
    make_shards, tmp_path, lost
):
    paths = make_shards(tmp_path, counts=[40, lost])
    manifest, reader = open_manifest(tmp_path)
    named, _ = name_samples([Piece(0, 0), Piece(1, 0)], reader.open)
    position = Position(manifest.digest, GRID, 3).deal_again(Deal(pieces=tuple(named), one_by_one=True))
    paths[1].unlink()
    feed = make_feed(manifest, reader, position)
    for batch in feed:
        feed.commit(batch)
        assert feed.position.generation < 20
    assert feed.position.finished
    assert feed.position.trained == 32


def test_a_damage_beyond_what_a_window_reached_before_a_restart_is_told(make_shards, tmp_path):
    """The shard of half a window is gone, so the window that is read again reaches further."""
    first, second = make_shards(tmp_path, counts=[6, 30])
    data = bytearray(second.read_bytes())
    headers = [at for at in range(0, len(data), 512) if data[at + 257 : at + 262] == b"ustar"]
    data[headers[20] + 148 : headers[20] + 156] = b"7777777\0"
    second.write_bytes(data)
    manifest, reader = open_manifest(tmp_path)
    plan = Position(manifest.digest, Grid(1, 1, 1, 8), 0).plan(manifest)
    plan = plan.__class__(plan.grid, 0, 0, 0, ((Piece(0, 0), Piece(1, 0)),))
    lane = LaneReader(plan, 0, reader.open)
    for _ in range(3):
        next(lane)
    assert lane.take_damages() == []
    first.unlink()
    resumed = LaneReader(plan, 0, open_manifest_reader(manifest).open, lane.cursor)
    found = [each for _ in resumed for each in resumed.take_damages()] + resumed.take_damages()
    assert {(each.shard, each.reason) for each in found} == {(0, "missing_shard"), (1, "bad_header")}


def open_manifest_reader(manifest):
    return ShardReader(manifest, StorageSection(), read_ahead=1)


def test_a_lane_of_filtered_samples_alone_has_the_rest_dealt_again_and_not_scanned(make_shards, tmp_path):
    make_shards(tmp_path, counts=[25] * 64)
    manifest, reader = open_manifest(tmp_path)
    filtered = {index for index in range(64) if index % 5}
    position = Position(manifest.digest, Grid(16, 16, 1, 8), 3)
    feed = make_feed(manifest, reader, position, OnlySome(filtered, manifest))
    scans = []
    name = feed._name
    feed._name = lambda left: scans.append(feed.position.total("filtered").samples) or name(left)
    for batch in feed:
        feed.commit(batch)
    position = feed.position
    left = sum(len(piece.named()) for piece in position.carried)
    assert position.trained + left == 25 * (64 - len(filtered))
    assert position.total("filtered").samples == 25 * len(filtered)
    assert scans[0] > 600, "most was met by the lanes before what was left was scanned"


class OnlySome:
    def __init__(self, filtered, manifest):
        self.keys = {manifest.shards[index].key for index in filtered}

    def judge(self, sample, shard_key):
        return ("filtered", "test") if shard_key in self.keys else None


def test_what_a_failing_batch_found_does_not_depend_on_the_ranks(make_shards, tmp_path):
    """Lanes of 5 to 12 samples, every third of which is broken: some cannot fill the batch, others can."""
    broken = b"no image"
    make_shards(
        tmp_path, counts=range(5, 13), image=lambda number: encode_image(number) if number % 3 else broken
    )
    manifest, reader = open_manifest(tmp_path)
    crop = MultiCrop(CropsSection(sizes=[8], counts=[2], scales=[(0.3, 1.0)]), seed=3)
    lanes = tuple((Piece(shard, 0),) for shard in range(8))
    plan = Plan(Grid(48, 8, 1, 4), 0, 0, 0, lanes)

    def found(ranks):
        passed = set()
        for rank in range(ranks):
            columns = range(rank * 8 // ranks, (rank + 1) * 8 // ranks)
            items = list(LaneBatches(plan, {}, 1, columns, manifest, reader, Selection.none(), crop))
            passed |= set(items[0].passed_over) if isinstance(items[0], Exhausted) else set()
        return passed

    assert {each.shard for each in found(1)} == {0, 1, 2, 3}
    assert found(1) == found(2) == found(4) == found(8)


@pytest.mark.parametrize("seed", range(4))
def test_a_broken_image_is_quarantined_also_where_it_would_be_left_over(make_shards, tmp_path, seed):
    broken = b"no image"
    make_shards(tmp_path, counts=[23], image=lambda number: encode_image(number) if number % 4 else broken)
    manifest, reader = open_manifest(tmp_path)
    feed = make_feed(manifest, reader, Position(manifest.digest, GRID, seed))
    for batch in feed:
        feed.commit(batch)
    left = sum(len(piece.named()) for piece in feed.position.carried)
    assert (feed.position.trained, feed.position.total("quarantined").samples, left) == (16, 6, 1)


def test_a_reader_keeps_its_share_of_memory_when_it_goes_to_a_process(make_shards, tmp_path):
    make_shards(tmp_path, counts=[3])
    manifest, _ = open_manifest(tmp_path)
    needed = 2_300_000
    reader = ShardReader(manifest, StorageSection(), read_ahead=1, memory=needed, lanes=1, window=8)
    assert pickle.loads(pickle.dumps(reader)).share_among(1, 8) == reader.share_among(1, 8)


def test_no_signature_of_a_url_is_stored_with_the_run():
    urls = ["https://h/a.tar?X-Amz-Signature=S1", "@https://h/list.txt?X-Amz-Signature=S2"]
    config = parse_config({"stream": {"urls": urls, "exclude": ["https://h/keys.txt?X-Amz-Signature=S3"]}})
    assert "Signature" not in json.dumps(without_secrets(config).model_dump(mode="json"))


def check(budgets, position, found, run_bytes):
    counts = {"trained": 160, "trained_bytes": 1_600_000, "run_bytes": run_bytes}
    budgets.check(position, found, **counts, evidence=str)


def test_one_broken_shard_that_comes_early_does_not_end_a_long_run():
    broken = [PassedOver(3, 0, "compressed", 0, 100_000_000)]
    budgets, position = Budgets(0.01, 100, 0.001), Position("m", GRID, 0)
    check(budgets, position, broken, 400_000_000_000)
    with pytest.raises(BudgetSpentError, match="10000 of 10160"):
        check(budgets, position, broken, 4_000_000_000)


def test_one_damage_explains_no_more_missing_samples_than_its_bytes_could_hold(make_shards, tmp_path):
    class Run:
        manifest = list_manifest([str(make_shards(tmp_path, counts=[3])[0].parent)], Store())
        position = Position(
            manifest.digest,
            GRID,
            0,
            turn=1,
            finished=True,
            tallies={"trained": (Tally(400, 1, 1),)},
            damages=(PassedOver(0, 0, "no_end_of_archive", 10240, 10240),),
        )

    Run.manifest = type(Run.manifest)(Run.manifest.shards, (1000,))
    assert check_counts(Run, [0]).verdict == "FAILED"
    Run.manifest = type(Run.manifest)(Run.manifest.shards, (401,))
    assert check_counts(Run, [0]).verdict == "ok"


def test_an_error_of_one_rank_alone_is_told_by_rank_0(make_shards, tmp_path, monkeypatch):
    make_shards(tmp_path / "shards", counts=[40])
    (tmp_path / "rules_of_one.py").write_text(
        "import os\nif os.environ['RANK'] == '1':\n    raise ImportError('not here')\n"
        "def every(sample):\n    return True\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    stream = {"urls": tmp_path / "shards", "where": "rules_of_one:every"}
    given = arguments(run={"directory": tmp_path / "run"}, stream=stream)
    with start_ranks(2, given, tmp_path / "out") as running:
        ended = running.wait()
    assert ended.code == EXIT_CONFIG
    (line,) = (line for line in ended.said if line.startswith("streamswav: "))
    assert "rules_of_one" in line
    assert "Traceback" not in ended.err
