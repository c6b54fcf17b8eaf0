"""Faults of the data that stay: each has an outcome, a reason, its bytes in the list, and costs nothing else.

Every test trains over a few shards of which one has the fault, by the command line's own `main`. What the
shards hold is known by construction: the run must come to exactly that, each sample once.
"""

import bz2
import gzip
import lzma
import os
import re
import resource
import struct
import tarfile
import zlib
from dataclasses import replace

import pytest
import torch
from conftest import encode_image
from runs import arguments
from shard_parts import (
    END,
    JPEG,
    Ended,
    Part,
    Shards,
    check,
    check_position,
    damage,
    join,
    sample,
    samples,
    tar_member,
)
from tiny_run import tiny_config

from shards.cli import main as shards_main
from streamswav import cli
from streamswav.commands import training_run
from streamswav.config import LabelsSection, StorageSection
from streamswav.errors import EXIT_CONFIG, EXIT_DONE, EXIT_RETRY
from streamswav.models import build_trunk
from streamswav.stream.grid import Grid
from streamswav.stream.labels import Labels, load_labels
from streamswav.stream.manifest import list_manifest
from streamswav.stream.position import Position, lost_bytes
from streamswav.stream.store import Store
from streamswav.telemetry.metrics import Metrics
from streamswav.transfer.extraction.features import extract
from streamswav.transfer.extraction.preprocessing import Preprocessing

BATCH = 4
WHOLE = 16  # samples of a shard without fault
ONE_LANE = {"columns": 1, "rows": 1}
KiB, MiB = 1 << 10, 1 << 20


@pytest.fixture
def shards(tmp_path):
    made = Shards(tmp_path / "shards")
    for name in ("a", "c"):
        made.write(f"{name}.tar", [*samples(*range(WHOLE), prefix=name), END])
    return made


@pytest.fixture
def train(shards, tmp_path, capfd, monkeypatch):
    """Train over the shards, in eight lanes that share them, with the keys that are given."""
    threads = torch.get_num_threads()

    def run(*, images=None, crops=None, storage=None, optimizer=None, **stream):
        metrics = Metrics()
        monkeypatch.setattr(training_run, "Metrics", lambda _: metrics)
        base = {"urls": shards.folder, "columns": 4, "rows": 2, "window": 4, "shard_ratio": 0.9}
        given = arguments(
            run={"directory": tmp_path / "run"},
            stream=base | stream,
            training={"batch": BATCH} | ({"images": images} if images else {}),
            crops=crops or {},
            storage=storage or {},
            optimizer=optimizer or {},
        )
        code = cli.main(given)
        lines = capfd.readouterr().err.splitlines()
        said = [line for line in lines if not line.startswith("{")]
        keys = [part for key, value in (storage or {}).items() for part in (f"--storage.{key}", str(value))]
        return Ended(code, said, tmp_path / "run", metrics, tuple(keys))

    yield run
    torch.set_num_threads(threads)


# Shards that are lost, changed or redacted.


class AtSample:
    """A condition that all samples meet; when the run comes to its third sample, something is done."""

    def __init__(self):
        self.calls, self.act = 0, None

    def __call__(self, _):
        self.calls += 1
        if self.calls == 3:
            self.act()
        return True


at_sample = AtSample()
IN_MID_PASS = ONE_LANE | {"where": f"{__name__}:at_sample", "storage": {"block_bytes": 4 * KiB}}


@pytest.fixture
def in_mid_pass():
    """Have something done in the middle of a run that is given IN_MID_PASS."""

    def do(act):
        at_sample.calls, at_sample.act = 0, act

    return do


def in_order(shards):
    """Keys of the shards as the only lane of these runs comes to them."""
    manifest = list_manifest([str(shards.folder)], Store())
    (lane,) = Position(manifest.digest, Grid(BATCH, 1, 1, 4), 0).plan(manifest).lanes
    return [manifest.shards[piece.shard].key for piece in lane]


def write_again(path):
    """Write the same bytes under the same name: another object."""
    os.utime(path, (1, 1))


def check_lost(ended, shards, reason):
    """What was read of the one lost shard is trained; return its key and the keys of that."""
    (entry,) = [each for each in ended.listed() if each["reason"] == reason]
    shards.lose(entry["shard"], reason, entry["start"])
    check(ended, shards)
    assert lost_bytes(ended.position.damages) == entry["stop"] - entry["start"]
    assert ended.metric("stream_shards", state="lost") == 1
    return entry["shard"], [part.key for part in shards.parts[entry["shard"]] if part.key]


def test_a_shard_that_is_missing_once_its_turn_comes_is_lost_as_a_whole(shards, train, in_mid_pass):
    *_, last = in_order(shards)
    in_mid_pass((shards.folder / last).unlink)
    assert check_lost(train(**IN_MID_PASS), shards, "missing_shard") == (last, [])


def test_a_shard_that_goes_missing_while_it_is_read_is_lost_from_there_on(shards, train, in_mid_pass):
    first, *_ = in_order(shards)
    in_mid_pass((shards.folder / first).unlink)
    shard, read = check_lost(train(**IN_MID_PASS), shards, "missing_shard")
    assert shard == first
    assert 4 <= len(read) < WHOLE


def test_a_shard_that_is_missing_after_a_restart_is_lost(shards, train):
    *_, last = in_order(shards)
    assert train(images=8, **ONE_LANE).code == EXIT_DONE
    (shards.folder / last).unlink()
    ended = train(**ONE_LANE)
    assert check_lost(ended, shards, "missing_shard") == (last, [])


def test_a_shard_that_is_missing_after_a_restart_beyond_the_budget_is_refused_by_name(shards, train):
    *_, last = in_order(shards)
    assert train(images=8, **ONE_LANE).code == EXIT_DONE
    (shards.folder / last).unlink()
    ended = train(shard_ratio=0.001, **ONE_LANE)
    assert ended.code == EXIT_CONFIG
    (line,) = ended.said
    assert f"shard {last} is gone" in line
    assert "stream.shard_ratio = 0.001" in line


def test_another_object_under_the_key_of_a_shard_is_not_read(shards, train, in_mid_pass):
    *_, last = in_order(shards)
    in_mid_pass(lambda: write_again(shards.folder / last))
    assert check_lost(train(**IN_MID_PASS), shards, "changed_shard") == (last, [])


def test_another_object_under_the_key_on_s3_is_told_by_its_etag(s3, shards, train, in_mid_pass):
    url, shards.folder = bucket_of(s3, shards)
    first, *_ = in_order(shards)
    path = shards.folder / first
    in_mid_pass(lambda: path.write_bytes(path.read_bytes().replace(b"b/", b"x/")[::-1]))
    place = {"endpoint_url": s3.endpoint, **IN_MID_PASS["storage"]}
    ended = train(urls=url, **IN_MID_PASS | {"storage": place})
    shard, read = check_lost(ended, shards, "changed_shard")
    assert shard == first
    assert 4 <= len(read) < WHOLE


def bucket_of(s3, shards):
    url, folder = s3.make_bucket()
    for path in shards.folder.iterdir():
        path.rename(folder / path.name)
    return url, folder


@pytest.mark.parametrize("place", [0, -1], ids=["being read", "not opened yet"])
def test_a_shard_that_is_redacted_in_mid_pass_is_read_on_without_the_sample(
    place, shards, train, in_mid_pass
):
    shard = in_order(shards)[place]
    gone = shards.parts[shard][13]

    def redact():
        assert shards_main(["redact", str(shards.folder), "--key", gone.key]) == 0

    in_mid_pass(redact)
    ended = train(**IN_MID_PASS)
    shards.parts[shard][13] = replace(gone, key="redacted-00000013", reason="redacted", outcome="excluded")
    check(ended, shards)
    assert ended.position.damages == ()


# Archives that are cut, damaged or none.


def test_a_shard_that_ends_within_an_image_keeps_what_is_before(shards, train):
    cut = sample("b/008").data[: 512 + len(JPEG) // 2]
    shards.write("b.tar", [*samples(*range(8)), damage("truncated", cut)])
    check(train(), shards)


def test_a_shard_that_ends_within_a_header_keeps_what_is_before(shards, train):
    shards.write("b.tar", [*samples(*range(8)), damage("truncated", sample("b/008").data[:200])])
    check(train(), shards)


def test_a_shard_that_ends_between_two_samples_is_told_from_a_whole_one(shards, train):
    shards.write("b.tar", [*samples(*range(8)), damage("no_end_of_archive")])
    check(train(), shards)


def test_a_shard_that_ends_between_image_and_label_keeps_the_image_and_is_told(shards, train):
    shards.write("b.tar", [*samples(*range(8)), sample("b/008", jpg=JPEG), damage("no_end_of_archive")])
    check(train(), shards)


def test_a_shard_that_ends_on_a_block_within_an_image_is_told(shards, train):
    cut = sample("b/008").data[: 512 + 512]
    assert len(JPEG) > 512
    shards.write("b.tar", [*samples(*range(8)), damage("truncated", cut)])
    check(train(), shards)


def test_a_damaged_header_costs_its_own_member_and_reading_goes_on_after_it(shards, train):
    image = bytearray(tar_member("b/004.jpg", JPEG))
    image[148:154] = b"777777"
    label = sample("b/004", "no_image", cls=b"1")
    parts = [*samples(*range(4)), damage("bad_header", bytes(image)), label, *samples(5, 6, 7), END]
    shards.write("b.tar", parts)
    check(train(), shards)


def test_zeros_or_noise_in_the_middle_cost_what_they_cover(shards, train):
    noise = b"\xa5" * 4096
    parts = [*samples(0, 1), damage("bad_header", noise), *samples(2, 3), damage("zero_blocks", bytes(2048))]
    shards.write("b.tar", [*parts, *samples(4, 5), END])
    check(train(), shards)


def test_garbage_in_place_of_a_shard_is_one_damage(shards, train):
    shards.write("b.tar", [damage("bad_header", b"<html>no such page</html>" * 400)])
    check(train(), shards)


def test_an_object_of_no_bytes_is_told_as_cut_off(shards, train):
    shards.write("b.tar", [damage("no_end_of_archive")])
    check(train(), shards)


def test_a_shard_without_members_is_no_fault(shards, train):
    shards.write("b.tar", [Part(bytes(10240))])
    ended = train()
    check(ended, shards)
    assert ended.listed() == []


def test_a_shard_whose_members_are_of_no_sample_is_told(shards, train):
    members = tar_member("README", b"nothing here") + tar_member(".hidden.jpg", JPEG)
    shards.write("b.tar", [damage("no_sample", members), END])
    check(train(), shards)


@pytest.mark.parametrize("kind", ["gzip", "zstd", "xz", "bzip2"])
def test_a_compressed_shard_is_named_as_such(kind, shards, train):
    whole = join([*samples(*range(8)), END])
    packed = {
        "gzip": gzip.compress(whole),
        "zstd": b"\x28\xb5\x2f\xfd" + zlib.compress(whole),  # by its magic alone
        "xz": lzma.compress(whole),
        "bzip2": bz2.compress(whole),
    }
    shards.write("b.tar", [damage("compressed", packed[kind])])
    check(train(), shards)


@pytest.mark.parametrize("form", ["pax", "gnu"])
def test_names_longer_than_a_header_are_no_fault(form, shards, train):
    kind = {"pax": tarfile.PAX_FORMAT, "gnu": tarfile.GNU_FORMAT}[form]
    parts = [sample(f"{'deep/' * 60}{number:03d}", form=kind) for number in range(8)]
    shards.write("b.tar", [*parts, END])
    ended = train()
    check(ended, shards)
    assert ended.listed() == []


# Samples that cannot be used.


def test_members_out_of_order_are_never_joined_across_another_sample(shards, train):
    apart = [sample(f"b/{number:03d}", jpg=JPEG) for number in range(3)]
    labels = [sample(f"b/{number:03d}", "no_image", cls=b"1") for number in range(3)]
    shards.write("b.tar", [*samples(10, 11), *apart, *labels, END])
    check(train(), shards)


def test_a_key_that_comes_twice_is_two_samples(shards, train):
    shards.write("b.tar", [*samples(0, 1, 2, 2, 3, 1), END])
    ended = train()
    check(ended, shards)
    assert ended.listed() == []


def test_a_sample_without_an_image_is_quarantined(shards, train):
    blind = sample("b/002", "no_image", cls=b"1", txt=b"a caption")
    shards.write("b.tar", [*samples(0, 1), blind, *samples(3, 4), END])
    check(train(), shards)


def header_of_png(width, height):
    data = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + data + struct.pack(">I", zlib.crc32(data))


def black_png(width, height):
    """A valid PNG of few bytes and many pixels."""
    packed = zlib.compress(bytes(height * (1 + 3 * width)), 9)
    rest = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in ((b"IDAT", packed), (b"IEND", b""))
    )
    return header_of_png(width, height) + rest


PNG = encode_image(1, (48, 40), "PNG")
BAD_IMAGES = {
    "nothing like an image": (b"<html>404</html>" * 9, "not_an_image"),
    "no bytes": (b"", "empty"),
    "half a JPEG": (JPEG[: len(JPEG) // 2], "truncated"),
    "half a PNG": (PNG[: len(PNG) // 2], "truncated"),
    "no pixels, JPEG": (JPEG.replace(struct.pack(">HH", 40, 48), bytes(4), 1), "corrupt"),
    "no pixels, PNG": (header_of_png(0, 0), "empty"),
    "damaged": (PNG[:60] + bytes(60) + PNG[120:], "corrupt"),
    "a format without a decoder": (b"\xff\x0a" + bytes(100), "unsupported"),
    "a decompression bomb": (black_png(2000, 2001), "too_large"),
}


@pytest.mark.parametrize("image", BAD_IMAGES)
def test_an_image_that_cannot_be_decoded_is_quarantined(image, shards, train):
    data, reason = BAD_IMAGES[image]
    bad = sample("b/002", reason, jpg=data, cls=b"1")
    shards.write("b.tar", [*samples(0, 1), bad, *samples(3, 4), END])
    check(train(crops={"max_pixels": 4_000_000}), shards)


def test_a_sample_larger_than_the_memory_allows_is_passed_over_by_name(shards, train):
    large = sample("b/002", "too_large", jpg=JPEG + bytes(MiB), cls=b"1")
    shards.write("b.tar", [*samples(0, 1), large, *samples(3, 4), END])
    check(train(memory=4 * MiB, storage={"block_bytes": 64 * KiB}), shards)


def test_samples_that_an_evaluation_cannot_use_are_counted_by_reason(shards):
    blind, bare = sample("b/001", cls=b"1"), sample("b/002", jpg=JPEG)
    torn, word = sample("b/003", jpg=JPEG[:300], cls=b"1"), sample("b/004", jpg=JPEG, cls=b"cat")
    shards.write("b.tar", [*samples(0), blind, bare, torn, word, *samples(5), END])
    found = evaluate(shards)
    assert found.skipped == {
        "label_not_a_class_number": 1,
        "no_image": 1,
        "no_label": 1,
        "truncated": 1,
    }
    assert {key for key in found.keys if key.startswith("b/")} == {"b/000", "b/005"}
    assert len(found.keys) == 2 * WHOLE + 2


def test_a_sample_of_another_split_is_counted_as_such(shards, tmp_path):
    table = tmp_path / "labels.csv"
    table.write_text("key,label,fold\na/000,3,train\na/001,4,test\nc/000,5,test\n")
    labels = load_labels(LabelsSection(file=str(table), split="fold"), Store(), split="train")
    found = evaluate(shards, labels)
    assert found.keys == ("a/000",)
    assert found.labels.tolist() == [3]
    assert found.skipped == {"no_label": len(list(shards.folder.glob("*.tar"))) * WHOLE - 3, "other_split": 2}


def test_an_evaluation_counts_redacted_samples_apart(shards):
    keys = ["--key", "a/003", "--key", "c/000", "--key", "c/009"]
    assert shards_main(["redact", str(shards.folder), *keys]) == 0
    found = evaluate(shards)
    assert found.skipped == {"redacted": 3}
    assert len(found.keys) == 2 * WHOLE - 3


def evaluate(shards, labels=None):
    wanted = Preprocessing(resize=20, crop=16, mean=(0.5,) * 3, std=(0.2,) * 3, max_pixels=10**6)
    trunk = build_trunk(tiny_config().model).eval()
    labels = labels or Labels.from_shards()
    return extract(trunk, [str(shards.folder)], preprocessing=wanted, storage=StorageSection(), labels=labels)


# What ends a run.


def test_a_spent_budget_of_samples_ends_the_run_with_the_latest_three(shards, train):
    blind = [sample(f"b/{number:03d}", "no_image", cls=b"1") for number in range(12)]
    shards.write("b.tar", [*blind, END])
    ended = train(skip_ratio=0.2, skip_probation=4)
    assert ended.code == EXIT_CONFIG
    (line,) = ended.said
    counted = re.search(r"(\d+) of (\d+) samples could not be used, more than stream.skip_ratio = 0.2", line)
    skipped, seen = map(int, counted.groups())
    assert skipped > 0.2 * seen
    assert seen >= 4
    places = {part.key: f"b.tar[{start}:{stop}] {part.key}" for part, start, stop in shards.places("b.tar")}
    shown = re.findall(r"(b\.tar\[\d+:\d+\] (\S+)): no_image", line)
    assert len(shown) == 3
    assert all(places[key] == place for place, key in shown)


def test_within_its_probation_no_share_of_samples_ends_a_run(shards, train):
    blind = [sample(f"b/{number:03d}", "no_image", cls=b"1") for number in range(12)]
    shards.write("b.tar", [*blind, END])
    check(train(skip_ratio=0.0, skip_probation=2 * WHOLE + 13), shards)


def test_after_a_spent_budget_a_larger_one_goes_on_where_the_run_ended(shards, train):
    blind = [sample(f"b/{number:03d}", "no_image", cls=b"1") for number in range(12)]
    shards.write("b.tar", [*blind, END])
    spent = train(skip_ratio=0.2, skip_probation=4)
    assert spent.code == EXIT_CONFIG
    trained = spent.position.trained
    assert 0 < trained < 2 * WHOLE - BATCH
    ended = train(skip_ratio=0.9, skip_probation=4)
    check_position(ended, shards)
    assert ended.position.trained > trained


def test_a_spent_budget_of_shards_ends_the_run_with_what_was_lost(shards, train, in_mid_pass):
    *_, last = in_order(shards)
    size = (shards.folder / last).stat().st_size
    in_mid_pass((shards.folder / last).unlink)
    ended = train(**IN_MID_PASS, shard_ratio=0.01)
    assert ended.code == EXIT_CONFIG
    (line,) = ended.said
    assert "stream.shard_ratio = 0.01" in line
    assert f"{last}[0:{size}]: missing_shard" in line
    assert ended.position.trained > 0


def refused(ended, *parts):
    assert ended.code == EXIT_CONFIG
    (line,) = ended.said
    assert all(part in line for part in parts), line


def test_a_list_of_exclusions_that_is_missing_is_refused_by_name(shards, train, tmp_path):
    refused(train(exclude=tmp_path / "keys.txt"), "keys.txt")


@pytest.mark.parametrize("content", [gzip.compress(b"a/000\n" * 99)[:-9], b"a/000.jpg\n"])
def test_a_list_of_exclusions_that_cannot_be_read_is_refused_by_name(content, shards, train, tmp_path):
    (tmp_path / "keys").write_bytes(content)
    refused(train(exclude=tmp_path / "keys"), "stream.exclude", "keys")


def test_a_condition_that_no_sample_meets_ends_the_run_with_the_count(shards, train):
    refused(
        train(where="json.widht >= 256"), "0 usable samples", f"{2 * WHOLE} more were excluded or filtered"
    )


def test_too_little_memory_is_refused_with_the_figure_that_is_needed(shards, train):
    ended = train(memory=1000, **ONE_LANE)
    refused(ended, "stream.memory = 1000")
    needed = re.search(r"a worker needs (\d+) bytes", ended.said[0])[1]
    refused(train(memory=int(needed) - 8, **ONE_LANE), "stream.memory")
    check(train(memory=needed, **ONE_LANE), shards)


def test_a_checkpoint_that_finds_no_room_ends_the_run_and_the_last_one_stands(shards, train):
    """A limit to the size of files stands for the disk's."""
    assert train(images=8).code == EXIT_DONE
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (256 * KiB, hard))
    try:
        ended = train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert ended.code == EXIT_RETRY
    assert "model.pt: cannot be written" in ended.said[-1]
    assert ended.metric("checkpoints_total", outcome="failed") == 1
    assert ended.position.trained == 8
    check_position(train(), shards)


def test_a_loss_that_is_no_number_ends_the_run_and_is_never_saved(shards, train):
    assert train(images=8).code == EXIT_DONE
    ended = train(optimizer={"rate": 1e30})
    refused(ended, "not finite and were skipped", "lower optimizer.rate")
    steps = ended.metric("nonfinite_steps_total")
    assert steps == ended.metric("nonfinite_steps_consecutive") > 0
    assert ended.metric("samples_total", outcome="skipped_step") == BATCH * steps
    assert ended.position.trained == 8
    check_position(train(optimizer={"rate": 0.01}), shards)
