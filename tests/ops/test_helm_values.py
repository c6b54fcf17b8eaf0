"""Wrong values of the chart: refused before anything is made, by the key's name, with what would be right."""

import pytest
import yaml
from charts import one, render, run_helm

from streamswav.config import parse_config

TUNED = {"stream": {"urls": ["s3://b/t/"]}, "run": {"directory": "s3://b/ft"}}
FINETUNE = {"enabled": True, "config": {**TUNED, "finetune": {"test": ["s3://b/v/"]}}}
LABELLED = {"enabled": True, "train": ["s3://b/t/"], "test": ["s3://b/v/"]}
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
    ({"finetune": {"enabled": True, "config": TUNED}}, ["finetune.config.finetune.test: say where"]),
    (
        {"finetune": FINETUNE, "config": {"run": {"directory": "s3://b/ft/"}}},
        ["finetune.config.run.directory: "],
    ),
    ({"evaluation": {**LABELLED, "train": ["b/t/"]}}, ["evaluation.train: ", "use s3://b/t/"]),
    ({"evaluation": {**LABELLED, "json": "results.json"}}, ["evaluation.json: ", "goes with the pod"]),
    ({"image": {"repository": "registry:5000/x:1"}}, ["image.repository: ", "without a tag"]),
    ({"image": {"repository": "https://registry/x"}}, ["image.repository: ", "without https://"]),
    (
        {"config": {"stream": {"urls": ["gs://bucket/"]}}},
        ["config.stream.urls: ", "no place that can be read"],
    ),
    ({"config": {"run": {"directory": "s3://"}}}, ["config.run.directory: ", "no place that a run"]),
    (
        {"config": {"storage": {"endpoint_url": "minio:9000"}}},
        ["config.storage.endpoint_url: ", "must be http://HOST"],
    ),
    ({"resources": {"cpu": "48cores"}}, ["/resources/cpu"]),
    ({"env": [{"name": "A", "value": 3}]}, ["/env/0/value", "want string"]),
    ({"networkPolicy": {"storageCidrs": ["10.0.0.0"]}}, ["/networkPolicy/storageCidrs/0"]),
    ({"cache": {"size": "1Ti"}}, ["cache.type: is none"]),
    ({"runs": {"claim": "a", "path": "/b"}}, ["runs.path: "]),
    ({"kueue": {"requiredTopology": "rack"}}, ["kueue.queue: "]),
    *(({key: None}, [f"{key}: is empty; give it a value"]) for key in ("resources", "config", "gpusPerNode")),
    ({"resources": {"cpu": None}}, ["resources.cpu: is empty"]),
    ({"evaluation": {"enabled": True}}, ["evaluation.train, evaluation.test: "]),
]


@pytest.mark.parametrize(("values", "parts"), WRONG, ids=[each[1][0] for each in WRONG])
def test_a_wrong_value_is_refused_by_the_keys_name(values, parts, tmp_path):
    code, out, error = run_helm(values, tmp_path)
    assert (code, out) == (1, "")
    assert all(part in error for part in parts), error
    assert "values don't meet the specifications" in error or "streamswav/templates/values.yaml" in error


def test_shards_may_be_a_text_as_for_the_trainer(tmp_path):
    configured = one(render({"config": {"stream": {"urls": "s3://b/t/"}}}, tmp_path), "ConfigMap", "first")
    assert yaml.safe_load(configured["data"]["config.yaml"])["stream"]["urls"] == ["s3://b/t/"]


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


def test_followers_are_jobs_that_know_75_whatever_the_engine_wants(tmp_path):
    values = {"engine": "pytorchjob", "finetune": FINETUNE, "evaluation": LABELLED}
    objects = render(values, tmp_path)
    gang = one(objects, "PyTorchJob")["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]
    codes = {"first": variables(gang).get("STREAMSWAV_RETRY_CODE")}
    for name in ("first-finetune", "first-evaluation"):
        pod = one(objects, "Job", name)["spec"]["template"]["spec"]
        codes[name] = variables(pod).get("STREAMSWAV_RETRY_CODE")
    assert codes == {"first": "143", "first-finetune": None, "first-evaluation": None}


def test_storage_is_in_the_ranks_variables_for_commands_that_read_no_file(tmp_path):
    storage = {"endpoint_url": "https://minio.minio:9000", "region": None, "path_style": True}
    values = {"engine": "job", "config": {"storage": storage}}
    pod = one(render(values, tmp_path), "Job", "first")["spec"]["template"]["spec"]
    found = {name: value for name, value in variables(pod).items() if "STORAGE" in name}
    assert found == {
        "STREAMSWAV_STORAGE__ENDPOINT_URL": "https://minio.minio:9000",
        "STREAMSWAV_STORAGE__PATH_STYLE": "true",
    }


def variables(pod):
    """The variables of a pod's ranks that have a value of their own."""
    return {each["name"]: each["value"] for each in pod["containers"][0]["env"] if "value" in each}
