"""What all dashboards are made of: panels of one look, the variables to choose servers by, and the annotations.

A query's `{S}` becomes the selection of servers. Quantiles are taken from summed buckets, never from quantiles or
averages: `quantiles` writes them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias, TypeVar

from grafana_foundation_sdk.builders import bargauge, common, heatmap, prometheus, stat, timeseries
from grafana_foundation_sdk.builders import dashboard as builders
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models.common import BigValueColorMode, BigValueGraphMode, StackingMode
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

SOURCE = models.DataSourceRef(type_val="prometheus", uid="${datasource}")
SERVERS = 'job=~"$job", instance=~"$instance"'
WINDOW = "$__rate_interval"
SHARE, SECONDS, BYTES, COUNT, RATE, TIME = "percentunit", "s", "bytes", "short", "cps", "dateTimeFromNow"
ROW = 24  # columns

Queries: TypeAlias = Mapping[str, str]  # by legend, in which {{label}} stands for a label's value
Panel: TypeAlias = Builder[models.Panel]
Rows: TypeAlias = Mapping[str, Sequence[Panel]]
P = TypeVar("P", timeseries.Panel, stat.Panel, heatmap.Panel, bargauge.Panel)


def lines(
    title: str, unit: str, text: str, queries: Queries, *, width: int = 8, stack: bool = False
) -> timeseries.Panel:
    """Over time."""
    panel = timeseries.Panel().fill_opacity(10).line_width(1)
    if unit == SHARE:
        panel.min(0)
    if stack:
        panel.fill_opacity(40).stacking(common.StackingConfig().mode(StackingMode.NORMAL))
    return _common(panel, title, unit, text, queries, width, height=8)


def number(
    title: str, unit: str, text: str, queries: Queries, *, good: tuple[float, float] | None = None, width: int = 4
) -> stat.Panel:
    """The last value, in green, yellow or red if `good` has the limits between them, the first the better one."""
    panel = stat.Panel().graph_mode(BigValueGraphMode.NONE).color_mode(BigValueColorMode.VALUE)
    panel.thresholds(_steps(good)).reduce_options(_last())
    return _common(panel, title, unit, text, queries, width, height=4)


def bars(title: str, unit: str, text: str, queries: Queries, *, width: int = 8, height: int = 8) -> bargauge.Panel:
    """The last value of each series, side by side."""
    panel = bargauge.Panel().thresholds(_steps(None)).reduce_options(_last())
    return _common(panel, title, unit, text, queries, width, height)


def heat(title: str, unit: str, text: str, metric: str, *, width: int = 8) -> heatmap.Panel:
    """How a histogram's values are spread, over time."""
    query = f"sum by (le) (increase({metric}_bucket{{{SERVERS}}}[{WINDOW}]))"
    panel = heatmap.Panel().calculate(False).y_axis(heatmap.YAxisConfig().unit(unit))
    return _common(panel, title, unit, text, {"{{le}}": query}, width, height=8, kind=PromQueryFormat.HEATMAP)


def quantiles(metric: str, by: str = "") -> dict[str, str]:
    """The median and the 99th percentile of a histogram, of all servers together or for each value of a label."""
    labels, legend = (f"le, {by}", f"{{{{{by}}}}} ") if by else ("le", "")
    buckets = f"sum by ({labels}) (rate({metric}_bucket{{S}}[{WINDOW}]))"
    return {f"{legend}p{100 * q:g}": f"histogram_quantile({q:g}, {buckets})" for q in (0.5, 0.99)}


def rate(metric: str, labels: str = "") -> str:
    """A counter's rise per second; `labels` are more conditions."""
    chosen = f"{{{SERVERS}, {labels}}}" if labels else "{S}"
    return f"rate({metric}{chosen}[{WINDOW}])"


def board(title: str, uid: str, text: str, rows: Rows) -> builders.Dashboard:
    """A dashboard of these rows."""
    made = (
        builders.Dashboard(title)
        .uid(uid)
        .description(text)
        .tags(["pawl"])
        .editable()
        .time("now-6h", "now")
        .refresh("30s")
        .tooltip(models.DashboardCursorSync.CROSSHAIR)
        .link(builders.DashboardLink("Pawl").type(models.DashboardLinkType.DASHBOARDS).tags(["pawl"]).keep_time(True))
        .with_variable(builders.DatasourceVariable("datasource").type("prometheus").label("data source"))
        .with_variable(_variable("job", "label_values(pawl_info, job)"))
        .with_variable(_variable("instance", 'label_values(pawl_info{job=~"$job"}, instance)'))
        .annotation(_annotation("versions", "rgb(87, 148, 242)", _VERSIONS))
        .annotation(_annotation("decisions", "rgb(255, 152, 48)", _DECISIONS))
    )
    for name, panels in rows.items():
        made.with_row(builders.Row(name))
        for panel in panels:
            made.with_panel(panel)
    return made


# A version began to answer; somebody, or the gate, moved a version.
_SHARES = f"sum by (version, role) (pawl_version_share{{{SERVERS}}}%s) > 0"
_VERSIONS = f"({_SHARES % ''}) unless ({_SHARES % ' offset 1m'})"
_DECISIONS = f"max by (action) (changes(pawl_last_decision_seconds{{{SERVERS}}}[1m])) > 0"
TITLES = {"versions": "{{version}} is {{role}}", "decisions": "{{action}}"}  # which the SDK has no words for


def _annotation(name: str, colour: str, query: str) -> builders.AnnotationQuery:
    return builders.AnnotationQuery().name(name).datasource(SOURCE).enable(True).icon_color(colour).expr(query)


def _variable(name: str, query: str) -> builders.QueryVariable:
    made = builders.QueryVariable(name).datasource(SOURCE).query(query).label(name)
    return made.refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED).multi(True).include_all(True).all_value(".*")


def _last() -> common.ReduceDataOptions:
    return common.ReduceDataOptions().calcs(["lastNotNull"])


def _steps(good: tuple[float, float] | None) -> builders.ThresholdsConfig:
    steps = [models.Threshold(color="green")]
    if good is not None:
        first, second = good
        falling = first > second
        colours = ("red", "yellow", "green") if falling else ("green", "yellow", "red")
        edges = (None, *sorted(good))
        steps = [models.Threshold(value=edge, color=colour) for edge, colour in zip(edges, colours, strict=True)]
    return builders.ThresholdsConfig().mode(models.ThresholdsMode.ABSOLUTE).steps(steps)


def _common(
    panel: P,
    title: str,
    unit: str,
    text: str,
    queries: Queries,
    width: int,
    height: int,
    kind: PromQueryFormat = PromQueryFormat.TIME_SERIES,
) -> P:
    panel.title(title).description(text).unit(unit).datasource(SOURCE).span(width).height(height)
    for place, (legend, query) in enumerate(queries.items()):
        written = query.replace("{S}", f"{{{SERVERS}}}")
        target = prometheus.Dataquery().expr(written).legend_format(legend).ref_id(chr(ord("A") + place)).format(kind)
        target.exemplar(kind is PromQueryFormat.HEATMAP)  # which requests they were, as dots among the buckets
        panel.with_target(target.datasource(SOURCE))
    return panel
