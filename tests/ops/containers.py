"""Runs a built image as Kubernetes would under its restricted profile: by runc, as its configuration says."""

from __future__ import annotations

import json
import signal
import subprocess
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runs import Outcome, Running, Script

USER = 65532
SHARED_MEMORY = 512 << 20


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@dataclass(frozen=True)
class Image:
    """An image that buildah has, mounted: where its files are, and what is to be run how."""

    root: Path
    config: Mapping[str, Any]

    @staticmethod
    @contextmanager
    def mount(name: str) -> Iterator[Image]:
        """Give the image's files, until they are not needed any more."""
        config = json.loads(_output("buildah", "inspect", "--type", "image", name))["OCIv1"]["config"]
        container = _output("buildah", "from", "--pull-never", name)
        try:
            yield Image(Path(_output("buildah", "mount", container)), config)
        finally:
            _output("buildah", "rm", container)

    @contextmanager
    def start(
        self,
        arguments: Sequence[str],
        folder: Path,
        *,
        entry_point: Sequence[str] | None = None,
        environment: Mapping[str, str] | None = None,
        volumes: Mapping[str, Path] | None = None,
    ) -> Iterator[Container]:
        """Start a container: read-only root, user 65532, no capability, memory at /tmp and /dev/shm."""
        folder.mkdir(parents=True)
        command = [*(self.config["Entrypoint"] if entry_point is None else entry_point), *arguments]
        given = [f"{name}={value}" for name, value in (environment or {}).items()]
        bundle = self._bundle(command, [*self.config["Env"], *given], volumes or {})
        (folder / "config.json").write_text(json.dumps(bundle))
        name = f"streamswav-{uuid.uuid4().hex[:12]}"
        output = (folder / "stdout", folder / "stderr")
        runc = Script(["runc", "run", "--bundle", str(folder), name], output, {})
        try:
            yield Container(name, Running(runc, output))
        finally:
            subprocess.run(["runc", "delete", "--force", name], check=False, capture_output=True)
            runc.poll()

    def _bundle(self, command: list[str], environment: list[str], volumes: Mapping[str, Path]) -> object:
        """Say it in the words of the OCI runtime specification."""
        assert self.config["User"] == f"{USER}:{USER}"
        safe = ["nosuid", "noexec", "nodev"]
        mounts = [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            _memory("/dev", ["nosuid", "mode=755", "size=65536k"]),
            _memory("/dev/shm", [*safe, "mode=1777", f"size={SHARED_MEMORY}"]),
            _memory("/tmp", ["nosuid", "nodev", "mode=1777", "size=1g"]),
        ]
        for inside, outside in volumes.items():
            options = ["bind", "rw", "nosuid", "nodev"]
            mounts.append({"destination": inside, "type": "bind", "source": str(outside), "options": options})
        none: dict[str, list[str]] = {
            kind: [] for kind in ("bounding", "effective", "inheritable", "permitted", "ambient")
        }
        # The network is this machine's, so that the S3 server on the loopback can be reached.
        namespaces = [{"type": kind} for kind in ("pid", "ipc", "uts", "mount")]
        return {
            "ociVersion": "1.0.2",
            "root": {"path": str(self.root), "readonly": True},
            "process": {
                "user": {"uid": USER, "gid": USER},
                "args": command,
                "env": environment,
                "cwd": self.config["WorkingDir"],
                "capabilities": none,
                "noNewPrivileges": True,
            },
            "mounts": mounts,
            "linux": {
                "namespaces": namespaces,
                "maskedPaths": ["/proc/kcore"],
                "readonlyPaths": ["/proc/sys"],
            },
        }


def _memory(path: str, options: list[str]) -> dict[str, object]:
    return {"destination": path, "type": "tmpfs", "source": "tmpfs", "options": options}


@dataclass(frozen=True)
class Container:
    """A container that runs."""

    name: str
    running: Running

    def signal(self, number: signal.Signals) -> None:
        """Signal its PID 1, as the kubelet does."""
        _output("runc", "kill", self.name, str(int(number)))

    def wait(self, seconds: float) -> Outcome:
        """Wait for the end."""
        return self.running.wait(seconds)

    def inside(self, *command: str) -> str:
        """Run something beside what it runs, and return what that says."""
        return _output("runc", "exec", self.name, *command)
