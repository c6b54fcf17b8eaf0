"""The chart where a release is already: Helm asks the API, of which as much as it asks for stands in here."""

import json
import os
import subprocess
import threading
from collections import defaultdict
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import yaml
from charts import CHART, FINETUNE, RUN, load_make, one, over, read, render

KUEUE = {"kueue": {"queue": "gpus"}}
CASES = [
    ("Job", "first-finetune", {"finetune": {"enabled": True, **FINETUNE}}),
    ("Job", "first", {"engine": "job", **KUEUE}),
    ("JobSet", "first", KUEUE),
    ("TrainJob", "first", {"engine": "trainjob", **KUEUE}),
    ("PyTorchJob", "first", {"engine": "pytorchjob", **KUEUE}),
]

OWNED = {
    "labels": {"app.kubernetes.io/managed-by": "Helm"},
    "annotations": {"meta.helm.sh/release-name": "first", "meta.helm.sh/release-namespace": "ml"},
}


@contextmanager
def cluster(objects, live):
    """An API server that knows the kinds of some objects, and holds those that are live, by their path."""
    kinds = defaultdict(set)
    for each in objects:
        kinds[each["apiVersion"]].add(each["kind"])
    versions = [{"groupVersion": each, "version": each.rpartition("/")[2]} for each in kinds if "/" in each]
    answers = {
        "/version": {"major": "1", "minor": "31", "gitVersion": "v1.31.0"},
        "/api": {"kind": "APIVersions", "versions": ["v1"]},
        "/apis": {
            "kind": "APIGroupList",
            "groups": [
                {"name": each["groupVersion"].partition("/")[0], "versions": [each], "preferredVersion": each}
                for each in versions
            ],
        },
        **live,
    }
    for api, named in kinds.items():
        resources = [
            {"name": f"{kind.lower()}s", "kind": kind, "namespaced": True, "verbs": ["get"]} for kind in named
        ]
        listed = {"kind": "APIResourceList", "groupVersion": api, "resources": resources}
        answers[f"/apis/{api}" if "/" in api else f"/api/{api}"] = listed

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self):
            found = answers.get(self.path.partition("?")[0])
            missing = {"kind": "Status", "status": "Failure", "reason": "NotFound", "code": 404}
            self.send_response(200 if found else 404)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps(found or missing).encode())

        def log_message(self, *_):
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(("kind", "name", "values"), CASES, ids=[f"{kind} {name}" for kind, name, _ in CASES])
def test_an_upgrade_leaves_waiting_what_waits_and_running_what_runs(kind, name, values, tmp_path):
    objects = render(values, tmp_path)
    made = one(objects, kind, name)
    file = tmp_path / "given.yaml"
    file.write_text(yaml.safe_dump(over(RUN, values)))
    command = [load_make().find_helm(), "template", "first", str(CHART), "--values", str(file)]
    command += ["--namespace", "ml", "--dry-run=server", "--disable-openapi-validation"]

    def waits(live):
        """Whether Helm would have it wait, where it waits in the cluster, or does not, or is not there."""
        spec = {"runPolicy": {"suspend": live}} if kind == "PyTorchJob" else {"suspend": live}
        there = {"apiVersion": made["apiVersion"], "kind": kind, "metadata": OWNED, "spec": spec}
        path = f"/apis/{made['apiVersion']}/namespaces/ml/{kind.lower()}s/{name}"
        with cluster(objects, {} if live is None else {path: there}) as address:
            done = subprocess.run(
                [*command, "--kube-apiserver", address],
                check=False,
                capture_output=True,
                text=True,
                env={**os.environ, "KUBECONFIG": str(tmp_path / "none"), "HELM_CACHE_HOME": str(tmp_path)},
            )
        assert done.returncode == 0, done.stderr
        found = one(read(done.stdout), kind, name)["spec"]
        return found.get("runPolicy", found).get("suspend", False)

    assert (waits(None), waits(True), waits(False)) == (True, True, False)
