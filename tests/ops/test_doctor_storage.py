"""`streamswav doctor` on storage and data: what is broken on purpose fails the right check."""

import contextlib
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
from conftest import encode_image
from doctor_cases import (
    BY_NAME,
    case,
    config,
    finetuning,
    look,
    on_s3,
    shown,
)
from meddler import meddling
from runs import free_port

from streamswav.doctor import run_checks


@pytest.fixture(scope="module")
def shards(make_shards, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    make_shards(folder, counts=[40, 24])
    return folder


@pytest.fixture
def bucket(s3, shards):
    """Its URL, with good shards in it."""
    url, folder = s3.make_bucket()
    for path in shards.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return url


@pytest.fixture
def behind(s3):
    """A proxy before the S3 server."""
    with meddling(s3.endpoint) as proxy:
        yield proxy


# --- storage


def test_wrong_keys(s3, bucket, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "this-is-not-it")
    shown("wrong keys", case(on_s3(s3, f"{bucket}/")))


def test_no_credentials(s3, bucket, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    shown("no credentials", case(on_s3(s3, f"{bucket}/")))


def in_s3(asked):
    """Which of the checks that ask storage failed, and what the others say."""
    names = ("identity", "listing", "clock", "ranges", "writing", "conditions", "holder", "run", "rate")
    found = {each.name: each.finding for each in run_checks([BY_NAME[name] for name in names], asked)}
    failed = [name for name, finding in found.items() if finding.status == "fail"]
    return failed, {finding.text for name, finding in found.items() if finding.status == "skip"}


def test_want_of_credentials_is_told_once(s3, bucket, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    failed, skipped = in_s3(case(on_s3(s3, f"{bucket}/", run__directory=f"{bucket}/run")))
    assert failed == ["identity"]
    assert skipped == {"builds upon identity, which failed"}


def test_storage_out_of_reach_is_waited_for_once(bucket):
    nobody = SimpleNamespace(url=f"http://127.0.0.1:{free_port()}")
    keys = {"storage__deadline_seconds": 2, "run__directory": f"{bucket}/run"}
    failed, skipped = in_s3(case(on_s3(nobody, f"{bucket}/", **keys)))
    assert failed == ["listing"]
    assert skipped == {"builds upon listing, which failed"}


class Sts(BaseHTTPRequestHandler):
    answers = (
        200,
        "<GetCallerIdentityResponse><GetCallerIdentityResult><Arn>arn:aws:sts::1:assumed-role/trainer/pod"
        "</Arn></GetCallerIdentityResult></GetCallerIdentityResponse>",
    )

    def log_message(self, *args): ...

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        status, text = self.answers
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())


@contextlib.contextmanager
def sts(monkeypatch, *answers):
    handler = type("Handler", (Sts,), {"answers": answers or Sts.answers})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL_STS", f"http://127.0.0.1:{server.server_address[1]}")
        yield
        server.shutdown()


def test_at_amazon_the_arn_is_told_and_never_a_key(monkeypatch, s3_keys):
    asked = case(config(stream__urls="s3://bucket/shards/"))
    with sts(monkeypatch):
        found = look(asked, "identity")
    assert found.status == "pass"
    assert found.text == "arn:aws:sts::1:assumed-role/trainer/pod, by the environment (AWS_ACCESS_KEY_ID)"


def test_keys_that_amazon_does_not_know(monkeypatch):
    error = (
        "<ErrorResponse><Error><Code>InvalidClientTokenId</Code><Message>no</Message></Error></ErrorResponse>"
    )
    with sts(monkeypatch, 403, error):
        shown("keys that AWS does not know", case(config(stream__urls="s3://bucket/shards/")))


def test_sts_out_of_reach_is_no_failure(monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL_STS", f"http://127.0.0.1:{free_port()}")
    found = look(case(config(stream__urls="s3://bucket/shards/")), "identity")
    assert found.status == "skip"
    assert (
        "credentials come from the environment (AWS_ACCESS_KEY_ID); AWS (STS) was not reached" in found.text
    )


def test_temporary_keys_from_the_environment(s3, bucket, monkeypatch):
    monkeypatch.setenv("AWS_SESSION_TOKEN", "a-token")
    shown("temporary keys in the environment", case(on_s3(s3, f"{bucket}/")))


def test_a_missing_bucket(s3):
    shown("a missing bucket", case(on_s3(s3, "s3://no-such-bucket/shards/")))


def test_an_empty_prefix(s3, bucket):
    shown("a prefix without shards", case(on_s3(s3, f"{bucket}/elsewhere/")))


def test_storage_out_of_reach(bucket):
    class Nobody:
        url = f"http://127.0.0.1:{free_port()}"

    shown("storage that is out of reach", case(on_s3(Nobody, f"{bucket}/", storage__deadline_seconds=5)))


@pytest.mark.parametrize(
    ("seconds", "fault"), [(1200, "a clock that is 20 minutes off"), (-60, "a minute off")]
)
def test_a_clock_that_is_off(behind, bucket, seconds, fault):
    def shift(_, headers):
        headers["date"] = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + seconds))

    behind.change = shift
    shown(fault, case(on_s3(behind, f"{bucket}/")))


def test_a_clock_that_is_right(s3, bucket):
    found = look(case(on_s3(s3, f"{bucket}/")), "clock")
    assert found.status == "pass"
    assert found.text.endswith("s of the server's")


def test_a_server_without_ranges(web, shards):
    (web.folder / "a.tar").write_bytes((shards / "shard-000000.tar").read_bytes())
    web.ranges = False
    shown("a server without ranges", case(config(stream__urls=f"{web.url}/a.tar")), "listing")


def test_a_server_without_versions(web, shards):
    (web.folder / "a.tar").write_bytes((shards / "shard-000000.tar").read_bytes())
    with meddling(web.url) as proxy:
        proxy.change = lambda _, headers: [headers.pop(name, None) for name in ("etag", "last-modified")]
        shown("no ETag", case(config(stream__urls=f"{proxy.url}/a.tar")), "listing")


def test_a_gateway_that_changes_etags(behind, bucket):
    def change(method, headers):
        if method == "GET" and "etag" in headers:
            headers["etag"] = '"another"'

    behind.change = change
    shown("a gateway that changes ETags", case(on_s3(behind, f"{bucket}/")), "listing")


# --- data


def test_a_first_shard_that_is_cut_off(shards, tmp_path):
    whole = (shards / "shard-000000.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(whole[: len(whole) // 2 + 100])
    shown("a first shard that is cut off", case(config(stream__urls=tmp_path)))


def test_a_first_shard_that_is_no_archive(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"<html>not found</html>" * 1000)
    shown("a first shard that is no archive", case(config(stream__urls=tmp_path)))


@pytest.mark.parametrize(
    ("picture", "fault"),
    [
        (lambda _: b"no image at all", "images that cannot be decoded"),
        (lambda n: encode_image(n) if n % 4 else encode_image(n)[:200], "an image that is cut off"),
    ],
)
def test_images_that_cannot_be_used(make_shards, tmp_path, picture, fault):
    make_shards(tmp_path, counts=[24], image=picture)
    shown(fault, case(config(stream__urls=tmp_path)))


@pytest.mark.parametrize(
    ("picture", "keys", "fault"),
    [
        ((12, 10), {}, "images smaller than the crops"),
        ((400, 300), {}, "images much larger than the crops"),
        ((48, 40), {"crops__max_pixels": 1000}, "images of more pixels than allowed"),
    ],
)
def test_images_that_do_not_suit_the_crops(make_shards, tmp_path, picture, keys, fault):
    make_shards(tmp_path, counts=[16], image=picture)
    shown(fault, case(config(stream__urls=tmp_path, **keys)))


@pytest.mark.parametrize(
    ("where", "fault"),
    [("json.width => 256", "a condition that is none"), ("label == cat", "a condition that nothing meets")],
)
def test_a_condition_with_a_slip_of_the_pen(shards, where, fault):
    shown(fault, case(config(stream__urls=shards, stream__where=f"[{where}]")))


def test_labels_of_a_finetuning(make_shards, shards, tmp_path):
    make_shards(tmp_path, counts=[12], labels=False)
    good = finetuning(shards, labels__classes=10, finetune__test=shards)
    assert look(case(good, command="finetune"), "labels").text == "40 of 40 samples have one of 10 classes"
    without = finetuning(tmp_path, labels__classes=10, finetune__test=shards)
    shown("a finetuning without labels", case(without, command="finetune"))
    unknown = finetuning(shards, finetune__test=shards)
    shown("a finetuning that knows no number of classes", case(unknown, command="finetune"))


def test_weights_that_are_not_there(tmp_path):
    shown("weights that are not there", case(config(model__init=tmp_path / "none.pt")))
