"""The Helm chart: each field that matters, by what it is for."""

import itertools
import json

import pytest
import yaml
from charts import ENGINES, GPU, OPS, job_specs, of, one, pod_templates, rendered


def environment_of(container):
    return {each["name"]: each.get("value") for each in container["env"]}


def main_pod(objects):
    return next(pod_templates(objects))["spec"]


def test_the_gang_meets_at_its_first_pod():
    names = {"jobset": "first-node-0-0.first", "job": "first-0.first"}
    for engine, name in names.items():
        (container,) = main_pod(rendered(engine))["containers"]
        variables = environment_of(container)
        assert variables["PET_MASTER_ADDR"] == name
        assert (variables["PET_NNODES"], variables["PET_NPROC_PER_NODE"]) == ("2", "8")
        rank = next(each for each in container["env"] if each["name"] == "PET_NODE_RANK")
        path = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
        assert rank["valueFrom"]["fieldRef"]["fieldPath"] == path
    service = one(rendered("job"), "Service")["spec"]
    assert (service["clusterIP"], service["publishNotReadyAddresses"]) == ("None", True)
    assert main_pod(rendered("job"))["subdomain"] == "first"


def test_a_stores_name_is_looked_up_as_it_is_and_a_pods_in_its_domain():
    for engine in ENGINES:
        assert main_pod(rendered(engine))["dnsConfig"] == {"options": [{"name": "ndots", "value": "2"}]}
    assert "first-node-0-0.first".count(".") < 2 <= "s3.amazonaws.com".count(".")


def test_where_an_operator_sets_the_rendezvous_the_chart_does_not():
    for engine, name in (("trainjob", "node"), ("pytorchjob", "pytorch")):
        (container,) = main_pod(rendered(engine))["containers"]
        assert container["name"] == name
        assert not [each for each in environment_of(container) if each.startswith(("PET_", "MASTER_"))]
    spec = one(rendered("trainjob"), "TrainingRuntime")["spec"]
    assert spec["mlPolicy"] == {"numNodes": 2, "torch": {}}
    (replicated,) = spec["template"]["spec"]["replicatedJobs"]
    assert replicated["name"] == "node"
    label = {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}
    assert replicated["template"]["metadata"]["labels"] == label
    assert "ttlSecondsAfterFinished" not in spec["template"]["spec"]
    assert one(rendered("trainjob"), "TrainJob")["spec"]["trainer"] == {
        "numNodes": 2,
        "numProcPerNode": 8,
    }


def test_a_pytorchjob_has_the_fields_that_its_operator_reads():
    spec = one(rendered("pytorchjob"), "PyTorchJob")["spec"]
    assert spec.keys() == {"nprocPerNode", "runPolicy", "pytorchReplicaSpecs"}
    assert spec["nprocPerNode"] == "8"
    assert spec["runPolicy"] == {"cleanPodPolicy": "None", "backoffLimit": 100}
    replicas = spec["pytorchReplicaSpecs"]
    assert {name: each["replicas"] for name, each in replicas.items()} == {"Master": 1, "Worker": 1}
    for each in replicas.values():
        assert each.keys() == {"replicas", "restartPolicy", "template"}
        (container,) = each["template"]["spec"]["containers"]
        assert environment_of(container)["STREAMSWAV_RETRY_CODE"] == "143"
        assert {"name": "pytorchjob-port", "containerPort": 29500} in container["ports"]
        assert "restartPolicy" not in each["template"]["spec"]
    assert (
        "Worker"
        not in one(rendered("pytorchjob", "single node"), "PyTorchJob")["spec"]["pytorchReplicaSpecs"]
    )


def test_the_launcher_is_the_entry_point_in_exec_form_and_gives_up_before_the_kubelet_does():
    for engine in ENGINES:
        spec = main_pod(rendered(engine))
        (container,) = spec["containers"]
        assert container["command"] == ["streamswav", "launch"]
        assert container["args"] == ["pretrain", "--config", "/etc/streamswav/config.yaml"]
        grace = int(environment_of(container)["STREAMSWAV_GRACE_SECONDS"])
        assert 900 + 1800 <= grace < spec["terminationGracePeriodSeconds"]


def test_the_grace_period_follows_the_watchdog():
    config = {"watchdog": {"step_seconds": 400, "checkpoint_seconds": 200.5}}
    spec = main_pod(rendered("jobset", config={**make_config(), **config}))
    (container,) = spec["containers"]
    assert environment_of(container)["STREAMSWAV_GRACE_SECONDS"] == "601"
    assert spec["terminationGracePeriodSeconds"] == 691


def make_config():
    return {"stream": {"urls": ["s3://bucket/shards/"]}, "run": {"directory": "s3://bucket/runs/first"}}


def test_jobs_replace_pods_one_after_the_other_and_are_done_when_node_0_is():
    for engine in ("jobset", "trainjob", "job"):
        for spec in job_specs(rendered(engine)):
            assert spec["podReplacementPolicy"] == "Failed"
            assert spec["successPolicy"] == {"rules": [{"succeededIndexes": "0"}]}
            assert (spec["completions"], spec["parallelism"], spec["completionMode"]) == (2, 2, "Indexed")
            assert spec["template"]["spec"]["restartPolicy"] == "Never"
    policy = one(rendered("jobset"), "JobSet")["spec"]["failurePolicy"]
    assert (policy["restartStrategy"], policy["maxRestarts"]) == ("BlockingRecreate", 100)
    assert one(rendered("jobset"), "JobSet")["spec"]["network"]["publishNotReadyAddresses"] is True


def test_kueue_is_asked_first():
    for engine in ENGINES:
        kind = {"jobset": "JobSet", "trainjob": "TrainJob", "pytorchjob": "PyTorchJob", "job": "Job"}[engine]
        each = one(rendered(engine, "kueue"), kind)
        assert each["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "gpus"
        assert each["metadata"]["labels"]["kueue.x-k8s.io/priority-class"] == "high"
        spec = each["spec"]["runPolicy"] if engine == "pytorchjob" else each["spec"]
        assert spec["suspend"] is True
        template = next(pod_templates(rendered(engine, "kueue")))
        topology = template["metadata"]["annotations"]["kueue.x-k8s.io/podset-required-topology"]
        assert topology == "example.com/block"


def test_pods_keep_off_one_another_and_put_up_with_gpu_taints():
    spec = main_pod(rendered("jobset", "placement"))
    (spread,) = spec["topologySpreadConstraints"]
    assert (spread["maxSkew"], spread["minDomains"], spread["whenUnsatisfiable"]) == (1, 2, "DoNotSchedule")
    assert spread["topologyKey"] == "kubernetes.io/hostname"
    selector = {"matchLabels": {"streamswav-run": "first"}}
    (together,) = spec["affinity"]["podAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    assert together == {"topologyKey": "topology.kubernetes.io/zone", "labelSelector": selector}
    assert spec["tolerations"] == [{"key": GPU, "operator": "Exists", "effect": "NoSchedule"}]
    assert (spec["priorityClassName"], spec["runtimeClassName"]) == ("training", "nvidia")
    assert "tolerations" not in main_pod(rendered("jobset", "cpu"))


def test_shared_memory_is_sized_and_within_the_memory_limit():
    spec = main_pod(rendered("jobset"))
    (container,) = spec["containers"]
    (shm,) = [each for each in spec["volumes"] if each["name"] == "shm"]
    assert shm["emptyDir"] == {"medium": "Memory", "sizeLimit": "32Gi"}
    assert {"name": "shm", "mountPath": "/dev/shm"} in container["volumeMounts"]
    assert container["resources"] == {
        "requests": {"cpu": "48", "memory": "256Gi", GPU: 8},
        "limits": {"memory": "256Gi", GPU: 8},
    }


def test_an_identity_is_a_role_or_a_secret_and_never_a_token_of_kubernetes():
    for engine, feature in itertools.product(ENGINES, ("role", "secret")):
        spec = main_pod(rendered(engine, feature))
        assert spec["automountServiceAccountToken"] is False
    (account,) = of(rendered("jobset", "role"), "ServiceAccount")
    role = account["metadata"]["annotations"]["eks.amazonaws.com/role-arn"]
    assert role == "arn:aws:iam::123456789012:role/first"
    objects = rendered("jobset", "secret")
    assert of(objects, "ServiceAccount") == []
    (container,) = main_pod(objects)["containers"]
    keys = {
        each["name"]: each["valueFrom"]["secretKeyRef"] for each in container["env"] if "AWS_" in each["name"]
    }
    assert {name: each["optional"] for name, each in keys.items()} == {
        "AWS_ACCESS_KEY_ID": False,
        "AWS_SECRET_ACCESS_KEY": False,
        "AWS_SESSION_TOKEN": True,
    }
    assert all(each["name"] == "keys" for each in keys.values())


def config_of(objects, file="config.yaml"):
    return yaml.safe_load(one(objects, "ConfigMap", "first")["data"][file])


def test_endpoint_and_certificates_reach_the_configuration_and_the_network_policy():
    objects = rendered("jobset", "endpoint")
    storage = config_of(objects)["storage"]
    assert storage == {"endpoint_url": "https://minio.minio:9000", "ca_bundle": "/etc/streamswav-ca/ca.crt"}
    spec = main_pod(objects)
    assert {"name": "ca", "configMap": {"name": "minio-ca"}} in spec["volumes"]
    egress = one(objects, "NetworkPolicy")["spec"]["egress"]
    assert [{"port": 443}, {"port": 9000}] in [rule.get("ports") for rule in egress]


def test_the_network_policy_lets_in_metrics_and_one_another_and_nothing_else():
    spec = one(rendered("jobset", networkPolicy={"prometheusNamespace": "monitoring"}), "NetworkPolicy")[
        "spec"
    ]
    assert spec["policyTypes"] == ["Ingress", "Egress"]
    peers, metrics = spec["ingress"]
    labels = {"app.kubernetes.io/name": "streamswav", "app.kubernetes.io/instance": "first"}
    assert peers == {"from": [{"podSelector": {"matchLabels": labels}}]}
    namespace = {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}
    assert metrics == {"ports": [{"port": 9404}], "from": [{"namespaceSelector": namespace}]}
    others = [port for rule in spec["egress"] for port in rule.get("ports", [])]
    assert {each["port"] for each in others} == {53, 443, 80}
    (pod_identity,) = [rule for rule in spec["egress"] if rule.get("ports") == [{"port": 80}]]
    assert {each["ipBlock"]["cidr"] for each in pod_identity["to"]} == {
        "169.254.170.23/32",
        "fd00:ec2::23/128",
    }


def test_a_cache_is_smaller_than_its_volume():
    for feature in ("cache on the node", "cache of a claim"):
        storage = config_of(rendered("jobset", feature))["storage"]
        assert storage == {"cache": "/cache", "cache_bytes": 450 * 2**30}
    (container,) = main_pod(rendered("jobset", "cache on the node"))["containers"]
    assert {"name": "cache", "mountPath": "/cache"} in container["volumeMounts"]


def test_a_run_is_known_to_prometheus_by_its_name_and_namespace():
    objects = rendered("jobset")
    (endpoint,) = one(objects, "PodMonitor")["spec"]["podMetricsEndpoints"]
    assert endpoint["port"] == "metrics"
    relabelled = {each["targetLabel"]: each["sourceLabels"] for each in endpoint["relabelings"]}
    assert relabelled == {
        "run": ["__meta_kubernetes_pod_label_streamswav_run"],
        "namespace": ["__meta_kubernetes_namespace"],
    }
    template = next(pod_templates(objects))
    assert template["metadata"]["labels"]["streamswav-run"] == "first"
    (container,) = template["spec"]["containers"]
    assert {"name": "metrics", "containerPort": 9404} in container["ports"]
    for kind in ("startupProbe", "livenessProbe"):
        assert container[kind]["httpGet"] == {"path": "/healthz", "port": "metrics"}
    assert container["readinessProbe"]["httpGet"]["path"] == "/readyz"


def test_alerts_and_dashboards_come_along():
    objects = rendered("jobset")
    rules = yaml.safe_load((OPS / "prometheus" / "rules.yaml").read_text())
    assert one(objects, "PrometheusRule")["spec"] == rules
    shown = one(objects, "ConfigMap", "first-dashboards")
    assert shown["metadata"]["labels"]["grafana_dashboard"] == "1"
    files = list((OPS / "grafana" / "dashboards").glob("*.json"))
    assert {name: json.loads(text) for name, text in shown["data"].items()} == {
        file.name: json.loads(file.read_text()) for file in files
    }
    assert len(str(shown)) < 1 << 20, "what a ConfigMap may hold"


def test_without_the_operator_nothing_of_it_is_made():
    objects = rendered("jobset", "no operator")
    assert not of(objects, "PodMonitor") + of(objects, "PrometheusRule")
    annotations = next(pod_templates(objects))["metadata"]["annotations"]
    assert (annotations["prometheus.io/scrape"], annotations["prometheus.io/port"]) == ("true", "9404")
    (container,) = main_pod(rendered("jobset", "no metrics"))["containers"]
    assert not {"startupProbe", "livenessProbe", "readinessProbe"} & container.keys()


def test_evictions_are_refused_while_the_gang_is_up():
    spec = one(rendered("jobset"), "PodDisruptionBudget")["spec"]
    assert spec == {
        "minAvailable": 2,
        "unhealthyPodEvictionPolicy": "AlwaysAllow",
        "selector": {"matchLabels": {"streamswav-run": "first"}},
    }
    annotations = next(pod_templates(rendered("jobset")))["metadata"]["annotations"]
    assert annotations["karpenter.sh/do-not-disrupt"] == "true"
    assert annotations["cluster-autoscaler.kubernetes.io/safe-to-evict"] == "false"


def test_doctor_looks_with_the_pods_own_devices_volumes_and_identity():
    spec = main_pod(rendered("jobset", "doctor"))
    (doctor,), (container,) = spec["initContainers"], spec["containers"]
    assert doctor["command"] == ["streamswav", "doctor", "--for", "pretrain", *container["args"][1:]]
    for key in ("image", "env", "resources", "volumeMounts", "securityContext"):
        assert doctor[key] == container[key]


def test_fabrics_add_devices_and_the_right_to_lock_memory():
    (container,) = main_pod(rendered("jobset", "fabric"))["containers"]
    limits = container["resources"]["limits"]
    assert limits["vpc.amazonaws.com/efa"] and limits["hugepages-2Mi"]
    assert container["resources"]["requests"]["vpc.amazonaws.com/efa"] == limits["vpc.amazonaws.com/efa"]
    assert environment_of(container)["FI_PROVIDER"] == "efa"
    assert container["securityContext"]["capabilities"]["add"] == ["IPC_LOCK"]


@pytest.mark.parametrize("engine", ENGINES)
def test_what_follows_waits_without_gpus_and_is_let_go_by_a_pod_with_one_right(engine):
    objects = rendered(engine, "followers")
    followers = ["first-finetune", "first-evaluation"]
    for name in followers:
        assert one(objects, "Job", name)["spec"]["suspend"] is True
    gate = one(objects, "Job", "first-follow")["spec"]["template"]["spec"]
    (wait,), (release,) = gate["initContainers"], gate["containers"]
    run = "s3://bucket/runs/first"
    assert wait["command"] == ["streamswav", "wait", run, "--config", "/etc/streamswav/config.yaml"]
    assert release["args"][:2] == [f"job/{name}" for name in followers]
    assert yaml.safe_load(release["args"][-1]) == {"spec": {"suspend": False}}
    assert not any(GPU in str(each["resources"]) for each in (wait, release))
    (rule,) = one(objects, "Role")["rules"]
    assert rule == {
        "apiGroups": ["batch"],
        "resources": ["jobs"],
        "resourceNames": followers,
        "verbs": ["get", "patch"],
    }
    assert (
        "streamswav-run" not in one(objects, "Job", "first-follow")["spec"]["template"]["metadata"]["labels"]
    )
    finetune = config_of(objects, "finetune.yaml")
    assert finetune["model"] == {"init": run}


def test_under_kueue_what_follows_joins_the_queue_when_its_time_has_come():
    objects = rendered("jobset", "many")
    assert "kueue" not in str(one(objects, "Job", "first-finetune")["metadata"])
    release = one(objects, "Job", "first-follow")["spec"]["template"]["spec"]["containers"][0]
    labels = {"kueue.x-k8s.io/queue-name": "gpus", "kueue.x-k8s.io/priority-class": "high"}
    assert yaml.safe_load(release["args"][-1]) == {"metadata": {"labels": labels}}
