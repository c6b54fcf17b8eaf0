"""Each row of ops/faults.md names tests, metrics and exit codes that exist; no reason is left out."""

import re
from pathlib import Path

import pytest
from tables import tables

from streamswav.errors import EXIT_CONFIG, EXIT_DONE, EXIT_FAILED, EXIT_RETRY
from streamswav.stream.outcomes import LOST_REASONS
from streamswav.telemetry.metrics import Metrics

TESTS = Path(__file__).parents[1]
COLUMNS = ["fault", "what happens", "metric", "log line or error", "exit", "test"]
CODES = {"-", *map(str, (EXIT_DONE, EXIT_FAILED, EXIT_RETRY, EXIT_CONFIG))}
NAMED = r"`(\w+)(?:\[([^\]]+)\])?`"  # a test, and perhaps the id of its parameters
RAISED = r'\b(?:DamageError|DecodeError|Damage|pass_over)\(\s*"(\w+)"(?: if .+ else "(\w+)")?'


PAGE = (TESTS.parent / "ops" / "faults.md").read_text()
TABLES = tables(PAGE)
ROWS = [pytest.param(row, id=row[0]) for table in TABLES for row in table[1:]]


def reasons():
    """Every reason for which the product passes bytes over."""
    sources = (file.read_text() for file in (TESTS.parent / "streamswav").rglob("*.py"))
    found = {name for source in sources for names in re.findall(RAISED, source) for name in names if name}
    return sorted(found | {*LOST_REASONS})


@pytest.fixture(scope="module")
def known_tests():
    """Names of tests, each with the text of its file."""
    texts = [file.read_text() for file in TESTS.rglob("test_*.py")]
    return {name: text for text in texts for name in re.findall(r"^ *def (test_\w+)\(", text, re.M)}


@pytest.fixture(scope="module")
def known_metrics():
    """Every sample of a registry, with its labels."""
    metrics = Metrics()
    for reason in reasons():
        metrics.add("quarantined_bytes_total", 0, reason)
    samples = [sample for family in metrics.registry.collect() for sample in family.samples]
    return [(sample.name.removeprefix("streamswav_"), set(sample.labels.items())) for sample in samples]


def test_every_table_has_the_columns():
    assert len(ROWS) >= 20
    assert [table[0] for table in TABLES] == [COLUMNS] * len(TABLES)


@pytest.mark.parametrize("row", ROWS)
def test_each_fault_has_a_test_a_metric_and_an_exit_code(row, known_tests, known_metrics):
    assert len(row) == len(COLUMNS), row
    named = re.findall(NAMED, row[5])
    assert named
    for name, parameters in named:
        assert name in known_tests
        assert not parameters or f'"{parameters}"' in known_tests[name]
    assert set(row[4].split(" or ")) <= CODES
    for name, labels in re.findall(r"`(\w+)(?:\{(.*?)\})?`", row[2]):
        wanted = set(re.findall(r'(\w+)="(\w+)"', labels))
        assert any(name == known and wanted <= having for known, having in known_metrics), row[2]
    assert row[2] == "-" or "`" in row[2]


@pytest.mark.parametrize("reason", reasons())
def test_each_reason_is_on_the_page_and_in_a_test(reason, known_tests):
    assert f"`{reason}`" in PAGE
    of_data = known_tests["test_garbage_in_place_of_a_shard_is_one_damage"]
    assert f'"{reason}"' in of_data
