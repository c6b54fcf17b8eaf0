"""What storage does on a bad day, by a proxy before a real S3 server: no byte is lost, none comes twice.

Each test stands for a row of ops/faults.md.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec.asyn
import pytest
from conftest import MakeShards, S3Server
from runs import arguments, differences, free_port, run, scrape_text, start, state_of, values_of

from streamswav.config import StorageSection
from streamswav.errors import EXIT_DONE, EXIT_RETRY, UnavailableError
from streamswav.stream.store import Store, clients, retry
from streamswav.stream.store import throttle as throttle_module
from streamswav.stream.store.clients import Clients
from streamswav.stream.store.remote import CONNECTIONS
from streamswav.stream.store.s3 import PART_BYTES
from streamswav.stream.store.throttle import shared_throttle
from streamswav.telemetry.families import REQUEST_OUTCOMES

sys.path.append(str(Path(__file__).parents[2] / "ops" / "benchmarks"))
from fault_proxy import FAULTS, FaultProxy, Rates

DATA = bytes(range(251)) * 2000
OBJECT = "/a.tar"


@pytest.fixture
def proxy(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    monkeypatch.setattr(retry, "BASE_SECONDS", 0.01)
    with FaultProxy(s3.endpoint, seed=1) as running:
        yield running


class Reader:
    """A store behind the proxy, an object in it, and the outcomes of all requests."""

    def __init__(self, proxy: FaultProxy, bucket: str, **section: Any) -> None:
        self.proxy, self.bucket = proxy, bucket
        self.url = bucket + OBJECT
        self.outcomes: list[str] = []
        self.received = 0
        given = {"endpoint_url": proxy.url, "deadline_seconds": 20, "timeout_seconds": 10} | section
        self.store = Store(StorageSection(**given), on_request=self._record)

    def _record(self, outcome: str, _: float, received: int) -> None:
        self.outcomes.append(outcome)
        self.received += received

    @property
    def starts(self) -> list[int]:
        """Where the ranges begin that were asked for."""
        spans = [request.range for request in self.proxy.requests if request.method == "GET"]
        return [int(span.removeprefix("bytes=").partition("-")[0]) for span in spans if span]

    def read(self, start: int = 0, stop: int = len(DATA)) -> bytes:
        return self.store.read_range(self.url, start, stop)


@pytest.fixture
def reader(s3: S3Server, proxy: FaultProxy) -> Callable[..., Reader]:
    """Makes a reader of DATA in a new bucket."""

    def make(**section: Any) -> Reader:
        bucket, folder = s3.make_bucket()
        (folder / OBJECT.lstrip("/")).write_bytes(DATA)
        return Reader(proxy, bucket, **section)

    return make


def assert_met(proxy: FaultProxy, outcomes: list[str], **injected: int) -> None:
    """All faults came, and the last request went well.

    Not every one is an outcome: where a kept connection ends before the answer begins, as an idle one may at
    any time, aiohttp asks once more on a new one.
    """
    assert +proxy.injected == injected
    assert {"throttled", "error"} < set(outcomes) <= {"throttled", "error", "ok"}
    assert outcomes[-1] == "ok"


# --- reads


def test_a_connection_reset_in_mid_body_resumes_at_the_byte(
    proxy: FaultProxy, reader: Callable[..., Reader]
) -> None:
    one = reader()
    proxy.plan(("reset", 1000), ("reset", 500))
    assert one.read() == DATA
    assert one.starts == [0, 1000, 1500]
    assert one.outcomes == ["error", "error", "ok"]
    assert one.received == proxy.sent == len(DATA)


def test_a_truncated_body_resumes_at_the_byte(proxy: FaultProxy, reader: Callable[..., Reader]) -> None:
    one = reader()
    proxy.plan(("truncate", 1000), ("truncate", 0))
    assert one.read() == DATA
    assert one.starts == [0, 1000, 1000]
    assert one.outcomes == ["error", "error", "ok"]


def test_a_body_that_stalls_is_broken_off_and_resumes_at_the_byte(
    proxy: FaultProxy, reader: Callable[..., Reader]
) -> None:
    one = reader(timeout_seconds=0.3)
    proxy.plan(("stall", 1000))
    assert one.read() == DATA
    assert one.starts == [0, 1000]
    assert one.outcomes == ["timeout", "ok"]


def test_internal_errors_are_tried_again(proxy: FaultProxy, reader: Callable[..., Reader]) -> None:
    one = reader()
    proxy.plan("error", "error", "slowdown")
    assert one.read() == DATA
    assert one.outcomes == ["error", "error", "throttled", "ok"]


def test_slow_down_slows_all_readers_together_and_passes(
    proxy: FaultProxy, reader: Callable[..., Reader], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(throttle_module, "PAUSE_SECONDS", 0.02)
    one = reader()
    throttle = shared_throttle(f"S3 {proxy.url}", CONNECTIONS)
    limits: list[int] = []
    one.store.on_request = lambda outcome, *_: limits.append(throttle.limit)
    proxy.plan(*["slowdown"] * 20)
    size = len(DATA) // 200
    with ThreadPoolExecutor(16) as pool:
        parts = list(pool.map(lambda n: one.read(n * size, (n + 1) * size), range(200)))
    assert b"".join(parts) == DATA
    assert min(limits) <= 8
    assert throttle.limit > min(limits)
    assert len(limits) == 220


def test_connections_refused_for_a_while_are_tried_again(
    proxy: FaultProxy, reader: Callable[..., Reader]
) -> None:
    one = reader()
    proxy.pause()
    one.store.on_request = lambda outcome, *_: (
        one.outcomes.append(outcome),
        len(one.outcomes) == 3 and proxy.resume(),
    )
    assert one.read() == DATA
    assert one.outcomes[:3] == ["error"] * 3
    assert one.outcomes[-1] == "ok"


def test_a_name_that_does_not_resolve_for_a_while_is_tried_again(
    s3: S3Server, proxy: FaultProxy, reader: Callable[..., Reader], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, failures = socket.getaddrinfo, [0]

    def resolve(host: Any, *rest: Any, **options: Any) -> Any:
        if host != "storage.test":
            return real(host, *rest, **options)
        failures[0] += 1
        if failures[0] <= 2:
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        return real("127.0.0.1", *rest, **options)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    one = reader(endpoint_url=f"http://storage.test:{proxy.port}")
    assert one.read() == DATA
    assert one.outcomes == ["error", "error", "ok"]


def test_a_name_that_never_resolves_ends_at_the_deadline(reader: Callable[..., Reader]) -> None:
    one = reader(endpoint_url="http://storage.invalid:9000", deadline_seconds=1)
    with pytest.raises(
        UnavailableError, match=r"read failed \d+ times in 1 s; the last time: .*Cannot connect"
    ):
        one.read()


@pytest.mark.parametrize("fault", [*FAULTS])
def test_each_fault_that_stays_ends_at_the_deadline_with_what_was_tried(
    proxy: FaultProxy, reader: Callable[..., Reader], fault: str
) -> None:
    one = reader(timeout_seconds=0.2)
    assert one.read(0, 10) == DATA[:10]
    one.store._place(one.url)._retrier._deadline = 0.7  # type: ignore[attr-defined]
    proxy.plan(*[(fault, 0)] * 1000)
    said = {
        "reset": "reset|disconnected|Cannot connect|not completed|ended",
        "truncate": "not completed|ended|disconnected|closed",
        "stall": "timed out",
        "slowdown": "503 SlowDown",
        "error": "500 InternalError",
        "expired": r"refused after it had worked: the credentials have expired \(ExpiredToken\)",
    }[fault]
    with pytest.raises(UnavailableError, match=rf"{one.url}: read failed \d+ times in 1 s; .*({said})"):
        one.read()


def test_listing_and_asking_for_a_size_meet_the_same_faults(
    s3: S3Server, proxy: FaultProxy, reader: Callable[..., Reader]
) -> None:
    one = reader(timeout_seconds=1)
    folder = s3.folder / one.bucket.removeprefix("s3://")
    for number in range(1100):
        (folder / f"{number:05d}.tar").touch()
    proxy.plan("slowdown", "reset", "error", "truncate", "stall")
    assert len(one.store.list(one.bucket)) == 1101
    assert one.outcomes == ["throttled", "error", "error", "error", "timeout", "ok", "ok"]
    proxy.plan("slowdown", "reset", "error", "truncate")
    assert one.store.info(one.url).size == len(DATA)
    assert_met(proxy, one.outcomes[7:], slowdown=2, reset=2, error=2, truncate=2, stall=1)


def test_everything_at_once_and_every_byte_comes_once(
    proxy: FaultProxy, reader: Callable[..., Reader]
) -> None:
    one = reader(timeout_seconds=0.5, deadline_seconds=120)
    proxy.rates = Rates(reset=0.1, truncate=0.1, stall=0.02, slowdown=0.02, error=0.05)
    size = len(DATA) // 40
    with ThreadPoolExecutor(8) as pool:
        parts = list(pool.map(lambda n: one.read(n * size, (n + 1) * size), range(40)))
    assert b"".join(parts) == DATA
    assert one.received == len(DATA)
    assert proxy.sent - len(DATA) < len(DATA) // 10  # what was on its way when a connection broke
    assert one.outcomes.count("ok") == 40
    assert len(one.outcomes) - 40 == proxy.injected.total() == len(proxy.requests) - 40 > 5


# --- writes


def test_a_write_that_meets_faults_appears_once_and_whole(
    s3: S3Server, reader: Callable[..., Reader]
) -> None:
    data = bytes(range(251)) * (3 * PART_BYTES // 251)
    with FaultProxy(s3.endpoint, writes=True) as proxy:
        bucket, folder = s3.make_bucket()
        one = Reader(proxy, bucket)
        proxy.plan("slowdown", "reset", "error", "truncate")
        one.store.write(f"{bucket}/small", DATA)
        assert_met(proxy, one.outcomes, slowdown=1, reset=1, error=1, truncate=1)
        proxy.plan("slowdown", "error", "slowdown", "error", "reset")
        one.store.write(f"{bucket}/large", data)
        assert_met(proxy, one.outcomes, slowdown=3, reset=2, error=3, truncate=1)
    assert (folder / "small").read_bytes() == DATA
    assert (folder / "large").read_bytes() == data


# --- credentials


@pytest.fixture
def rotate(s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Writes the shared credentials file with another session token; nothing is in the environment."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))

    def write(token: str) -> None:
        lines = [f"aws_access_key_id = {s3.access_key}", f"aws_secret_access_key = {s3.secret_key}"]
        aside = tmp_path / "aside"
        aside.write_text("\n".join(["[default]", *lines, f"aws_session_token = {token}", ""]))
        aside.replace(tmp_path / "credentials")

    return write


def test_expired_credentials_are_read_anew_once_their_file_was_rotated(
    proxy: FaultProxy,
    reader: Callable[..., Reader],
    rotate: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(clients, "RENEW_SECONDS", 0.05)
    rotate("old-token")
    one = reader()
    assert one.read() == DATA
    proxy.expired.add("old-token")
    one.store.on_request = lambda outcome, *_: (
        one.outcomes.append(outcome),
        len(one.outcomes) == 10 and rotate("new-token"),
    )
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda _: one.read(), range(4))) == [DATA] * 4
    assert one.outcomes.count("ok") == 5
    assert set(one.outcomes) == {"ok", "error"}
    assert proxy.injected["expired"] == one.outcomes.count("error") >= 9


def test_a_burst_of_refusals_after_success_passes(proxy: FaultProxy, reader: Callable[..., Reader]) -> None:
    one = reader()
    assert one.read() == DATA
    proxy.plan("expired", "expired", "expired")
    assert one.read() == DATA
    assert one.outcomes == ["ok", "error", "error", "error", "ok"]


def test_a_client_is_replaced_seldom_and_closed_when_its_last_request_ends(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(clients, "time", type("Time", (), {"monotonic": lambda: now[0]}))
    pool, closed = Clients(s3.section), []

    async def scenario() -> None:
        async with pool.lease() as first:
            real = first.close

            async def close() -> None:
                closed.append(first)
                await real()

            first.close = close
            now[0] += clients.RENEW_SECONDS / 2
            pool.doubt()
            async with pool.lease() as same:
                assert same is first
            now[0] += clients.RENEW_SECONDS
            pool.doubt()
            pool.doubt()
            async with pool.lease() as second:
                assert second is not first
                pool.doubt()
            async with pool.lease() as third:
                assert third is second
            assert closed == []
            await first.list_objects_v2(Bucket=bucket)
        assert closed == [first]
        await pool.close()

    bucket = s3.make_bucket()[0].removeprefix("s3://")
    fsspec.asyn.sync(fsspec.asyn.get_loop(), scenario)


# --- runs

IMAGES = 16 * 24


@pytest.fixture(scope="module")
def shards(s3: S3Server, make_shards: MakeShards) -> str:
    url, folder = s3.make_bucket()
    make_shards(folder / "train", counts=[20, 25, 15, 30])
    return f"{url}/train/"


def tiny(endpoint: str, shards: str, directory: Path, *, deadline: int, port: int = 0) -> list[str]:
    """Arguments of a run of 24 steps that holds little in memory, hence always needs its storage."""
    return arguments(
        run={"directory": directory},
        stream={"urls": shards, "passes": 100, "rows": 1},
        storage={
            "endpoint_url": endpoint,
            "block_bytes": 16384,
            "deadline_seconds": deadline,
            "timeout_seconds": 1,
        },
        loader={"workers": 1, "prefetch": 1, "read_ahead": 1},
        training={"images": IMAGES},
        checkpoint={"images": 80},
        telemetry={"port": port},
    )


@pytest.fixture(scope="module")
def whole(s3: S3Server, shards: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The final state of a run that met no fault."""
    folder = tmp_path_factory.mktemp("whole")
    outcome = run(tiny(s3.endpoint, shards, folder / "run", deadline=60), folder)
    assert outcome.code == EXIT_DONE, outcome.err
    return state_of(folder / "run")


def test_a_run_whose_storage_is_gone_ends_at_the_deadline_and_continues_without_loss(
    proxy: FaultProxy, shards: str, whole: dict[str, Any], tmp_path: Path
) -> None:
    again = tiny(proxy.url, shards, tmp_path / "run", deadline=2)
    with start(again, tmp_path / "first") as running:
        running.wait_until(lambda so_far: so_far.of("checkpoint"))
        proxy.pause()
        ended = running.wait(60)
        assert running.left_behind() == []
    assert ended.code == EXIT_RETRY, ended.err
    said = ended.said[-1]
    assert said.startswith(f"streamswav: {shards}shard-0000")
    assert "read failed" in said
    assert "times in 2 s; the last time: " in said
    assert "Cannot connect" in said
    proxy.resume()
    outcome = run(again, tmp_path / "second")
    assert outcome.code == EXIT_DONE, outcome.err
    assert outcome.of("resumed")[0]["step"] == ended.of("progress")[-1]["step"] >= 5
    assert differences(state_of(tmp_path / "run"), whole) == []


def test_a_run_through_faults_of_every_kind_ends_as_one_without_and_counts_them(
    proxy: FaultProxy, shards: str, whole: dict[str, Any], tmp_path: Path
) -> None:
    each: list[Any] = [("reset", 3000), None, "slowdown", None, "error", None, ("truncate", 3000), None]
    proxy.plan(*each * 5, ("stall", 3000), None, *each)
    again = tiny(proxy.url, shards, tmp_path / "run", deadline=60, port=(port := free_port()))
    counter = 'streamswav_s3_requests_total{{outcome="{}"}}'

    def counted(_: object) -> bool:
        values = values_of(scrape_text(port))
        return all(values.get(counter.format(outcome), 0) > 0 for outcome in REQUEST_OUTCOMES)

    with start(again, tmp_path / "out") as running:
        running.wait_until(counted)
        outcome = running.wait()
    assert outcome.code == EXIT_DONE, outcome.err
    assert differences(state_of(tmp_path / "run"), whole) == []
