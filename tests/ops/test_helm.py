"""The Helm chart: what it renders is valid, restricted, in step, and means what the exit codes mean."""

import itertools
import subprocess
import textwrap
import warnings

import kubernetes_validate
import pytest
import yaml
from charts import (
    CHART,
    ENGINES,
    FEATURES,
    OPS,
    OUTSIDE_OF_RESTRICTED,
    job_specs,
    load_make,
    of,
    one,
    pod_templates,
    read,
    render,
    rendered,
    run_helm,
)
from controllers import End, after
from kubeflow_trainer_api import models as kubeflow

from streamswav import __version__

make = load_make()
VERSIONS = ("1.31", "1.37")
CORE = {
    "ConfigMap", "Job", "NetworkPolicy", "PodDisruptionBudget", "Role", "RoleBinding", "Service",
    "ServiceAccount",
}  # fmt: skip
QUICK = [("jobset", "nothing"), *((engine, "many") for engine in ENGINES)]
REST = [each for each in itertools.product(ENGINES, [*FEATURES, "many"]) if each not in QUICK]


def check_object(each):
    """Hold an object to its schema; unknown fields are refused."""
    if each["kind"] in CORE:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its reading of schemas is deprecated by its own dependencies
            for version in VERSIONS:
                kubernetes_validate.validate(each, version, strict=True)
        return
    model = model_of(each["kind"])
    if model is not None:
        assert list(lost(each, model(each))) == []


def lost(given, read, place=""):
    """Where something that was given is not in what was read, or is another value."""
    if isinstance(given, dict) and isinstance(read, dict):
        for key, value in given.items():
            yield from lost(value, read.get(key), f"{place}/{key}")
    elif isinstance(given, list) and isinstance(read, list) and len(given) == len(read):
        for number, pair in enumerate(zip(given, read, strict=True)):
            yield from lost(*pair, f"{place}/{number}")
    elif given != read:
        yield place


def model_of(kind):
    """Reads an object with the types of its API and writes it again: unknown fields are lost."""
    kubeflow_model = {
        "JobSet": kubeflow.JobsetV1alpha2JobSet,
        "TrainJob": kubeflow.TrainerV1alpha1TrainJob,
        "TrainingRuntime": kubeflow.TrainerV1alpha1TrainingRuntime,
        "ClusterTrainingRuntime": kubeflow.TrainerV1alpha1ClusterTrainingRuntime,
    }.get(kind)
    if kubeflow_model:
        return lambda each: kubeflow_model.from_dict(each).to_dict()
    if kind in ("PodMonitor", "PrometheusRule"):
        from cloudcoil.models.prometheus_operator import v1  # noqa: PLC0415 - seconds, for these alone

        model = getattr(v1, kind)
        return lambda each: model.model_validate(each).model_dump(by_alias=True, exclude_unset=True)
    assert kind == "PyTorchJob", f"{kind} is held to nothing"
    return None


def check_all(objects):
    for each in objects:
        check_object(each)
    for spec in job_specs(objects):  # also within CRDs
        check_object({"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, "spec": spec})
    for template in pod_templates(objects):
        spec = {"restartPolicy": "Never", **template["spec"]}
        job = {"template": {**template, "spec": spec}}
        check_object({"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, "spec": job})


def is_restricted(spec):
    """Pod Security's restricted profile, as far as these pods touch it."""
    pod = spec["securityContext"]
    assert pod["runAsNonRoot"] and pod["runAsUser"] > 0
    assert pod["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys()
    for container in [*spec.get("initContainers", []), *spec["containers"]]:
        rights = container["securityContext"]
        assert rights["allowPrivilegeEscalation"] is False
        assert rights["capabilities"] == {"drop": ["ALL"]}
        assert rights["readOnlyRootFilesystem"] is True
    allowed = {"configMap", "emptyDir", "ephemeral", "persistentVolumeClaim", "secret"}
    return all(volume.keys() & allowed for volume in spec["volumes"])


@pytest.mark.parametrize(("engine", "feature"), QUICK)
def test_what_is_rendered_is_valid_and_restricted(engine, feature):
    objects = rendered(engine, feature)
    check_all(objects)
    assert all(is_restricted(template["spec"]) for template in pod_templates(objects))


@pytest.mark.all
@pytest.mark.parametrize(("engine", "feature"), REST)
def test_all_of_it_is_valid_and_restricted(engine, feature):
    test_what_is_rendered_is_valid_and_restricted(engine, feature)


@pytest.mark.all
@pytest.mark.parametrize("feature", OUTSIDE_OF_RESTRICTED)
def test_what_is_outside_of_the_restricted_profile_is_valid(feature):
    check_all(rendered("jobset", feature))


@pytest.mark.parametrize("example", sorted(each.name for each in (CHART / "examples").iterdir()))
def test_examples_go_over_a_runs_values(example, tmp_path):
    check_all(render(yaml.safe_load((CHART / "examples" / example).read_text()), tmp_path))


@pytest.mark.all
@pytest.mark.parametrize("recipe", sorted(each.name for each in (OPS / "recipes").glob("r*.yaml")))
def test_recipes_become_values_as_the_page_says(recipe, tmp_path):
    text = textwrap.indent((OPS / "recipes" / recipe).read_text(), "  ")
    (tmp_path / "recipe.yaml").write_text(f"config:\n{text}")
    code, _, error = run_helm({}, tmp_path, more=[tmp_path / "recipe.yaml"])
    assert code == 0, error


def test_lint_has_nothing_to_say():
    values = OPS / "manifests" / "jobset" / "values.yaml"
    for engine in ENGINES:
        command = [make.find_helm(), "lint", "--strict", str(CHART), "--values", str(values)]
        done = subprocess.run(
            [*command, "--set", f"engine={engine}"], check=False, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_what_is_derived_is_in_step():
    stale = [path for path, text in make.made().items() if not path.exists() or path.read_text() != text]
    examples = {OPS / "manifests" / engine / "streamswav.yaml": engine for engine in ENGINES}
    stale += [path for path, engine in examples.items() if path.read_text() != make.manifest(engine)]
    assert stale == [], "python ops/helm/make.py writes them"


@pytest.mark.parametrize("engine", ENGINES)
def test_kustomize_builds_the_plain_manifests(engine):
    command = [make.beside_python("kubectl"), "kustomize", str(OPS / "manifests" / engine)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    objects = read(done.stdout)
    plain = read((OPS / "manifests" / engine / "streamswav.yaml").read_text())
    assert sorted(each["kind"] for each in objects) == sorted(each["kind"] for each in plain)
    assert {each["metadata"].get("namespace") for each in objects} == {"training"}


MEANINGS = [
    ([End(0), End(0)], "done", "done"),
    ([End(75), End(75)], "restart", "restart"),
    ([End(75, disrupted=True), End(75)], "restart", "restart"),
    ([End(137, disrupted=True), End(75)], "restart", "restart"),
    ([End(1), End(75)], "restart, counted", "failed"),
    ([End(137), End(75)], "restart, counted", "restart"),
    ([End(78), End(78)], "failed", "failed"),
]


@pytest.mark.parametrize(("ends", "meaning", "in_pytorchjob"), MEANINGS)
def test_exit_codes_mean_what_the_launcher_means_by_them(ends, meaning, in_pytorchjob):
    for engine in ("jobset", "trainjob", "job"):
        assert after(rendered(engine), ends) == meaning, engine
    retried = [End(143 if end.code == 75 else end.code) for end in ends]
    assert after(rendered("pytorchjob"), retried) == in_pytorchjob


def test_the_chart_is_of_the_packages_version():
    about = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert about["appVersion"] == about["version"] == __version__


def notes_of(values, *words):
    """What an install says."""
    command = [make.find_helm(), "install", "first", str(CHART), "--values", str(values), *words]
    done = subprocess.run([*command, "--dry-run=client"], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.partition("\nNOTES:\n")[2]


def test_the_notes_tell_a_batch_that_the_ranks_cannot_share():
    values = OPS / "manifests" / "jobset" / "values.yaml"
    assert "no multiple of the 16 ranks" in notes_of(values, "--set", "config.training.batch=100")
    assert "no multiple" not in notes_of(values, "--set", "config.training.batch=128")


def test_alerts_and_dashboards_link_to_the_runbook_that_is_named(tmp_path):
    address = "https://wiki.example/runbook"
    objects = render({"monitoring": {"runbook": address}}, tmp_path)
    rules = [rule for group in one(objects, "PrometheusRule")["spec"]["groups"] for rule in group["rules"]]
    links = {each["annotations"]["runbook_url"].partition("#")[0] for each in rules if "alert" in each}
    assert links == {address}
    boards = [each["data"] for each in of(objects, "ConfigMap") if "streamswav.json" in each["data"]]
    assert [address in each["streamswav.json"] for each in boards] == [True]
    assert "ops/runbook.md" not in boards[0]["streamswav.json"]


def test_the_notes_say_where_to_look():
    for engine in ENGINES:
        notes = notes_of(OPS / "manifests" / engine / "values.yaml")
        assert f"get {engine},pods -l app.kubernetes.io/instance=first" in notes
        assert "curl -s localhost:9404/status" in notes
        assert "A pod has 2700 s to save" in notes
