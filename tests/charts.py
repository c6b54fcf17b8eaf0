"""What the chart renders, as objects, for each engine and feature."""

from __future__ import annotations

import functools
import importlib.util
import json
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
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

ENGINES = ("jobset", "trainjob", "pytorchjob", "job")
GPU = "nvidia.com/gpu"

LABELLED = {"train": ["s3://bucket/train/"], "test": ["s3://bucket/test/"]}
FINETUNE = {
    "config": {
        "stream": {"urls": ["s3://bucket/train/"]},
        "run": {"directory": "s3://bucket/ft"},
        "finetune": {"test": ["s3://bucket/test/"]},
    }
}
FEATURES = {
    "nothing": {},
    "single node": {"nodes": 1},
    "cpu": {"gpusPerNode": 0, "tolerations": [], "ranksPerNode": 2},
    "secret": {"identity": {"secret": "keys", "create": False}},
    "role": {"identity": {"roleArn": "arn:aws:iam::123456789012:role/first"}},
    "endpoint": {
        "config": {"storage": {"endpoint_url": "https://minio.minio:9000"}},
        "caBundle": {"configMap": "minio-ca"},
    },
    "kueue": {"kueue": {"queue": "gpus", "priorityClass": "high", "requiredTopology": "example.com/block"}},
    "placement": {
        "topologyKey": "topology.kubernetes.io/zone",
        "priorityClassName": "training",
        "runtimeClassName": "nvidia",
        "nodeSelector": {"node.kubernetes.io/instance-type": "p5.48xlarge"},
    },
    "cache on the node": {"cache": {"type": "emptyDir", "size": "500Gi"}},
    "cache of a claim": {"cache": {"type": "ephemeral", "size": "500Gi", "storageClass": "nvme"}},
    "runs on a claim": {"runs": {"claim": "lustre"}, "config": {"run": {"directory": "/runs/first"}}},
    "no operator": {"monitoring": {"enabled": False}},
    "no metrics": {"monitoring": {"enabled": False}, "config": {"telemetry": {"port": 0}}},
    "doctor": {"doctor": {"enabled": True}},
    "no policies": {"networkPolicy": {"enabled": False}, "disruptionBudget": {"enabled": False}},
    "image": {"image": {"digest": f"sha256:{'0' * 64}", "pullSecrets": ["registry"]}},
    "variables": {"env": [{"name": "NCCL_DEBUG", "value": "INFO"}], "podLabels": {"team": "vision"}},
    "followers": {"finetune": {"enabled": True, **FINETUNE}, "evaluation": {"enabled": True, **LABELLED}},
}
OUTSIDE_OF_RESTRICTED = {
    "fabric": yaml.safe_load((CHART / "examples" / "efa.yaml").read_text()),
    "cache of the host": {"cache": {"type": "hostPath", "size": "1Ti", "path": "/mnt/nvme"}},
}
TOGETHER = ("role", "endpoint", "kueue", "placement", "cache of a claim", "doctor", "image", "followers")


@functools.cache
def load_make() -> ModuleType:
    """The command that writes what is derived from the chart."""
    spec = importlib.util.spec_from_file_location("make_helm", OPS / "helm" / "make.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def over(below: Mapping[str, Any], above: Mapping[str, Any]) -> Object:
    """Values over values, as several `--values` of Helm."""
    merged: Object = load_make().over(below, above)
    return merged


def run_helm(
    values: Mapping[str, Any], folder: Path, *, name: str = "first", more: Sequence[Path] = ()
) -> tuple[int, str, str]:
    """`helm template` with values, and files of more, over a minimal run: exit code, output, complaints."""
    file = folder / "values.yaml"
    file.write_text(yaml.safe_dump(over(RUN, values)))
    command = [load_make().find_helm(), "template", name, str(CHART), "--values", str(file)]
    command += [part for each in more for part in ("--values", str(each))]
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


_RENDERED: dict[str, list[Object]] = {}


def rendered(engine: str, feature: str = "nothing", **values: Any) -> list[Object]:
    """The objects of an engine with a feature of the chart, rendered once."""
    given = over(feature_values(feature), {"engine": engine, **values})
    key = json.dumps(given, sort_keys=True)
    if key not in _RENDERED:
        with tempfile.TemporaryDirectory() as folder:
            _RENDERED[key] = render(given, Path(folder))
    return _RENDERED[key]


def feature_values(feature: str) -> Mapping[str, Any]:
    """The values that switch a feature on; `many` is most of them together."""
    if feature == "many":
        return functools.reduce(over, (FEATURES[name] for name in TOGETHER))
    return (FEATURES | OUTSIDE_OF_RESTRICTED)[feature]


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
