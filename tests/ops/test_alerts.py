"""ops/prometheus and the runbook: what is made is up to date; each alert fires, is quiet, is explained."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from prometheus import program

from streamswav.cli import main

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "ops" / "prometheus"
PAGE = (ROOT / "ops" / "runbook.md").read_text()
GROUPS = yaml.safe_load((FOLDER / "rules.yaml").read_text())["groups"]
ALERTS = [rule for group in GROUPS for rule in group["rules"] if "alert" in rule]
NAMES = [rule["alert"] for rule in ALERTS]
TESTS = sorted((FOLDER / "tests").glob("*.yaml"))
PAGES = {"Stalled", "NonFiniteLoss", "PrototypeCollapse", "CheckpointTooOld", "RestartLoopNoProgress"}
TICKETS = {"StartupStuck", "DataStarvation", "ShardErrorRatioHigh", "S3Throttled", "OutOfMemory"}
TICKETS |= {"RankStraggler", "StreamExhaustionSoon", "ThroughputRegression", "Verdict"}
PARTS = ["Meaning.", "First look.", "Likely causes.", "Fix."]


def promtool(*arguments):
    return subprocess.run([program("promtool"), *arguments], check=False, capture_output=True, text=True)


@pytest.fixture(scope="module")
def made():
    sys.path.insert(0, str(FOLDER))
    try:
        import make_rules  # noqa: PLC0415
    finally:
        sys.path.remove(str(FOLDER))
    return make_rules


def expectations(name):
    """What the tests ask of an alert: a pair (is it firing, test) for each question."""
    for path in TESTS:
        for test in yaml.safe_load(path.read_text())["tests"]:
            for asked in test["promql_expr_test"]:
                if f'alertname="{name}"' in asked["expr"]:
                    yield bool(asked.get("exp_samples")), test


def test_what_is_made_is_what_template_and_thresholds_make(made):
    for path, text in made.made().items():
        assert path.read_text() == text, f"{path.name}: run python ops/prometheus/make_rules.py"


def test_the_custom_resource_holds_the_same_rules():
    resource = yaml.safe_load((FOLDER / "prometheusrule.yaml").read_text())
    assert resource["kind"] == "PrometheusRule"
    assert resource["apiVersion"] == "monitoring.coreos.com/v1"
    assert resource["spec"] == {"groups": GROUPS}


def test_every_threshold_is_used_and_what_the_template_names_exists(made):
    template = (FOLDER / "rules.in.yaml").read_text()
    named = {name for name, _ in re.findall(r"<(\w+)( told)?>", template)} - {"who", "runbook"}
    assert named == set(made.thresholds())
    with pytest.raises(KeyError):
        made.render("<nothing_of_the_kind>", made.thresholds(), runbook="")


def test_the_rules_are_sound():
    done = promtool("check", "rules", str(FOLDER / "rules.yaml"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "duplicate" not in done.stdout
    done = promtool("check", "config", str(FOLDER / "prometheus.yaml"))
    assert done.returncode == 0, done.stdout + done.stderr


def test_each_alert_is_a_page_or_a_ticket_as_it_deserves():
    severities = {rule["alert"].removeprefix("Streamswav"): rule["labels"]["severity"] for rule in ALERTS}
    assert severities == dict.fromkeys(PAGES, "page") | dict.fromkeys(TICKETS, "ticket")
    assert len(NAMES) == len(set(NAMES))


@pytest.mark.parametrize("name", NAMES)
def test_each_alert_is_seen_to_fire_and_to_be_quiet(name):
    asked = list(expectations(name))
    assert any(fires for fires, _ in asked)
    assert any(not fires for fires, _ in asked)


def test_the_rules_do_what_their_tests_say():
    done = promtool("test", "rules", *map(str, TESTS))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("SUCCESS") == len(TESTS) > 0


def test_what_an_alert_says_can_be_read(tmp_path):
    """Its templates are filled in when it fires: promtool shows what it got where nothing is expected."""
    for number, path in enumerate(TESTS):
        whole = yaml.safe_load(path.read_text())
        for test in whole["tests"]:
            fired = [asked for asked in test.pop("promql_expr_test") if asked.get("exp_samples")]
            names = [re.search(r'alertname="(\w+)"', asked["expr"])[1] for asked in fired]
            test["alert_rule_test"] = [
                {"eval_time": asked["eval_time"], "alertname": name}
                for asked, name in zip(fired, names, strict=True)
            ]
        whole["rule_files"] = [str(FOLDER / "rules.yaml")]
        (tmp_path / f"{number}.yaml").write_text(yaml.safe_dump(whole))
    said = promtool("test", "rules", *map(str, tmp_path.glob("*.yaml"))).stderr
    summaries = re.findall(r'Annotations:\{description="(.*?)", runbook_url="(.*?)", summary="(.*?)"\}', said)
    assert {url.rpartition("#")[2] for _, url, _ in summaries} == {name.lower() for name in NAMES}
    for description, _, summary in summaries:
        assert not re.search(r"error expanding|<\w+|%!|\{\{|map\[", description + summary)
        assert re.match(r"[\w ]+: .+", summary), summary


def entries():
    """The runbook's entries, as (alert, text)."""
    parts = re.split(r"^## (\w+)\n", PAGE, flags=re.MULTILINE)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def test_each_alert_has_an_entry_and_each_entry_an_alert():
    assert [name for name in entries() if name != "Thresholds"] == NAMES
    for rule in ALERTS:
        assert rule["annotations"]["runbook_url"] == f"ops/runbook.md#{rule['alert'].lower()}"


@pytest.mark.parametrize("name", NAMES)
def test_each_entry_says_what_it_means_where_to_look_why_it_comes_and_what_to_do(name):
    text = entries()[name]
    assert re.findall(r"^\*\*(.+?)\*\*", text, re.MULTILINE) == PARTS
    look = text.partition("**First look.**")[2].partition("**Likely causes.**")[0]
    assert "```" in look


def commands():
    blocks = re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)
    lines = {line.partition("  #")[0].strip() for block in blocks for line in block.splitlines()}
    return sorted(lines)


@pytest.mark.parametrize("command", commands())
def test_each_command_of_the_runbook_is_understood(command, capsys):
    words = shlex.split(command)
    if words[0] == "curl":
        assert re.fullmatch(r"http://POD:9404/(status|metrics)", words[-1])
        return
    if words[0] == "streamswav-shards":
        from shards.cli import main as run  # noqa: PLC0415
    else:
        run = main
    with pytest.raises(SystemExit) as ended:
        run([words[1], "--help"])
    assert ended.value.code == 0


def test_links_within_the_runbook_lead_somewhere():
    anchors = {name.lower() for name in entries()}
    for target in re.findall(r"\]\(([^)]+)\)", PAGE):
        path, _, anchor = target.partition("#")
        assert not anchor or anchor in anchors
        assert not path or (ROOT / "ops" / path).exists(), target
