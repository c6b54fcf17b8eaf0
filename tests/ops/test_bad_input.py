"""What cannot work ends with an exit code that says whether to restart, and a line that says what to do."""

import json
import os
import pty
import re
import shutil
import signal
import socket
from pathlib import Path

import pytest
from conftest import encode_image
from runs import arguments, run, start, start_ranks

from streamswav.errors import EXIT_CONFIG, EXIT_FAILED, EXIT_RETRY


@pytest.fixture(scope="module")
def shards(make_shards, tmp_path_factory):
    """A folder of 40 samples, uncounted."""
    folder = tmp_path_factory.mktemp("shards")
    make_shards(folder, counts=[12, 16, 12])
    return folder


@pytest.fixture
def given(shards, tmp_path):
    """Arguments of a run that would work, with what the test changes about it."""

    def build(**sections):
        base = {"run": {"directory": tmp_path / "run"}, "stream": {"urls": shards}}
        names = {*base, *sections}
        return arguments(**{name: base.get(name, {}) | sections.get(name, {}) for name in sorted(names)})

    return build


def the_line(outcome, code=EXIT_CONFIG):
    """The one line for people, after the checks that hold for every failure."""
    assert outcome.code == code, (outcome.code, outcome.err)
    assert "Traceback" not in outcome.err + outcome.out
    assert outcome.out == ""
    (line,) = outcome.said
    assert line.startswith("streamswav: ")
    return line


def refused(given_arguments, folder, *parts, code=EXIT_CONFIG, **options):
    """Run it and look for all parts in the line."""
    line = the_line(run(given_arguments, folder, **options), code)
    assert all(part in line for part in parts), line


def test_the_configuration(given, tmp_path):
    def check(*parts, script=False, extra=(), **sections):
        refused([*given(**sections), *extra], tmp_path / "out", *parts, script=script)

    check("swav.epsilom", "swav.epsilon", script=True, swav={"epsilom": 1})
    check("none.yaml", "no such file", extra=["--config", str(tmp_path / "none.yaml")])
    check("stream.urls", "s3://bucket/", stream={"urls": "[]"})
    check("model.trunk", "resnet51", "resnet50", model={"trunk": "resnet51"})
    check("swav.queue_length", "10", "16", swav={"queue_length": 10})
    check("stream.columns", "5", "16", stream={"columns": 5})
    check("stream.rows", "3", "2", stream={"rows": 3}, loader={"workers": 2})
    check("training.device", "CUDA", "cpu", training={"device": "cuda"})


def test_no_directory_for_the_run(shards, tmp_path):
    refused(arguments(stream={"urls": shards}), tmp_path, "run.directory", "runs/first")


def test_nothing_is_left_of_a_run_that_did_not_begin(given, tmp_path):
    place = tmp_path / "runs" / "first"
    refused(given(stream={"urls": tmp_path / "none"}, run={"directory": place}), tmp_path / "out", "none")
    assert not (tmp_path / "runs").exists()


def test_an_output_that_cannot_be_written(given, tmp_path):
    (tmp_path / "file").write_text("")
    refused(given(run={"directory": tmp_path / "file" / "run"}), tmp_path / "out", "file/run", "written")


def test_too_few_samples(given, make_shards, tmp_path):
    make_shards(tmp_path / "few", counts=[5, 6])
    few = given(stream={"urls": tmp_path / "few"})
    refused(few, tmp_path / "uncounted", "11", "training.batch = 16", "lower it")
    counted = {f"shard-00000{number}.tar": {"samples": 5 + number} for number in (0, 1)}
    (tmp_path / "few" / "_stats.json").write_text(json.dumps({"shards": counted}))
    refused(few, tmp_path / "counted", "few", "11", "training.batch = 16", "lower it")


def test_a_metrics_port_in_use(given, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        section = {"port": taken.getsockname()[1], "bind": "127.0.0.1"}
        refused(given(telemetry=section), tmp_path / "out", "telemetry.port", str(section["port"]), "in use")


def test_a_run_of_something_else(given, make_shards, tmp_path):
    begun = run(given(training={"images": 16}), tmp_path / "begun")
    assert begun.code == 0, begun.err
    make_shards(tmp_path / "others", counts=[20, 30])

    def check(*parts, **sections):
        refused(given(**sections), tmp_path / "again", *parts, "run.directory")

    check("model.width", "0.125", "0.25", model={"width": 0.25})
    check("shard shard-000000.tar has another size", "shard_ratio", stream={"urls": tmp_path / "others"})
    check("training.batch", "16", "8", training={"batch": 8})
    check("stream.window", "8", "9", stream={"window": 9})
    check("stream.seed", "0", "1", stream={"seed": 1})
    config = tmp_path / "run" / "config.yaml"
    written = config.read_text()
    config.write_text(written.replace("stream:\n", "stream:\n  flavour: 1\n", 1))
    check("written by another version (stream.flavour = 1")
    config.write_text(written)
    for file in (tmp_path / "run" / "checkpoints").rglob("model.pt"):
        file.unlink()
    again = run(given(), tmp_path / "damaged")
    assert "model.pt is missing" in again.of("warning")[0]["message"]
    assert "none of the 1 checkpoints is whole" in the_line(again)


def test_s3(s3, given, make_shards, tmp_path):
    url, folder = s3.make_bucket()
    make_shards(folder / "train", counts=[20])

    def check(urls, *parts, code=EXIT_CONFIG, storage=None, **environment):
        section = {"endpoint_url": s3.endpoint, **(storage or {})}
        made = given(stream={"urls": urls}, storage=section)
        refused(made, tmp_path / "out", *parts, code=code, environment=environment)

    check("s3://no-such-bucket-here/train/", "no-such-bucket-here", "bucket")
    check(f"{url}/tarin/", f"{url}/tarin/", "no .tar", "spelling")
    check(f"{url}/train/", url, "key", AWS_ACCESS_KEY_ID="SOMEBODYELSE")
    check(f"{url}/train/", url, "secret", AWS_SECRET_ACCESS_KEY="somebody-elses")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        nobody = {"endpoint_url": f"http://127.0.0.1:{closed.getsockname()[1]}", "deadline_seconds": 2}
        check(f"{url}/train/", url, "failed", "in 2 s", code=EXIT_RETRY, storage=nobody)


def test_a_web_server_without_ranges(web, given, make_shards, tmp_path):
    make_shards(web.folder, counts=[20, 20])
    web.ranges = False
    made = given(stream={"urls": f"{web.url}/shard-00000{{0,1}}.tar"}, loader={"workers": 1})
    refused(made, tmp_path / "out", web.url, "range")


@pytest.fixture
def long(given, make_shards, tmp_path):
    """Arguments of a run over many small shards that takes a minute, and the folder of these."""
    image = encode_image(0)
    make_shards(tmp_path / "shards", counts=[20] * 100, image=lambda _: image)
    section = {"urls": tmp_path / "shards", "passes": 10}
    return given(stream=section, loader={"workers": 1}), tmp_path / "shards"


def steps(outcome):
    return len(outcome.of("progress"))


def test_a_shard_that_is_lost_meanwhile(long, tmp_path):
    made, folder = long
    with start(made, tmp_path / "out", script=True) as running:
        running.wait_until(lambda so_far: steps(so_far) > 2)
        shutil.rmtree(folder)
        line = the_line(running.wait(30))
        assert running.left_behind() == []
    assert "stream.shard_ratio = 0.001" in line
    assert re.search(r"shard-\d+\.tar\[0:\d+\]: missing_shard", line)


def test_a_shard_that_is_replaced_meanwhile_on_two_ranks(long, tmp_path):
    """Rank 0's line is there, once, and nothing else; the launcher ends with what must not be restarted."""
    made, folder = long
    with start_ranks(2, made, tmp_path / "out", launcher=[]) as running:
        running.wait_until(lambda so_far: steps(so_far) > 2)
        for shard in folder.iterdir():
            os.utime(shard, (1, 1))
        outcome = running.wait(30)
        assert running.left_behind() == []
    assert outcome.code == EXIT_CONFIG
    (line,) = (line for line in outcome.said if line.startswith("streamswav: "))
    assert re.search(r"shard-\d+\.tar\[\d+:\d+\]: changed_shard", line)
    assert "Traceback" not in outcome.err


def test_a_loader_process_that_is_killed(long, tmp_path):
    with start(long[0], tmp_path / "out") as running:
        running.wait_until(lambda so_far: steps(so_far) > 2)
        os.kill(max(each.pid for each in running.members()), signal.SIGKILL)
        line = the_line(running.wait(30), EXIT_FAILED)
    assert "loader.workers" in line


def test_on_a_terminal_the_line_stands_alone(long, tmp_path):
    made, folder = long
    ours, theirs = pty.openpty()
    shown = b""
    with start(made, tmp_path, terminal=Path(os.ttyname(theirs))) as running:
        while b"loss" not in shown:
            shown += os.read(ours, 4096)
        shutil.rmtree(folder)
        assert running.wait(30).code == EXIT_CONFIG
        shown += os.read(ours, 1 << 20)
    os.close(theirs)
    os.close(ours)
    rows = [row.rpartition("\r\x1b[K")[2] for row in shown.decode().strip().split("\r\n")]
    assert rows[-1].startswith("streamswav: ")
    assert "missing_shard" in rows[-1]
    assert "loss" in rows[-2]  # the live line, below what was told meanwhile
    assert "saved" in rows[-3]
    assert not any(row.startswith("{") for row in rows)
