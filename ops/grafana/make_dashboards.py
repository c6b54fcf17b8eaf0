"""Writes the dashboard that Grafana is provisioned with.

    python ops/grafana/make_dashboards.py [--runbook https://HOST/PATH/runbook.md]

Rows and panels are in the modules beside this one; lines at which alerts begin come from
`ops/prometheus/thresholds.yaml`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import learning_rows
import machine_rows
import run_rows
from grafana_foundation_sdk.builders import dashboard as build
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import dashboard
from panels import RUN, SOURCE

TARGET = Path(__file__).parent / "dashboards" / "streamswav.json"
ROWS = {
    "Run": run_rows.header,
    "Throughput and goodput": run_rows.throughput,
    "Stream": run_rows.stream,
    "Representation health": learning_rows.health,
    "Reliability": learning_rows.reliability,
    "GPU": machine_rows.gpu,
    "Rank skew": machine_rows.ranks,
    "Host and cluster": machine_rows.cluster,
}
ANNOTATIONS = {
    "Starts": ("blue", f"changes(streamswav:process_start_timestamp_seconds{{{RUN}}}[2m]) > 0", "started"),
    "Verdicts": (
        "purple",
        f"changes(streamswav_verdict{{{RUN}}}[2m]) > 0 and streamswav_verdict == 1",
        "verdict: {{verdict}}",
    ),
    "Alerts": (
        "red",
        f'ALERTS{{alertname=~"Streamswav.*",alertstate="firing",{RUN}}}',
        "{{alertname}}",
    ),
}


def made(runbook: str = "ops/runbook.md") -> str:
    """The dashboard as JSON."""
    builder = (
        build.Dashboard("streamswav: a run")
        .uid("streamswav-run")
        .description("Where a run is, how fast, what it reads, what it learns, and what is wrong with it.")
        .tags(["streamswav"])
        .timezone("browser")
        .time("now-6h", "now")
        .refresh("30s")
        .tooltip(dashboard.DashboardCursorSync.CROSSHAIR)
        .readonly()
        .variables(_variables())
        .annotations([_annotation(name) for name in ANNOTATIONS])
        .link(
            build.DashboardLink("Runbook")
            .type(dashboard.DashboardLinkType.LINK)
            .url(runbook)
            .icon("doc")
            .tooltip("What each alert means and what to do")
            .target_blank(True)
        )
    )
    number = 0
    for title, panels in ROWS.items():
        number += 1
        builder.with_row(build.Row(title).id(number))
        for panel in panels():
            number += 1
            builder.with_panel(panel.id(number))
    whole = json.loads(json.dumps(builder.build(), cls=JSONEncoder))
    _complete(whole, runbook)
    return json.dumps(whole, indent=1) + "\n"


def _variables() -> list[Any]:
    everything = dashboard.VariableOption(selected=True, text="All", value="$__all")

    def of_label(name: str, label: str, query: str) -> build.QueryVariable:
        return (
            build.QueryVariable(name)
            .label(label)
            .datasource(SOURCE)
            .query(query)
            .refresh(dashboard.VariableRefresh.ON_TIME_RANGE_CHANGED)
            .sort(dashboard.VariableSort.ALPHABETICAL_ASC)
            .include_all(True)
            .all_value(".*")
            .current(everything)
        )

    return [
        build.DatasourceVariable("datasource").label("Data source").type("prometheus"),
        of_label("namespace", "Namespace", "label_values(streamswav_run_state, namespace)"),
        of_label("run", "Run", 'label_values(streamswav_run_state{namespace=~"$namespace"}, run)'),
    ]


def _annotation(name: str) -> build.AnnotationQuery:
    colour, expression, _ = ANNOTATIONS[name]
    return (
        build.AnnotationQuery().name(name).datasource(SOURCE).icon_color(colour).expr(expression).enable(True)
    )


def _complete(whole: dict[str, Any], runbook: str) -> None:
    """Add what the SDK's builders have no word for."""
    for annotation in whole["annotations"]["list"]:
        annotation |= {"titleFormat": ANNOTATIONS[annotation["name"]][2], "step": "60s"}
    for panel in whole["panels"]:
        if panel["title"] == "Alerts" and panel["type"] == "table":
            link = {"title": "Runbook", "url": f"{runbook}#${{__value.text}}", "targetBlank": True}
            panel["fieldConfig"]["overrides"].append(
                {
                    "matcher": {"id": "byName", "options": "alertname"},
                    "properties": [{"id": "links", "value": [link]}],
                }
            )


def main() -> None:
    """Write what is made."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--runbook", default="ops/runbook.md", help="where those on call can read it")
    TARGET.write_text(made(parser.parse_args().runbook))


if __name__ == "__main__":
    main()
