"""`streamswav doctor`: the command, what it prints, and the page that shows it."""

import json
import threading
import time
from pathlib import Path

import pytest
from doctor_cases import (
    ALL,
    ROWS,
    TABLES,
    case,
    config,
    finetuning,
    look,
)
from runs import TINY

from streamswav.cli import main
from streamswav.doctor import CHECKS, Check, exit_code, run_checks
from streamswav.doctor.finding import STATUSES, failed, passed, size, warned
from streamswav.doctor.report import Report
from streamswav.doctor.running import Result
from streamswav.errors import EXIT_CONFIG, EXIT_DONE, EXIT_RETRY

OF_STORAGE = ("configuration", "identity", "clock", "listing", "writing", "holder")


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


# --- the command


def test_a_good_bucket_passes_and_nothing_is_left_behind(bucket, s3, capsys):
    place = f"{bucket}/runs/first"
    words = ["--stream.urls", f"{bucket}/", "--run.directory", place, "--storage.endpoint_url", s3.endpoint]
    tiny = [word for key, value in TINY.items() for word in (f"--{key}", value)]
    code = main(["doctor", "--json", *tiny, *words, "--seconds", "0.5", "--skip", "memory"])
    told = json.loads(capsys.readouterr().out)
    assert (code, told["exit_code"]) == (EXIT_DONE, EXIT_DONE), told
    assert {*told} == {"version", "command", "exit_code", "counts", "checks"}
    assert all({*each} == {"name", "status", "text", "remedy", "waits", "seconds"} for each in told["checks"])
    assert [each["name"] for each in told["checks"]] == [name for name in ALL if name != "memory"]
    by_name = {each["name"]: each for each in told["checks"]}
    assert by_name["identity"]["text"].startswith("credentials come from the environment")
    assert by_name["listing"]["text"].startswith("2 shards")
    assert by_name["rate"]["status"] == "pass"
    assert by_name["conditions"]["status"] == "warn"  # rclone's server has none
    assert sum(told["counts"].values()) == len(told["checks"])
    left = [path.name for path in s3.folder.joinpath(bucket.removeprefix("s3://")).rglob("*.*")]
    assert sorted(left) == ["shard-000000.tar", "shard-000001.tar"]


def test_a_command_as_a_word_is_told_how_to_be_named(capsys):
    assert main(["doctor", "pretrain", "--stream.urls", "shards/"]) == EXIT_CONFIG
    assert "--for COMMAND" in capsys.readouterr().err


def test_a_typo_in_the_configuration_is_the_same_error_as_pretrains(tmp_path, capsys):
    file = tmp_path / "typo.yaml"
    file.write_text("swav: {epsilom: 0.03}\n")
    assert main(["pretrain", "--config", str(file)]) == EXIT_CONFIG
    said = capsys.readouterr().err.removeprefix("streamswav: ").strip()
    assert main(["doctor", "--config", str(file), "--only", "configuration", "listing", "shm"]) == EXIT_CONFIG
    lines = capsys.readouterr().out.splitlines()
    name, status, code, says, remedy, _ = ROWS["a typo in the configuration"]
    assert lines[0] == f"fail  configuration {said} -> set the key that is named; `streamswav keys` " + (
        "describes them all"
    )
    assert says.strip('"') in lines[0]
    assert remedy.strip('"') in lines[0]
    assert (name, status, code) == ("`configuration`", "fail", "78")
    assert lines[-1].endswith("1 fail (configuration), 2 skip; exit 78")


def test_only_what_waiting_mends_is_75_and_strict_makes_warnings_fail():
    ok, warning = Result("a", passed("."), 0), Result("b", warned(".", "."), 0)
    wrong, late = Result("c", failed(".", "."), 0), Result("d", failed(".", ".", waits=True), 0)
    assert exit_code([ok, warning], strict=False) == EXIT_DONE
    assert exit_code([ok, warning], strict=True) == EXIT_CONFIG
    assert exit_code([ok], strict=True) == EXIT_DONE
    assert exit_code([ok, late], strict=False) == EXIT_RETRY
    assert exit_code([wrong, late], strict=False) == EXIT_CONFIG


def test_it_takes_what_the_command_takes_and_ends_with_the_launchers_retry_code(shards, capsys, monkeypatch):
    monkeypatch.setenv("STREAMSWAV_RETRY_CODE", "143")
    place = ["--stream.urls", str(shards), "--run.directory", "unused"]
    nodes = ["--nnodes", "2", "--node-rank", "1", "--master-addr", "node-0.invalid", "--dns-seconds", "0"]
    asked = ["--for", "cooldown", *place, "--images", "100", *nodes, "--only", "configuration", "meeting"]
    assert main(["doctor", *asked]) == 143
    assert "1 pass, 0 warn, 1 fail (meeting), 0 skip; exit 143" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["finetune", "lowshot", "evaluate"])
def test_other_commands_pass_too(shards, tmp_path, command):
    given = finetuning(
        shards, labels__classes=10, finetune__test=shards, run__directory=tmp_path / "run", training__batch=8
    )
    asked = case(config(stream__urls=shards) if command == "evaluate" else given, command=command, seconds=0)
    results = {each.name: each.finding for each in run_checks(CHECKS, asked)}
    left = {name: found for name, found in results.items() if found.status in ("warn", "fail")}
    assert not {*left} - {"memory", "cores"}, left
    assert results["labels"].status == ("skip" if command == "evaluate" else "pass")
    assert results["writing"].status == ("skip" if command == "evaluate" else "pass")


def test_a_check_that_crashes_or_hangs_is_a_line_of_its_own():
    over = threading.Event()
    checks = [
        Check("crashes", lambda _: {}["missing"]),
        Check("hangs", lambda _: over.wait(30), seconds=0.1),
        Check("works", lambda _: passed("fine")),
    ]
    began = time.monotonic()
    crashed, hung, fine = (each.finding for each in run_checks(checks, case(seconds=0)))
    over.set()
    assert time.monotonic() - began < 5
    assert (crashed.status, crashed.text) == ("fail", "the check itself failed: KeyError: 'missing'")
    assert (hung.status, hung.waits) == ("fail", True)
    assert fine.status == "pass"


def test_what_a_failed_check_was_for_is_skipped_with_its_name(tmp_path):
    asked = case(config(stream__urls=tmp_path / "none", run__directory=tmp_path / "run"))
    statuses = {each.name: each.finding for each in run_checks(CHECKS, asked)}
    assert statuses["listing"].status == "fail"
    for name in ("ranges", "tags", "shard", "images", "sizes", "settings", "rate"):
        assert (statuses[name].status, statuses[name].text) == ("skip", "builds upon listing, which failed")
    assert statuses["shm"].status in ("pass", "skip")


def test_without_a_configuration_what_builds_upon_it_is_one_line(capsys):
    assert main(["doctor", "--swav.epsilom", "1", "--only", "configuration", "listing", "shm"]) == EXIT_CONFIG
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:] == [
        "skip  2 checks: builds upon configuration, which failed",
        "doctor for pretrain: 0 pass, 0 warn, 1 fail (configuration), 2 skip; exit 78",
    ]


def test_a_look_leaves_no_folder_behind(shards, tmp_path):
    asked = case(config(stream__urls=shards, run__directory=tmp_path / "runs" / "first"))
    found = {each.name: each.finding.status for each in run_checks(CHECKS, asked)}
    assert found["writing"] == "pass"
    assert not (tmp_path / "runs").exists()


def test_a_run_elsewhere_is_asked_about_by_its_gpus_and_nodes_alone(shards, capsys):
    nodes = ["--gpu", "A100-80GB", "--nnodes", "4", "--nproc-per-node", "8", "--json"]
    place = ["--stream.urls", str(shards), "--run.directory", "unused"]
    main(["doctor", *place, *nodes, "--only", "configuration", "collectives", "meeting"])
    found = {each["name"]: each for each in json.loads(capsys.readouterr().out)["checks"]}
    assert "nodes 4, ranks on each 8" in found["configuration"]["text"]
    assert found["collectives"]["text"] == "NCCL is looked at where the GPUs are"
    assert found["meeting"]["status"] == "pass"


def test_remedies_are_of_what_was_given(shards, tmp_path, capsys):
    missing = look(case(config(stream__urls=tmp_path / "none")), "listing")
    assert "it names a folder of this machine; a bucket is s3://BUCKET/PREFIX/" in missing.remedy
    assert main(["doctor", "--config", str(tmp_path / "none.yaml"), "--only", "configuration"]) == EXIT_CONFIG
    assert "-> correct the argument: `streamswav doctor --help`" in capsys.readouterr().out


def test_no_secret_is_ever_printed(s3, monkeypatch, capsys):
    secrets = {"AWS_SECRET_ACCESS_KEY": "hidden-secret-value", "AWS_SESSION_TOKEN": "hidden-token-value"}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    url = "http://someone:hidden-password@127.0.0.1:1/a.tar?X-Amz-Signature=hidden-signature"
    words = ["--stream.urls", url, "--storage.deadline_seconds", "0.2", "--run.directory", "s3://b/run"]
    for more in ([], ["--json"]):
        assert main(["doctor", *words, "--only", *OF_STORAGE, *more])
        assert "hidden-" not in "".join(capsys.readouterr()), more
    report = Report("pretrain", secrets)
    found = report.add(Result("x", failed("tried hidden-secret-value", "no hidden-token-value"), 0)).finding
    assert "hidden-" not in found.text + found.remedy


# --- the page


def test_every_row_of_the_page_is_broken_here_and_every_check_has_one():
    source = "".join(file.read_text() for file in Path(__file__).parent.glob("test_doctor*.py"))
    header, *listed = TABLES["check"]
    assert header == ["check", "looks at", "warns or fails where"]
    assert [row[0].strip("`") for row in listed] == [*ALL]
    assert TABLES["broken on purpose"][0] == [
        "broken on purpose",
        "check",
        "finds",
        "exit",
        "says",
        "remedy",
        "test",
    ]
    for fault, (check, status, _, _, _, test) in ROWS.items():
        assert f'"{fault}"' in source, fault
        assert f"def {test.strip('`')}(" in source, test
        assert check.strip("`") in ALL
        assert status in STATUSES
    assert {row[0].strip("`") for row in ROWS.values()} == {*ALL}


def test_sizes_are_told_as_limits_are_given():
    assert [size(n) for n in (512, 64 << 20, 3 << 30)] == ["512 bytes", "64 MiB", "3 GiB"]
