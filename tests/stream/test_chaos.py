"""Runs killed at random, on changing ranks, with damaged shards and a faulty S3, balance at the end."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

CHAOS = Path(__file__).parents[2] / "ops" / "benchmarks" / "chaos.py"


def chaos(folder, *options):
    report = folder / "report.json"
    command = [sys.executable, str(CHAOS), "--json", str(report), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(report.read_text())


@pytest.mark.all
@pytest.mark.timeout(240)
def test_a_run_killed_thrice_on_changing_ranks_balances(tmp_path):
    report = chaos(tmp_path, "--rounds", "3", "--minutes", "2", "--passes", "1", "--shards", "14")
    assert report["kills"] == 3
    assert report["differences"] == []


@pytest.mark.all
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("options", [("--seed", "1"), ("--seed", "2", "--dividing")])
def test_twenty_kills_balance_with_the_digests_of_an_undisturbed_run(tmp_path, options):
    report = chaos(tmp_path, *options)
    assert report["kills"] >= 20
    assert report["differences"] == []
