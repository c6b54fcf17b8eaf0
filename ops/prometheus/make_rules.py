"""Writes rules, PrometheusRule and the runbook's table from `rules.in.yaml` and `thresholds.yaml`.

    python ops/prometheus/make_rules.py [--runbook https://HOST/PATH/runbook.md]

In the template `<name>` is a threshold as PromQL reads it, `<name told>` as people do, `<who>` names the run
of an alert, and `<runbook>` is the alert's entry in the runbook, below the address that is given here.
"""

from __future__ import annotations

import argparse
import re
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).parent
RUNBOOK = FOLDER.parent / "runbook.md"
WHO = r"""{{ or $labels.run \"the run\" }}"""
MADE = "# Made by ops/prometheus/make_rules.py from rules.in.yaml and thresholds.yaml: change those.\n"
RESOURCE = """\
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: streamswav
  labels:
    app.kubernetes.io/name: streamswav
spec:
"""
TABLE = re.compile(r"(?<=<!-- thresholds -->\n).*?(?=<!-- end -->)", re.DOTALL)


def thresholds() -> dict[str, dict[str, Any]]:
    """Every threshold by its name: `value`, and what it is `about`."""
    loaded: dict[str, dict[str, Any]] = yaml.safe_load((FOLDER / "thresholds.yaml").read_text())
    return loaded


def told(name: str, value: float | str) -> str:
    """A threshold as people read it."""
    if name.endswith("_seconds") and not isinstance(value, str):
        return f"{value / 3600:g} h" if value >= 3600 else f"{value / 60:g} min"
    shares = ("_ratio", "_share")
    return f"{value:.0%}" if name.endswith(shares) and not isinstance(value, str) else str(value)


def render(template: str, known: Mapping[str, Mapping[str, Any]], *, runbook: str) -> str:
    """Fill the template's places in.

    Raises:
        KeyError: there is no threshold of that name.
    """

    def fill(found: re.Match[str]) -> str:
        name, as_told = found[1], found[2]
        value = known[name]["value"]
        return told(name, value) if as_told else str(value)

    text = template.replace("<who>", WHO)
    text = re.sub(
        r"(alert: (\w+)\n(?:(?!- alert:).*\n)*?.*)<runbook>",
        lambda found: f"{found[1]}{runbook}#{found[2].lower()}",
        text,
    )
    return re.sub(r"<(\w+)( told)?>", fill, text)


def table(known: Mapping[str, Mapping[str, Any]]) -> str:
    """The thresholds as a table for the runbook."""
    rows = [f"| `{name}` | {told(name, each['value'])} | {each['about']} |" for name, each in known.items()]
    return "\n".join(["| threshold | value | what it is |", "|---|---|---|", *rows, ""])


def made(runbook: str = "ops/runbook.md") -> dict[Path, str]:
    """Every file that is made, with its text."""
    known = thresholds()
    rules = render((FOLDER / "rules.in.yaml").read_text(), known, runbook=runbook)
    page = TABLE.sub(lambda _: table(known), RUNBOOK.read_text())
    return {
        FOLDER / "rules.yaml": MADE + rules,
        FOLDER / "prometheusrule.yaml": MADE + RESOURCE + textwrap.indent(rules, "  "),
        RUNBOOK: page,
    }


def main() -> None:
    """Write what is made."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--runbook", default="ops/runbook.md", help="where those on call can read it")
    for path, text in made(parser.parse_args().runbook).items():
        path.write_text(text)


if __name__ == "__main__":
    main()
