"""Pods without a cluster: what a template renders, as a process in namespaces of its own.

Each pod has a network, a host name and an /etc as a kubelet would give it; an S3 server stands beside them on
the same bridge. All of it is in namespaces that end with the process that holds them: nothing of the
machine's own network or files is changed.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from runs import Fork, Running

SUBNET = "10.231.7"
SERVER = f"{SUBNET}.1"
PORT = 9000
INDEX = "metadata.annotations['batch.kubernetes.io/job-completion-index']"

IMAGE = {"PATH", "PYTHONPATH", "TMPDIR"}  # variables that find this program, as those of an image do

# Mounts an /etc of its own over the machine's, which stays as it is below.
_OWN_ETC = """
set -e
hostname "$1"
mount -t tmpfs tmpfs /mnt
mkdir /mnt/upper /mnt/work
mount -t overlay overlay -o lowerdir=/etc,upperdir=/mnt/upper,workdir=/mnt/work /etc
cat "$2" >/etc/hosts
: >/etc/resolv.conf
mkdir -p /etc/streamswav
cp "$3"/* /etc/streamswav/
"""

_ASK = """
import sys, urllib.request
for url in sys.argv[1:]:
    print(urllib.request.urlopen(url, timeout=10).status)
"""


def _run(*command: object) -> None:
    done = subprocess.run([str(part) for part in command], check=False, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}: {done.stderr}"


@contextmanager
def _holder(*namespaces: str) -> Iterator[int]:
    """A process that does nothing but keep namespaces; yields its pid."""
    command = ["unshare", *namespaces, "--", "sh", "-c", "echo ready; exec sleep 3600"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        try:
            yield process.pid
        finally:
            process.kill()


def _move(holder: int) -> None:
    """Move this process to a pod's namespaces, with the variables of an image and no others."""
    libc = ctypes.CDLL(None, use_errno=True)
    for name in ("net", "uts", "mnt"):
        with Path(f"/proc/{holder}/ns/{name}").open() as file:
            assert libc.setns(file.fileno(), 0) == 0, f"{name}: {os.strerror(ctypes.get_errno())}"
    for name in {*os.environ} - IMAGE:
        del os.environ[name]
    os.environ["OMP_NUM_THREADS"] = "1"


@dataclass
class Cluster:
    """A bridge with a store on it, and room for pods.

    Attributes:
        bridge: pid that holds the network of the bridge.
        folder: for files of the cluster.
        buckets: folder of the store; each folder in it is a bucket.
        secrets: keys and values of each Secret.
    """

    bridge: int
    folder: Path
    buckets: Path
    secrets: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    @contextmanager
    def gang(
        self, template: Mapping[str, Any], files: Mapping[str, str], names: Sequence[str]
    ) -> Iterator[list[Pod]]:
        """The pods of a template, one for each name, with the files of their ConfigMap."""
        config = self.folder / "config"
        config.mkdir(exist_ok=True)
        for name, text in files.items():
            (config / name).write_text(text)
        with ExitStack() as stack:
            pods = []
            for index, name in enumerate(names):
                holder = stack.enter_context(_holder("--net", "--mount", "--uts"))
                pods.append(Pod(self, index, name, holder, template))
                self._connect(holder, index)
                self._give_etc(pods[-1], names, config)
            yield pods

    def _connect(self, holder: int, index: int) -> None:
        outside = ("nsenter", "-t", self.bridge, "-n", "ip")
        inside = ("nsenter", "-t", holder, "-n", "ip")
        _run(*outside, "link", "add", f"pod{index}", "type", "veth", "peer", "name", "eth0", "netns", holder)
        _run(*outside, "link", "set", f"pod{index}", "master", "bridge0", "up")
        _run(*inside, "addr", "add", f"{address(index)}/24", "dev", "eth0")
        for device in ("eth0", "lo"):
            _run(*inside, "link", "set", device, "up")

    def _give_etc(self, pod: Pod, names: Sequence[str], config: Path) -> None:
        """Names as a headless Service publishes them; the pod's own as its kubelet writes it."""
        lines = ["127.0.0.1 localhost", f"{address(pod.index)} {pod.host}"]
        lines += [f"{address(index)} {name}" for index, name in enumerate(names)]
        hosts = self.folder / f"hosts-{pod.index}"
        hosts.write_text("\n".join(lines) + "\n")
        enter = ("nsenter", "-t", pod.holder, "-m", "-u")
        _run(*enter, "sh", "-c", _OWN_ETC, "sh", pod.host, hosts, config)


def address(index: int) -> str:
    """Where a pod is."""
    return f"{SUBNET}.{10 + index}"


@dataclass(frozen=True)
class Pod:
    """One pod, and the process that it becomes."""

    cluster: Cluster
    index: int
    name: str
    holder: int
    template: Mapping[str, Any]

    @property
    def host(self) -> str:
        """Its host name: that without the Service."""
        return self.name.partition(".")[0]

    def start(self, folder: Path, *, kind: str = "containers") -> Running:
        """Start the container, or another kind: command, arguments and environment are what was rendered."""
        (container,) = self.template["spec"][kind]
        program, *rest = container["command"]
        assert program == "streamswav"
        folder.mkdir(parents=True)
        output = (folder / "stdout", folder / "stderr")
        given = [*rest, *container.get("args", [])]
        move = functools.partial(_move, self.holder)
        return Running(Fork(given, output, [self.environment()], spares=2, move=move), output)

    def probe(self) -> dict[str, int]:
        """The answers to the container's probes, as a kubelet asks for them: status by path."""
        (container,) = self.template["spec"]["containers"]
        ports = {each["name"]: each["containerPort"] for each in container["ports"]}
        asked = [container[kind]["httpGet"] for kind in ("readinessProbe", "livenessProbe")]
        urls = [f"http://{address(self.index)}:{ports[each['port']]}{each['path']}" for each in asked]
        enter = ["nsenter", "-t", str(self.cluster.bridge), "-n", sys.executable, "-c", _ASK, *urls]
        done = subprocess.run(enter, check=False, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        answers = map(int, done.stdout.split())
        return {each["path"]: status for each, status in zip(asked, answers, strict=True)}

    def environment(self) -> dict[str, str]:
        """Its variables, with what they refer to; what is optional and not there is not set."""
        (container,) = self.template["spec"]["containers"]
        found = {each["name"]: self._value(each) for each in container["env"]}
        return {name: value for name, value in found.items() if value is not None}

    def _value(self, variable: Mapping[str, Any]) -> str | None:
        if "value" in variable:
            return str(variable["value"])
        source = variable["valueFrom"]
        if "fieldRef" in source:
            assert source["fieldRef"]["fieldPath"] == INDEX
            return str(self.index)
        wanted = source["secretKeyRef"]
        keys = self.cluster.secrets[wanted["name"]]
        assert wanted["key"] in keys or wanted["optional"]
        return keys.get(wanted["key"])


@contextmanager
def cluster(folder: Path, access_key: str, secret_key: str) -> Iterator[Cluster]:
    """A cluster's network with an S3 server on it; skips where namespaces may not be made."""
    rclone = shutil.which("rclone", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if os.geteuid() != 0 or not shutil.which("ip") or rclone is None:
        pytest.skip("network namespaces need root, ip and rclone")
    buckets = folder / "buckets"
    buckets.mkdir(parents=True)
    with _holder("--net") as bridge, (folder / "s3.log").open("wb") as log:
        enter = ("nsenter", "-t", bridge, "-n")
        _run(*enter, "ip", "link", "add", "bridge0", "type", "bridge")
        _run(*enter, "ip", "addr", "add", f"{SERVER}/24", "dev", "bridge0")
        for device in ("bridge0", "lo"):
            _run(*enter, "ip", "link", "set", device, "up")
        command = [*map(str, enter), rclone, "serve", "s3", "--auth-key", f"{access_key},{secret_key}"]
        command += ["--addr", f"{SERVER}:{PORT}", "--vfs-cache-mode", "off", "--dir-cache-time", "1ms"]
        with subprocess.Popen([*command, str(buckets)], stdout=log, stderr=log) as server:
            try:
                keys = {"AWS_ACCESS_KEY_ID": access_key, "AWS_SECRET_ACCESS_KEY": secret_key}
                yield Cluster(bridge, folder, buckets, {"keys": keys})
            finally:
                server.terminate()
