"""What a cluster's controllers make of the ends of a gang's pods, read off the rendered policies."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from charts import Object, of, one


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
