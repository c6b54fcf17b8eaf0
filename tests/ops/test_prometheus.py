"""A real Prometheus scrapes real two-rank runs: a healthy one, and some that are made to fail."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from prometheus import Prometheus, scraping
from runs import Running, arguments, free_port, start_ranks

from shards.cli import main as build_shards
from streamswav.errors import EXIT_FAILED, EXIT_RETRY
from streamswav.telemetry.families import FAMILIES, PREFIX

ROOT = Path(__file__).parents[2]
OPS = ROOT / "ops"
sys.path[:0] = [str(OPS / "benchmarks"), str(OPS / "prometheus")]
import make_rules  # noqa: E402
from fault_proxy import FaultProxy, Rates  # noqa: E402

FASHION = Path("/usr/share/datasets/fashion-mnist")
COUNTS = [40] * 6
LABELS = {"namespace": "ml", "run": "first"}
SCRAPED = {"$namespace": "ml", "$run": "first", "$__rate_interval": "1m"}
SOON = {"stalled_seconds": 3, "stalled_steps": 0}
WITHOUT_GPU = {
    "GPU memory reserved",
    "MFU",
    "Utilisation",
    "Tensor cores",
    "Memory bandwidth",
    "Power",
    "Temperature",
    "Clock",
    "XID errors",
}
WITHOUT_CLUSTER = {"CPU", "CPU throttled", "Memory", "Network received", "Pods", "Node load", "Node disk"}
NOTHING_HAPPENED = {"annotation Starts", "annotation Verdicts", "annotation Alerts"}


class Seen(NamedTuple):
    """A run that is scraped, where it runs, and what scrapes it."""

    running: Running
    server: Prometheus
    folder: Path


def keys(folder: Path, urls: str, endpoint: str, port: int, **more: dict[str, Any]) -> list[str]:
    """What the runs of this file have in common."""
    sections: dict[str, dict[str, Any]] = {
        "run": {"directory": folder / "run"},
        "stream": {"urls": urls, "samples": sum(COUNTS), "passes": 10_000, "skip_ratio": 0.5},
        "storage": {"endpoint_url": endpoint},
        "loader": {"workers": 1},
        "checkpoint": {"minutes": 0.05},
        "telemetry": {"port": port, "bind": "127.0.0.1", "log_seconds": 0.5},
    }
    return arguments(**{name: sections.get(name, {}) | more.get(name, {}) for name in {*sections, *more}})


@pytest.fixture(scope="module")
def garments(tmp_path_factory) -> Path:
    """The quickstart's data, Fashion-MNIST out of Debian's package."""
    if FASHION.is_dir():
        return FASHION
    if shutil.which("apt-get") is None:
        pytest.skip("the quickstart's data comes out of a Debian package, and there is no apt-get here")
    folder = tmp_path_factory.mktemp("debian")
    load = "apt-get download -qq -o APT::Sandbox::User=root dataset-fashion-mnist"
    unpack = f"({load} || (apt-get update -qq && {load})) && dpkg -x dataset*.deb ."
    subprocess.run(unpack, shell=True, cwd=folder, check=True)
    return folder / FASHION.relative_to("/")


@pytest.fixture(scope="module")
def healthy(s3, garments, tmp_path_factory) -> Iterator[Seen]:
    """A run with probes, a queue, a damaged sample and a store that refuses some requests, after a while."""
    url, bucket = s3.make_bucket()
    for name, split, counts in (("train", "train", COUNTS), ("labelled", "test", [24, 24])):
        sizes = ["--samples-per-shard", str(counts[0]), "--limit", str(sum(counts))]
        assert build_shards(["build", str(garments), str(bucket / name), "--split", split, *sizes]) == 0
    damaged = min((bucket / "train").glob("*.tar"))
    damaged.write_bytes(damaged.read_bytes().replace(b"\x89PNG", bytes(4), 1))
    folder, port = tmp_path_factory.mktemp("healthy"), free_port()
    with (
        FaultProxy(s3.endpoint, seed=1, rates=Rates(slowdown=0.2), burst=1) as proxy,
        scraping(
            port, folder / "prometheus", rules=OPS / "prometheus" / "rules.yaml", labels=LABELS
        ) as server,
    ):
        given = keys(
            folder,
            f"{url}/train/",
            proxy.url,
            port,
            training={"batch": 64},
            swav={"queue_length": 64, "queue_start_images": 0},
            storage={"cache": folder / "cache", "block_bytes": 4096},
            evaluation={
                "every": 3200,
                "train": f"{url}/labelled/",
                "test": f"{url}/labelled/",
                "neighbours": 5,
            },
        )
        with start_ranks(2, given, folder / "out", launcher=["--max-restarts", "1"]) as running:
            server.wait_for('streamswav_checkpoints_total{outcome="ok"} > 2', seconds=90)
            server.wait_for("streamswav_rankme", seconds=120)  # the last to come: it needs many rows
            server.wait_for('count_over_time(streamswav_run_state{state="training"}[1m]) >= 15')
            yield Seen(running, server, folder)
            running.signal(signal.SIGTERM)
            assert running.wait(60).code == EXIT_RETRY, running.so_far().err[-3000:]


def filled_in(expression: str) -> str:
    for name, value in SCRAPED.items():
        expression = expression.replace(name, value)
    return expression


def panels() -> Iterator[tuple[str, list[str]]]:
    whole = json.loads((OPS / "grafana" / "dashboards" / "streamswav.json").read_text())
    for panel in whole["panels"]:
        if panel["type"] != "row":
            yield panel["title"], [filled_in(target["expr"]) for target in panel["targets"]]
    for annotation in whole["annotations"]["list"]:
        yield f"annotation {annotation['name']}", [filled_in(annotation["expr"])]


def test_every_family_is_there_with_its_type(healthy):
    told = healthy.server.ask("metadata")
    for family in FAMILIES.values():
        name = PREFIX + family.name
        (found,) = told.get(name) or told[name.removesuffix("_total")]
        assert (found["type"], found["help"]) == (family.kind, family.text), name


def test_every_rule_is_evaluated_without_error(healthy):
    groups = healthy.server.ask("rules")["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert len(rules) == sum(len(group["rules"]) for group in groups) > 30
    for rule in rules:
        assert (rule["health"], rule.get("lastError", "")) == ("ok", ""), rule["name"]


def test_every_panel_has_data_but_those_for_which_there_is_no_hardware_here(healthy):
    ask = healthy.server.query
    empty = {title for title, expressions in panels() if not all(map(ask, expressions))}
    assert empty - NOTHING_HAPPENED == WITHOUT_GPU | WITHOUT_CLUSTER


def test_every_expression_of_the_runbook_can_be_asked(healthy):
    page = (OPS / "runbook.md").read_text()
    blocks = re.findall(r"```promql\n(.*?)```", page, re.DOTALL)
    for expression in (line for block in blocks for line in block.splitlines()):
        healthy.server.query(expression)


def scraped(server: Prometheus, selector: str) -> dict[float, float]:
    """The sum of the series at each scrape."""
    totals: dict[float, float] = {}
    for series in server.query(f"{selector}[5m]"):
        for moment, value in series["values"]:
            totals[moment] = totals.get(moment, 0) + float(value)
    return totals


def test_phases_add_up_to_wall_time(healthy):
    """Between two scrapes that came just after a step: a phase is accounted when it ends."""

    def measured() -> tuple[float, float] | None:
        server = healthy.server
        phases = scraped(server, "streamswav_step_phase_seconds_total")
        training = scraped(server, 'streamswav_run_state{state="training"}')  # and perhaps a newer scrape
        stepped = scraped(server, "streamswav_last_step_timestamp_seconds")
        just = [at for at in sorted(phases) if training.get(at) and phases[at] > 0 and at - stepped[at] < 0.4]
        if not just or (wall := stepped[just[-1]] - stepped[just[0]]) < 12:
            return None
        return phases[just[-1]] - phases[just[0]], wall

    accounted, wall = healthy.server.wait_until(measured, "no 12 s between two such scrapes")
    assert accounted == pytest.approx(wall, rel=0.05)


def test_a_store_that_throttles_is_seen_and_its_ticket_is_pending(healthy):
    assert healthy.server.value("streamswav:s3_throttled_ratio:rate5m") > 0.05
    (alert,) = healthy.server.query('ALERTS{alertname="StreamswavS3Throttled"}')
    assert alert["metric"] == {
        "__name__": "ALERTS",
        "alertname": "StreamswavS3Throttled",
        "alertstate": "pending",
        "severity": "ticket",
        **LABELS,
    }


def test_no_alert_fires(healthy):
    assert not healthy.server.query('ALERTS{alertstate="firing"}')


def test_a_rank_that_is_killed_is_counted_and_the_new_start_is_seen(healthy):
    server, ranks = healthy.server, healthy.running.ranks()
    os.kill(ranks[1], signal.SIGKILL)
    (ended,) = server.wait_for('streamswav_worker_exits_total{reason=~"signal|host_oom"} > 0')
    assert ended["value"][1] == "1"
    server.wait_for("changes(streamswav:process_start_timestamp_seconds[1m]) > 0")
    server.wait_for('streamswav:run_state{state="training"} and on (run) streamswav_run_info{attempt="1"}')


@pytest.fixture
def failing(s3, make_shards, tmp_path) -> Callable[..., AbstractContextManager[Seen]]:
    """A function that starts a run whose Prometheus has the rules with other thresholds, and no labels."""
    url, bucket = s3.make_bucket()
    make_shards(bucket / "train", counts=COUNTS)

    @contextmanager
    def start(
        thresholds: dict[str, Any], *, endpoint: str = s3.endpoint, **more: dict[str, Any]
    ) -> Iterator[Seen]:
        known = yaml.safe_load((OPS / "prometheus" / "thresholds.yaml").read_text())
        for name, value in thresholds.items():
            known[name]["value"] = value
        template, rules = (OPS / "prometheus" / "rules.in.yaml").read_text(), tmp_path / "rules.yaml"
        rules.write_text(make_rules.render(template, known, runbook=""))
        port = free_port()
        given = keys(tmp_path, f"{url}/train/", endpoint, port, **more)
        with (
            scraping(port, tmp_path / "prometheus", rules=rules) as server,
            start_ranks(2, given, tmp_path / "out", launcher=["--max-restarts", "1"]) as running,
        ):
            server.wait_for('streamswav_run_state{state="training"} == 1 and on () streamswav_step > 0', 90)
            yield Seen(running, server, tmp_path)

    return start


def firing(name: str) -> str:
    return f'ALERTS{{alertname="Streamswav{name}",alertstate="firing"}}'


@pytest.mark.all
def test_ranks_that_are_killed_again_and_again_page_as_a_loop_and_then_as_stalled(failing):
    """Two starts instead of four, 3 s without a step instead of 300 or 30 steps."""
    with failing(SOON | {"incarnations": 2}, checkpoint={"minutes": 60}) as (
        running,
        server,
        _,
    ):
        os.kill(running.ranks()[0], signal.SIGKILL)
        server.wait_for(firing("RestartLoopNoProgress"))
        server.wait_for(
            'streamswav:run_state{state="training"} and on () streamswav_run_info{attempt="1"}', 90
        )
        assert not server.query(firing("Stalled"))
        os.kill(running.ranks()[0], signal.SIGKILL)
        assert running.wait(60).code == EXIT_FAILED
        assert server.query('last_over_time(streamswav_run_state{state="failed"}[1m]) == 1')
        server.wait_until(lambda: not server.query("streamswav_run_state"), "the pod is still there")
        server.wait_for(firing("Stalled"))


@pytest.mark.all
def test_a_rank_that_hangs_pages_as_stalled_until_the_watchdog_ends_it(failing):
    """3 s without a step instead of 300 or 30 steps."""
    with failing(SOON, watchdog={"step_seconds": 8}) as (
        running,
        server,
        _,
    ):
        os.kill(running.ranks()[1], signal.SIGSTOP)
        server.wait_for(firing("Stalled"))
        assert server.query('streamswav:run_state{state="training"}')
        assert running.wait(60).code == EXIT_RETRY
        assert server.query('last_over_time(streamswav_worker_exits_total{reason="hang"}[1m]) > 0')


@pytest.mark.all
def test_a_full_disk_pages_as_a_checkpoint_that_is_too_old_and_passes_once_there_is_room(failing):
    """An interval of 1.2 s, and 2 s instead of 5 minutes; rank 0 may write no file above 256 KiB."""
    wide = {"width": 1.0}
    with failing({"checkpoint_for": "2s"}, checkpoint={"minutes": 0.02}, model=wide) as (running, server, _):
        server.wait_for('streamswav_checkpoints_total{outcome="ok"} > 0')
        rank = running.ranks()[0]
        before = resource.prlimit(rank, resource.RLIMIT_FSIZE, (256 << 10, resource.RLIM_INFINITY))
        server.wait_for('streamswav_checkpoints_total{outcome="failed"} > 0')
        server.wait_for(firing("CheckpointTooOld"))
        assert server.value("rate(streamswav_images_total[5s])") > 0
        resource.prlimit(rank, resource.RLIMIT_FSIZE, before)
        server.wait_until(lambda: not server.query(firing("CheckpointTooOld")), "it still fires")


@pytest.mark.all
def test_a_store_that_throttles_is_a_ticket(failing, s3):
    """2 s instead of 10 minutes."""
    with (
        FaultProxy(s3.endpoint, seed=1, rates=Rates(slowdown=0.2), burst=1) as proxy,
        failing({"s3_throttled_for": "2s"}, endpoint=proxy.url) as (_, server, _),
    ):
        server.wait_for(firing("S3Throttled"))
        assert server.value("streamswav:s3_throttled_ratio:rate5m") > 0.05
