"""Saving on bad days: writers that are killed, stopped or doubled, full disks, storage that is gone."""

import contextlib
import hashlib
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from runs import (
    arguments,
    differences,
    free_port,
    newest,
    run,
    scrape_text,
    start,
    start_ranks,
    state_of,
    values_of,
)

from streamswav.errors import EXIT_CONFIG, EXIT_DONE, EXIT_RETRY

sys.path.append(str(Path(__file__).parents[2] / "ops" / "benchmarks"))
from fault_proxy import FaultProxy

SAMPLES = 16 * 12


@pytest.fixture(scope="module")
def shards(make_shards, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    make_shards(folder, counts=[40, 60, 50, SAMPLES - 150])
    return folder


@pytest.fixture(scope="module")
def command(shards):
    """Arguments of a run of twelve steps a pass that saves every third."""

    def build(directory, *, passes=1, port=0, storage=None, **checkpoint):
        return arguments(
            run={"directory": directory},
            stream={"urls": shards, "passes": passes},
            swav={"queue_length": 32, "queue_start_images": 0},
            storage=storage or {},
            checkpoint={"images": 48, **checkpoint},
            telemetry={"port": port},
        )

    return build


@pytest.fixture(scope="module")
def whole(command, tmp_path_factory):
    """The folder of a run that nobody disturbed and that keeps all its checkpoints."""
    folder = tmp_path_factory.mktemp("whole")
    outcome = run(command(folder / "run", keep=100), folder)
    assert outcome.code == EXIT_DONE, outcome.err
    return folder / "run"


@pytest.fixture
def slow(s3):
    """A proxy before the S3 server that meets writes, too; a stall lasts until the test is over."""
    with FaultProxy(s3.endpoint, writes=True, stall_seconds=600) as running:
        yield running


def outage(text):
    return [event for event in text.of("warning") if "could not be written" in event["message"]]


def same_state(one, other):
    """Whether two checkpoints' tensors are equal to the bit."""
    loaded = [[torch.load(each / name, weights_only=True) for each in (one, other)] for name in FILES]
    return all(str(a) == str(b) and _equal(a, b) for a, b in loaded)


FILES = ("model.pt", "ranks.pt")


def _equal(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_equal, one, other))
    return bool(one == other)


# Writing in the background.


def test_a_checkpoint_holds_the_state_of_its_step_though_training_went_on(s3, slow, command, whole, tmp_path):
    """The first one's upload takes until steps later; then what it holds is that of an undisturbed run."""
    url, folder = s3.make_bucket()
    storage = {"endpoint_url": slow.url, "timeout_seconds": 1}
    slow.plan(*[None] * 12, *[("stall", 0)] * 3)
    build = command(f"{url}/run", storage=storage, keep=100, passes=1)
    outcome = run(build, tmp_path)
    assert outcome.code == EXIT_DONE, outcome.err
    names = [event["event"] for event in outcome.events if event["event"] in ("progress", "checkpoint")]
    steps = [event["step"] for event in outcome.of("checkpoint")]
    assert steps[0] == 3
    assert names.index("checkpoint") > 4, "nothing was trained while it was written"
    for step in steps:
        name = f"step-{step:09d}"
        if (whole / "checkpoints" / name).is_dir():
            assert same_state(folder / "run" / "checkpoints" / name, whole / "checkpoints" / name)
    assert differences(state_of(folder / "run"), state_of(whole)) == []


def test_a_run_killed_in_an_upload_goes_on_from_the_checkpoint_before(s3, slow, command, whole, tmp_path):
    url, folder = s3.make_bucket()
    storage = {"endpoint_url": slow.url, "timeout_seconds": 300}
    again = command(f"{url}/run", storage=storage, passes=1000, keep=1)
    with start(again, tmp_path / "first") as running:
        running.wait_until(lambda so_far: so_far.of("checkpoint"))
        slow.plan(*[("stall", 0)] * 1000)
        running.wait_until(lambda so_far: slow.injected["stall"])
        running.signal(signal.SIGKILL)
        ended = running.wait()
    last = ended.of("checkpoint")[-1]["step"]
    assert newest(folder / "run").name == f"step-{last:09d}"
    assert (newest(folder / "run") / "checkpoint.json").is_file()
    final = command(f"{url}/run", storage={"endpoint_url": s3.endpoint}, keep=100)
    with start(final, tmp_path / "second") as running:
        outcome = running.wait()
    assert outcome.code == EXIT_DONE, outcome.err
    assert outcome.of("resumed")[0]["step"] == last
    assert outcome.of("lease") == []


# Failures.


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 3 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip("a file system cannot be mounted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_is_told_and_tried_again_until_there_is_room(command, small_disk, tmp_path):
    port = free_port()
    again = command(small_disk / "run", passes=10_000, keep=1, port=port)
    with start(again, tmp_path / "out") as running:
        running.wait_until(lambda so_far: so_far.of("checkpoint"))
        with contextlib.suppress(OSError), (small_disk / "big").open("wb", buffering=0) as file:
            while file.write(bytes(16384)):
                pass
        before = newest(small_disk / "run")
        full = running.wait_until(outage)
        assert "No space left on device" in outage(full)[0]["message"]
        assert (before / "checkpoint.json").is_file()
        failed = values_of(scrape_text(port))['streamswav_checkpoints_total{outcome="failed"}']
        assert failed >= 1
        (small_disk / "big").unlink()
        saved = len(running.so_far().of("checkpoint"))
        running.wait_until(lambda so_far: len(so_far.of("checkpoint")) > saved)
        running.signal(signal.SIGTERM)
        ended = running.wait()
    assert ended.code == EXIT_RETRY
    assert newest(small_disk / "run").name == f"step-{ended.of('checkpoint')[-1]['step']:09d}"
    kept = (small_disk / "run" / "checkpoints").glob("step-*/*")
    assert {file.parent for file in kept} == {newest(small_disk / "run")}


def test_an_outage_of_the_storage_is_told_and_tried_again_until_it_is_back(s3, slow, command, tmp_path):
    url, folder = s3.make_bucket()
    storage = {"endpoint_url": slow.url, "deadline_seconds": 1, "timeout_seconds": 1}
    with start(command(f"{url}/run", passes=10_000, storage=storage), tmp_path / "out") as running:
        running.wait_until(lambda so_far: so_far.of("checkpoint"))
        slow.pause()
        running.wait_until(outage)
        slow.resume()
        saved = len(running.so_far().of("checkpoint"))
        running.wait_until(lambda so_far: len(so_far.of("checkpoint")) > saved)
        running.signal(signal.SIGTERM)
        ended = running.wait()
    assert ended.code == EXIT_RETRY
    assert ended.said[-1].startswith("streamswav: drained")
    assert newest(folder / "run").name == f"step-{ended.of('checkpoint')[-1]['step']:09d}"


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.all), 2])
def test_without_a_checkpoint_for_too_long_all_ranks_end_with_what_was_tried(
    s3, slow, command, tmp_path, ranks
):
    url, folder = s3.make_bucket()
    storage = {"endpoint_url": slow.url, "deadline_seconds": 1, "timeout_seconds": 1}
    build = command(f"{url}/run", passes=10_000, storage=storage, deadline_seconds=3)
    with start_ranks(ranks, build, tmp_path / "out") as running:
        running.wait_until(lambda so_far: so_far.of("checkpoint"))
        slow.pause()
        ended = running.wait()
    assert ended.code == EXIT_RETRY
    assert "no checkpoint could be written for" in ended.said[-1]
    assert "tries; the last time:" in ended.said[-1]
    assert newest(folder / "run").name == f"step-{ended.of('checkpoint')[-1]['step']:09d}"


def test_a_place_that_cannot_be_written_from_the_start_ends_the_run_at_once(command, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").write_text("in the way")
    outcome = run(command(tmp_path / "run", passes=10_000), tmp_path / "out")
    assert outcome.code == EXIT_CONFIG
    assert "checkpoints" in outcome.said[-1]


def test_a_checkpoint_of_another_sample_order_is_refused(command, whole, tmp_path):
    """Whole, but by a version that dealt the samples in another order."""
    shutil.copytree(whole, tmp_path / "run")
    folder = newest(tmp_path / "run")
    data = json.dumps(json.loads((folder / "position.json").read_text()) | {"order_version": 1}).encode()
    (folder / "position.json").write_bytes(data)
    listing = json.loads((folder / "checkpoint.json").read_text())
    listing["files"]["position.json"] = [len(data), hashlib.sha256(data).hexdigest()]
    (folder / "checkpoint.json").write_text(json.dumps(listing))
    outcome = run(command(tmp_path / "run"), tmp_path / "out")
    assert outcome.code == EXIT_CONFIG
    assert "finish the pass with the version that began it" in outcome.said[-1]


# One writer.


def test_a_second_run_in_the_same_folder_is_refused_by_the_name_of_the_first(command, tmp_path):
    build = command(tmp_path / "run", passes=10_000, lease_seconds=6)
    with start(build, tmp_path / "first") as first:
        first.wait_until(lambda so_far: so_far.of("checkpoint"))
        second = run(build, tmp_path / "second")
        assert second.code == EXIT_CONFIG
        assert "another run writes here" in second.said[-1]
        assert f"process {first.pid}," in second.said[-1]
        saved = len(first.so_far().of("checkpoint"))
        first.wait_until(lambda so_far: len(so_far.of("checkpoint")) > saved)
        first.signal(signal.SIGTERM)
        assert first.wait().code == EXIT_RETRY
    assert not (tmp_path / "run" / "lease.json").exists()


def test_a_stopped_writer_that_was_succeeded_ends_and_leaves_everything_as_it_is(command, tmp_path):
    build = command(tmp_path / "run", passes=10_000, lease_seconds=1)
    with start(build, tmp_path / "first") as first, start_after(first, build, tmp_path) as second:
        second.wait_until(lambda so_far: len(so_far.of("checkpoint")) > 1)
        second.signal(signal.SIGTERM)
        ended = second.wait()
        assert ended.code == EXIT_RETRY
        assert "taken over" in ended.of("lease")[-1]["message"]
        before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
        first.signal(signal.SIGCONT)
        woken = first.wait()
    assert woken.code == EXIT_CONFIG
    assert "the lease was removed" in woken.said[-1]
    after = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert {path: data for path, data in after.items() if path in before} == before
    assert newest(tmp_path / "run").name == f"step-{ended.of('checkpoint')[-1]['step']:09d}"


def start_after(first, build, folder):
    """Start the same run again once the first has saved and is stopped."""
    first.wait_until(lambda so_far: so_far.of("checkpoint"))
    first.signal(signal.SIGSTOP)
    return start(build, folder / "second")


# A second place.


def test_a_run_goes_on_from_its_copy_as_from_itself(s3, command, whole, tmp_path):
    url, folder = s3.make_bucket()
    storage = {"endpoint_url": s3.endpoint}
    build = [*command(tmp_path / "run", storage=storage, copy_to=f"{url}/copy"), "--training.images", "96"]
    outcome = run(build, tmp_path / "first")
    assert outcome.code == EXIT_DONE, outcome.err
    assert outcome.of("warning") == []
    shutil.rmtree(tmp_path / "run")
    assert not (folder / "copy" / "lease.json").exists()
    again = run(command(f"{url}/copy", storage=storage), tmp_path / "second")
    assert again.code == EXIT_DONE, again.err
    assert again.of("resumed")[0]["step"] == 6
    assert run(["audit", f"{url}/copy", "--storage.endpoint_url", s3.endpoint], tmp_path / "audit").code == 0


def test_a_second_place_that_fails_is_a_warning(command, tmp_path):
    (tmp_path / "copy").write_text("in the way")
    build = command(tmp_path / "run", copy_to=tmp_path / "copy")
    outcome = run(build, tmp_path / "out")
    assert outcome.code == EXIT_DONE, outcome.err
    assert "is behind: " in outcome.of("warning")[0]["message"]


def test_a_second_place_within_the_first_is_refused(command, tmp_path):
    outcome = run(command(tmp_path / "run", copy_to=tmp_path / "run" / "copy"), tmp_path / "out")
    assert outcome.code == EXIT_CONFIG
    assert "checkpoint.copy_to" in outcome.said[-1]
