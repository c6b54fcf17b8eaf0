"""The endpoint of a pod: two real ranks with loader processes under the launcher, scraped over HTTP."""

import gzip
import http.client
import json
import os
import signal
import time

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families
from runs import arguments, free_port, scrape_text, start, start_ranks, values_of

from streamswav.errors import EXIT_CONFIG, EXIT_DONE, EXIT_FAILED, EXIT_RETRY
from streamswav.telemetry.multiprocess import collected_registry

COUNTS = [25, 14, 31]
BATCH = 16


@pytest.fixture(scope="module")
def command(s3, make_shards):
    url, bucket = s3.make_bucket()
    make_shards(bucket / "train", counts=COUNTS)

    def build(directory, *, port, passes=200, workers=1, **sections):
        return arguments(
            run={"directory": directory},
            stream={"urls": f"{url}/train/", "passes": passes, "samples": sum(COUNTS)},
            storage={"endpoint_url": s3.endpoint},
            loader={"workers": workers},
            checkpoint={"images": 2 * BATCH},
            telemetry={"port": port, "bind": "127.0.0.1"},
            **sections,
        )

    return build


def get(port, path, **headers):
    """Status, headers and body of an answer; None while nobody answers."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request(
            "GET", path, headers={name.replace("_", "-"): each for name, each in headers.items()}
        )
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()
    except OSError:
        return None
    finally:
        connection.close()


def scrape_until(running, port, reached, seconds=90):
    """Scrape until the values are as they should be, and return them."""
    deadline = time.monotonic() + seconds
    while not reached(values := values_of(scrape_text(port))):
        assert not running.ended, running.so_far().err[-3000:]
        assert time.monotonic() < deadline, values
        time.sleep(0.02)
    return values


def value(values, name, **labels):
    shown = ",".join(f'{label}="{each}"' for label, each in sorted(labels.items()))
    return values.get(f"streamswav_{name}{{{shown}}}" if shown else f"streamswav_{name}", 0.0)


def scrape_to_the_end(running, port):
    """The last answer before the launcher goes."""
    last, deadline = {}, time.monotonic() + 120
    while not running.ended:
        assert time.monotonic() < deadline, running.so_far().err[-3000:]
        last = values_of(scrape_text(port)) or last
        time.sleep(0.02)
    return last


@pytest.fixture(scope="module")
def story(command, tmp_path_factory):
    """Two ranks with a loader process each: a rank is killed, all start again, and come to the end."""
    folder, port = tmp_path_factory.mktemp("run"), free_port()
    made = command(folder / "run", port=port, passes=12)
    seen = {}
    with start_ranks(2, made, folder, launcher=["--max-restarts", "1"]) as running:
        seen["working"] = scrape_until(running, port, lambda now: value(now, "step") >= 6)
        seen["status"] = json.loads(get(port, "/status")[2])
        seen["ready"], seen["healthy"] = get(port, "/readyz"), get(port, "/healthz")
        seen["elsewhere"] = get(port, "/")
        seen["open"] = get(port, "/metrics", Accept="application/openmetrics-text; version=1.0.0")
        seen["zipped"] = get(port, "/metrics", Accept_Encoding="gzip")
        seen["before"] = values_of(scrape_text(port))
        os.kill(running.ranks()[0], signal.SIGKILL)
        seen["after"] = scrape_until(
            running,
            port,
            lambda now: (
                any('attempt="1"' in name for name in now) and value(now, "run_state", state="training")
            ),
        )
        seen["again"] = json.loads(get(port, "/status")[2])
        seen["last"] = scrape_to_the_end(running, port)
        seen["outcome"] = running.wait()
    return seen


def test_what_ranks_and_loader_processes_count_comes_together(story):
    values = story["working"]
    assert value(values, "s3_requests_total", outcome="ok") >= len(COUNTS)
    assert value(values, "s3_request_duration_seconds_count") >= len(COUNTS)
    assert value(values, "shard_opens_total", outcome="ok") >= len(COUNTS)
    for stage in ("fetch", "parse", "decode", "crop", "collate"):
        assert value(values, "stage_seconds_total", stage=stage) > 0, stage
    states = [value(values, "dataloader_workers", state=state) for state in ("busy", "waiting")]
    assert sum(states) == 2, "one a rank"
    # Of the whole run, from rank 0 alone.
    assert value(values, "images_total") <= BATCH * value(values, "step") <= BATCH * (6 + 2)
    assert value(values, "prototypes") == 10


def test_the_endpoint_tells_whether_and_where_the_run_is(story):
    assert story["ready"][0] == story["healthy"][0] == 200
    assert story["elsewhere"][0] == 404
    assert b"/status" in story["elsewhere"][2]
    status = story["status"]
    assert status["state"] in ("training", "checkpoint")
    assert status["step"] >= 1
    assert status["run"]["world_size"] == "2"
    assert [rank["rank"] for rank in status["ranks"]] == [0, 1]
    assert {"images", "fraction", "loss", "images_per_second", "seconds_left", "versions"} <= set(status)


def test_a_node_that_waits_for_another_is_healthy_and_not_ready(command, tmp_path):
    port = free_port()
    flags = ["--nnodes", "2", "--node-rank", "0", "--master-addr", "localhost"]
    flags += ["--master-port", str(free_port()), "--join-seconds", "60"]
    with start_ranks(1, command(tmp_path / "run", port=port), tmp_path, launcher=flags) as running:
        while (ready := get(port, "/readyz")) is None:
            assert not running.ended, running.so_far().err[-3000:]
            time.sleep(0.01)
        assert ready[0] == 503
        assert get(port, "/healthz")[0] == 200
        assert json.loads(get(port, "/status")[2])["state"] == "init"


def test_openmetrics_and_gzip_are_negotiated(story):
    _, headers, body = story["open"]
    assert headers["Content-Type"].startswith("application/openmetrics-text; version=1.0.0")
    families = {family.name: family for family in text_string_to_metric_families(body.decode())}
    assert families["streamswav_s3_requests"].type == "counter"
    _, headers, body = story["zipped"]
    assert headers["Content-Encoding"] == "gzip"
    assert b"# TYPE streamswav_step gauge" in gzip.decompress(body)


def test_a_killed_rank_is_counted_and_counts_go_on_after_the_restart(story):
    before, after, last = story["before"], story["after"], story["last"]
    assert story["outcome"].code == EXIT_DONE, story["outcome"].err[-3000:]
    assert value(after, "worker_exits_total", reason="signal") == 1
    for name in before:
        if "_total" in name or name.endswith("_count"):
            assert after[name] >= before[name], name
            assert last[name] >= after[name], name
    assert story["again"]["attempt"] == 1
    (info,) = (name for name in after if name.startswith("streamswav_run_info"))
    assert 'attempt="1"' in info


def test_who_scrapes_sees_that_the_run_is_done(story):
    assert value(story["last"], "run_state", state="done") == 1
    assert value(story["last"], "worker_exits_total", reason="ok") == 2


def test_a_users_folder_is_used_and_our_own_is_gone_with_the_run(command, tmp_path):
    temporary, shared = tmp_path / "temporary", tmp_path / "shared"
    temporary.mkdir()
    made = command(tmp_path / "run", port=0, passes=1, workers=0)
    own = {"TMPDIR": str(temporary)}
    with start(made, tmp_path / "one", environment=own, script=True) as running:
        running.wait_until(lambda _: list(temporary.glob("streamswav-metrics-*/counter_0.db")))
        assert running.wait().code == EXIT_DONE
    assert not list(temporary.glob("streamswav-metrics-*"))
    again = [word.replace(str(tmp_path / "run"), str(tmp_path / "other")) for word in made]
    for directory in (made, again):  # the second one counts from 0
        with start(
            directory, tmp_path / "two", environment={"PROMETHEUS_MULTIPROC_DIR": str(shared)}
        ) as running:
            assert running.wait().code == EXIT_DONE
        images = collected_registry(shared).get_sample_value("streamswav_images_total")
        assert images in (0, sum(COUNTS) // BATCH * BATCH)
    assert images > 0


def test_a_hung_rank_is_told_by_its_reason(command, tmp_path):
    port = free_port()
    made = command(tmp_path / "run", port=port, watchdog={"step_seconds": 4, "checkpoint_seconds": 4})
    with start_ranks(2, made, tmp_path / "out", launcher=[]) as running:
        scrape_until(running, port, lambda now: value(now, "step") >= 2)
        os.kill(running.ranks()[1], signal.SIGSTOP)
        last = scrape_to_the_end(running, port)
        assert running.wait().code == EXIT_RETRY
    assert value(last, "worker_exits_total", reason="hang") == 1
    assert value(last, "run_state", state="failed") == 1


def test_rank_0_that_is_killed_leaves_a_run_that_failed(command, tmp_path):
    port = free_port()
    with start_ranks(1, command(tmp_path / "run", port=port), tmp_path / "out", launcher=[]) as running:
        scrape_until(running, port, lambda now: value(now, "step") >= 2)
        os.kill(running.ranks()[0], signal.SIGKILL)
        last = scrape_to_the_end(running, port)
        assert running.wait().code == EXIT_FAILED
    assert value(last, "run_state", state="failed") == 1
    assert value(last, "run_state", state="training") == 0


@pytest.mark.parametrize("launcher", [True, False])
def test_a_port_in_use_is_refused_before_anything_starts(command, tmp_path, launcher):
    port = free_port()
    made = command(tmp_path / "run", port=port, workers=0)
    with start(made, tmp_path / "one") as first:
        scrape_until(first, port, lambda now: now)
        again = (
            start_ranks(2, made, tmp_path / "two", launcher=[]) if launcher else start(made, tmp_path / "two")
        )
        with again as second:
            outcome = second.wait()
    assert outcome.code == EXIT_CONFIG
    assert f"telemetry.port = {port}" in outcome.err
    assert "Traceback" not in outcome.err
