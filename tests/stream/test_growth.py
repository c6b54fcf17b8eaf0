"""A stream that is followed: shards that come later are trained, the run waits, drains and ends as asked."""

import json
import shutil
import signal
from collections import Counter

import pytest
from runs import arguments, newest, run, start

from streamswav.errors import EXIT_CONFIG, EXIT_DONE, EXIT_RETRY
from streamswav.stream.manifest import Manifest, list_manifest
from streamswav.stream.position import Position
from streamswav.stream.store import Store
from streamswav.training.growth import Growth

COUNTS = [30, 21, 17, 40, 9]


@pytest.fixture
def bucket(make_shards, tmp_path):
    """A function that lets the next shards arrive in the folder that is read."""
    waiting = make_shards(tmp_path / "coming", counts=COUNTS)
    (tmp_path / "shards").mkdir()

    def arrive(count):
        for _ in range(count):
            path = waiting.pop(0)
            path.rename(tmp_path / "shards" / path.name)

    return tmp_path / "shards", arrive


def command(shards, directory, **stream):
    follow = {"urls": shards, "follow": "true", "follow_seconds": 0.2, **stream}
    return arguments(run={"directory": directory}, stream=follow, telemetry={"log_seconds": 0.0001})


def waits(times=1):
    return lambda so_far: len(so_far.of("waiting")) == times


def read_position(directory):
    return Position.from_json(json.loads((newest(directory) / "position.json").read_text()))


def test_new_shards_are_trained_and_the_run_waits_drains_and_ends(bucket, tmp_path):
    shards, arrive = bucket
    arrive(2)
    directory = tmp_path / "run"
    with start(command(shards, directory), tmp_path / "first") as running:
        running.wait_until(waits())
        arrive(2)
        running.wait_until(lambda so_far: so_far.of("grown") and waits(2)(so_far))
        running.signal(signal.SIGTERM)
        drained = running.wait(30)
    assert drained.code == EXIT_RETRY, drained.err
    position = read_position(directory)
    assert position.trained == sum(COUNTS[:4]) // 16 * 16
    assert position.generation >= 1
    arrive(1)
    ended = run(command(shards, directory, follow_idle_seconds=1), tmp_path / "last")
    assert ended.code == EXIT_DONE, ended.err
    stream = json.loads(ended.out)["stream"]
    assert stream["trained"] == sum(COUNTS) // 16 * 16
    assert stream["trained"] + stream["left"] == sum(COUNTS)
    manifest = Manifest.from_json(json.loads((directory / "manifest.json").read_text()))
    assert [shard.key for shard in manifest.shards[-1:]] == ["shard-000004.tar"]
    assert sum(manifest.parts) == 5
    assert read_position(directory).manifest == manifest.digest
    audited = run(["audit", str(directory), "--recount"], tmp_path / "audit")
    assert audited.code == EXIT_DONE, audited.out


def test_a_run_that_is_killed_after_it_grew_goes_on_with_what_joined(bucket, tmp_path):
    shards, arrive = bucket
    arrive(2)
    directory = tmp_path / "run"
    with start(command(shards, directory), tmp_path / "first") as running:
        running.wait_until(waits())
        arrive(2)
        running.wait_until(lambda so_far: so_far.of("grown"))
        running.kill()
    shutil.rmtree(tmp_path / "coming")
    ended = run(command(shards, directory, follow="false"), tmp_path / "last")
    assert ended.code == EXIT_DONE, ended.err
    stream = json.loads(ended.out)["stream"]
    assert stream["trained"] + stream["left"] == sum(COUNTS[:4])
    assert stream["left"] < 16


def test_a_run_that_does_not_follow_leaves_new_shards_and_says_so(bucket, tmp_path):
    shards, arrive = bucket
    arrive(3)
    given = arguments(run={"directory": tmp_path / "run"}, stream={"urls": shards})
    assert run([*given, "--training.images", "32"], tmp_path / "first").code == EXIT_DONE
    arrive(1)
    ended = run(given, tmp_path / "last")
    assert ended.code == EXIT_DONE, ended.err
    assert "1 shards came after the run began" in ended.of("new_shards")[0]["message"]
    assert json.loads(ended.out)["stream"]["trained"] == sum(COUNTS[:3]) // 16 * 16


def test_several_passes_and_a_growing_stream_exclude_each_other(tmp_path):
    refused = run(command(tmp_path, tmp_path / "run", passes=2), tmp_path)
    assert refused.code == EXIT_CONFIG
    assert "stream.follow = True: a stream that is followed goes by once" in refused.err


def test_a_local_shard_joins_once_nobody_writes_it_any_more(make_shards, tmp_path):
    shards = tmp_path / "shards"
    make_shards(shards, counts=[3])
    store, now = Store(), [0.0]
    growth = Growth(
        [str(shards)],
        store,
        list_manifest([str(shards)], store),
        str(tmp_path / "manifest.json"),
        seconds=10,
        idle_seconds=5,
        clock=lambda: now[0],
    )
    assert growth.take() is None
    (new,) = make_shards(tmp_path / "other", counts=[4])
    data = new.read_bytes()
    found = []
    for part in (100, 5000, len(data), len(data), len(data)):
        target = shards / "shard-000009.tar"
        if not target.exists() or target.stat().st_size != part:
            target.write_bytes(data[:part])
        assert growth.take() is None, "it looks again only after the interval"
        now[0] += 10
        taken = growth.take()
        found.append(taken and [(shard.key, shard.size) for shard in taken[0]])
    assert found == [None, None, None, [("shard-000009.tar", len(data))], None]
    assert not growth.given_up(4.9)
    assert growth.given_up(5)


def test_the_manifest_of_a_run_names_every_shard_once(bucket, tmp_path):
    shards, arrive = bucket
    arrive(2)
    store = Store()
    growth = Growth(
        [f"file://{shards}"],
        store,
        list_manifest([f"file://{shards}"], store),
        str(tmp_path / "manifest.json"),
        seconds=0,
        idle_seconds=None,
    )
    for _ in range(3):
        arrive(1)
        assert growth.take() is None
        assert len(growth.take()[0]) == 1
    manifest = Manifest.from_json(json.loads((tmp_path / "manifest.json").read_text()))
    assert set(Counter(shard.key for shard in manifest.shards).values()) == {1}
    assert manifest.parts == (2, 1, 1, 1)
    assert not growth.given_up(1e9)
