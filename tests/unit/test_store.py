"""The store over local files and over a real web server that fails on demand."""

from __future__ import annotations

import logging
import os
import pickle
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import WebServer
from hypothesis import given
from hypothesis import strategies as st

from streamswav.config import StorageSection
from streamswav.errors import (
    ChangedError,
    ConfigError,
    DeniedError,
    NotFoundError,
    StorageError,
    UnavailableError,
    UnsupportedError,
)
from streamswav.stream.store import Store, is_pattern, join, redact, retry
from streamswav.stream.store.retry import IdentityError, Retrier, TransientError
from streamswav.stream.store.throttle import Throttle
from streamswav.stream.store.transfer import Transfer, refusal

DATA = bytes(range(256)) * 1000


def make_store(seconds: float = 20.0, timeout: float = 5.0) -> Store:
    return Store(StorageSection(deadline_seconds=seconds, timeout_seconds=timeout))


def run(code: str) -> tuple[int, str]:
    """Run Python with all its warnings; return exit code and what it complained about."""
    command = [sys.executable, "-W", "error", "-W", "always::ResourceWarning", "-c", code]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stderr


@pytest.fixture
def served(web: WebServer, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(retry, "BASE_SECONDS", 0.01)
    (web.folder / "a.tar").write_bytes(DATA)
    return f"{web.url}/a.tar"


# --- names


def test_redacted_urls_carry_no_query_and_no_password() -> None:
    secret = "https://user:pass@host:8443/dir/a.tar?X-Amz-Signature=abc&x=y#part"
    assert redact(secret) == "https://host:8443/dir/a.tar"
    assert redact("s3://bucket/dir/a.tar") == "s3://bucket/dir/a.tar"
    assert redact("/data/what?.tar") == "/data/what?.tar"


def test_join_puts_one_slash_between_parts() -> None:
    assert join("s3://bucket/", "dir/", "/a.tar") == "s3://bucket/dir/a.tar"
    assert join("/", "a.tar") == "/a.tar"


def test_a_question_mark_is_a_pattern_but_not_in_a_web_address() -> None:
    assert is_pattern("s3://bucket/a-?.tar")
    assert is_pattern("/data/[ab].tar")
    assert not is_pattern("/data/a.tar")
    assert not is_pattern("https://host/a.tar?signature=*")


@pytest.mark.parametrize("url", ["pipe:cat a.tar", "gs://bucket/a", "ftp://host/a"])
def test_unknown_schemes_and_pipes_are_refused(url: str) -> None:
    with pytest.raises(UnsupportedError, match="unknown scheme"):
        Store().read(url)


# --- local files


def test_listing_is_recursive_sorted_and_complete(tmp_path: Path) -> None:
    for name in ("b/2.tar", "a.tar", "b/1.tar"):
        Store().write(f"{tmp_path}/{name}", name.encode())
    found = Store().list(str(tmp_path))
    assert [info.url for info in found] == [f"{tmp_path}/{name}" for name in ("a.tar", "b/1.tar", "b/2.tar")]
    assert [info.size for info in found] == [5, 7, 7]
    assert found[0] == Store().info(f"{tmp_path}/a.tar")


def test_file_urls_keep_their_scheme_in_listings(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"x")
    (info,) = Store().list(f"file://{tmp_path}/")
    assert info.url == f"file://{tmp_path}/a.tar"
    assert Store().read(info.url) == b"x"


def test_glob_does_not_cross_a_slash(tmp_path: Path) -> None:
    for name in ("s-1.tar", "s-2.tar", "s-10.tar", "t-1.tar", "s-3/x.tar"):
        Store().write(f"{tmp_path}/{name}", b"")
    names = [Path(info.url).name for info in Store().glob(f"{tmp_path}/s-[0-9].tar")]
    assert names == ["s-1.tar", "s-2.tar"]
    assert [info.url for info in Store().glob(f"{tmp_path}/s-?/*.tar")] == [f"{tmp_path}/s-3/x.tar"]
    assert Store().glob(f"{tmp_path}/none-*.tar") == []


def test_glob_of_a_relative_path_finds_what_lies_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.tar").write_bytes(b"12")
    monkeypatch.chdir(tmp_path)
    (info,) = Store().glob("*.tar")
    assert Store().read(info.url) == b"12"


def test_a_range_is_exact_and_checked_against_the_version(tmp_path: Path) -> None:
    url = f"{tmp_path}/a.tar"
    Store().write(url, DATA)
    version = Store().info(url).version
    assert Store().read_range(url, 10, 500, version=version) == DATA[10:500]
    assert Store().read_range(url, 7, 7) == b""
    with pytest.raises(ChangedError, match="ends at byte 256000"):
        Store().read_range(url, 255_999, 256_001)
    os.utime(url, ns=(1, 1))
    with pytest.raises(ChangedError, match="written again"):
        Store().read_range(url, 10, 500, version=version)


def test_missing_files_and_folders_are_not_found(tmp_path: Path) -> None:
    missing = f"{tmp_path}/missing"
    calls: list[Callable[[str], object]] = [Store().info, Store().read, Store().list]
    for call in calls:
        with pytest.raises(NotFoundError):
            call(missing)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(NotFoundError):
        Store().list(f"{tmp_path}/file")
    with pytest.raises(NotFoundError, match="is a folder"):
        Store().read(str(tmp_path))


def test_what_can_be_no_file_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    for call in (Store().info, Store().read):
        with pytest.raises(UnsupportedError, match="is a pipe"):
            call(f"{tmp_path}/pipe")
        for name in ("loop", "n" * 5000, "a\0b"):
            with pytest.raises(NotFoundError):
                call(f"{tmp_path}/{name}")


def test_an_unwritable_place_is_denied(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DeniedError, match="cannot be written"):
        Store().write(f"{tmp_path}/file/below", b"x")
    with pytest.raises(DeniedError, match="cannot be written"):
        Store().write("/proc/streamswav/x", b"x")


def test_a_failed_write_leaves_the_old_object_and_no_litter(tmp_path: Path) -> None:
    url = f"{tmp_path}/folder"
    Store().write(f"{url}/inside", b"old")
    with pytest.raises(DeniedError):
        Store().write(url, b"new")
    assert [path.name for path in tmp_path.rglob("*")] == ["folder", "inside"]


def test_half_written_files_are_not_listed(tmp_path: Path) -> None:
    Store().write(f"{tmp_path}/a.tar", b"whole")
    (tmp_path / ".b.tar.0123.partial").write_bytes(b"ha")
    assert [Path(info.url).name for info in Store().list(str(tmp_path))] == ["a.tar"]


def test_delete_removes_a_file_or_a_whole_folder_and_forgives_nothing_there(tmp_path: Path) -> None:
    store = Store()
    for name in ("run/1/a", "run/1/b", "run/2"):
        store.write(f"{tmp_path}/{name}", b"x")
    store.delete(f"{tmp_path}/run/1")
    store.delete(f"{tmp_path}/run/1")
    assert [info.url for info in store.list(f"{tmp_path}/run")] == [f"{tmp_path}/run/2"]
    store.delete(f"{tmp_path}/run/2")
    assert not store.exists(f"{tmp_path}/run/2")


@pytest.mark.parametrize("url", ["", "/", ".", "file:///"])
def test_the_root_and_the_working_folder_are_never_deleted(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "rmtree", lambda path: pytest.fail(f"would have deleted {path}"))
    with pytest.raises(UnsupportedError, match="not deleted"):
        Store().delete(url)


def test_exists_knows_objects_and_folders_that_hold_any(tmp_path: Path) -> None:
    Store().write(f"{tmp_path}/run/1/a", b"x")
    (tmp_path / "empty").mkdir()
    names = ("run/1/a", "run", "empty", "none")
    assert [Store().exists(f"{tmp_path}/{name}") for name in names] == [True, True, False, False]


# --- over the network


def test_only_the_missing_bytes_are_asked_for_after_a_broken_connection(web: WebServer, served: str) -> None:
    web.faults.extend([("break", 1000), ("break", 500)])
    assert make_store().read_range(served, 100, 200_000) == DATA[100:200_000]
    spans = [span for _, _, span in web.requests]
    assert spans[0] == "bytes=100-199999"
    starts = [int(span.removeprefix("bytes=").partition("-")[0]) for span in spans if span]
    assert starts == [100, 1100, 1600]


def test_a_whole_read_continues_with_ranges(web: WebServer, served: str) -> None:
    web.faults.append(("break", 70_000))
    assert make_store().read(served) == DATA
    assert [span for _, _, span in web.requests] == [None, "bytes=70000-255999"]


def test_an_object_replaced_between_two_attempts_is_not_stitched_together(
    web: WebServer, served: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    web.faults.append(("break", 70_000))

    def replace(attempt: int) -> float:
        (web.folder / "a.tar").write_bytes(b"other" * 60_000)
        return 0.0

    monkeypatch.setattr(retry, "backoff", replace)
    with pytest.raises(ChangedError, match="replaced"):
        make_store().read(served)


@pytest.mark.parametrize("status", [500, 502, 503, 429, 408])
def test_passing_trouble_is_retried_and_counted(web: WebServer, served: str, status: int) -> None:
    seen: list[tuple[str, float, int]] = []
    store = make_store()
    store.on_request = lambda outcome, seconds, received: seen.append((outcome, seconds, received))
    web.faults.extend([status, status])
    assert store.read_range(served, 0, 10) == DATA[:10]
    failure = "throttled" if status in (503, 429) else "error"
    assert [outcome for outcome, _, _ in seen] == [failure, failure, "ok"]
    assert [received for _, _, received in seen] == [0, 0, 10]
    assert all(seconds > 0 for _, seconds, _ in seen)


def test_a_silent_server_times_out_and_is_asked_again(web: WebServer, served: str) -> None:
    seen: list[str] = []
    store = make_store(timeout=0.3)
    store.on_request = lambda outcome, seconds, received: seen.append(outcome)
    web.faults.append(("hang", 1.0))
    assert store.read_range(served, 0, 10) == DATA[:10]
    assert seen == ["timeout", "ok"]


def test_trouble_that_stays_ends_at_the_deadline_with_the_evidence(web: WebServer, served: str) -> None:
    web.faults.extend([503] * 1000)
    started = time.monotonic()
    with pytest.raises(UnavailableError, match=r"read failed \d+ times in 1 s; the last time: 503"):
        make_store(seconds=1.0).read_range(served, 0, 10)
    assert 0.9 < time.monotonic() - started < 2.0
    assert 3 <= len(web.requests) <= 200


def test_one_hanging_attempt_does_not_outlast_the_deadline(web: WebServer, served: str) -> None:
    web.faults.append(("hang", 3.0))
    started = time.monotonic()
    with pytest.raises(UnavailableError, match="timed out"):
        make_store(seconds=0.5, timeout=30.0).read_range(served, 0, 10)
    assert time.monotonic() - started < 2.5


def test_a_refused_connection_costs_only_the_deadline() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{probe.getsockname()[1]}"
    section = StorageSection(endpoint_url=endpoint, anonymous=True, deadline_seconds=3)
    for url in (f"{endpoint}/a.tar?signature=hush", "s3://bucket/a.tar"):
        started = time.monotonic()
        with pytest.raises(UnavailableError, match=r"failed \d+ times in 3 s.*Cannot connect") as caught:
            Store(section).info(url)
        assert time.monotonic() - started < 6.0
        assert "hush" not in str(caught.value)


def test_a_server_without_ranges_is_refused(web: WebServer, served: str) -> None:
    web.ranges = False
    with pytest.raises(UnsupportedError, match="whole object"):
        make_store().read_range(served, 0, 10)
    assert len(web.requests) == 1


def test_a_source_without_a_length_is_refused(web: WebServer, served: str) -> None:
    web.lengths = web.ranges = False
    with pytest.raises(UnsupportedError, match="length"):
        make_store().info(served)
    with pytest.raises(UnsupportedError, match="length"):
        make_store().read(served)


def test_the_length_is_found_where_head_is_forbidden(web: WebServer, served: str) -> None:
    web.head = False
    info = make_store().info(served)
    assert info.size == len(DATA)
    web.head = True
    assert make_store().info(served) == info


def test_a_web_object_that_changed_is_refused(web: WebServer, served: str) -> None:
    store = make_store()
    version = store.info(served).version
    assert store.read_range(served, 0, 5, version=version) == DATA[:5]
    (web.folder / "a.tar").write_bytes(b"another")
    with pytest.raises(ChangedError, match="replaced"):
        store.read_range(served, 0, 5, version=version)
    with pytest.raises(ChangedError, match=r"shorter|gave"):
        store.read_range(served, 5, 100)


def test_refusals_of_a_web_server_are_final(web: WebServer, served: str) -> None:
    with pytest.raises(NotFoundError):
        make_store().read(f"{web.url}/missing.tar?token=hush")
    web.faults.append(401)
    with pytest.raises(DeniedError, match="401"):
        make_store().read(served)
    assert len(web.requests) == 2


def test_a_refusal_after_success_is_retried_because_credentials_are_renewed(
    web: WebServer, served: str
) -> None:
    store = make_store()
    store.read_range(served, 0, 10)
    web.faults.extend([403, 403])
    assert store.read_range(served, 10, 20) == DATA[10:20]
    web.faults.extend([403] * 100)
    brief = make_store(seconds=0.6)
    with pytest.raises(DeniedError):
        brief.read_range(served, 0, 10)
    web.faults.clear()
    brief.read_range(served, 0, 10)
    web.faults.extend([403] * 100)
    with pytest.raises(UnavailableError, match="refused after it had worked"):
        brief.read_range(served, 0, 10)


def test_web_servers_are_neither_listed_nor_written(served: str) -> None:
    store = make_store()
    calls: list[Callable[[], object]] = [
        lambda: store.list(served),
        lambda: store.glob(served),
        lambda: store.write(served, b""),
        lambda: store.delete(served),
    ]
    for call in calls:
        with pytest.raises(UnsupportedError):
            call()


def test_exists_knows_web_objects(web: WebServer, served: str) -> None:
    assert make_store().exists(served)
    assert not make_store().exists(f"{web.url}/missing.tar")


def test_download_fetches_in_blocks_and_appears_whole(web: WebServer, served: str, tmp_path: Path) -> None:
    store = Store(StorageSection(block_bytes=100_000))
    web.faults.extend([503, ("break", 40_000)])
    store.download(served, tmp_path / "copy.tar")
    assert (tmp_path / "copy.tar").read_bytes() == DATA
    assert [path.name for path in tmp_path.glob("*.tar")] == ["copy.tar"]


def test_a_long_trouble_is_logged_once_however_many_requests_meet_it(
    web: WebServer, served: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(retry, "QUIET_SECONDS", 0.0)
    web.faults.extend([503] * 6)
    store = make_store()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            store.read_range(f"{served}?key=hush", 0, 10)
            web.faults.extend([503])
    (message,) = caplog.messages
    assert "503" in message
    assert "hush" not in message


def test_many_threads_may_share_a_store(served: str) -> None:
    store = make_store()
    with ThreadPoolExecutor(8) as pool:
        parts = list(pool.map(lambda n: store.read_range(served, n * 1000, (n + 1) * 1000), range(256)))
    assert b"".join(parts) == DATA


def test_a_store_pickles_small_and_works_elsewhere(served: str) -> None:
    store = make_store()
    store.on_request = lambda outcome, seconds, received: None
    assert store.read_range(served, 0, 10) == DATA[:10]
    pickled = pickle.dumps(store)
    assert len(pickled) < 1000
    code = f"import pickle; assert pickle.loads({pickled!r}).read_range({served!r}, 5, 15) == {DATA[5:15]!r}"
    assert run(code) == (0, "")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_store_that_was_used_works_after_a_fork(served: str) -> None:
    code = f"""
import os, sys
from streamswav.stream.store import Store
store = Store()
assert len(store.read_range({served!r}, 0, 10)) == 10
child = os.fork()
assert len(store.read_range({served!r}, 10, 30)) == 20
if not child:
    os._exit(0)  # as multiprocessing's children do
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert run(code) == (0, "")


def test_nothing_is_left_open_at_exit(served: str) -> None:
    code = f"from streamswav.stream.store import Store; store = Store(); store.read({served!r})"
    assert run(code) == (0, "")


# --- how long is tried


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that pass only by sleeping, or as the test says."""
    now = [0.0]

    class Time:
        monotonic = staticmethod(lambda: now[0])

        @staticmethod
        def sleep(seconds: float) -> None:
            now[0] += seconds

    monkeypatch.setattr(retry, "time", Time)
    return now


def retrier(**options: Callable[[], None]) -> Retrier:
    return Retrier(10.0, lambda *_: None, throttle=Throttle(4), **options)


def test_a_slow_body_is_no_failure_as_long_as_bytes_come(clock: list[float]) -> None:
    body = bytearray()

    def attempt(left: float) -> int:
        clock[0] += left
        body.extend(b"some")
        if len(body) < 40:
            raise TransientError("timeout", "timed out")
        return len(body)

    got = retrier().call(attempt, url="s3://bucket/a", operation="read", received=lambda: len(body))
    assert got == 40
    assert clock[0] > 90


def test_a_body_that_comes_in_pieces_is_not_paused_for_longer_each_time(clock: list[float]) -> None:
    body = bytearray()

    def attempt(_: float) -> int:
        body.append(0)
        if len(body) < 50:
            raise TransientError("error", "the connection ended early")
        return len(body)

    assert retrier().call(attempt, url="s3://bucket/a", operation="read", received=lambda: len(body)) == 50
    assert clock[0] <= 49 * 2 * retry.BASE_SECONDS


def test_the_last_failure_told_is_not_the_one_that_the_deadline_cut_short(clock: list[float]) -> None:
    def attempt(left: float) -> None:
        clock[0] += 1.0
        if left < 1.0:
            raise TransientError("timeout", "timed out")
        raise TransientError("throttled", "503 SlowDown")

    with pytest.raises(
        UnavailableError, match=r"info failed \d+ times in 1\d s; the last time: 503 SlowDown"
    ):
        retrier().call(attempt, url="s3://bucket/a", operation="info")


def test_expired_credentials_are_renewed_for_an_operation_that_never_ran(clock: list[float]) -> None:
    """Old checkpoints are deleted hours after the start; of permissions, a first refusal stays final."""
    answers: list[StorageError] = [
        IdentityError("s3://bucket/a", "the credentials have expired (ExpiredToken)"),
        DeniedError("s3://bucket/a", "this identity has no permission (AccessDenied)"),
    ]
    renewed: list[int] = []
    tried = retrier(on_denied=lambda: renewed.append(1))

    def attempt(_: float) -> None:
        raise answers.pop(0)

    with pytest.raises(IdentityError):
        tried.call(attempt, url="s3://bucket/a", operation="delete")
    tried.call(lambda _: None, url="s3://bucket/a", operation="read")
    answers.insert(0, IdentityError("s3://bucket/a", "the credentials have expired (ExpiredToken)"))
    with pytest.raises(DeniedError, match="no permission"):
        tried.call(attempt, url="s3://bucket/a", operation="delete")
    assert renewed == [1]


def test_an_attempt_that_was_given_up_adds_nothing_to_the_next() -> None:
    transfer = Transfer("s3://bucket/a", 0, 10, None)
    first = transfer.begin()
    transfer.take(b"01", first)
    second = transfer.begin()
    with pytest.raises(TransientError):
        transfer.take(b"23", first)
    transfer.take(b"23", second)
    assert (bytes(transfer.body), transfer.range) == (b"0123", "bytes=4-9")


# --- what refusals mean


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (404, "NoSuchBucket", NotFoundError),
        (404, "404", NotFoundError),
        (403, "AccessDenied", DeniedError),
        (403, "InvalidObjectState", DeniedError),
        (403, "SignatureDoesNotMatch", IdentityError),
        (400, "ExpiredToken", IdentityError),
        (400, "400", IdentityError),
        (301, "PermanentRedirect", UnsupportedError),
        (400, "AuthorizationHeaderMalformed", UnsupportedError),
        (501, "NotImplemented", UnsupportedError),
        (416, "InvalidRange", ChangedError),
        (400, "RequestTimeout", TransientError),
        (400, "Throttling", TransientError),
        (503, "SlowDown", TransientError),
        (500, "InternalError", TransientError),
        (409, "OperationAborted", TransientError),
    ],
)
def test_each_refusal_has_its_error(status: int, code: str, expected: type[Exception]) -> None:
    assert type(refusal("s3://bucket/a", status, code, "message")) is expected


def test_an_unforeseen_refusal_says_all_that_is_known() -> None:
    error = refusal("s3://bucket/a", 400, "EntityTooLarge", "too large")
    assert type(error) is StorageError
    assert "400 EntityTooLarge too large" in str(error)


@given(attempt=st.integers(0, 100))
def test_pauses_are_jittered_and_capped(attempt: int) -> None:
    assert 0 <= retry.backoff(attempt) <= min(20.0, 0.1 * 2**attempt)


@pytest.mark.parametrize("endpoint", ["localhost:9000", "nonsense", "ftp://host"])
def test_an_impossible_endpoint_is_a_configuration_error(endpoint: str) -> None:
    with pytest.raises(ConfigError, match=r"storage\.endpoint_url"):
        Store(StorageSection(endpoint_url=endpoint)).info("s3://bucket/a")


def test_a_missing_ca_bundle_is_a_configuration_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"storage\.ca_bundle"):
        Store(StorageSection(ca_bundle=f"{tmp_path}/ca.pem")).info("s3://bucket/a")
