"""What the chart renders is what runs: its pods as processes, preempted, restarted, and accounted for."""

import json
import signal
from pathlib import Path

import pytest
import yaml
from charts import one, over, pod_templates, render
from controllers import End, after
from pods import PORT, SERVER, cluster
from runs import TINY, run

HOSTS = Path("/etc/hosts")
COUNTS = [25, 14, 31]
PASSES = 12
NAMES = {"jobset": "first-node-0-{}.first", "job": "first-{}.first"}


def tiny():
    """The tiny run's keys as sections, but for what the chart is to be seen with: its port for metrics."""
    sections = {}
    for key, text in TINY.items():
        section, name = key.split(".")
        sections.setdefault(section, {})[name] = yaml.safe_load(text)
    del sections["telemetry"]["port"]
    return sections


def values(engine):
    config = {
        **tiny(),
        "run": {"directory": "s3://bucket/runs/first"},
        "checkpoint": {"images": 32},
        "storage": {"endpoint_url": f"http://{SERVER}:{PORT}"},
    }
    config["stream"] |= {"urls": ["s3://bucket/shards/"], "passes": PASSES}
    return {"engine": engine, "gpusPerNode": 0, "identity": {"secret": "keys"}, "config": config}


@pytest.mark.all
def test_doctor_finds_nothing_wrong_in_the_pods_in_which_it_is_an_init_container(
    make_shards, s3_keys, tmp_path
):
    objects = render(over(values("jobset"), {"doctor": {"enabled": True}}), tmp_path)
    files = one(objects, "ConfigMap", "first")["data"]
    names = [NAMES["jobset"].format(index) for index in range(2)]
    with (
        cluster(tmp_path / "cluster", *s3_keys) as there,
        there.gang(next(pod_templates(objects)), files, names) as pods,
    ):
        make_shards(there.buckets / "bucket" / "shards", counts=COUNTS)
        started = [pod.start(tmp_path / "out" / str(pod.index), kind="initContainers") for pod in pods]
        with started[0], started[1]:
            outcomes = [each.wait() for each in started]
    assert [each.code for each in outcomes] == [0, 0], outcomes[0].out + outcomes[0].err


def saved_after(step):
    return lambda so_far: any(event["step"] >= step for event in so_far.of("checkpoint"))


@pytest.mark.parametrize("engine", ["jobset", pytest.param("job", marks=pytest.mark.all)])
def test_pods_as_rendered_drain_together_and_their_restart_completes_the_pass(
    engine, make_shards, s3_keys, tmp_path
):
    before = HOSTS.read_bytes()
    objects = render(values(engine), tmp_path)
    files = one(objects, "ConfigMap", "first")["data"]
    names = [NAMES[engine].format(index) for index in range(2)]
    with (
        cluster(tmp_path / "cluster", *s3_keys) as there,
        there.gang(next(pod_templates(objects)), files, names) as pods,
    ):
        make_shards(there.buckets / "bucket" / "shards", counts=COUNTS)
        first, second = (pod.start(tmp_path / "first" / str(pod.index)) for pod in pods)
        with first, second:
            first.wait_until(saved_after(2))
            assert [pod.probe() for pod in pods] == [{"/readyz": 200, "/healthz": 200}] * 2
            second.signal(signal.SIGTERM)  # as the kubelet does when this pod is preempted
            ends = [second.wait(60).code, first.wait(60).code]
        assert ends == [75, 75], first.so_far().err[-3000:]
        assert after(objects, [End(ends[0], disrupted=True), End(ends[1])]) == "restart"

        first, second = (pod.start(tmp_path / "second" / str(pod.index)) for pod in pods)
        with first, second:
            outcomes = [first.wait(), second.wait()]
        assert [each.code for each in outcomes] == [0, 0], outcomes[0].err[-3000:]
        assert after(objects, [End(0), End(0)]) == "done"
        (resumed,) = outcomes[0].of("resumed")
        assert resumed["step"] >= 2
    summary = json.loads((there.buckets / "bucket" / "runs" / "first" / "summary.json").read_text())
    assert summary["stream"]["trained"] + summary["stream"]["left"] == PASSES * sum(COUNTS)
    audit = run(["audit", str(there.buckets / "bucket" / "runs" / "first")], tmp_path / "audit")
    assert audit.code == 0, audit.out + audit.err
    assert HOSTS.read_bytes() == before
