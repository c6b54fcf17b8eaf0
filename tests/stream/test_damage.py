"""Damaged and uneven shards, through the trainer and through its feed: nothing is lost without a word."""

import json
import re
import tarfile
import time
from collections import Counter

import pytest
import webdataset
from conftest import encode_image
from runs import arguments, free_port, newest, run, scrape_text, start, values_of

from streamswav.config import CropsSection, StorageSection
from streamswav.crops import MultiCrop
from streamswav.errors import EXIT_CONFIG, EXIT_DONE, ManifestError
from streamswav.stream.grid import Grid
from streamswav.stream.manifest import list_manifest
from streamswav.stream.position import Position
from streamswav.stream.reader import ShardReader
from streamswav.stream.store import Store
from streamswav.training.budgets import Budgets
from streamswav.training.distributed import Ranks
from streamswav.training.feed import Feed, FeedSettings

JPEG = encode_image(0, (64, 48))
BAD_IMAGES = {
    2: b"nothing that looks like an image" * 9,
    5: JPEG[: len(JPEG) // 2],
    9: encode_image(1, (64, 48), "PNG")[:900] + bytes(600),
}
NO_IMAGE = 12


def write_bad_images(path):
    """20 samples: three images that cannot be decoded, and one sample without."""
    with path.open("wb") as file, webdataset.TarWriter(file, mtime=0) as writer:
        for index in range(20):
            image = {} if index == NO_IMAGE else {"jpg": BAD_IMAGES.get(index, JPEG)}
            writer.write({"__key__": f"odd_{index}", "cls": index, **image})


def truncate_within_a_sample(path, sample):
    """Cut the archive inside the image of this sample."""
    with tarfile.open(path) as archive:
        (member,) = (each for each in archive if each.name.startswith(f"{sample}.jpg"))
    with path.open("r+b") as file:
        file.truncate(member.offset_data + member.size // 2)


def damage_header(path, name):
    """Break the checksum of a member's header."""
    with tarfile.open(path) as archive:
        offset = archive.getmember(name).offset
    with path.open("r+b") as file:
        file.seek(offset + 148)
        file.write(b"777777")


@pytest.fixture(scope="module")
def damaged(make_shards, tmp_path_factory):
    """Four shards of 20 samples: whole, cut in sample 13, a bad header at sample 7, odd images."""
    folder = tmp_path_factory.mktemp("damaged")
    paths = make_shards(folder, counts=[20, 20, 20], labels=False)
    truncate_within_a_sample(paths[1], "1_13")
    damage_header(paths[2], "2_7.jpg")
    write_bad_images(folder / "shard-000003.tar")
    return folder


@pytest.fixture(scope="module")
def survived(damaged, tmp_path_factory):
    """A run over all that, twice: its folder, how it ended, and its metrics shortly before."""
    folder, port, metrics = tmp_path_factory.mktemp("survived"), free_port(), {}
    made = arguments(
        run={"directory": folder / "run"},
        stream={"urls": damaged, "passes": 2, "skip_ratio": 0.2},
        training={"batch": 8},
        loader={"workers": 2},
        checkpoint={"images": 24},
        telemetry={"port": port, "bind": "127.0.0.1"},
    )
    with start(made, folder) as running:
        while not running.ended:
            metrics = values_of(scrape_text(port)) or metrics
            time.sleep(0.02)
        return folder / "run", running.wait(), metrics


def test_a_run_survives_damage_and_counts_it(survived):
    folder, outcome, _ = survived
    assert outcome.code == EXIT_DONE, outcome.err
    assert outcome.said == []
    position = json.loads((newest(folder) / "position.json").read_text())
    assert position["reasons"] == {"not_an_image": 2, "truncated": 4, "no_image": 2}
    damages = {(each["turn"], each["shard"], each["reason"]) for each in position["damages"]}
    assert damages == {(turn, *where) for turn in (0, 1) for where in ((1, "truncated"), (2, "bad_header"))}
    stream = json.loads((folder / "summary.json").read_text())["stream"]
    whole = 20 + 13 + 19 + 20  # what is still a sample
    assert stream["trained"] + stream["quarantined"] + stream["left"] == 2 * whole
    assert (stream["quarantined"], stream["damages"]) == (8, 4)
    assert stream["left"] < 8


def listed(folder):
    files = (folder / "quarantined").iterdir()
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def test_the_lists_say_which_bytes_were_not_trained(survived, damaged):
    entries = listed(survived[0])
    assert len(entries) == 12
    by_key = {(each["turn"], each["key"]): each for each in entries if each["key"]}
    for turn in (0, 1):
        for index in (*BAD_IMAGES, NO_IMAGE):
            entry = by_key[turn, f"odd_{index}"]
            assert (entry["shard"], entry["ordinal"]) == ("shard-000003.tar", index)
            data = (damaged / entry["shard"]).read_bytes()[entry["start"] : entry["stop"]]
            assert data.startswith(f"odd_{index}.".encode())
            assert BAD_IMAGES.get(index, b"") in data
    cut = [each for each in entries if each["shard"] == "shard-000001.tar"]
    size = (damaged / "shard-000001.tar").stat().st_size
    assert [each["stop"] for each in cut] == [size, size]


def test_the_metrics_tell_of_it(survived):
    folder, _, metrics = survived
    assert metrics['streamswav_samples_total{outcome="quarantined"}'] >= 4
    first = Counter()
    for each in listed(folder):
        first[each["reason"]] += (each["turn"] == 0) * (each["stop"] - each["start"])
    assert set(first) == {"not_an_image", "truncated", "no_image", "bad_header"}
    for reason, count in first.items():
        told = metrics[f'streamswav_quarantined_bytes_total{{reason="{reason}"}}']
        assert count <= told <= 2 * count


def test_a_spent_budget_ends_the_run_with_the_evidence(damaged, tmp_path):
    made = arguments(
        run={"directory": tmp_path / "run"},
        stream={"urls": damaged, "skip_ratio": 0.01, "skip_probation": 20},
    )
    outcome = run(made, tmp_path)
    assert outcome.code == EXIT_CONFIG
    (line,) = outcome.said
    assert "stream.skip_ratio = 0.01" in line
    assert re.search(
        r"shard-00000\d\.tar\[\d+:\d+\]( odd_\d+)?: (truncated|bad_header|no_image|not_an_image)", line
    )


GRIDS = {
    "uneven": ([1, 50, 3, 17, 0, 29], Grid(8, 2, 2, 4)),
    "one shard": ([60], Grid(8, 4, 1, 16)),
    "an empty tar": ([0, 40, 0], Grid(10, 2, 3, 8)),
    "more lanes than shards": ([23, 31], Grid(12, 6, 4, 8)),
    "a lane a sample": ([5, 4], Grid(4, 4, 6, 2)),
}


def make_feed(folder, grid, *, passes=2, skip_ratio=1.0):
    storage = StorageSection()
    manifest = list_manifest([str(folder)], Store(storage))
    section = CropsSection(sizes=[8], counts=[2], scales=[(0.3, 1.0)])
    return Feed(
        manifest,
        Position(manifest.digest, grid, 3, (passes,)),
        settings=FeedSettings(workers=0, prefetch=1, budgets=Budgets(skip_ratio, 0, 0.001)),
        reader=ShardReader(manifest, storage, read_ahead=1),
        crop=MultiCrop(section, seed=3),
        ranks=Ranks(),
    )


def train(feed):
    """What a trainer does, without training: the identities it was given, and those that were left."""
    trained = Counter()
    for batch in feed:
        assert len(batch.ids) == feed.position.grid.batch
        trained.update((each.turn, each.shard, each.ordinal) for each in batch.ids)
        feed.commit(batch)
    feed.synchronise()
    left = Counter(
        (piece.turn, piece.shard, ordinal) for piece in feed.position.carried for ordinal in piece.named()
    )
    return trained, left


@pytest.mark.parametrize(("counts", "grid"), GRIDS.values(), ids=GRIDS.keys())
def test_every_sample_is_trained_once_a_pass_or_left(make_shards, tmp_path, counts, grid):
    make_shards(tmp_path, counts=counts, image=lambda _: JPEG)
    trained, left = train(make_feed(tmp_path, grid))
    assert left.total() < grid.batch
    assert trained + left == Counter(
        (turn, shard, ordinal)
        for turn in (0, 1)
        for shard, count in enumerate(counts)
        for ordinal in range(count)
    )


@pytest.mark.parametrize("grid", [Grid(8, 2, 2, 4), Grid(9, 3, 4, 8), Grid(6, 1, 1, 64)])
def test_every_sample_of_damaged_shards_is_trained_left_or_quarantined_once(damaged, grid):
    feed = make_feed(damaged, grid)
    trained, left = train(feed)
    bad = Counter(
        (each.turn, each.shard, each.ordinal) for each in feed.unwritten if each.ordinal is not None
    )
    assert bad == Counter((turn, 3, ordinal) for turn in (0, 1) for ordinal in (*BAD_IMAGES, NO_IMAGE))
    assert trained + left + bad == Counter(
        (turn, shard, ordinal)
        for turn in (0, 1)
        for shard, count in enumerate((20, 13, 19, 20))
        for ordinal in range(count)
    )
    assert sorted({(each.turn, each.shard) for each in feed.position.damages}) == [
        (0, 1),
        (0, 2),
        (1, 1),
        (1, 2),
    ]


def test_too_few_usable_samples_are_refused(damaged):
    feed = make_feed(damaged, Grid(80, 4, 1, 16), passes=1)
    with pytest.raises(ManifestError, match=r"usable samples, fewer than .* 80"):
        train(feed)
