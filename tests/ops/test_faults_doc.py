"""Each row of ops/faults.md names tests that exist, metrics that exist, and an exit code of ours."""

import re
from pathlib import Path

import pytest

from streamswav.errors import EXIT_CONFIG, EXIT_DONE, EXIT_FAILED, EXIT_RETRY
from streamswav.telemetry.metrics import Metrics

TESTS = Path(__file__).parents[1]
COLUMNS = ["fault", "what happens", "metric", "log line or error", "exit", "test"]
CODES = {"-", *map(str, (EXIT_DONE, EXIT_FAILED, EXIT_RETRY, EXIT_CONFIG))}


def tables(text):
    """The tables of a page, each as rows of cells, the header first."""
    found = [[]]
    for line in text.splitlines():
        if line.startswith("|"):
            cells = [cell.strip() for cell in line.strip().strip("|").split(" | ")]
            if not set("".join(cells)) <= set("-|"):
                found[-1].append(cells)
        elif found[-1]:
            found.append([])
    return [table for table in found if table]


TABLES = tables((TESTS.parent / "ops" / "faults.md").read_text())
ROWS = [pytest.param(row, id=row[0]) for table in TABLES for row in table[1:]]


@pytest.fixture(scope="module")
def known_tests():
    files = TESTS.rglob("test_*.py")
    return {name for file in files for name in re.findall(r"^ *def (test_\w+)\(", file.read_text(), re.M)}


@pytest.fixture(scope="module")
def known_metrics():
    """Every sample of a fresh registry, with its labels."""
    samples = [sample for family in Metrics().registry.collect() for sample in family.samples]
    return [(sample.name.removeprefix("streamswav_"), set(sample.labels.items())) for sample in samples]


def test_every_table_has_the_columns():
    assert len(ROWS) >= 20
    assert [table[0] for table in TABLES] == [COLUMNS] * len(TABLES)


@pytest.mark.parametrize("row", ROWS)
def test_each_fault_has_a_test_a_metric_and_an_exit_code(row, known_tests, known_metrics):
    assert len(row) == len(COLUMNS), row
    named = re.findall(r"`(\w+)`", row[5])
    assert named
    assert not set(named) - known_tests
    assert row[4] in CODES
    for name, labels in re.findall(r"`(\w+)(?:\{(.*?)\})?`", row[2]):
        wanted = set(re.findall(r'(\w+)="(\w+)"', labels))
        assert any(name == known and wanted <= having for known, having in known_metrics), row[2]
    assert row[2] == "-" or "`" in row[2]
