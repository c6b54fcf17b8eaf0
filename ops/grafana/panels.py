"""Panels as this dashboard has them: few kinds, each with a description, a unit and thresholds."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import yaml
from grafana_foundation_sdk.builders import common as build
from grafana_foundation_sdk.builders import stat, statetimeline, table, timeseries
from grafana_foundation_sdk.builders.dashboard import ThresholdsConfig
from grafana_foundation_sdk.builders.prometheus import Dataquery
from grafana_foundation_sdk.models import common, dashboard
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

THRESHOLDS = Path(__file__).parents[1] / "prometheus" / "thresholds.yaml"
SOURCE = dashboard.DataSourceRef("prometheus", "${datasource}")
RUN = 'namespace=~"$namespace",run=~"$run"'
PODS = 'namespace=~"$namespace",pod=~"$run.*"'
LIMITS = {name: each["value"] for name, each in yaml.safe_load(THRESHOLDS.read_text()).items()}
"""The figures at which alerts begin."""

Panels = stat.Panel | statetimeline.Panel | table.Panel | timeseries.Panel
Panel = TypeVar("Panel", stat.Panel, statetimeline.Panel, table.Panel, timeseries.Panel)


class Query(NamedTuple):
    """An expression and how its series are called; `<run>` and `<pods>` in it select what is shown."""

    expression: str
    legend: str

    def build(self, ref: str, *, instant: bool = False) -> Dataquery:
        """Return it as Grafana has it."""
        query = Dataquery().expr(self.full).legend_format(self.legend).ref_id(ref).datasource(SOURCE)
        return query.instant() if instant else query.range()

    @property
    def full(self) -> str:
        """The expression with its selectors."""
        return self.expression.replace("<run>", RUN).replace("<pods>", PODS)


class Limit(NamedTuple):
    """Where a panel turns red: above the value, or below it."""

    value: float
    below: bool = False

    def steps(self) -> list[dashboard.Threshold]:
        """Return the colours and where they begin."""
        colours = ("red", "green") if self.below else ("green", "red")
        return [dashboard.Threshold(None, colours[0]), dashboard.Threshold(self.value, colours[1])]


def graph(
    title: str,
    unit: str,
    text: str,
    *queries: Query,
    limit: Limit | None = None,
    stacked: bool = False,
    dashed: str = "",
    least: float | None = 0,
    most: float | None = None,
) -> timeseries.Panel:
    """Curves over time; `limit` is a line, and so are the series whose names match `dashed`."""
    panel = _common(timeseries.Panel(), title, unit, text, *queries, limit=limit)
    mode = common.GraphThresholdsStyleMode.DASHED if limit else common.GraphThresholdsStyleMode.OFF
    panel.thresholds_style(build.GraphThresholdsStyleConfig().mode(mode))
    panel.line_width(1).fill_opacity(60 if stacked else 5).show_points(common.VisibilityMode.NEVER)
    legend = build.VizLegendOptions().display_mode(common.LegendDisplayMode.LIST).show_legend(True)
    panel.legend(legend.placement(common.LegendPlacement.BOTTOM))
    panel.tooltip(build.VizTooltipOptions().mode(common.TooltipDisplayMode.MULTI))
    if stacked:
        panel.stacking(build.StackingConfig().mode(common.StackingMode.NORMAL))
    if dashed:
        panel.override_by_regexp(dashed, _dashes())
    if least is not None:
        panel.min(least)
    if most is not None:
        panel.max(most)
    return panel.height(8).span(8)


def number(
    title: str, unit: str, text: str, query: Query, *, limit: Limit | None = None, named: bool = False
) -> stat.Panel:
    """One figure as it is now; `named`: the name of the series instead."""
    panel = _common(stat.Panel(), title, unit, text, query, limit=limit, instant=True)
    mode = common.BigValueTextMode.NAME if named else common.BigValueTextMode.VALUE
    panel.text_mode(mode).graph_mode(common.BigValueGraphMode.NONE)
    panel.reduce_options(build.ReduceDataOptions().calcs(["lastNotNull"]))
    panel.color_mode(common.BigValueColorMode.VALUE if limit else common.BigValueColorMode.NONE)
    return panel.height(4).span(3)


def timeline(title: str, text: str, query: Query) -> statetimeline.Panel:
    """Which of several things held when: a lane for each, filled while its series is there."""
    panel = _common(statetimeline.Panel(), title, "none", text, query)
    panel.show_value(common.VisibilityMode.NEVER).merge_values(True)
    panel.legend(build.VizLegendOptions().show_legend(False).display_mode(common.LegendDisplayMode.HIDDEN))
    return panel.height(8).span(8)


def listing(title: str, text: str, query: Query, *hidden: str) -> table.Panel:
    """A table of series by their labels, without the `hidden` ones."""
    panel = _common(table.Panel(), title, "none", text)
    asked = query.build("A", instant=True).format(PromQueryFormat.TABLE)
    panel.with_target(asked)
    excluded = {"excludeByName": dict.fromkeys(("Time", "Value", "__name__", *hidden), True)}
    panel.with_transformation(dashboard.DataTransformerConfig("organize", options=excluded))
    return panel.no_value("none").height(8).span(8)


def _common(
    panel: Panel,
    title: str,
    unit: str,
    text: str,
    *queries: Query,
    limit: Limit | None = None,
    instant: bool = False,
) -> Panel:
    panel.title(title).description(text).unit(unit).datasource(SOURCE)
    steps = limit.steps() if limit else [dashboard.Threshold(None, "green")]
    panel.thresholds(ThresholdsConfig().mode(dashboard.ThresholdsMode.ABSOLUTE).steps(steps))
    for ref, query in zip("ABCDEFGH", queries, strict=False):
        panel.with_target(query.build(ref, instant=instant))
    return panel


def _dashes() -> list[dashboard.DynamicConfigValue]:
    values: dict[str, Any] = {
        "custom.lineStyle": {"fill": "dash", "dash": [8, 8]},
        "color": {"mode": "fixed", "fixedColor": "red"},
        "custom.fillOpacity": 0,
    }
    return [dashboard.DynamicConfigValue(name, value) for name, value in values.items()]
