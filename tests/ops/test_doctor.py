"""`streamswav doctor`: what is broken on purpose fails the right check, as ops/doctor.md shows it."""

import contextlib
import json
import resource
import socket
import subprocess
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import encode_image
from meddler import meddling
from runs import TINY, arguments, free_port, run, start_ranks
from tables import tables

from streamswav.cli import main
from streamswav.config import load_config
from streamswav.defaults import FINETUNE_BASE
from streamswav.doctor import CHECKS, Case, Check, Machine, exit_code, run_checks
from streamswav.doctor.finding import STATUSES, failed, passed, size, warned
from streamswav.doctor.of_configuration import _within
from streamswav.doctor.report import Report
from streamswav.doctor.running import Result
from streamswav.errors import EXIT_CONFIG, EXIT_DONE, EXIT_RETRY
from streamswav.launch_options import LaunchOptions
from streamswav.planning import GPUS, find_gpu, recognise
from streamswav.planning.host import batch_bytes, count_host
from streamswav.training.lease import Lease

PAGE = (Path(__file__).parents[2] / "ops" / "doctor.md").read_text()
TABLES = {table[0][0]: table for table in tables(PAGE)}
ROWS = {row[0]: row[1:] for row in TABLES["broken on purpose"][1:]}
BY_NAME = {check.name: check for check in CHECKS}
ALL = tuple(BY_NAME)
OF_STORAGE = ("configuration", "identity", "clock", "listing", "writing", "holder")


def config(*, base=None, **keys):
    """The tiny run's configuration with keys such as `stream__urls`."""
    given = {**TINY, **{key.replace("__", "."): value for key, value in keys.items()}}
    words = [word for key, value in given.items() for word in (f"--{key}", str(value))]
    return load_config(None, {}, words, base=base or {})


def case(given=None, *, command="pretrain", **parts):
    return Case(command=command, given=given or config(), **parts)


def on_s3(server, url, **keys):
    """A configuration whose storage is a server."""
    endpoint = getattr(server, "endpoint", None) or server.url
    return config(storage__endpoint_url=endpoint, stream__urls=url, **keys)


def look(asked, *names):
    """Run checks one after the other, as the command does, and return the last one's finding."""
    *_, last = run_checks([BY_NAME[name] for name in names], asked)
    return last.finding


def shown(fault, asked, *before):
    """Run the check that ops/doctor.md names for a fault, and hold what it says against the page."""
    name, status, code, says, remedy, _ = ROWS[fault]
    *_, result = run_checks([BY_NAME[each] for each in (*before, name.strip("`"))], asked)
    found = result.finding
    assert found.status == status, found
    assert says.strip('"') in found.text, found
    assert remedy.strip('"') in found.remedy, found
    assert str(exit_code([result], strict=False)) == code, found
    return found


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
    assert [line.split()[0] for line in lines[1:3]] == ["skip", "skip"]
    assert lines[-1].endswith("1 fail, 2 skip (configuration); exit 78")


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
    assert "1 pass, 0 warn, 1 fail, 0 skip (meeting); exit 143" in capsys.readouterr().out


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


# --- storage


def test_wrong_keys(s3, bucket, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "this-is-not-it")
    shown("wrong keys", case(on_s3(s3, f"{bucket}/")))


def test_no_credentials(s3, bucket, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    shown("no credentials", case(on_s3(s3, f"{bucket}/")))


class Sts(BaseHTTPRequestHandler):
    answers = (
        200,
        "<GetCallerIdentityResponse><GetCallerIdentityResult><Arn>arn:aws:sts::1:assumed-role/trainer/pod"
        "</Arn></GetCallerIdentityResult></GetCallerIdentityResponse>",
    )

    def log_message(self, *args): ...

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        status, text = self.answers
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())


@contextlib.contextmanager
def sts(monkeypatch, *answers):
    handler = type("Handler", (Sts,), {"answers": answers or Sts.answers})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL_STS", f"http://127.0.0.1:{server.server_address[1]}")
        yield
        server.shutdown()


def test_at_amazon_the_arn_is_told_and_never_a_key(monkeypatch, s3_keys):
    asked = case(config(stream__urls="s3://bucket/shards/"))
    with sts(monkeypatch):
        found = look(asked, "identity")
    assert found.status == "pass"
    assert found.text == "arn:aws:sts::1:assumed-role/trainer/pod, by the environment (AWS_ACCESS_KEY_ID)"


def test_keys_that_amazon_does_not_know(monkeypatch):
    error = (
        "<ErrorResponse><Error><Code>InvalidClientTokenId</Code><Message>no</Message></Error></ErrorResponse>"
    )
    with sts(monkeypatch, 403, error):
        shown("keys that AWS does not know", case(config(stream__urls="s3://bucket/shards/")))


def test_sts_out_of_reach_is_no_failure(monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL_STS", f"http://127.0.0.1:{free_port()}")
    found = look(case(config(stream__urls="s3://bucket/shards/")), "identity")
    assert found.status == "skip"
    assert (
        "credentials come from the environment (AWS_ACCESS_KEY_ID); AWS (STS) was not reached" in found.text
    )


def test_temporary_keys_from_the_environment(s3, bucket, monkeypatch):
    monkeypatch.setenv("AWS_SESSION_TOKEN", "a-token")
    shown("temporary keys in the environment", case(on_s3(s3, f"{bucket}/")))


def test_a_missing_bucket(s3):
    shown("a missing bucket", case(on_s3(s3, "s3://no-such-bucket/shards/")))


def test_an_empty_prefix(s3, bucket):
    shown("a prefix without shards", case(on_s3(s3, f"{bucket}/elsewhere/")))


def test_storage_out_of_reach(bucket):
    class Nobody:
        url = f"http://127.0.0.1:{free_port()}"

    shown("storage that is out of reach", case(on_s3(Nobody, f"{bucket}/", storage__deadline_seconds=1)))


@pytest.mark.parametrize(
    ("seconds", "fault"), [(1200, "a clock that is 20 minutes off"), (-60, "a minute off")]
)
def test_a_clock_that_is_off(behind, bucket, seconds, fault):
    def shift(_, headers):
        headers["date"] = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + seconds))

    behind.change = shift
    shown(fault, case(on_s3(behind, f"{bucket}/")))


def test_a_clock_that_is_right(s3, bucket):
    found = look(case(on_s3(s3, f"{bucket}/")), "clock")
    assert found.status == "pass"
    assert found.text.endswith("s of the server's")


def test_a_server_without_ranges(web, shards):
    (web.folder / "a.tar").write_bytes((shards / "shard-000000.tar").read_bytes())
    web.ranges = False
    shown("a server without ranges", case(config(stream__urls=f"{web.url}/a.tar")), "listing")


def test_a_server_without_versions(web, shards):
    (web.folder / "a.tar").write_bytes((shards / "shard-000000.tar").read_bytes())
    with meddling(web.url) as proxy:
        proxy.change = lambda _, headers: [headers.pop(name, None) for name in ("etag", "last-modified")]
        shown("no ETag", case(config(stream__urls=f"{proxy.url}/a.tar")), "listing")


def test_a_gateway_that_changes_etags(behind, bucket):
    def change(method, headers):
        if method == "GET" and "etag" in headers:
            headers["etag"] = '"another"'

    behind.change = change
    shown("a gateway that changes ETags", case(on_s3(behind, f"{bucket}/")), "listing")


# --- data


def test_a_first_shard_that_is_cut_off(shards, tmp_path):
    whole = (shards / "shard-000000.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(whole[: len(whole) // 2 + 100])
    shown("a first shard that is cut off", case(config(stream__urls=tmp_path)))


def test_a_first_shard_that_is_no_archive(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"<html>not found</html>" * 1000)
    shown("a first shard that is no archive", case(config(stream__urls=tmp_path)))


@pytest.mark.parametrize(
    ("picture", "fault"),
    [
        (lambda _: b"no image at all", "images that cannot be decoded"),
        (lambda n: encode_image(n) if n % 4 else encode_image(n)[:200], "an image that is cut off"),
    ],
)
def test_images_that_cannot_be_used(make_shards, tmp_path, picture, fault):
    make_shards(tmp_path, counts=[24], image=picture)
    shown(fault, case(config(stream__urls=tmp_path)))


@pytest.mark.parametrize(
    ("picture", "keys", "fault"),
    [
        ((12, 10), {}, "images smaller than the crops"),
        ((400, 300), {}, "images much larger than the crops"),
        ((48, 40), {"crops__max_pixels": 1000}, "images of more pixels than allowed"),
    ],
)
def test_images_that_do_not_suit_the_crops(make_shards, tmp_path, picture, keys, fault):
    make_shards(tmp_path, counts=[16], image=picture)
    shown(fault, case(config(stream__urls=tmp_path, **keys)))


@pytest.mark.parametrize(
    ("where", "fault"),
    [("json.width => 256", "a condition that is none"), ("label == cat", "a condition that nothing meets")],
)
def test_a_condition_with_a_slip_of_the_pen(shards, where, fault):
    shown(fault, case(config(stream__urls=shards, stream__where=f"[{where}]")))


def finetuning(shards, **keys):
    given = {"crops.sizes": "[16]", "crops.counts": "[1]", "crops.scales": "[[0.3, 1.0]]"}
    named = {key.replace(".", "__"): value for key, value in given.items()}
    return config(base=FINETUNE_BASE, stream__urls=shards, **named, **keys)


def test_labels_of_a_finetuning(make_shards, shards, tmp_path):
    make_shards(tmp_path, counts=[12], labels=False)
    good = finetuning(shards, labels__classes=10, finetune__test=shards)
    assert look(case(good, command="finetune"), "labels").text == "40 of 40 samples have one of 10 classes"
    without = finetuning(tmp_path, labels__classes=10, finetune__test=shards)
    shown("a finetuning without labels", case(without, command="finetune"))
    unknown = finetuning(shards, finetune__test=shards)
    shown("a finetuning that knows no number of classes", case(unknown, command="finetune"))


def test_weights_that_are_not_there(tmp_path):
    shown("weights that are not there", case(config(model__init=tmp_path / "none.pt")))


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
def test_what_is_counted_for_a_machine_is_more_than_a_run_takes_and_not_much(shards, tmp_path):
    keys = {"loader.workers": "2", "training.batch": "64", "crops.sizes": "[32, 16]", "stream.columns": "4"}
    place = [
        "--stream.urls",
        str(shards),
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
            found = [looked_at(each.pid) for each in running.members()]
            files, tasks, memory = zip(*found, strict=True)
            now = max(files), sum(tasks), sum(memory)
            most = list(map(max, most, now))
    assert most[0] <= need.files
    assert need.tasks / 4 < most[1] <= need.tasks
    assert sum(need.memory.values()) / 3 < most[2] <= sum(need.memory.values())


def looked_at(pid):
    """Open files, threads and bytes (shared pages by their share) of a process."""
    proc = Path(f"/proc/{pid}")
    pages = (proc / "smaps_rollup").read_text().partition("Pss:")[2].split()[0]
    return len(list((proc / "fd").iterdir())), len(list((proc / "task").iterdir())), 1024 * int(pages)


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
    shown("a memory limit of 256 MiB", case(config(stream__urls=shards, loader__workers=2), machine=machine))


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


# --- GPUs and network


def test_cuda_without_a_gpu():
    shown("training.device cuda without a GPU", case(config(training__device="cuda")))
    assert look(case(config(training__device="auto")), "gpus").status == "skip"


def test_a_driver_whose_devices_are_not_there(tmp_path):
    (tmp_path / "driver" / "nvidia").mkdir(parents=True)
    text = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\n"
    (tmp_path / "driver" / "nvidia" / "version").write_text(text)
    assert Machine(proc=tmp_path).driver() == "535.104.05"
    asked = case(config(training__device="auto"), machine=Machine(proc=tmp_path))
    shown("a driver without a device that torch can use", asked)


def test_a_step_that_does_not_fit(shards):
    crops = {"crops__sizes": "[512, 96]"}
    large = config(stream__urls=shards, training__batch=256, model__width=1, **crops)
    shown("a batch that does not fit the GPU", case(large, gpu_type=find_gpu("T4")))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVIDIA A100-SXM4-80GB", "A100-80GB"),
        ("NVIDIA A100-SXM4-40GB", "A100-40GB"),
        ("Tesla V100-SXM2-16GB", "V100-16GB"),
        ("Tesla T4", "T4"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA H100 80GB HBM3", "H100-80GB"),
        ("NVIDIA GeForce RTX 3090", "RTX-3090"),
    ],
)
def test_a_gpu_is_known_by_the_name_that_its_driver_gives(name, expected):
    assert recognise(name, GPUS[expected].memory).name == expected
    assert recognise("Voodoo 2", 1) is None


def test_an_interface_that_is_not_there():
    shown("NCCL_SOCKET_IFNAME of no interface", case(environment={"NCCL_SOCKET_IFNAME": "eth99"}))
    assert look(case(environment={"NCCL_SOCKET_IFNAME": "^eth99"}), "collectives").status == "skip"
    assert look(case(environment={"GLOO_SOCKET_IFNAME": "lo"}), "collectives").status == "skip"
    asked = case(environment={"NCCL_SOCKET_IFNAME": "lo"}, launch=LaunchOptions(ranks="2"))
    assert look(asked, "collectives").text == "gloo, for 2 ranks on CPUs"


def of_two(**changes):
    port = changes.pop("port", None) or free_port()
    return LaunchOptions(
        nodes=2, address=changes.pop("address", "127.0.0.1"), port=port, dns_seconds=0, **changes
    )


def test_a_master_that_has_no_name():
    shown("a master whose name is not known", case(launch=of_two(address="node-0.invalid", node=1)))


def test_a_port_of_the_master_that_is_taken():
    assert look(case(launch=of_two()), "meeting").status == "pass"
    with socket.create_server(("0.0.0.0", 0)) as taken:
        port = taken.getsockname()[1]
        shown("a taken port on node 0", case(launch=of_two(port=port)))
        assert "and answers" in look(case(launch=of_two(port=port, node=1)), "meeting").text
    assert "nobody listens there yet" in look(case(launch=of_two(port=port, node=1)), "meeting").text


def test_node_0_under_another_machines_name():
    shown("node 0 that is not the master", case(launch=of_two(address="192.0.2.1")))


def test_launch_variables_that_cannot_be_understood(monkeypatch, capsys):
    monkeypatch.setenv("PET_NNODES", "two")
    assert main(["doctor", "--only", "configuration"]) == EXIT_CONFIG
    line = capsys.readouterr().out
    _, status, _, says, _, _ = ROWS["PET_NNODES that is no number"]
    assert line.startswith(status)
    assert says.strip('"') in line


def test_a_metrics_port_that_is_taken():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        keys = {"telemetry__port": taken.getsockname()[1], "telemetry__bind": "127.0.0.1"}
        shown("a metrics port that is taken", case(config(**keys)))


# --- speed


def test_a_loader_slower_than_the_gpu(shards):
    keys = {"stream__urls": shards, "loader__workers": 0, "model__trunk": "resnet10"}
    asked = case(config(**keys), gpu_type=find_gpu("H100"), seconds=0.2)
    found = shown("a loader slower than the GPUs", asked, "listing")
    assert "images take" in found.text
    alone = look(case(config(**keys), seconds=0.2), "rate")
    assert alone.status == "pass"
    assert look(case(config(**keys), seconds=0), "rate").status == "skip"


# --- the page


def test_every_row_of_the_page_is_broken_here_and_every_check_has_one():
    source = Path(__file__).read_text()
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
