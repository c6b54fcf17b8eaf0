"""The bucket policies: all that a run asks of a store is allowed, and nothing is that it does not ask for."""

import fnmatch
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from charts import OPS, of, render
from runs import arguments, run

from streamswav.config import StorageSection
from streamswav.stream.store import Store

sys.path.append(str(OPS / "benchmarks"))
from fault_proxy import FaultProxy

FOLDER = OPS / "policies"
COUNTS = [25, 14, 31]


class Asked(NamedTuple):
    """What a request needs: an IAM action, on a resource, listing below a prefix."""

    action: str
    resource: str
    prefix: str = ""


def needs(method, url):
    """The IAM action of a request, after the table of S3's actions (`Service Authorization Reference`)."""
    parts = urlsplit(url)
    bucket, _, key = unquote(parts.path).lstrip("/").partition("/")
    query = parse_qs(parts.query, keep_blank_values=True)
    arn = f"arn:aws:s3:::{bucket}"
    if not key:
        assert (method, "list-type" in query) == ("GET", True), f"{method} {url}"
        return Asked("s3:ListBucket", arn, query.get("prefix", [""])[0])
    actions = {
        "GET": "s3:GetObject",
        "HEAD": "s3:GetObject",
        "PUT": "s3:PutObject",
        "POST": "s3:PutObject",  # of parts: begin and complete
        "DELETE": "s3:AbortMultipartUpload" if "uploadId" in query else "s3:DeleteObject",
    }
    return Asked(actions[method], f"{arn}/{key}")


def policy(**places):
    """The policy of a run with its places filled in."""
    text = (FOLDER / "run.json").read_text()
    for name, value in places.items():
        text = text.replace(name, value)
    return json.loads(text)


def allowed_by(statements, asked) -> Iterator[tuple[str, str]]:
    """Which statement and action allow it."""
    for statement in statements:
        actions = statement["Action"]
        for action in [actions] if isinstance(actions, str) else actions:
            prefixes = statement.get("Condition", {}).get("StringLike", {}).get("s3:prefix", ["*"])
            if (
                action == asked.action
                and fnmatch.fnmatchcase(asked.resource, statement["Resource"])
                and any(fnmatch.fnmatchcase(asked.prefix, each) for each in prefixes)
            ):
                yield statement["Sid"], action


@pytest.fixture(scope="module")
def recorded(s3, make_shards, tmp_path_factory):
    """What a run in two parts, a finetuning's reader and a failed upload ask of the store."""
    folder = tmp_path_factory.mktemp("policies")
    url, bucket = s3.make_bucket()
    make_shards(bucket / "data" / "shards", counts=COUNTS)
    with FaultProxy(s3.endpoint) as proxy:
        storage = {"endpoint_url": proxy.url}
        given = arguments(
            run={"directory": f"{url}/runs/first"},
            stream={"urls": f"{url}/data/shards/"},
            storage=storage,
            checkpoint={"images": 16, "keep": 1},
        )
        for part, more in enumerate((["--training.images", "32"], [])):
            outcome = run([*given, *more], folder / str(part))
            assert outcome.code == 0, outcome.err
        audited = run(
            ["audit", f"{url}/runs/first", "--recount", "--storage.endpoint_url", proxy.url], folder / "a"
        )
        assert audited.code == 0, audited.err
        store = Store(StorageSection(endpoint_url=proxy.url))
        with suppress(InterruptedError), store.writing(f"{url}/runs/first/large") as file:
            file.write(bytes(17 << 20))
            raise InterruptedError
        requests = {needs(each.method, each.path) for each in proxy.requests}
    name = url.removeprefix("s3://")
    prefixes = {"SHARDS_PREFIX": "data/shards", "RUN_PREFIX": "runs/first"}
    return requests, policy(SHARDS_BUCKET=name, RUN_BUCKET=name, **prefixes), name


def test_everything_that_a_run_asks_for_is_allowed(recorded):
    requests, written, _ = recorded
    refused = [each for each in requests if not any(allowed_by(written["Statement"], each))]
    assert refused == []


def test_what_is_not_there_is_told_as_such(recorded):
    """Without the right to list S3 says 403 where it would say 404; the key counts as the prefix."""
    requests, written, name = recorded
    arn = f"arn:aws:s3:::{name}"
    keys = {each.resource.removeprefix(f"{arn}/") for each in requests if each.action == "s3:GetObject"}
    asked = [Asked("s3:ListBucket", arn, key) for key in keys]
    assert len(asked) > 5
    assert [each for each in asked if not any(allowed_by(written["Statement"], each))] == []


def test_nothing_is_allowed_that_no_run_asks_for(recorded):
    requests, written, _ = recorded
    used = {each for asked in requests for each in allowed_by(written["Statement"], asked)}
    granted = {
        (statement["Sid"], action)
        for statement in written["Statement"]
        for action in ([statement["Action"]] if isinstance(statement["Action"], str) else statement["Action"])
    }
    assert granted == used


def test_other_runs_other_data_and_the_shards_are_out_of_reach(recorded):
    _, written, name = recorded
    arn = f"arn:aws:s3:::{name}"
    for asked in (
        Asked("s3:PutObject", f"{arn}/data/shards/shard-000000.tar"),
        Asked("s3:DeleteObject", f"{arn}/data/shards/shard-000000.tar"),
        Asked("s3:GetObject", f"{arn}/data/private/x.tar"),
        Asked("s3:GetObject", f"{arn}/runs/second/summary.json"),
        Asked("s3:PutObject", f"{arn}/runs/first-not/summary.json"),
        Asked("s3:ListBucket", arn, ""),
        Asked("s3:ListBucket", arn, "runs/"),
        Asked("s3:GetObject", "arn:aws:s3:::other/data/shards/shard-000000.tar"),
    ):
        assert not list(allowed_by(written["Statement"], asked)), asked


def test_the_trust_is_in_the_service_accounts_that_the_chart_makes(tmp_path):
    labelled = {"enabled": True, "train": ["s3://b/train/"], "test": ["s3://b/test/"]}
    made = of(render({"evaluation": labelled}, tmp_path), "ServiceAccount")
    names = {f"system:serviceaccount:NAMESPACE:{each['metadata']['name']}" for each in made}
    (statement,) = json.loads((FOLDER / "irsa-trust.json").read_text())["Statement"]
    trusted = statement["Condition"]["StringEquals"]["OIDC_PROVIDER:sub"]
    assert {each.replace("RELEASE", "first") for each in trusted} == names


def test_the_pages_commands_make_policies_of_the_templates(tmp_path):
    page = (OPS / "helm" / "streamswav" / "README.md").read_text()
    commands = page.partition("    cd ops/policies\n")[2].partition("    aws iam")[0]
    for file in FOLDER.glob("*.json"):
        shutil.copy(file, tmp_path)
    subprocess.run(["bash", "-euc", commands], cwd=tmp_path, check=True)
    for name in ("policy.json", "trust.json"):
        text = (tmp_path / name).read_text()
        assert json.loads(text)["Statement"]
        assert re.findall(r"\b[A-Z]+(?:_[A-Z]+)*\b", text) == ["ABCDEF"] * text.count("ABCDEF")


def test_every_policy_is_whole_and_its_places_are_on_the_page():
    page = (OPS / "helm" / "streamswav" / "README.md").read_text()
    for file in FOLDER.glob("*.json"):
        loaded = json.loads(file.read_text())
        assert loaded["Version"] == "2012-10-17"
        assert file.name in page
        for place in re.findall(r"\b[A-Z]+(?:_[A-Z]+)*\b", file.read_text()):
            assert place in page, f"{file.name}: {place}"
