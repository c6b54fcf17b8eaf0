"""The node's cache: what was read once is not fetched again, never stale or torn, within bounds."""

import errno
import multiprocessing
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from runs import arguments
from shard_parts import END, join, samples

from streamswav import cli
from streamswav.commands import training_run
from streamswav.config import StorageSection, parse_config
from streamswav.errors import EXIT_DONE, ConfigError
from streamswav.stream import cache as cache_module
from streamswav.stream import open_stream
from streamswav.stream.cache import CHUNK_BYTES, BlockCache
from streamswav.stream.manifest import list_manifest
from streamswav.stream.pieces import Piece
from streamswav.stream.reader import ShardReader
from streamswav.stream.store import Store
from streamswav.stream.tar import Damage
from streamswav.telemetry.metrics import Metrics

BLOCK = 4096


def object_of(cache, name="x", *, version="v1", size=10 * BLOCK, block=BLOCK):
    return cache.of(f"s3://bucket/{name}", version, size=size, block=block)


def open_cache(folder, limit, **options):
    """A cache on a disk that may be nearly full already."""
    return BlockCache(folder, limit, **{"free_ratio": 0, **options})


def content(number, length=BLOCK):
    return (number.to_bytes(4, "little") * (length // 4 + 1))[:length]


def disk_bytes(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and path.name != "used")


def read_all(urls, storage, **options):
    """Read a pass, and return it with what it took: (bytes of bodies, requests, hits, misses)."""
    reader = ShardReader(list_manifest(urls, Store(storage)), storage, read_ahead=2, **options)
    items = [
        item for shard in range(len(reader.manifest.shards)) for item in reader.open(Piece(shard, turn=0))
    ]
    traffic = reader.take_traffic()
    outcomes = [outcome for outcome, _ in traffic]
    requests = sum(not outcome.startswith("cache_") for outcome in outcomes)
    received = sum(count for _, count in traffic)
    return items, (received, requests, outcomes.count("cache_hit"), outcomes.count("cache_miss"))


@pytest.fixture
def shards(s3, make_shards):
    """Three shards in S3, and how they are read with blocks of 4 KiB and a cache in `folder`."""
    bucket, folder = s3.make_bucket()
    make_shards(folder / "all", counts=[12, 5, 9])

    def storage(cache, **section):
        return s3.section.model_copy(
            update={"cache": str(cache), "cache_free_ratio": 0, "block_bytes": BLOCK} | section
        )

    return f"{bucket}/all/", folder / "all", storage


def test_a_second_pass_over_s3_reads_no_bytes_of_shards(shards, tmp_path):
    url, folder, storage = shards
    size = sum(path.stat().st_size for path in folder.glob("*.tar"))
    first, (received, _, hits, misses) = read_all([url], storage(tmp_path / "cache"))
    assert (received, hits) == (size, 0)
    second, (received, requests, hits, missed) = read_all([url], storage(tmp_path / "cache"))
    assert second == first
    assert (received, requests) == (0, 3), "one request a shard asks for its version"
    assert (hits, missed) == (misses, 0)
    assert read_all([url], storage(""))[0] == first


def test_a_run_of_several_passes_fills_the_cache_for_its_own_later_ones(shards, tmp_path):
    url, folder, storage = shards
    keys = sorted(each.key for each in open_stream(url, passes=3, storage=storage(tmp_path / "cache")))
    assert keys == sorted(3 * [each.key for each in open_stream(folder)])
    blocks = list((tmp_path / "cache").rglob("*-*-*"))
    assert len(blocks) == sum(-(-path.stat().st_size // BLOCK) for path in folder.glob("*.tar"))


def test_a_reader_that_begins_within_a_shard_uses_and_fills_the_same_blocks(shards, tmp_path):
    url, _, storage = shards
    section = storage(tmp_path / "cache")
    whole, _ = read_all([url], section)
    begun = whole[7]
    reader = ShardReader(list_manifest([url], Store(section)), section, read_ahead=2)
    rest = list(reader.open(Piece(0, turn=0, offset=begun.start, ordinal=begun.ordinal)))
    assert rest == whole[7:12]
    assert sum(count for _, count in reader.take_traffic()) == 0


def test_samples_that_are_read_again_come_from_the_cache(shards, tmp_path):
    url, _, storage = shards
    section = storage(tmp_path / "cache")
    whole, _ = read_all([url], section)
    reader = ShardReader(list_manifest([url], Store(section)), section, read_ahead=0)
    kept = whole[3]
    assert reader.shelf._fetch(0, kept)().members == kept.members
    assert sum(count for _, count in reader.take_traffic()) == 0


def test_a_shard_that_was_replaced_is_never_served_from_the_cache(shards, tmp_path):
    url, folder, storage = shards
    section = storage(tmp_path / "cache")
    before = list_manifest([url], Store(section))
    read_all([url], section)
    path = folder / "shard-000001.tar"
    path.write_bytes(join([*samples(*range(4)), END]))
    os.utime(path, (1, 1))
    # Who has listed the old one is told; what was kept of it goes.
    reader = ShardReader(before, section, read_ahead=0)
    (lost,) = reader.open(Piece(1, turn=0))
    assert isinstance(lost, Damage)
    assert lost.reason == "changed_shard"
    items, (received, *_) = read_all([url], section)
    assert [item.key for item in items[12:16]] == [f"b/{number:03d}" for number in range(4)]
    assert received == path.stat().st_size
    path.unlink()
    assert next(reader.open(Piece(1, turn=0))).reason == "missing_shard"


def test_the_same_url_at_another_endpoint_is_another_object(tmp_path):
    here, there = (open_cache(tmp_path, 1 << 20, endpoint=endpoint) for endpoint in ("http://a", "http://b"))
    here.write(object_of(here), 0, content(1))
    assert here.read(object_of(here), 0, BLOCK) == content(1)
    assert there.read(object_of(there), 0, BLOCK) is None
    for other in ({"version": "v2"}, {"size": 9 * BLOCK}, {"block": 2 * BLOCK}):
        assert here.read(object_of(here, **other), 0, BLOCK) is None


def test_local_shards_and_those_without_a_version_are_not_kept(make_shards, tmp_path):
    make_shards(tmp_path / "all", counts=[3])
    section = StorageSection(cache=str(tmp_path / "cache"))
    read_all([str(tmp_path / "all")], section)
    assert disk_bytes(tmp_path / "cache") == 0
    assert open_cache(tmp_path, 1 << 20).of("s3://bucket/x", "", size=1, block=1) is None


@pytest.mark.parametrize("length", [1, CHUNK_BYTES - 1, CHUNK_BYTES, 3 * CHUNK_BYTES + 5])
def test_any_stretch_of_what_is_kept_is_given_exactly(tmp_path, length):
    cache = open_cache(tmp_path, 64 << 20)
    size = 2 * length + length // 2
    blocks, data = object_of(cache, size=size, block=length), os.urandom(size)
    for start in range(0, size, length):
        cache.write(blocks, start, data[start : start + length])
    cuts = sorted({0, 1, length - 1, length, length + 1, CHUNK_BYTES, 2 * length, size - 1, size})
    cuts = [cut for cut in cuts if 0 <= cut <= size]
    for start in cuts:
        for stop in cuts:
            if start < stop:
                assert cache.read(blocks, start, stop) == data[start:stop]


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-1],
        lambda data: data + b"\0",
        lambda data: b"",
        lambda data: bytes(len(data)),
        lambda data: data[:100] + bytes([data[100] ^ 1]) + data[101:],
    ],
)
def test_a_damaged_block_is_removed_and_not_served(tmp_path, damage):
    cache = open_cache(tmp_path, 1 << 20)
    blocks = object_of(cache)
    for number in (0, 1):
        cache.write(blocks, number * BLOCK, content(number + 1))
    path = next(tmp_path.rglob(blocks.name(0)))
    path.write_bytes(damage(path.read_bytes()))
    assert cache.read(blocks, 0, BLOCK) is None
    assert not path.exists()
    assert cache.read(blocks, BLOCK, 2 * BLOCK) == content(2)
    next(tmp_path.rglob(blocks.name(1))).rename(path)
    assert cache.read(blocks, 0, BLOCK) is None, "a block under another's name"


def test_the_least_recently_used_go_when_room_is_short(tmp_path, monkeypatch):
    monkeypatch.setattr(cache_module, "TOUCH_SECONDS", -1.0)
    cache = open_cache(tmp_path, 10 * (BLOCK + 4))
    blocks = object_of(cache, size=100 * BLOCK)
    for number in range(10):
        cache.write(blocks, number * BLOCK, content(number))
        os.utime(next(tmp_path.rglob(blocks.name(number))), (number, number))
    assert cache.read(blocks, 0, BLOCK) == content(0)
    cache.write(blocks, 10 * BLOCK, content(10))
    left = [number for number in range(11) if cache.read(blocks, number * BLOCK, (number + 1) * BLOCK)]
    assert {0, 10} < set(left)
    assert not {1, 2} & set(left)
    assert disk_bytes(tmp_path) <= 10 * (BLOCK + 4)


def fill(folder: Path, limit: int, process: int, count: int) -> None:
    """Write blocks that all processes share in part, read others, and check every byte that comes."""
    cache = open_cache(folder, limit)
    blocks = object_of(cache, size=1000 * BLOCK)

    def turn(step: int) -> None:
        number = (step * (process + 1)) % 200
        found = cache.read(blocks, number * BLOCK, (number + 1) * BLOCK)
        assert found in (None, content(number))
        if found is None:
            cache.write(blocks, number * BLOCK, content(number))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(turn, range(count)))


def start(function, *arguments):
    process = multiprocessing.get_context("forkserver").Process(target=function, args=arguments)
    process.start()
    return process


def test_processes_that_write_read_and_evict_at_once_stay_below_the_bound(tmp_path):
    limit = 40 * (BLOCK + 4)
    running = [start(fill, tmp_path, limit, process, 600) for process in range(2)]
    most = 0
    while any(process.is_alive() for process in running):
        most = max(most, bytes_at_once(tmp_path))
    for process in running:
        process.join()
        assert process.exitcode == 0
    assert 0 < most <= limit
    assert 0 < disk_bytes(tmp_path) <= limit


def bytes_at_once(folder):
    """Bytes of all blocks at one moment: nothing comes, goes or is renamed while the lock is held."""
    with cache_module._locked(folder / "v1"):
        return disk_bytes(folder)


def kill_writers(folder: Path) -> None:
    """Kill one writer after the other while it is at it."""
    for round_ in range(5):
        if not (writer := os.fork()):
            cache = open_cache(folder, 1 << 30)
            blocks = object_of(cache, size=1 << 30, block=1 << 20)
            while True:
                for number in range(50):
                    cache.write(blocks, number << 20, content(number, 1 << 20))
        while len(list(folder.rglob("*-*-*"))) < 5 * (round_ + 1):
            time.sleep(0.001)
        os.kill(writer, signal.SIGKILL)
        assert os.WTERMSIG(os.waitpid(writer, 0)[1]) == signal.SIGKILL


def test_a_writer_that_is_killed_leaves_nothing_torn_and_no_lock(tmp_path):
    process = start(kill_writers, tmp_path)
    process.join()
    assert process.exitcode == 0
    cache = open_cache(tmp_path, 1 << 30)
    blocks = object_of(cache, size=1 << 30, block=1 << 20)
    found = [cache.read(blocks, number << 20, (number + 1) << 20) for number in range(50)]
    assert sum(block is not None for block in found) >= 25
    assert all(block in (None, content(number, 1 << 20)) for number, block in enumerate(found))
    cache.write(blocks, 60 << 20, content(60, 1 << 20))
    assert cache.read(blocks, 60 << 20, 61 << 20) == content(60, 1 << 20)
    # What it left half written goes with the next sweep, once it is old.
    orphan = next(tmp_path.rglob(blocks.name(60))).with_name(".new-orphan")
    orphan.write_bytes(bytes(100))
    old = time.time() - 2 * cache_module.ORPHAN_SECONDS
    os.utime(orphan, (old, old))
    (tmp_path / "v1/used").write_text("")
    cache.write(blocks, 61 << 20, content(61, 1 << 20))
    assert not orphan.exists()


def test_a_full_disk_ends_caching_with_one_warning_and_nothing_else(shards, tmp_path, monkeypatch, caplog):
    url, _, storage = shards
    whole, _ = read_all([url], storage(""))

    def no_room(self, aside, size):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(BlockCache, "_reserve", no_room)
    items, (received, *_) = read_all([url], storage(tmp_path / "cache"))
    assert items == whole
    assert received > 0
    assert [record.getMessage().partition(";")[0] for record in caplog.records] == [
        "storage.cache: No space left on device"
    ]


def test_a_disk_that_others_filled_keeps_its_last_share(tmp_path, caplog):
    cache = open_cache(tmp_path, 1 << 30, free_ratio=1)
    cache.write(object_of(cache), 0, content(0))
    cache.write(object_of(cache), BLOCK, content(0))
    assert disk_bytes(tmp_path) == 0
    assert len(caplog.records) == 1
    assert "no room" in caplog.text


def test_a_cache_that_is_deleted_while_it_is_used_begins_anew(tmp_path):
    cache = open_cache(tmp_path / "cache", 1 << 20)
    cache.write(object_of(cache), 0, content(0))
    (tmp_path / "cache").rename(tmp_path / "gone")
    assert cache.read(object_of(cache), 0, BLOCK) is None
    cache.write(object_of(cache), 0, content(0))
    assert cache.read(object_of(cache), 0, BLOCK) == content(0)


def test_a_folder_that_cannot_be_used_is_refused_before_anything_is_read(shards, tmp_path):
    url, _, storage = shards
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"storage\.cache = .*cannot be used"):
        open_stream(url, storage=storage(tmp_path / "file"))
    with pytest.raises(ConfigError, match="on a disk of this machine"):
        parse_config({"storage": {"cache": "s3://bucket/cache"}})


def test_a_run_of_two_passes_fetches_shards_once_and_counts_what_the_cache_gave(
    shards, s3, tmp_path, monkeypatch
):
    url, folder, _ = shards
    metrics = Metrics()
    monkeypatch.setattr(training_run, "Metrics", lambda _: metrics)
    storage = {"cache": tmp_path / "cache", "cache_free_ratio": 0, "block_bytes": BLOCK}
    code = cli.main(
        arguments(
            run={"directory": tmp_path / "run"},
            stream={"urls": url, "passes": 2},
            storage=storage | {"endpoint_url": s3.endpoint},
            training={"batch": 8},
        )
    )
    assert code == EXIT_DONE
    value = metrics.registry.get_sample_value
    size = sum(path.stat().st_size for path in folder.glob("*.tar"))
    assert size <= value("streamswav_s3_received_bytes_total") < 1.5 * size, "not twice"
    hits, misses = (value("streamswav_cache_reads_total", {"outcome": each}) for each in ("hit", "miss"))
    assert hits > misses > 0
