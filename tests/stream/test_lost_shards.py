"""Shards that vanish or are replaced while a run reads them: quarantined, within a budget of their own."""

import json

import pytest
from runs import arguments, newest, run

from streamswav.config import CropsSection, StorageSection
from streamswav.crops import MultiCrop
from streamswav.errors import EXIT_CONFIG, EXIT_DONE, BudgetSpentError
from streamswav.stream.grid import Grid
from streamswav.stream.manifest import Manifest, list_manifest
from streamswav.stream.outcomes import LOST_REASONS
from streamswav.stream.position import Position, lost_bytes
from streamswav.stream.reader import ShardReader
from streamswav.stream.store import Store
from streamswav.training.budgets import Budgets
from streamswav.training.distributed import Ranks
from streamswav.training.feed import Feed, FeedSettings

COUNTS = [40] * 6
GRID = Grid(16, 1, 1, 4)


@pytest.fixture
def shards(make_shards, tmp_path):
    make_shards(tmp_path / "shards", counts=COUNTS)
    return tmp_path / "shards"


def lose_the_last_two(shards, position, manifest):
    """Let one shard vanish and write one anew, of those that come last in the only lane."""
    vanishing, replaced = (
        manifest.shards[piece.shard].key for piece in position.plan(manifest).lanes[0][-2:]
    )
    (shards / vanishing).unlink()
    (shards / replaced).write_bytes((shards / replaced).read_bytes())
    return {vanishing: "missing_shard", replaced: "changed_shard"}


def make_feed(shards, *, shard_ratio):
    storage = StorageSection()
    manifest = list_manifest([str(shards)], Store(storage))
    return Feed(
        manifest,
        Position(manifest.digest, GRID, 0),
        settings=FeedSettings(0, 1, Budgets(0.01, 0, shard_ratio)),
        reader=ShardReader(manifest, storage, read_ahead=1),
        crop=MultiCrop(CropsSection(sizes=[8], counts=[2], scales=[(0.3, 1.0)]), seed=0),
        ranks=Ranks(),
    )


def train_and_lose(feed, shards):
    """Lose two shards after the first batch, and go on to the end."""
    lost = {}
    for batch in feed:
        feed.commit(batch)
        lost = lost or lose_the_last_two(shards, feed.position, feed.manifest)
    feed.synchronise()
    return lost


def test_lost_shards_in_mid_pass_are_quarantined_within_their_budget(shards):
    feed = make_feed(shards, shard_ratio=0.5)
    lost = train_and_lose(feed, shards)
    found = {feed.shard_key(each): each.reason for each in feed.unwritten if each.ordinal is None}
    assert found == lost
    position = feed.position
    left = sum(len(piece.named()) for piece in position.carried)
    assert position.trained + left == sum(COUNTS) - 80
    sizes = {shard.key: shard.size for shard in feed.manifest.shards}
    assert lost_bytes(position.damages) == sum(sizes[key] for key in lost)


def test_lost_shards_beyond_their_budget_end_the_run_with_the_evidence(shards):
    with pytest.raises(BudgetSpentError, match=r"shard_ratio = 0\.001 .*shard-\d+\.tar\[0:\d+\]: .*_shard"):
        train_and_lose(make_feed(shards, shard_ratio=0.001), shards)


def test_shards_lost_between_two_starts_are_refused_or_quarantined_as_the_budget_says(shards, tmp_path):
    def command(**stream):
        given = {"urls": shards, "columns": 1, "rows": 1, "window": 4, **stream}
        return arguments(run={"directory": tmp_path / "run"}, stream=given)

    assert run([*command(), "--training.images", "32"], tmp_path / "first").code == EXIT_DONE
    position = Position.from_json(json.loads((newest(tmp_path / "run") / "position.json").read_text()))
    manifest = Manifest.from_json(json.loads((tmp_path / "run" / "manifest.json").read_text()))
    lost = lose_the_last_two(shards, position, manifest)
    refused = run(command(), tmp_path / "refused")
    assert refused.code == EXIT_CONFIG
    assert all(key in refused.said[-1] for key in lost)
    assert "stream.shard_ratio = 0.001" in refused.said[-1]
    outcome = run(command(shard_ratio=0.5), tmp_path / "last")
    assert outcome.code == EXIT_DONE, outcome.err
    stream = json.loads(outcome.out)["stream"]
    assert stream["trained"] + stream["left"] == sum(COUNTS) - 80
    files = (tmp_path / "run" / "quarantined").glob("*.jsonl")
    entries = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    assert {each["shard"]: each["reason"] for each in entries if each["reason"] in LOST_REASONS} == lost
    assert {event["shard"]: event["reason"] for event in outcome.of("lost_shard")} == lost
