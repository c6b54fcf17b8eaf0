"""Features on disk: gone on with after a kill, equal whoever computes them, never those of something else."""

import json
import multiprocessing
import os
import re
import shutil
import signal
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from distributed.ranks import run_ranks
from tiny_run import tiny_config
from torch import nn

from streamswav.config import LabelsSection, StorageSection
from streamswav.errors import (
    EXIT_CONFIG,
    ConfigError,
    DrainedError,
    ManifestError,
    NonFiniteError,
    StorageError,
)
from streamswav.models import build_trunk
from streamswav.stream.labels import load_labels
from streamswav.stream.store import Store
from streamswav.training.distributed import Ranks
from streamswav.transfer.embedding.embeddings import read_embeddings, read_parts
from streamswav.transfer.extraction import gathering, together
from streamswav.transfer.extraction.features import extract, gather_features
from streamswav.transfer.extraction.preprocessing import Preprocessing

COUNTS = [11, 3, 0, 26]
PART, BATCH = 4, 3
PREPROCESSING = Preprocessing(
    resize=16, crop=16, mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3), max_pixels=10**6
)


class Counting(nn.Module):
    """A tiny trunk that counts its images; where a file names a number of images, it stands still there."""

    def __init__(self, gate=None, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.inner, self.images, self.gate = build_trunk(tiny_config().model), 0, gate
        self.eval()

    def forward(self, images):
        if self.gate and self.gate.exists() and self.images >= int(self.gate.read_text()):
            self.gate.with_name("reached").touch()
            signal.pause()
        self.images += len(images)
        return self.inner(images)


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def data(make_shards, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    make_shards(folder, counts=COUNTS, image=(20, 18), kind="PNG")
    return folder


def features_of(trunk, folder, **options):
    storage = options.pop("storage", StorageSection())
    given = {"preprocessing": PREPROCESSING, "part": PART, "batch": BATCH} | options
    return extract(trunk, [str(folder)], storage=storage, **given)


@pytest.fixture(scope="module")
def whole(data):
    torch.set_num_threads(1)
    return features_of(Counting(), data)


def check_equal(one, other):
    assert one.keys == other.keys
    assert torch.equal(one.features, other.features)
    assert torch.equal(one.labels, other.labels)
    assert torch.equal(one.places, other.places)
    assert one.skipped == other.skipped


def test_places_tell_shard_and_number(whole):
    expected = [(shard, number) for shard, count in enumerate(COUNTS) for number in range(count)]
    assert whole.places.tolist() == [list(each) for each in expected]
    assert list(whole.keys) == [f"{shard}_{number}" for shard, number in expected]


@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.all), 2])
def test_workers_do_not_change_a_bit(whole, data, workers):
    check_equal(features_of(Counting(), data, workers=workers), whole)


def test_kept_features_are_the_same_and_are_only_read_the_next_time(whole, data, tmp_path):
    first, second = Counting(), Counting()
    check_equal(features_of(first, data, keep=str(tmp_path)), whole)
    check_equal(features_of(second, data, keep=str(tmp_path), workers=2), whole)
    assert (first.images, second.images) == (sum(COUNTS), 0)
    array, keys = read_embeddings(str(tmp_path))
    assert torch.equal(torch.from_numpy(array), whole.features)
    assert tuple(keys) == whole.keys
    labels = [label for part in read_parts(str(tmp_path)) for label in part.labels]
    assert labels == whole.labels.tolist()


# Several ranks.


def ranks_of(rank, group, world_size=2):
    together.ROUND_SECONDS = 0.0
    gathering._PIECE_BYTES = 200
    return Ranks(rank, world_size, rank, group=group, control=group)


def as_plain(found):
    if found is None:
        return None
    places, labels = found.places, found.labels
    return {
        "features": found.features,
        "labels": labels,
        "keys": list(found.keys),
        "places": places,
        "skipped": dict(found.skipped),
    }


def extract_on(rank, group, folder, keep="", workers=0, **options):
    ranks = ranks_of(rank, group)
    own = features_of(Counting(), Path(folder), keep=keep, workers=workers, ranks=ranks, **options)
    return {"own": as_plain(own), "all": as_plain(gather_features(own, ranks))}


class OnRanks:
    """`extract_on` with arguments; picklable."""

    def __init__(self, *given, **options):
        self.given, self.options = given, options

    def __call__(self, rank, group):
        return extract_on(rank, group, *self.given, **self.options)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.all)])
def test_ranks_share_the_work_and_rank_0_gathers_all_of_it_to_the_bit(whole, data, tmp_path, workers):
    first, second = run_ranks(OnRanks(str(data), workers=workers), 2, tmp_path / "ranks")
    assert second["all"] is None
    own = [each["own"]["keys"] for each in (first, second)]
    assert sorted(own[0] + own[1]) == sorted(whole.keys)
    assert min(map(len, own)) > 0
    everything = first["all"]
    assert torch.equal(everything["features"], whole.features)
    assert torch.equal(everything["labels"], whole.labels)
    assert torch.equal(everything["places"], whole.places)
    assert everything["keys"] == list(whole.keys)


def test_several_labels_an_image_are_as_wide_on_every_rank(data, tmp_path):
    table = tmp_path / "labels.csv"
    rows = [f"{shard}_{number},{shard}|{shard + 4}" for shard, c in enumerate(COUNTS) for number in range(c)]
    table.write_text("\n".join(["key,label", *rows]) + "\n")
    labels = load_labels(LabelsSection(file=str(table), separator="|"), Store())
    first, second = run_ranks(OnRanks(str(data), labels=labels), 2, tmp_path / "ranks")
    assert first["own"]["labels"].shape[1] == second["own"]["labels"].shape[1]
    hot = first["all"]["labels"]
    assert hot.dtype == torch.int8
    assert (hot.sum(dim=1) == 2).all()
    names = {tuple(row.nonzero().flatten().tolist()) for row in hot}
    assert len(names) == 3


class Diverged(Counting):
    """Gives no number for images of one rank's shard alone, so that one rank fails."""

    def forward(self, images):
        features = super().forward(images)
        return features * torch.nan if self.images > PART * 6 else features


def fail_on(rank, group, folder, keep):
    ranks = ranks_of(rank, group)
    trunk = Diverged() if rank == 0 else Counting()
    try:
        features_of(trunk, Path(folder), ranks=ranks, keep=keep, give_up=lambda: False)
    except NonFiniteError as error:
        return str(error)
    return "no error"


class Failing(OnRanks):
    def __call__(self, rank, group):
        return fail_on(rank, group, *self.given)


def test_an_error_of_one_rank_is_the_error_of_all(make_shards, tmp_path):
    make_shards(tmp_path / "shards", counts=[40, 40], image=(20, 18), kind="PNG")
    told = run_ranks(Failing(str(tmp_path / "shards"), ""), 2, tmp_path / "ranks")
    assert "diverged" in told[0]
    assert told[0] == told[1]


class Stopping(OnRanks):
    def __call__(self, rank, group):
        ranks, trunk = ranks_of(rank, group), Counting()
        folder, keep = self.given
        try:
            features_of(
                trunk, Path(folder), ranks=ranks, keep=keep, give_up=lambda: rank == 1 and trunk.images >= 8
            )
        except DrainedError:
            return "drained"
        return "done"


def test_a_stop_asked_of_one_rank_stops_all_and_what_was_done_is_kept(whole, data, tmp_path):
    keep = tmp_path / "kept"
    assert run_ranks(Stopping(str(data), str(keep)), 2, tmp_path / "ranks") == ["drained"] * 2
    trunk = Counting()
    check_equal(features_of(trunk, data, keep=str(keep)), whole)
    assert 0 < trunk.images <= sum(COUNTS) - 8


# Killed and gone on with.


def extract_until_killed(folder, keep, gate, storage, workers):
    torch.set_num_threads(1)
    features_of(Counting(gate), folder, keep=keep, storage=storage, workers=workers)


def kept_images(keep, storage):
    """Images in the parts that are on storage."""
    store = Store(storage)
    records = [info.url for info in store.list(keep) if re.search(r"part-\d+-\d+\.json$", info.url)]
    return sum(json.loads(store.read(url))["images"] for url in records)


def kill_at(images, folder, keep, gate, *, storage, workers, and_then=lambda: True):
    """Extract in a process of its own, and end it with SIGKILL after so many images and something else."""
    gate.write_text(str(images))
    reached = gate.with_name("reached")
    reached.unlink(missing_ok=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["streamswav.commands.pretrain"])
    given = (folder, keep, gate, storage, workers)
    process = context.Process(target=extract_until_killed, args=given)
    process.start()
    while not (reached.exists() and and_then()):
        assert process.is_alive()
        time.sleep(0.005)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    gate.unlink()


def test_killed_twice_it_ends_with_the_same_features_and_computes_nothing_twice_that_was_kept(
    whole, data, tmp_path, s3
):
    bucket, path = s3.make_bucket()
    shutil.copytree(data, path / "shards")
    keep, folder, storage = f"{bucket}/kept", f"{bucket}/shards", s3.section
    gate = tmp_path / "gate"
    # Parts are written beside the computing: those of the images done are on their way when it stands still.
    for images, workers, least in ((13, 0, 8), (9, 2, 9)):
        there = partial(lambda least: kept_images(keep, storage) >= least, least)
        kill_at(images, folder, keep, gate, storage=storage, workers=workers, and_then=there)
    kept = kept_images(keep, storage)
    trunk = Counting(gate)
    check_equal(features_of(trunk, folder, keep=keep, storage=storage), whole)
    assert trunk.images == sum(COUNTS) - kept


def test_ranks_go_on_with_what_one_process_left(whole, data, tmp_path):
    keep = tmp_path / "kept"
    kill_at(17, str(data), str(keep), tmp_path / "gate", storage=StorageSection(), workers=0)
    first, _ = run_ranks(OnRanks(str(data), str(keep)), 2, tmp_path / "ranks")
    assert torch.equal(first["all"]["features"], whole.features)
    assert first["all"]["keys"] == list(whole.keys)


# Damaged, or of something else.


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def cut(path):
    path.write_bytes(path.read_bytes()[:-7])


DAMAGES = {
    "a flipped bit": ("features.npy", flip),
    "a file cut short": ("jsonl", cut),
    "a lost file": ("features.npy", Path.unlink),
    "no record": ("json", Path.unlink),
    "a record cut short": ("json", cut),
    "another record": ("json", lambda path: path.write_text(path.read_text().replace('": 4', '": 3'))),
    "a record of nothing": ("json", lambda path: path.write_text("[]")),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_part_and_no_other_is_computed_again(whole, data, tmp_path, damage):
    features_of(Counting(), data, keep=str(tmp_path))
    end, strike = DAMAGES[damage]
    strike(tmp_path / f"part-000003-00002.{end}")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("part-*")}
    trunk = Counting()
    check_equal(features_of(trunk, data, keep=str(tmp_path)), whole)
    assert trunk.images == PART
    written = {path.name for path in tmp_path.glob("part-*") if path.stat().st_mtime_ns != before.get(path)}
    assert all(name.startswith("part-000003-00002") for name in written)


def test_what_was_left_half_written_is_no_part(whole, data, tmp_path):
    features_of(Counting(), data, keep=str(tmp_path))
    for path in tmp_path.glob("part-000000-*.json"):
        path.unlink()
    (tmp_path / ".part-000000-00000.json.0123.partial").write_bytes(b"{")
    trunk = Counting()
    check_equal(features_of(trunk, data, keep=str(tmp_path)), whole)
    assert trunk.images == COUNTS[0]


def test_a_folder_of_something_else_is_refused_with_what_differs(data, make_shards, tmp_path):
    keep = tmp_path / "kept"
    shards = tmp_path / "shards"
    shutil.copytree(data, shards)
    features_of(Counting(), shards, keep=str(keep))
    before = {path: path.read_bytes() for path in keep.iterdir()}
    table = tmp_path / "labels.csv"
    table.write_text("key,label\n0_0,1\n")
    labels = load_labels(LabelsSection(file=str(table)), Store())

    def refused(word, trunk=None, **options):
        with pytest.raises(ConfigError, match=rf"of another {word} .*choose another folder") as caught:
            features_of(trunk or Counting(), shards, keep=str(keep), **options)
        assert caught.value.exit_code == EXIT_CONFIG
        assert "\n" not in str(caught.value)

    refused("network", Counting(seed=1))
    refused("network", Counting().train())
    refused("preprocessing", preprocessing=replace(PREPROCESSING, resize=20))
    refused("labels", labels=labels)
    refused("limit", limit=5)
    refused("part_samples", part=5)
    first = shards / "shard-000000.tar"
    content = first.read_bytes()
    first.unlink()
    first.write_bytes(content)
    os.utime(first, ns=(1, 1))  # the same bytes, but who knows
    refused("shards")
    make_shards(shards, counts=[*COUNTS, 2], image=(20, 18), kind="PNG")
    refused("shards")
    assert {path: path.read_bytes() for path in keep.iterdir()} == before


def test_a_folder_of_another_kind_is_refused(data, tmp_path):
    (tmp_path / "embed.json").write_text('{"format_version": 9, "about": {}}')
    with pytest.raises(ConfigError, match="format 9, this version reads 1"):
        features_of(Counting(), data, keep=str(tmp_path))
    (tmp_path / "embed.json").write_text("{")
    with pytest.raises(ConfigError, match="damaged"):
        features_of(Counting(), data, keep=str(tmp_path))


def test_a_limit_is_kept_to_when_it_goes_on(data, tmp_path):
    expected = features_of(Counting(), data, limit=18)
    features_of(Counting(), data, limit=18, keep=str(tmp_path))
    for path in tmp_path.glob("part-000003-00001.*"):
        path.unlink()
    trunk = Counting()
    check_equal(features_of(trunk, data, limit=18, keep=str(tmp_path), workers=2), expected)
    assert len(expected.keys) == 4 + 3 + 5
    assert trunk.images == 1


def test_a_shard_that_vanishes_meanwhile_ends_the_pass(make_shards, tmp_path):
    make_shards(tmp_path, counts=[6, 6])
    lost = tmp_path / "shard-000001.tar"

    def lose(_):
        lost.unlink(missing_ok=True)

    with pytest.raises(StorageError, match=r"shard-000001\.tar: the shard is gone"):
        features_of(Counting(), tmp_path, on_images=lose)


def test_a_place_that_cannot_be_written_is_found_before_anything_is_read(data, tmp_path):
    (tmp_path / "file").touch()
    trunk = Counting()
    with pytest.raises(StorageError, match="cannot be"):
        features_of(trunk, data, keep=str(tmp_path / "file" / "below"))
    assert trunk.images == 0


def test_no_labelled_image_is_told_with_what_all_ranks_met(make_shards, tmp_path):
    make_shards(tmp_path, counts=[2, 2], labels=False)
    with pytest.raises(ManifestError, match="4 no_label") as caught:
        features_of(Counting(), tmp_path)
    assert caught.value.exit_code == EXIT_CONFIG
