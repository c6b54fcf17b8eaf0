"""`ops/certify-gpu` where there is no GPU: what can run passes, and nothing is certified."""

from __future__ import annotations

import hashlib
import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from streamswav.errors import EXIT_CONFIG, EXIT_DONE, EXIT_FAILED

ROOT = Path(__file__).parents[2]
NEED_A_GPU = {
    "memory",
    "memory, activation checkpointing",
    "memory, two micro-batches",
    "speed, float32, compiled",
    "speed, half precision, compiled",
    "no hidden synchronisation",
    "no hidden synchronisation, all ranks",
}
NEED_NONE = {
    "goldens in float32",
    "goldens under autocast",
    "sinkhorn against float64",
    "goldens of two ranks",
    "all ranks against one",
    "speed, float32",
    "speed, half precision",
    "deterministic",
    "drain and resume",
}


def certify(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(ROOT / "ops" / "certify-gpu"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def by_name(certificate: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {check["name"]: check for check in certificate["checks"]}


def test_a_rehearsal_passes_what_it_can_and_certifies_nothing(tmp_path: Path) -> None:
    ended = certify("--device", "cpu", "--quick", "--out", tmp_path / "certificate.json")
    assert ended.returncode == EXIT_DONE, ended.stderr
    written = json.loads((tmp_path / "certificate.json").read_text())
    assert json.loads(ended.stdout) == written
    checks = by_name(written)
    assert checks.keys() == NEED_A_GPU | NEED_NONE
    for name in NEED_NONE:
        assert checks[name]["outcome"] == "pass", checks[name]
        assert checks[name]["figures"]
    for name in NEED_A_GPU:
        assert (checks[name]["outcome"], checks[name]["reason"]) == ("skipped", "needs a GPU")
    assert not written["certified"]
    assert ended.stderr.splitlines()[-1] == "NOT CERTIFIED: rehearsed on a CPU; tiny shapes (--quick)"
    rest = {name: value for name, value in written.items() if name != "digest"}
    assert hashlib.sha256(_canonical(rest)).hexdigest() == written["digest"]


def _canonical(value: dict[str, Any]) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def test_a_check_that_fails_is_told_with_its_figure(tmp_path: Path) -> None:
    for file in (ROOT / "tests" / "goldens").glob("*.npz"):
        with np.load(file) as arrays:
            changed = dict(arrays)
        if file.stem == "sinkhorn_2rank":
            changed["rank0/codes"] = changed["rank0/codes"] + np.float32(2e-6)
        np.savez(tmp_path / file.name, **changed)
    ended = certify("--device", "cpu", "--quick", "--only", "goldens", "--goldens", tmp_path)
    assert ended.returncode == EXIT_FAILED
    written = json.loads(ended.stdout)
    outcomes = {name: check["outcome"] for name, check in by_name(written).items()}
    assert outcomes == {
        "goldens in float32": "pass",
        "goldens under autocast": "pass",
        "goldens of two ranks": "FAIL",
    }
    assert "above 1e-06" in by_name(written)["goldens of two ranks"]["reason"]
    assert ended.stderr.splitlines()[-1].endswith("failed: goldens of two ranks")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_line() -> None:
    ended = certify()
    assert ended.returncode == EXIT_CONFIG
    assert ended.stdout == ""
    assert "no CUDA device is visible here" in ended.stderr.splitlines()[-1]
    assert len(ended.stderr.splitlines()) == 1
