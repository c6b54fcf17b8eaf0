"""`streamswav doctor` on the run and its machine: what is broken on purpose fails the right check."""

import json
import resource
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from doctor_cases import (
    case,
    config,
    look,
    of_two,
    on_s3,
    shown,
)
from meddler import meddling
from runs import TINY, arguments, run, start_ranks

from streamswav.config import load_config
from streamswav.doctor import Case, Machine
from streamswav.doctor.of_configuration import _within
from streamswav.errors import EXIT_DONE
from streamswav.launch_options import LaunchOptions
from streamswav.planning.host import batch_bytes, count_host
from streamswav.training.lease import Lease


@pytest.fixture(scope="module")
def shards(make_shards, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    make_shards(folder, counts=[40, 24])
    return folder


@pytest.fixture
def bucket(s3, shards):
    """Its URL, with good shards in it."""
    url, folder = s3.make_bucket()
    for path in shards.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return url


@pytest.fixture
def behind(s3):
    """A proxy before the S3 server."""
    with meddling(s3.endpoint) as proxy:
        yield proxy


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 1 MiB with a block of it free."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip("this user may not mount a disk")
    yield folder
    subprocess.run(["umount", folder], check=True)


# --- the run


def test_no_permission_to_write(behind, bucket):
    behind.refuse = {"PUT"}
    asked = case(on_s3(behind, f"{bucket}/", run__directory=f"{bucket}/run"))
    shown("no permission to write", asked)
    assert look(asked, "conditions").text == "builds upon writing, which failed"


def test_no_permission_to_delete(behind, bucket):
    behind.refuse = {"DELETE"}
    asked = case(on_s3(behind, f"{bucket}/", run__directory=f"{bucket}/run"))
    shown("no permission to delete", asked)


def test_a_second_place_that_cannot_be_written(shards, tmp_path):
    (tmp_path / "file").write_text("in the way")
    keys = {"run__directory": tmp_path / "run", "checkpoint__copy_to": tmp_path / "file" / "copy"}
    shown("a second copy that cannot be written", case(config(stream__urls=shards, **keys)))


def test_conditions_on_writes(s3, behind, bucket, tmp_path):
    directory = {"run__directory": f"{bucket}/run"}
    shown("no conditional writes", case(on_s3(s3, f"{bucket}/", **directory)))
    behind.conditions = True
    assert look(case(on_s3(behind, f"{bucket}/", **directory)), "conditions").status == "pass"
    assert look(case(config(run__directory=tmp_path / "run")), "conditions").status == "pass"


def test_a_run_that_is_held_by_another(tmp_path):
    asked = case(config(run__directory=tmp_path / "run"))
    lease = Lease(str(tmp_path / "run"), asked.store, seconds=1.0)
    lease.acquire()
    try:
        shown("a run that another process writes to", asked)
        of_the_same_run = case(asked.given, launch=of_two(node=1))
        assert look(of_the_same_run, "holder").text == "node 0 looks, since it is the one that writes"
    finally:
        lease.release()
    assert look(asked, "holder").text == "nobody writes to the run"


def test_a_holder_who_is_gone_is_no_hindrance(tmp_path):
    asked = case(config(run__directory=tmp_path / "run"))
    lease = Lease(str(tmp_path / "run"), asked.store, seconds=0.6)
    lease.acquire()
    silent = replace(lease._held[0], host="another-pod", token="another")
    lease.release()
    asked.store.write(lease.url, silent.to_bytes())
    found = look(asked, "holder")
    assert found.status == "pass"
    assert "another-pod" in found.text
    assert "takes over" in found.text


def test_what_the_folder_holds(shards, tmp_path):
    place = {"urls": str(shards)}
    given = arguments(stream=place, run={"directory": str(tmp_path / "run")}, training={"images": 32})
    assert run(given, tmp_path / "log").code == EXIT_DONE
    keys = {"stream__urls": shards, "run__directory": tmp_path / "run", "training__images": 32}
    found = look(case(config(**keys)), "run")
    assert found.status == "pass"
    assert "to be continued, from step 2 (32 images)" in found.text
    assert look(case(config(**keys)), "listing", "run", "settings").status == "pass"
    other = config(**{**keys, "training__batch": "8"})
    shown("another batch than the run began with", case(other))
    wider = config(**{**keys, "model__width": "0.25"})
    shown("another model than the run's", case(wider), "listing", "run")
    assert look(case(config(**{**keys, "run__directory": tmp_path / "new"})), "run").text.endswith(
        "a new run"
    )


def test_a_batch_that_the_ranks_cannot_share(shards):
    asked = case(config(stream__urls=shards), launch=LaunchOptions(ranks="3"))
    shown("a batch that the ranks cannot share", asked, "listing")


def test_fewer_samples_than_a_batch(make_shards, tmp_path):
    make_shards(tmp_path, counts=[4])
    stats = {"shards": {"shard-000000.tar": {"samples": 4}}}
    (tmp_path / "_stats.json").write_text(json.dumps(stats))
    shown("fewer samples than a batch", case(config(stream__urls=tmp_path)), "listing")


def test_memory_that_does_not_do_for_the_lanes(shards):
    asked = case(config(stream__urls=shards, stream__memory=100_000))
    shown("too little stream.memory for the lanes", asked, "listing")


def test_a_disk_without_room_for_checkpoints(shards, small_disk):
    wide = config(stream__urls=shards, run__directory=small_disk / "run", model__width=1)
    shown("a disk without room for a checkpoint", case(wide))


def test_a_cache_on_a_full_disk(small_disk):
    (small_disk / "full").write_bytes(bytes(900_000))
    shown("a cache on a full disk", case(config(storage__cache=small_disk / "cache")))


def test_a_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    shown("a cache that cannot be written", case(config(storage__cache=tmp_path / "file" / "cache")))


# --- the machine


def test_shared_memory_that_is_too_small(shards, small_disk):
    asked = case(
        config(stream__urls=shards, loader__workers=2, training__batch=512, stream__columns="null"),
        machine=Machine(shm=small_disk),
    )
    shown("64 MB of /dev/shm where more is needed", asked)
    there, gone = tmp_machine(asked, small_disk.parent), tmp_machine(asked, small_disk / "none")
    assert look(there, "shm").status == "pass"
    assert look(gone, "shm").text == f"{small_disk / 'none'} is not there"


def tmp_machine(asked, folder):
    return replace_case(asked, machine=Machine(shm=folder))


def replace_case(asked, **parts):
    return Case(command=asked.command, given=asked.given, **parts)


def test_what_is_counted_for_shared_memory_is_the_batches_own_size():
    given = config(training__batch=64, crops__sizes="[64, 32]", crops__counts="[2, 6]")
    assert batch_bytes(given, 2) == 32 * 3 * (2 * 64 * 64 + 6 * 32 * 32)


@pytest.mark.all
def test_what_is_counted_for_a_machine_is_more_than_a_run_takes_and_not_much(make_shards, tmp_path):
    # With few samples a step is a pass, and has loader processes of its own.
    make_shards(tmp_path / "shards", counts=[1600] * 4)
    keys = {"loader.workers": "2", "training.batch": "64", "crops.sizes": "[32, 16]", "stream.columns": "4"}
    place = [
        "--stream.urls",
        str(tmp_path / "shards"),
        "--run.directory",
        str(tmp_path / "run"),
        "--stream.passes",
        "1000",
    ]
    words = ["pretrain", *(word for key, value in {**TINY, **keys}.items() for word in (f"--{key}", value))]
    need = count_host(load_config(None, {}, [*words[1:], *place]), world_size=2, ranks=2, cores=2, cuda=False)
    most = [0, 0, 0]
    with start_ranks(2, [*words, *place], tmp_path / "log", launcher=[], script=True) as running:
        running.wait_until(lambda so_far: len(so_far.of("progress")) > 3)
        for _ in range(5):
            found = [*filter(None, (looked_at(each.pid) for each in running.members()))]
            files, tasks, memory = zip(*found, strict=True)
            now = max(files), sum(tasks), sum(memory)
            most = list(map(max, most, now))
    assert most[0] <= need.files
    assert need.tasks / 4 < most[1] <= need.tasks
    assert sum(need.memory.values()) / 3 < most[2] <= sum(need.memory.values())


def looked_at(pid):
    """Open files, threads and bytes (shared pages by their share) of a process; None: it is gone.

    Pages of programs and libraries do not count: whoever is at its limit gets them back from the kernel.
    """
    proc = Path(f"/proc/{pid}")
    try:
        sizes = dict(line.split()[:2] for line in (proc / "smaps_rollup").read_text().splitlines()[1:])
        pages = int(sizes["Pss_Anon:"]) + int(sizes["Pss_Shmem:"])
        return len(list((proc / "fd").iterdir())), len(list((proc / "task").iterdir())), 1024 * pages
    except (FileNotFoundError, ProcessLookupError):
        return None


def test_few_open_files(shards):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    asked = case(config(stream__urls=shards, loader__workers=2))
    assert look(asked, "files").status == "pass"
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, hard))
    try:
        shown("ulimit -n 100", asked)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def group(folder, own="0::/", **files):
    """A machine whose control groups are files below a folder."""
    (folder / "proc" / "self").mkdir(parents=True)
    (folder / "proc" / "self" / "cgroup").write_text(own + "\n")
    for name, text in files.items():
        file = folder / "cgroup" / name.replace("__", "/").replace("-", ".")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")
    return Machine(cgroup=folder / "cgroup", proc=folder / "proc")


@pytest.mark.parametrize(
    ("own", "files"),
    [
        ("0::/", {"memory-max": 256 << 20}),
        ("0::/pod/main", {"memory-max": "max", "pod__memory-max": 256 << 20}),
        (
            "4:memory:/pod",
            {"memory__memory-limit_in_bytes": 1 << 62, "memory__pod__memory-limit_in_bytes": 1 << 28},
        ),
    ],
)
def test_a_memory_limit_below_what_is_needed(shards, tmp_path, own, files):
    machine = group(tmp_path, own, **{name.replace(".", "-"): text for name, text in files.items()})
    assert machine.memory().amount == 256 << 20
    given = config(stream__urls=shards, loader__workers=2)
    found = shown("a memory limit of 256 MiB", case(given, machine=machine))
    assert found.remedy.endswith("or lower the number of ranks")  # the largest part's lever


def test_budgets_beyond_the_memory_limit(shards, tmp_path):
    machine = group(tmp_path, **{"memory-max": 3 << 30})
    asked = case(config(stream__urls=shards, loader__workers=2), machine=machine)
    shown("stream.memory of all workers beyond the limit", asked)
    less = config(stream__urls=shards, loader__workers=2, stream__memory=64 << 20)
    assert look(case(less, machine=machine), "memory").status == "pass"


def test_few_processes(shards, tmp_path):
    machine = group(tmp_path, **{"pids-max": 20})
    shown("pids.max of 20", case(config(stream__urls=shards, loader__workers=2), machine=machine))


@pytest.mark.parametrize(
    ("own", "files"),
    [
        ("0::/", {"cpu-max": "100000 100000"}),
        ("1:cpu:/", {"cpu__cpu-cfs_quota_us": 100000, "cpu__cpu-cfs_period_us": 100000}),
    ],
)
def test_a_quota_of_one_core(shards, tmp_path, own, files):
    asked = case(config(stream__urls=shards, loader__workers=2), machine=group(tmp_path, own, **files))
    shown("a quota of one core for two loader processes", asked)


def test_without_limits_it_is_the_machines_own(tmp_path):
    (tmp_path / "self").mkdir()
    (tmp_path / "self" / "cgroup").write_text("0::/\n")
    (tmp_path / "meminfo").write_text("MemTotal: 8000 kB\nMemAvailable:    4000 kB\n")
    machine = Machine(cgroup=tmp_path, proc=tmp_path)
    assert machine.memory().amount == 4000 * 1024
    assert machine.cores().source == "affinity"
    assert machine.tasks() is None


def test_no_scratch_space():
    shown("a read-only /tmp", case(machine=Machine(scratch=Path("/proc"))))


def test_versions_outside_the_tested_ranges(tmp_path, monkeypatch):
    info = tmp_path / "webdataset-9.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: webdataset\nVersion: 9.0\n")
    assert look(case(), "versions").status == "pass"
    monkeypatch.syspath_prepend(tmp_path)
    shown("a version outside the tested range", case())


@pytest.mark.parametrize(
    ("version", "wanted", "expected"),
    [
        ("2.6", ">=2.6,<3", True),
        ("2.14.1+cu130", ">=2.6,<3", True),
        ("3.0", ">=2.6,<3", False),
        ("2.5.9", ">=2.6,<3", False),
        ("2.14.1", "==2.14.1", True),
        ("2.14.0", "==2.14.1", False),
        ("1", "", True),
    ],
)
def test_a_version_is_within_a_range(version, wanted, expected):
    assert _within(version, wanted) is expected
