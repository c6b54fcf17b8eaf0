"""ops/grafana: the dashboard is what its program makes, says what it shows, and asks for what there is."""

import itertools
import json
import sys
from collections import Counter
from pathlib import Path

import pytest
import yaml
from promql import metrics_of

from streamswav.telemetry.families import FAMILIES, PREFIX

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "ops" / "grafana"
FILES = sorted((FOLDER / "dashboards").glob("*.json"))
WHOLE = json.loads((FOLDER / "dashboards" / "streamswav.json").read_text())
PANELS = [panel for panel in WHOLE["panels"] if panel["type"] != "row"]
EXPORTERS = yaml.safe_load((FOLDER / "exporters.yaml").read_text())
FOREIGN = set(itertools.chain.from_iterable(EXPORTERS.values()))
RULES = yaml.safe_load((ROOT / "ops" / "prometheus" / "rules.yaml").read_text())["groups"]
ROWS = ["Run", "Throughput and goodput", "Stream", "Representation health", "Reliability", "GPU", "Rank skew"]
ROWS += ["Host and cluster"]
SOURCE = {"type": "prometheus", "uid": "${datasource}"}


def families():
    """Names of the series that a run exports."""
    endings = {"histogram": ("_bucket", "_sum", "_count")}
    return {
        f"{PREFIX}{family.name}{ending}"
        for family in FAMILIES.values()
        for ending in endings.get(family.kind, ("",))
    }


def records():
    return {rule["record"] for group in RULES for rule in group["rules"] if "record" in rule}


def queries():
    """Every expression of the dashboard, annotations included, with where it is."""
    for panel in PANELS:
        for target in panel["targets"]:
            yield f"{panel['title']} {target['refId']}", target["expr"]
    for annotation in WHOLE["annotations"]["list"]:
        yield annotation["name"], annotation["expr"]


def test_the_file_is_what_the_program_makes():
    sys.path.insert(0, str(FOLDER))
    try:
        import make_dashboards  # noqa: PLC0415
    finally:
        sys.path.remove(str(FOLDER))
    assert [file.name for file in FILES] == ["streamswav.json"]
    assert make_dashboards.TARGET.read_text() == make_dashboards.made(), (
        "run python ops/grafana/make_dashboards.py"
    )


def test_it_has_the_rows_and_variables_that_operations_need():
    assert [panel["title"] for panel in WHOLE["panels"] if panel["type"] == "row"] == ROWS
    assert [variable["name"] for variable in WHOLE["templating"]["list"]] == [
        "datasource",
        "namespace",
        "run",
    ]
    assert [each["name"] for each in WHOLE["annotations"]["list"]] == ["Starts", "Verdicts", "Alerts"]
    assert any("runbook" in link["url"] for link in WHOLE["links"])
    assert 0 < len(WHOLE["uid"]) <= 40


def test_no_panel_hides_another():
    ids = Counter(panel["id"] for panel in WHOLE["panels"])
    assert max(ids.values()) == 1
    taken = Counter()
    for panel in WHOLE["panels"]:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        taken.update(itertools.product(range(at["x"], at["x"] + at["w"]), range(at["y"], at["y"] + at["h"])))
    assert max(taken.values()) == 1


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_each_panel_says_what_it_shows_in_which_unit_and_asks_something(panel):
    assert panel["title"]
    assert panel["description"].endswith(".")
    defaults = panel["fieldConfig"]["defaults"]
    assert defaults["unit"]
    assert defaults["thresholds"]["steps"][0]["value"] is None
    assert panel["datasource"] == SOURCE
    assert panel["targets"]
    assert max(Counter(target["refId"] for target in panel["targets"]).values()) == 1
    for target in panel["targets"]:
        assert target["expr"]
        assert target["datasource"] == SOURCE
        assert target["legendFormat"] or panel["type"] == "table"


@pytest.mark.parametrize(("place", "expression"), list(queries()))
def test_each_query_asks_for_series_that_exist(place, expression):
    asked = metrics_of(expression)
    assert asked
    assert asked <= families() | records() | FOREIGN, place


def test_each_query_of_ours_is_of_the_chosen_run():
    for place, expression in queries():
        if metrics_of(expression) & (families() | records()):
            assert 'namespace=~"$namespace",run=~"$run"' in expression, place


def test_all_that_a_run_exports_is_shown_or_behind_a_rule_that_is():
    behind = {
        rule["record"]: metrics_of(rule["expr"])
        for group in RULES
        for rule in group["rules"]
        if "record" in rule
    }
    shown = set().union(*(metrics_of(expression) for _, expression in queries()))
    while more := {name for record in shown & behind.keys() for name in behind[record]} - shown:
        shown |= more
    missing = {name for name in families() - shown if not name.endswith(("_sum", "_count", "_bucket"))}
    assert missing == set()


def test_the_foreign_series_that_are_listed_are_the_ones_in_use():
    asked = set().union(*(metrics_of(expression) for _, expression in queries()))
    assert {name for name in asked if not name.startswith("streamswav")} == FOREIGN


def test_every_series_in_a_rule_or_on_the_runbook_exists():
    page = (ROOT / "ops" / "runbook.md").read_text()
    blocks = [part.partition("```")[0] for part in page.split("```promql\n")[1:]]
    lines = [line for block in blocks for line in block.splitlines()]
    assert len(lines) > 30
    expressions = [rule["expr"] for group in RULES for rule in group["rules"]] + lines
    for expression in expressions:
        assert metrics_of(expression) <= families() | records(), expression


def test_grafana_finds_the_dashboard_where_it_is_mounted():
    provider = yaml.safe_load((FOLDER / "provisioning" / "dashboards" / "streamswav.yaml").read_text())
    (given,) = provider["providers"]
    mounted = Path(given["options"]["path"]).relative_to("/etc/streamswav/grafana")
    assert (FOLDER / mounted) == FILES[0].parent
    source = yaml.safe_load((FOLDER / "provisioning" / "datasources" / "prometheus.yaml").read_text())
    assert [each["type"] for each in source["datasources"]] == ["prometheus"]
    assert provider["apiVersion"] == source["apiVersion"] == 1
