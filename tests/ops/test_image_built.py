"""The image itself, built on a base of Debian's packages, and training in it as Kubernetes would run it.

Takes minutes and 25 GB of disk. STREAMSWAV_IMAGE names one that buildah has already, instead.
"""

import json
import os
import shutil
import signal
import subprocess
import urllib.request
from pathlib import Path

import pytest
from containers import USER, Image
from runs import free_port

from streamswav.errors import EXIT_DONE, EXIT_RETRY

pytestmark = [pytest.mark.all, pytest.mark.timeout(5400)]

ROOT = Path(__file__).parents[2]
NEEDED = ("buildah", "debootstrap", "runc")
ROOM = 30 << 30
PASSWORD = "of-the-mirror-6d1f"
COUNTS = [500, 700, 600, 500]
PASSES = 4


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    missing = [name for name in NEEDED if shutil.which(name) is None]
    if missing or os.geteuid() != 0:
        pytest.skip(f"needs root and {', '.join(NEEDED)}; missing: {', '.join(missing) or 'root'}")
    if name := os.environ.get("STREAMSWAV_IMAGE"):
        with Image.mount(name) as mounted:
            yield mounted
        return
    folder = tmp_path_factory.mktemp("containers")
    if shutil.disk_usage(folder).free < ROOM:
        pytest.skip(f"needs {ROOM >> 30} GiB of disk")
    with pytest.MonkeyPatch.context() as patch:
        storage = f'[storage]\ndriver = "overlay"\ngraphroot = "{folder}/root"\nrunroot = "{folder}/run"\n'
        (folder / "storage.conf").write_text(storage)
        patch.setenv("CONTAINERS_STORAGE_CONF", str(folder / "storage.conf"))
        patch.setenv("BUILDAH_ISOLATION", "chroot")
        patch.setenv("TMPDIR", str(folder))
        wheels = set((ROOT / "ops/wheels").glob("*.whl"))
        try:
            build(folder)
            with Image.mount("streamswav:test") as mounted:
                yield mounted
        finally:
            for command in (["rm", "--all"], ["rmi", "--all", "--force"]):
                subprocess.run(["buildah", *command], check=False, capture_output=True)
            for path in set((ROOT / "ops/wheels").glob("*.whl")) - wheels:
                path.unlink()


def build(folder):
    (folder / "pip.conf").write_text(f"[global]\n# {PASSWORD}\n")
    commands = [["ops/image/debian-base", "streamswav-base:test"]]
    commands.append(["ops/image/download"])
    given = ["--tag", "streamswav:test", "--base", "streamswav-base:test", "--no-index"]
    given += ["--pip-conf", str(folder / "pip.conf"), "--sbom", str(folder / "sbom.json")]
    commands.append(["ops/build-image", *given])
    for command in commands:
        done = subprocess.run(["bash", *command], cwd=ROOT, check=False, capture_output=True, text=True)
        assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert len(json.loads((folder / "sbom.json").read_text())["components"]) > 50


@pytest.fixture
def volumes(tmp_path):
    folders = {"/runs": tmp_path / "runs", "/etc/streamswav": tmp_path / "etc"}
    for folder in folders.values():
        folder.mkdir()
        os.chown(folder, USER, USER)
    shutil.copy(ROOT / "ops/recipes/quickstart.yaml", tmp_path / "etc/config.yaml")
    return folders


def files(image):
    for folder, _, names in os.walk(image.root):
        yield from (Path(folder) / name for name in names)


def test_it_holds_no_compiler_installer_header_test_or_secret(image):
    inside = [path.relative_to(image.root) for path in files(image)]
    programs = {path.name for path in inside if path.parent.name in ("bin", "sbin")}
    assert not programs & {"cc", "gcc", "c++", "clang", "ld", "as", "make", "nvcc", "git", "curl", "wget"}
    packages = [path for path in inside if "/opt/venv/lib" in f"/{path}" and ".dist-info" not in str(path)]
    assert len(packages) > 5000
    assert not [path for path in packages if path.suffix == ".a" or {"include", "tests"} & set(path.parts)]
    assert not [path for path in inside if path.suffix == ".whl" and "share/python-wheels" not in str(path)]
    assert not (image.root / "build").exists()
    assert not list((image.root / "opt/venv/lib").glob("python3*/site-packages/pip"))
    for folder in ("etc", "root", "tmp", "var", "opt/venv/bin", "licenses", "usr/share/doc"):
        found = subprocess.run(
            ["grep", "-rl", PASSWORD, str(image.root / folder)], check=False, capture_output=True, text=True
        )
        assert found.stdout == ""


def test_its_user_may_write_to_runs_and_cache_alone_and_nothing_gives_other_rights(image):
    modes = {path: path.lstat() for path in files(image) if path.is_file() and not path.is_symlink()}
    assert not [path for path, each in modes.items() if each.st_mode & 0o6002 or each.st_uid == USER]
    owned = [name for name in ("runs", "cache") if (image.root / name).stat().st_uid == USER]
    assert owned == ["runs", "cache"]


def test_it_says_what_it_is_and_lists_what_is_locked(image):
    labels = image.config["Labels"]
    assert labels["org.opencontainers.image.licenses"] == "Apache-2.0"
    revision = labels["org.opencontainers.image.revision"]
    assert f"STREAMSWAV_GIT_SHA={revision}" in image.config["Env"]
    listed = json.loads((image.root / "licenses/sbom.cdx.json").read_text())["components"]
    listed = {each["name"].lower().replace("_", "-"): each["version"] for each in listed}
    for name in ("run", "embed", "evaluate", "export"):
        lock = (ROOT / "ops/locks" / f"{name}.txt").read_text()
        locked = dict(line.split(" ")[0].split("==") for line in lock.splitlines() if "==" in line)
        assert locked.items() <= listed.items()
    assert "triton" not in listed
    assert (image.root / "licenses/licences.md").read_bytes() == (ROOT / "ops/licences.md").read_bytes()


def test_the_quickstarts_training_drains_goes_on_and_ends_on_a_read_only_root(
    image, volumes, s3, make_shards, tmp_path
):
    url, bucket = s3.make_bucket()
    make_shards(bucket, counts=COUNTS, image=(28, 28))
    port = free_port()
    keys = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_EC2_METADATA_DISABLED")
    environment = {name: os.environ[name] for name in keys}
    environment["STREAMSWAV_STORAGE__ENDPOINT_URL"] = s3.endpoint
    command = ["pretrain", "--config", "/etc/streamswav/config.yaml", "--stream.urls", f"{url}/"]
    command += ["--stream.passes", str(PASSES), "--stream.samples", str(sum(COUNTS))]
    command += ["--optimizer.warmup_images", "1000", "--run.directory", "/runs/first"]
    command += ["--telemetry.port", str(port), "--telemetry.bind", "127.0.0.1"]
    given = {"environment": environment, "volumes": volumes}

    with image.start(command, tmp_path / "first", **given) as container:
        container.running.wait_until(lambda so_far: any(each["step"] >= 5 for each in so_far.of("progress")))
        status = container.inside("cat", "/proc/1/status")
        for line in ("Name:\tstreamswav", f"Uid:\t{USER}", "CapEff:\t0000000000000000", "NoNewPrivs:\t1"):
            assert line in status
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            metrics = answer.read().decode()
        container.signal(signal.SIGTERM)
        drained = container.wait(180)
    assert drained.code == EXIT_RETRY, drained.err[-3000:]
    assert not [line for line in drained.said if not line.startswith("streamswav: ")]
    revision = image.config["Labels"]["org.opencontainers.image.revision"]
    assert f'git_sha="{revision}"' in metrics

    with image.start(command, tmp_path / "second", **given) as container:
        ended = container.wait(900)
    assert ended.code == EXIT_DONE, ended.err[-3000:]
    (resumed,) = ended.of("resumed")
    assert resumed["step"] >= 5
    stream = json.loads((volumes["/runs"] / "first/summary.json").read_text())["stream"]
    assert stream["trained"] + stream["left"] == PASSES * sum(COUNTS)
    assert stream["trained"] == PASSES * sum(COUNTS) // 128 * 128


def test_other_commands_run_by_another_entry_point(image, volumes, tmp_path):
    for number, command in enumerate([["--version"], ["plan", "/etc/streamswav/config.yaml"], ["keys"]]):
        folder = tmp_path / str(number)
        with image.start(command, folder, entry_point=["streamswav"], volumes=volumes) as container:
            outcome = container.wait(180)
        assert (outcome.code, bool(outcome.out)) == (EXIT_DONE, True), outcome.err[-2000:]


def test_the_root_cannot_be_written(image, tmp_path):
    with image.start(["/opt/venv/x"], tmp_path / "out", entry_point=["touch"]) as container:
        outcome = container.wait(60)
    assert outcome.code == 1
    assert "Read-only file system" in outcome.err
