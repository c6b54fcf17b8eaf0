"""The certificate: where it was made, of what, all figures, and a digest."""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from certify.context import FAILED, SKIPPED, Finding, Options
from streamswav import __version__

ROOT = Path(__file__).resolve().parents[2]


def certificate(options: Options, findings: Sequence[Finding], doubts: Sequence[str]) -> dict[str, Any]:
    """Put it together.

    Args:
        options: of the certification.
        findings: of all checks.
        doubts: why this is no certificate, whatever was found.
    """
    failed = [each.name for each in findings if each.outcome == FAILED]
    written = {
        "certified": not failed and not doubts,
        "because": [*doubts, *(f"failed: {name}" for name in failed)],
        "made": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "streamswav": __version__,
        **_commit(),
        "machine": _machine(options),
        "counts": {
            "passed": len(findings) - len(failed) - sum(each.outcome == SKIPPED for each in findings),
            "failed": len(failed),
            "skipped": sum(each.outcome == SKIPPED for each in findings),
        },
        "checks": [asdict(each) for each in findings],
    }
    return {**written, "digest": digest(written)}


def digest(written: dict[str, Any]) -> str:
    """SHA-256 of everything but itself, as JSON with sorted keys and no spaces."""
    rest = {name: value for name, value in written.items() if name != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _commit() -> dict[str, Any]:
    commit = _ask("git", "-C", str(ROOT), "rev-parse", "HEAD")
    changed = _ask("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "changed": None if changed is None else bool(changed)}


def _machine(options: Options) -> dict[str, Any]:
    gpus = []
    if options.device == "cuda":
        found = [torch.cuda.get_device_properties(number) for number in range(options.gpus)]
        gpus = [
            {"name": each.name, "memory": each.total_memory, "capability": f"{each.major}.{each.minor}"}
            for each in found
        ]
    driver = _ask("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "gpus": gpus,
        "driver": driver.splitlines()[0] if driver else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if gpus else None,  # type: ignore[no-untyped-call]  # torch
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if gpus else None,  # type: ignore[no-untyped-call]  # torch
        "python": platform.python_version(),
        "platform": platform.platform(),
    }


def _ask(*command: str) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    return answer.stdout.strip() if answer.returncode == 0 else None
