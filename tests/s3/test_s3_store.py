"""The store against a real S3 server with signatures, and against S3's GET on a server that fails."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import S3Server, WebServer

from streamswav.config import StorageSection
from streamswav.errors import ChangedError, DeniedError, NotFoundError, UnavailableError, UnsupportedError
from streamswav.stream.store import Store, retry
from streamswav.stream.store.s3 import PART_BYTES

DATA = bytes(range(256)) * 1000


@pytest.fixture(scope="module")
def store(s3: S3Server) -> Store:
    return Store(s3.section)


@pytest.fixture
def bucket(s3: S3Server) -> str:
    return s3.make_bucket()[0]


def test_what_is_written_is_read_back_and_listed(store: Store, bucket: str) -> None:
    for name in ("b/2.tar", "a.tar", "b/1.tar"):
        store.write(f"{bucket}/data/{name}", name.encode())
    found = store.list(f"{bucket}/data")
    assert [info.url for info in found] == [
        f"{bucket}/data/{name}" for name in ("a.tar", "b/1.tar", "b/2.tar")
    ]
    assert [store.read(info.url).decode() for info in found] == ["a.tar", "b/1.tar", "b/2.tar"]
    assert found == store.list(f"{bucket}/data/")
    assert found == store.list(bucket)


def test_a_listing_and_a_head_agree_on_size_and_version(store: Store, bucket: str) -> None:
    store.write(f"{bucket}/a.tar", DATA)
    (listed,) = store.list(bucket)
    assert listed == store.info(f"{bucket}/a.tar")
    assert listed.size == len(DATA)
    assert listed.version
    assert store.read_range(listed.url, 1000, 200_000, version=listed.version) == DATA[1000:200_000]


def test_a_folder_is_not_confused_with_its_namesakes(store: Store, bucket: str) -> None:
    store.write(f"{bucket}/run/a", b"")
    store.write(f"{bucket}/run-2/b", b"")
    assert [info.url for info in store.list(f"{bucket}/run")] == [f"{bucket}/run/a"]
    store.delete(f"{bucket}/run")
    assert [info.url for info in store.list(bucket)] == [f"{bucket}/run-2/b"]


def test_glob_matches_within_a_folder(store: Store, bucket: str) -> None:
    for name in ("s-1.tar", "s-2.tar", "s-10.tar", "t-1.tar", "s-3/x.tar"):
        store.write(f"{bucket}/data/{name}", b"")
    assert [info.url[-7:] for info in store.glob(f"{bucket}/data/s-?.tar")] == ["s-1.tar", "s-2.tar"]
    assert [info.url[-9:] for info in store.glob(f"{bucket}/*/s-[3-9]/*.tar")] == ["s-3/x.tar"]
    assert store.glob(f"{bucket}/none/*.tar") == []


def test_listing_goes_on_over_many_pages(s3: S3Server, store: Store) -> None:
    url, folder = s3.make_bucket()
    for number in range(2100):
        (folder / f"{number:05d}.tar").touch()
    found = store.list(url)
    assert [info.url for info in found] == [f"{url}/{number:05d}.tar" for number in range(2100)]


def test_an_empty_bucket_lists_nothing_and_a_missing_one_is_not_found(store: Store, bucket: str) -> None:
    assert store.list(bucket) == []
    assert store.list(f"{bucket}/nothing/here") == []
    for call in (store.list, store.info, store.read):
        with pytest.raises(NotFoundError):
            call("s3://no-such-bucket/a")
    with pytest.raises(NotFoundError, match="no such bucket"):
        store.list("s3://no-such-bucket")
    with pytest.raises(NotFoundError, match="no such object"):
        store.read(f"{bucket}/a")


def test_large_files_go_up_in_parts_and_come_down_whole(s3: S3Server, bucket: str, tmp_path: Path) -> None:
    data = bytes(range(251)) * (3 * PART_BYTES // 251)
    (tmp_path / "large").write_bytes(data)
    outcomes: list[str] = []
    store = Store(s3.section, on_request=lambda outcome, seconds, received: outcomes.append(outcome))
    store.upload(tmp_path / "large", f"{bucket}/large")
    assert outcomes == ["ok"] * 5  # begin, three parts, end
    store.download(f"{bucket}/large", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == data


def test_empty_objects_are_objects(store: Store, bucket: str) -> None:
    store.write(f"{bucket}/empty", b"")
    assert store.read(f"{bucket}/empty") == b""
    assert store.info(f"{bucket}/empty").size == 0
    assert store.exists(f"{bucket}/empty")


def test_exists_knows_objects_and_folders(store: Store, bucket: str) -> None:
    store.write(f"{bucket}/run/1/a", b"x")
    names = ("run/1/a", "run/1", "run", "ru", "none")
    assert [store.exists(f"{bucket}/{name}") for name in names] == [True, True, True, False, False]


def test_delete_takes_what_is_there_and_never_a_bucket(store: Store, bucket: str) -> None:
    store.write(f"{bucket}/run/a", b"")
    store.delete(f"{bucket}/run/a")
    store.delete(f"{bucket}/run/a")
    assert store.list(bucket) == []
    for url in (bucket, f"{bucket}/"):
        with pytest.raises(UnsupportedError, match="whole bucket"):
            store.delete(url)


def test_a_replaced_object_is_refused(store: Store, bucket: str) -> None:
    store.write(f"{bucket}/a.tar", DATA)
    version = store.info(f"{bucket}/a.tar").version
    store.write(f"{bucket}/a.tar", DATA[:1000])
    with pytest.raises(ChangedError, match="replaced"):
        store.read_range(f"{bucket}/a.tar", 0, 10, version=version)
    with pytest.raises(ChangedError, match="gave bytes 0-999"):
        store.read_range(f"{bucket}/a.tar", 0, 2000)
    with pytest.raises(ChangedError, match="shorter"):
        store.read_range(f"{bucket}/a.tar", 5000, 6000)


def test_keys_with_odd_characters_survive(store: Store, bucket: str) -> None:
    for name in ("sp ace+plus.tar", "ümläut%20.tar", "a=b&c.tar"):
        store.write(f"{bucket}/{name}", name.encode())
        assert store.read(f"{bucket}/{name}") == name.encode()
    assert sorted(store.read(info.url) for info in store.list(bucket)) == sorted(
        name.encode() for name in ("sp ace+plus.tar", "ümläut%20.tar", "a=b&c.tar")
    )


@pytest.mark.parametrize("operation", ["list", "info"])
@pytest.mark.parametrize(
    ("key", "secret", "hint"),
    [
        ("ANOTHERKEY", "streamswav-secret", "does not know the access key"),
        ("STREAMSWAVTEST", "not-the-secret", "secret key does not belong"),
    ],
)
def test_wrong_keys_are_denied_at_once_with_the_hint_which(
    s3: S3Server,
    bucket: str,
    monkeypatch: pytest.MonkeyPatch,
    key: str,
    secret: str,
    hint: str,
    operation: str,
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
    started = time.monotonic()
    with pytest.raises(DeniedError, match=hint) as caught:
        getattr(Store(s3.section), operation)(f"{bucket}/a")
    assert time.monotonic() - started < 5
    assert key not in str(caught.value)
    assert secret not in str(caught.value)


def test_no_credentials_at_all_are_denied_at_once(
    s3: S3Server, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    started = time.monotonic()
    with pytest.raises(DeniedError, match="no credentials"):
        Store(s3.section).list(bucket)
    assert time.monotonic() - started < 5
    anonymous = s3.section.model_copy(update={"anonymous": True})
    with pytest.raises(DeniedError, match="signed requests"):
        Store(anonymous).list(bucket)


def test_an_ended_session_leaves_no_warnings(s3: S3Server, bucket: str) -> None:
    code = f"""
from streamswav.config import StorageSection
from streamswav.stream.store import Store
store = Store(StorageSection(endpoint_url={s3.endpoint!r}))
store.write("{bucket}/a", b"x")
assert store.read("{bucket}/a") == b"x"
del store
Store(StorageSection(endpoint_url={s3.endpoint!r})).list({bucket!r})
"""
    command = [sys.executable, "-W", "error", "-W", "always::ResourceWarning", "-c", code]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


# --- S3's protocol on a server that fails


@pytest.fixture
def failing(web: WebServer, monkeypatch: pytest.MonkeyPatch) -> tuple[WebServer, Store]:
    monkeypatch.setattr(retry, "BASE_SECONDS", 0.01)
    (web.folder / "bucket").mkdir()
    (web.folder / "bucket/a.tar").write_bytes(DATA)
    section = StorageSection(endpoint_url=web.url, anonymous=True, deadline_seconds=10, timeout_seconds=0.5)
    return web, Store(section)


def test_a_broken_s3_body_resumes_at_the_byte(failing: tuple[WebServer, Store]) -> None:
    web, store = failing
    web.faults.extend([("break", 1000), 503, ("break", 70_000)])
    assert store.read_range("s3://bucket/a.tar", 100, 200_000) == DATA[100:200_000]
    spans = [span for _, _, span in web.requests]
    assert spans == ["bytes=100-199999", "bytes=1100-199999", "bytes=1100-199999", "bytes=71100-199999"]


def test_every_s3_attempt_is_counted_once_so_no_other_layer_retries(failing: tuple[WebServer, Store]) -> None:
    web, store = failing
    outcomes: list[tuple[str, int]] = []
    store.on_request = lambda outcome, seconds, received: outcomes.append((outcome, received))
    web.faults.extend([500, 503, ("hang", 1.0), ("break", 300)])
    assert store.read("s3://bucket/a.tar") == DATA
    failures = [("error", 0), ("throttled", 0), ("timeout", 0), ("error", 300)]
    assert outcomes == [*failures, ("ok", len(DATA) - 300)]
    assert len(web.requests) == len(outcomes)


def test_an_s3_server_without_ranges_is_refused(failing: tuple[WebServer, Store]) -> None:
    web, store = failing
    web.ranges = False
    with pytest.raises(UnsupportedError, match="whole object"):
        store.read_range("s3://bucket/a.tar", 0, 10)


def test_s3_trouble_that_stays_ends_at_the_deadline(failing: tuple[WebServer, Store]) -> None:
    web, store = failing
    web.faults.extend([503] * 1000)
    brief = Store(store.section.model_copy(update={"deadline_seconds": 1.0}))
    calls: list[Callable[[str], object]] = [brief.info, brief.read]
    for call in calls:
        started = time.monotonic()
        with pytest.raises(UnavailableError, match="503"):
            call("s3://bucket/a.tar")
        assert time.monotonic() - started < 3
