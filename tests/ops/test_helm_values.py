"""Wrong values of the chart: refused before anything is made, by the key's name, with what would be right."""

import pytest
import yaml
from charts import one, render, run_helm

from streamswav.config import parse_config

FINETUNE = {"enabled": True, "config": {"stream": {"urls": ["s3://b/t/"]}, "run": {"directory": "s3://b/ft"}}}
ROLE = "arn:aws:iam::123456789012:role/first"
WRONG = [
    ({"nodez": 3}, ["'nodez' not allowed"]),
    ({"config": {"stream": {"urlz": ["s3://b/"]}}}, ["/config/stream", "'urlz' not allowed"]),
    ({"config": {"swav": {"epsilon": 0}}}, ["/config/swav/epsilon"]),
    ({"finetune": {"config": {"swaw": {}}}}, ["/finetune/config", "'swaw' not allowed"]),
    ({"engine": "mpijob"}, ["/engine", "'jobset', 'trainjob', 'pytorchjob', 'job'"]),
    ({"resources": {"memory": "256 GB"}}, ["/resources/memory"]),
    ({"runAsUser": 0}, ["/runAsUser"]),
    ({"identity": {"roleArn": "streamswav"}}, ["/identity/roleArn"]),
    ({"image": {"repository": ""}}, ["image.repository: say where the image is"]),
    ({"config": {"stream": {"urls": []}}}, ["config.stream.urls: say where the shards are"]),
    ({"config": {"stream": {"urls": ["bucket/shards"]}}}, ["config.stream.urls: ", "use s3://bucket/shards"]),
    ({"config": {"run": {"directory": ""}}}, ["config.run.directory: say where the run is kept"]),
    ({"config": {"run": {"directory": "runs/1"}}}, ["config.run.directory: ", "goes with the pod"]),
    ({"name": "First"}, ['name: "First" must be']),
    ({"name": "x" * 46}, ["name: ", "at most 45"]),
    ({"drainSeconds": 60}, ["drainSeconds: 60 is less than the 2700 s"]),
    ({"config": {"watchdog": {"step_seconds": 0}}}, ["drainSeconds: config.watchdog sets no limit"]),
    ({"sharedMemory": "200Gi"}, ["sharedMemory: 200Gi of resources.memory: 256Gi"]),
    ({"cache": {"type": "emptyDir"}}, ["cache.size: "]),
    ({"cache": {"type": "hostPath", "size": "1Ti"}}, ["cache.path: "]),
    (
        {"cache": {"type": "emptyDir", "size": "50Gi"}, "config": {"storage": {"cache_bytes": 2**40}}},
        ["config.storage.cache_bytes: ", "cache.size: 50Gi"],
    ),
    ({"config": {"storage": {"cache": "/cache"}}}, ["config.storage.cache: "]),
    ({"identity": {"roleArn": ROLE, "secret": "keys"}}, ["identity.secret: "]),
    ({"identity": {"roleArn": ROLE, "create": False}}, ["identity.roleArn: "]),
    ({"caBundle": {"secret": "a", "configMap": "b"}}, ["caBundle.secret: "]),
    ({"config": {"telemetry": {"port": 0}}}, ["monitoring.enabled: "]),
    ({"gpusPerNode": 0, "config": {"training": {"device": "cuda"}}}, ["gpusPerNode: "]),
    ({"engine": "trainjob", "masterPort": 29400}, ["masterPort: "]),
    ({"env": [{"name": "PET_NNODES", "value": "3"}]}, ["env: PET_NNODES is set by the chart"]),
    ({"finetune": {"enabled": True}}, ["finetune.config.stream.urls: "]),
    (
        {"finetune": FINETUNE, "config": {"run": {"directory": "s3://b/ft"}}},
        ["finetune.config.run.directory: "],
    ),
    ({"evaluation": {"enabled": True}}, ["evaluation.train, evaluation.test: "]),
]


@pytest.mark.parametrize(("values", "parts"), WRONG, ids=[each[1][0] for each in WRONG])
def test_a_wrong_value_is_refused_by_the_keys_name(values, parts, tmp_path):
    code, out, error = run_helm(values, tmp_path)
    assert (code, out) == (1, "")
    assert all(part in error for part in parts), error
    assert "values don't meet the specifications" in error or "streamswav/templates/values.yaml" in error


def test_a_release_whose_name_begins_with_a_digit_is_told_what_to_do(tmp_path):
    code, _, error = run_helm({}, tmp_path, name="1st")
    assert code == 1
    assert "default: the release's name" in error


def test_numbers_and_nothing_reach_the_ranks_as_they_were_given(tmp_path):
    given = {
        "training": {"images": 128_116_700},
        "optimizer": {"weight_decay": 1e-6},
        "checkpoint": {"minutes": None, "images": 1e6},
        "stream": {"memory": 100 << 30},
    }
    text = one(render({"config": given}, tmp_path), "ConfigMap", "first")["data"]["config.yaml"]
    config = parse_config(yaml.safe_load(text))
    assert config.training.images == 128_116_700
    assert config.optimizer.weight_decay == 1e-6
    assert (config.checkpoint.minutes, config.checkpoint.images) == (None, 1_000_000)
    assert config.stream.memory == 100 << 30
