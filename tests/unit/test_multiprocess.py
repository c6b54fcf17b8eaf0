"""Values that real processes keep in one folder: what stays, what goes with them, and how many files."""

import os
import signal
import subprocess
import sys

import pytest

from streamswav.heartbeat import METRICS_VARIABLE
from streamswav.telemetry.families import FAMILIES, PREFIX
from streamswav.telemetry.metrics import Metrics, Role
from streamswav.telemetry.multiprocess import FILE_BYTES, collected_registry, forget_dead

READER = """
import sys, time
from streamswav.telemetry.metrics import Metrics, Role
metrics = Metrics(Role[sys.argv[1]])
metrics.add("s3_requests_total", 2, "ok")
metrics.observe("s3_request_duration_seconds", 0.02)
metrics.choose("dataloader_workers", "busy", ("busy", "waiting"))
metrics.set("loss", 4.5)
print("there", flush=True)
time.sleep(600 if sys.argv[2:] else 0)
"""


@pytest.fixture
def start(tmp_path):
    """Start a process that counts two requests, and return once it has; with `live` it stays."""
    running = []

    def begin(role="LOADER", *, live=False):
        process = subprocess.Popen(
            [sys.executable, "-c", READER, role, *(["live"] if live else [])],
            env={**os.environ, METRICS_VARIABLE: str(tmp_path)},
            stdout=subprocess.PIPE,
            text=True,
        )
        running.append(process)
        assert process.stdout.readline() == "there\n"
        if not live:
            assert process.wait() == 0
        return process

    yield begin
    for process in running:
        process.kill()
        process.wait()
        process.stdout.close()


def sample(folder, name, **labels):
    return collected_registry(folder).get_sample_value(f"streamswav_{name}", labels)


def requests(folder):
    return sample(folder, "s3_requests_total", outcome="ok")


def test_counts_outlive_their_process_and_files_do_not_grow_with_processes(start, tmp_path):
    start()
    files = len(list(tmp_path.glob("*.db")))
    for _ in range(3):
        start()
    assert requests(tmp_path) == 8
    assert sample(tmp_path, "s3_request_duration_seconds_count") == 4
    assert len(list(tmp_path.glob("*.db"))) <= files
    first, second = start(live=True), start(live=True)
    assert requests(tmp_path) == 12
    assert len(list(tmp_path.glob("*.db"))) <= 2 * files
    for process in (first, second):
        process.send_signal(signal.SIGKILL)
        process.wait()
    start()
    assert requests(tmp_path) == 14
    assert len(list(tmp_path.glob("*.db"))) <= 2 * files


def test_a_file_that_is_being_made_hides_no_other(start, tmp_path):
    start()
    (tmp_path / "counter_7.db").touch()
    assert requests(tmp_path) == 2


def test_gauges_of_the_living_go_with_a_process_that_is_killed(start, tmp_path):
    processes = [start(live=True), start(live=True)]
    assert sample(tmp_path, "dataloader_workers", state="busy") == 2
    processes[0].send_signal(signal.SIGKILL)
    processes[0].wait()
    assert sample(tmp_path, "dataloader_workers", state="busy") == 1
    start()  # it takes the number of the one that was killed, and leaves it again
    assert sample(tmp_path, "dataloader_workers", state="busy") == 1


def test_what_is_another_process_to_tell_is_not_exported(start, tmp_path):
    start("RANK")
    assert sample(tmp_path, "loss") is None
    assert sample(tmp_path, "nonfinite_steps_total") is None
    start("LEADER")
    assert sample(tmp_path, "loss") == 4.5
    assert requests(tmp_path) == 4


def test_known_labels_are_there_from_the_start_and_every_family_with_its_help(start, tmp_path):
    start("ALONE", live=True)
    families = {family.name: family for family in collected_registry(tmp_path).collect()}
    for family in FAMILIES.values():
        exported = families[PREFIX + family.name.removesuffix("_total")]
        assert (exported.documentation, exported.type) == (family.text, family.kind)
        known = [values for values in family.labels.values() if values]
        if known and len(family.labels) == 1:
            (label,) = family.labels
            assert {each.labels[label] for each in exported.samples} == {*known[0]}, family.name


def test_what_dead_processes_left_in_a_users_folder_is_removed(start, tmp_path):
    (tmp_path / "counter_1234.db").write_bytes(bytes(100))  # somebody else's
    start()
    living = start(live=True)
    start()
    forget_dead(tmp_path, counts=True)
    assert requests(tmp_path) == 4, "what the living one took over and counted stays"
    living.kill()
    living.wait()
    forget_dead(tmp_path, counts=True)
    assert requests(tmp_path) is None
    assert [path.name for path in tmp_path.glob("*.db")] == ["counter_1234.db"]


def test_room_on_the_disk_is_taken_at_once(start, tmp_path):
    start()
    for path in tmp_path.glob("*_0.db"):
        assert path.stat().st_blocks * 512 >= FILE_BYTES, "a page without room would be a bus error"


def test_without_a_folder_values_stay_in_the_registry_that_is_given(monkeypatch):
    monkeypatch.delenv(METRICS_VARIABLE, raising=False)
    metrics = Metrics(Role.ALONE)
    metrics.add("s3_requests_total", 3, "throttled")
    value = metrics.registry.get_sample_value("streamswav_s3_requests_total", {"outcome": "throttled"})
    assert value == 3
    with pytest.raises(KeyError):
        metrics.add("no_such_total")


def test_readings_are_taken_where_there_is_a_family_for_them():
    metrics = Metrics()
    metrics.note({"rankme": 12.0, "gradient_norm/trunk": 0.5, "unheard_of": 1.0, "loss": float("nan")})
    value = metrics.registry.get_sample_value
    assert value("streamswav_rankme") == 12
    assert value("streamswav_gradient_norm", {"part": "trunk"}) == 0.5
    assert value("streamswav_loss") == 0
