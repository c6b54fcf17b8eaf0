"""What the chart renders, as objects, and what a cluster's controllers make of the ends of its pods."""

from __future__ import annotations

import functools
import importlib.util
import re
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

OPS = Path(__file__).parents[1] / "ops"
CHART = OPS / "helm" / "streamswav"
RUN = {
    "image": {"repository": "registry.example/streamswav"},
    "config": {"stream": {"urls": ["s3://bucket/shards/"]}, "run": {"directory": "s3://bucket/runs/first"}},
}

Object = dict[str, Any]


@functools.cache
def load_make() -> ModuleType:
    """The command that writes what is derived from the chart."""
    spec = importlib.util.spec_from_file_location("make_helm", OPS / "helm" / "make.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Values over values, as several `--values` of Helm."""
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = over(merged[key], value) if both else value
    return merged


def run_helm(values: Mapping[str, Any], folder: Path, *, name: str = "first") -> tuple[int, str, str]:
    """`helm template` with values over those of a minimal run: exit code, output, complaints."""
    file = folder / "values.yaml"
    file.write_text(yaml.safe_dump(over(RUN, values)))
    command = [load_make().find_helm(), "template", name, str(CHART), "--values", str(file)]
    done = subprocess.run(
        [*command, "--namespace", "training"], check=False, capture_output=True, text=True, timeout=60
    )
    return done.returncode, done.stdout, done.stderr


def render(values: Mapping[str, Any], folder: Path, *, name: str = "first") -> list[Object]:
    """The objects that the chart makes of these values."""
    code, out, err = run_helm(values, folder, name=name)
    assert code == 0, err
    return read(out)


def read(text: str) -> list[Object]:
    """The objects of a stream of YAML."""
    return [each for each in yaml.load_all(text, yaml.CSafeLoader) if each]


def one(objects: Sequence[Object], kind: str, name: str | None = None) -> Object:
    """The only object of this kind (and name)."""
    (found,) = of(objects, kind, name)
    return found


def of(objects: Sequence[Object], kind: str, name: str | None = None) -> list[Object]:
    """All objects of this kind (and name)."""
    return [each for each in objects if each["kind"] == kind and name in (None, each["metadata"]["name"])]


def job_specs(objects: Sequence[Object]) -> Iterator[Object]:
    """The specs of all Jobs, those within JobSets and runtimes too."""
    for each in objects:
        spec = each.get("spec", {})
        if each["kind"] == "Job":
            yield spec
        nested = spec.get("template", {}).get("spec", {}) if each["kind"].endswith("Runtime") else spec
        for replicated in nested.get("replicatedJobs", []):
            yield replicated["template"]["spec"]


def pod_templates(objects: Sequence[Object]) -> Iterator[Object]:
    """The templates of all pods."""
    yield from (spec["template"] for spec in job_specs(objects))
    for each in of(objects, "PyTorchJob"):
        yield from (replica["template"] for replica in each["spec"]["pytorchReplicaSpecs"].values())


@dataclass(frozen=True)
class End:
    """How a pod ended: its exit code, and whether the cluster had disrupted it (eviction, a lost node)."""

    code: int
    disrupted: bool = False


def after(objects: Sequence[Object], ends: Sequence[End]) -> str:
    """What becomes of the gang when its pods have ended so, in this order.

    Returns:
        done, failed, restart (free of charge), or "restart, counted".
    """
    for kind, decide in (("JobSet", _in_jobset), ("PyTorchJob", _in_pytorchjob), ("Job", _in_job)):
        if found := of(objects, kind):
            return decide(found[0]["spec"], ends)
    return _in_jobset(one(objects, "TrainingRuntime")["spec"]["template"]["spec"], ends)


def _in_jobset(spec: Object, ends: Sequence[End]) -> str:
    """A Job fails with its first pod; the JobSet's rules go by the reason and the message of that."""
    job = spec["replicatedJobs"][0]["template"]["spec"]
    failed = next((end for end in ends if end.code or end.disrupted), None)
    if failed is None:
        return "done"
    action, message = _matched(job, failed)
    assert action in ("FailJob", "Count"), "in a JobSet a pod alone does not come back"
    assert action == "FailJob" or job["backoffLimit"] == 0
    reason = "PodFailurePolicy" if action == "FailJob" else "BackoffLimitExceeded"
    return _by_jobset_rules(spec["failurePolicy"], reason, message)


def _by_jobset_rules(policy: Object, reason: str, message: str) -> str:
    meaning = {"FailJobSet": "failed", "RestartJobSetAndIgnoreMaxRestarts": "restart"}
    for rule in policy["rules"]:
        patterns = rule["onJobFailureMessagePatterns"]
        if reason in rule["onJobFailureReasons"] and any(re.search(each, message) for each in patterns):
            return meaning[rule["action"]]
    return "restart, counted" if policy["maxRestarts"] else "failed"


def _in_job(spec: Object, ends: Sequence[End]) -> str:
    actions = [_matched(spec, end)[0] for end in ends if end.code or end.disrupted]
    if "FailJob" in actions:
        return "failed"
    if "Count" in actions:
        return "restart, counted" if actions.count("Count") <= spec["backoffLimit"] else "failed"
    return "restart" if actions else "done"


def _matched(job: Object, end: End) -> tuple[str, str]:
    """Action and message of the first rule that holds, in the words of Kubernetes' Job controller."""
    for index, rule in enumerate(job["podFailurePolicy"]["rules"]):
        at = f"matching {rule['action']} rule at index {index}"
        codes = rule.get("onExitCodes")
        if codes and end.code and (end.code in codes["values"]) == (codes["operator"] == "In"):
            return (
                rule["action"],
                f"Container trainer for pod training/first failed with exit code {end.code} {at}",
            )
        for condition in rule.get("onPodConditions", []):
            if end.disrupted and condition == {"type": "DisruptionTarget", "status": "True"}:
                return rule["action"], f"Pod training/first has condition DisruptionTarget {at}"
    return "Count", "Job has reached the specified backoff limit"


def _in_pytorchjob(spec: Object, ends: Sequence[End]) -> str:
    """ExitCode: 1 to 127 is permanent; what is above, or has no code, starts the pod again."""
    assert {each["restartPolicy"] for each in spec["pytorchReplicaSpecs"].values()} == {"ExitCode"}
    codes = [end.code for end in ends]
    if any(1 <= code <= 127 for code in codes):
        return "failed"
    return "restart" if any(codes) else "done"
