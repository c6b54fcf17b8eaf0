"""`streamswav stream`: what it measures, what it says, and that it leaves nothing behind."""

import json
import signal

import pytest
from conftest import encode_image
from runs import TINY, start

from streamswav.cli import main
from streamswav.commands.stream import Report, name_limit
from streamswav.config import Config
from streamswav.telemetry.families import STAGES

COUNTS = [37, 14, 51, 20]
KEYS = [part for key, text in TINY.items() if key.startswith("crops") for part in (f"--{key}", text)]
BATCH = ["--training.batch", "8"]


@pytest.fixture(scope="module")
def shards(make_shards, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    make_shards(folder, counts=COUNTS)
    return folder


def measure(capsys, *arguments):
    """Run to the end in this process and return the report."""
    assert main(["stream", *map(str, arguments), *KEYS, *BATCH, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_it_measures_every_stage_on_the_way_to_the_end_of_the_stream(shards, capsys):
    report = measure(capsys, shards, "--workers", 0)
    assert report["samples"] == sum(COUNTS) // 8 * 8
    assert report["shards"] == len(COUNTS)
    assert all(report["stage_seconds"][stage] > 0 for stage in STAGES)
    assert sum(report["stage_share"].values()) == pytest.approx(1)
    assert report["first_batch_seconds"] > 0
    assert report["cpu_seconds_per_sample"] > 0
    assert report["received_bytes"] is None
    assert report["limit"].startswith("limited by ")


def test_loader_processes_are_counted_too(shards, capsys):
    report = measure(capsys, shards, "--workers", 2)
    assert report["workers"] == 2
    assert report["cpu_seconds"] > 0


def test_nothing_is_decoded_without_crops(shards, make_shards, tmp_path, capsys):
    make_shards(tmp_path, counts=[16], image=lambda _: b"no image at all")
    assert measure(capsys, tmp_path, "--no-crops", "--workers", 0)["samples"] == 16
    report = measure(capsys, shards, tmp_path, "--workers", 0, "--stream.skip_ratio", 1)
    assert report["not_used"]["quarantined"] == report["reasons"]["not_an_image"] == 16


def test_keys_may_stand_before_and_after_the_urls(shards, tmp_path, capsys):
    (tmp_path / "keys").write_text("0_1\n")
    report = measure(
        capsys, "--stream.exclude", tmp_path / "keys", shards, "--workers", 0, "--stream.where", "label != 3"
    )
    assert report["not_used"]["excluded"] == 1
    assert report["not_used"]["filtered"] == sum(number % 10 == 3 for number in range(sum(COUNTS)))


def test_it_ends_after_so_many_samples(shards, capsys):
    assert measure(capsys, shards, "--workers", 0, "--samples", 20)["samples"] == 24


def test_on_a_server_it_counts_requests_and_bytes(s3, shards, capsys):
    url, folder = s3.make_bucket()
    for path in shards.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    report = measure(capsys, f"{url}/", "--workers", 0, "--no-crops", "--storage.endpoint_url", s3.endpoint)
    assert report["requests"] == {"ok": len(COUNTS)}
    assert report["received_bytes"] == sum(path.stat().st_size for path in shards.iterdir())
    assert report["read_ratio"] > 1  # the end of an archive is no sample's


def test_it_says_it_in_words(shards, capsys):
    assert main(["stream", str(shards), "--workers", "0", *KEYS, *BATCH]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith(f"{shards}: 4 shards")
    assert [line.split()[0] for line in said[1:-1]] == [
        "start", "samples", "received", "CPU", "stages", "not",
    ]  # fmt: skip
    assert said[-1].startswith("limited by ")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "streamswav stream s3://bucket/shards/"),
        (["nowhere/"], "nowhere"),
        (["--seconds", "0", "nowhere/"], "--seconds"),
        (["--stream.urks", "x", "nowhere/"], "did you mean stream.urls"),
    ],
)
def test_a_mistake_is_one_line_and_78(arguments, reason, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["stream", *arguments]) == 78
    said = capsys.readouterr()
    assert reason in said.err
    assert said.err.count("\n") == 1
    assert said.out == ""
    assert not list(tmp_path.iterdir())


def test_a_budget_that_is_spent_ends_it_after_the_report(make_shards, tmp_path, capsys):
    make_shards(tmp_path, counts=[200], image=lambda number: encode_image(number) if number < 100 else b"x")
    keys = ["--stream.skip_probation", "0", "--stream.skip_ratio", "0.1", "--stream.window", "1"]
    assert main(["stream", str(tmp_path), "--workers", "0", *keys, *KEYS, *BATCH, "--json"]) == 78
    said = capsys.readouterr()
    assert "stream.skip_ratio" in said.err
    assert json.loads(said.out)["samples"] > 0


def test_ctrl_c_prints_the_report_so_far(shards, tmp_path):
    command = ["stream", str(shards), "--seconds", "600", "--workers", "1", "--stream.passes", "1000000"]
    with start([*command, *KEYS, *BATCH], tmp_path) as running:
        running.wait_until(lambda so_far: "first batch" in so_far.err)
        running.signal_group(signal.SIGINT)
        outcome = running.wait()
    assert outcome.code == 0, outcome.err
    assert "limited by " in outcome.out.splitlines()[-1]


def report_of(shares, **values):
    report = Report("u", 1, 1, None, workers=2, cores=4, seconds=10.0, samples=100, cpu_seconds=20.0)
    report.stage_share = {**dict.fromkeys(STAGES, 0.0), **shares}
    for name, value in values.items():
        setattr(report, name, value)
    return name_limit(report, Config())


def test_the_limit_follows_from_the_shares():
    assert "the bucket: raise loader.requests" in report_of({"fetch": 0.8}, received_bytes=10)
    assert "throttled 7 requests" in report_of({"fetch": 0.8}, received_bytes=10, requests={"throttled": 7})
    assert "the disk" in report_of({"fetch": 0.8})
    assert "decoding: raise loader.workers (now 2; 2.0 of 4" in report_of({"decode": 0.8})
    assert "decoding: add cores" in report_of({"decode": 0.8}, cpu_seconds=39.0)
    assert "decoding: add cores" in report_of({"decode": 0.8}, workers=4)
    assert "reading tars" in report_of({"parse": 0.8})
    assert "cutting" in report_of({"crop": 0.8})
    assert "stacking" in report_of({"collate": 0.8})
    assert "this process" in report_of({"decode": 0.8}, main_busy_ratio=0.95)
    assert "not one batch" in report_of({}, samples=0)
