"""What dashboards are made of, with the looks that all of them share."""

from string import ascii_uppercase

from grafana_foundation_sdk.builders import common as options
from grafana_foundation_sdk.builders import dashboard as grafana
from grafana_foundation_sdk.builders import prometheus, stat, timeseries
from grafana_foundation_sdk.models import common, dashboard
from grafana_foundation_sdk.models.prometheus import QueryEditorMode

SOURCE = common.DataSourceRef(type_val="prometheus", uid="${datasource}")

WIDTH = 24
Panel = stat.Panel | timeseries.Panel
Queries = dict[str, str]
"""PromQL by the legend of its series."""


def number(
    title: str,
    about: str,
    unit: str,
    query: str,
    colours: grafana.ThresholdsConfig | None = None,
) -> stat.Panel:
    """The latest value, large."""
    return (
        stat.Panel()
        .title(title)
        .description(about)
        .unit(unit)
        .datasource(SOURCE)
        .with_target(_target(title, query, "A"))
        .thresholds(colours or _colours("green"))
        .reduce_options(options.ReduceDataOptions().calcs(["lastNotNull"]))
        .height(4)
    )


def graph(
    title: str,
    about: str,
    unit: str,
    queries: Queries,
    colours: grafana.ThresholdsConfig | None = None,
) -> timeseries.Panel:
    """Lines over time, dashed ones where the colours change."""
    panel = (
        timeseries.Panel()
        .title(title)
        .description(about)
        .unit(unit)
        .min(0)
        .datasource(SOURCE)
        .targets(
            [
                _target(*query, ref)
                for ref, query in zip(ascii_uppercase, queries.items(), strict=False)
            ]
        )
        .fill_opacity(10)
        .show_points(common.VisibilityMode.NEVER)
        .legend(_legend())
        .tooltip(
            options.VizTooltipOptions()
            .mode(common.TooltipDisplayMode.MULTI)
            .sort(common.SortOrder.DESCENDING)
        )
        .height(8)
    )
    if colours:
        style = options.GraphThresholdsStyleConfig().mode(common.GraphThresholdsStyleMode.DASHED)
        panel.thresholds(colours).thresholds_style(style)
    return panel


def bad_from(warning: float, bad: float | None = None) -> grafana.ThresholdsConfig:
    """Green, orange from the first value on, red from the second one on."""
    red = [] if bad is None else [(bad, "red")]
    return _colours("green", (warning, "orange"), *red)


def good_from(value: float) -> grafana.ThresholdsConfig:
    """Red below the value, green from it on."""
    return _colours("red", (value, "green"))


def _colours(lowest: str, *others: tuple[float, str]) -> grafana.ThresholdsConfig:
    steps = [dashboard.Threshold(None, lowest), *(dashboard.Threshold(*other) for other in others)]
    return grafana.ThresholdsConfig().mode(dashboard.ThresholdsMode.ABSOLUTE).steps(steps)


def _target(legend: str, query: str, ref_id: str) -> prometheus.Dataquery:
    return (
        prometheus.Dataquery()
        .datasource(SOURCE)
        .expr(query)
        .legend_format(legend)
        .ref_id(ref_id)
        .editor_mode(QueryEditorMode.CODE)
        .range()
    )


def _legend() -> options.VizLegendOptions:
    return (
        options.VizLegendOptions()
        .display_mode(common.LegendDisplayMode.TABLE)
        .placement(common.LegendPlacement.BOTTOM)
        .show_legend(True)
        .calcs(["lastNotNull", "max"])
    )


def board(uid: str, title: str, about: str, rows: dict[str, list[Panel]]) -> dashboard.Dashboard:
    """A dashboard of rows, whose panels share the width; the row '' has no heading."""
    builder = (
        grafana.Dashboard(title)
        .uid(uid)
        .description(about)
        .tags(["sluice"])
        .time("now-1h", "now")
        .refresh("30s")
        .tooltip(dashboard.DashboardCursorSync.CROSSHAIR)
        .with_variable(_datasource())
        .with_variable(_model())
        .link(_links())
    )
    for name, panels in rows.items():
        if name:
            builder.with_row(grafana.Row(name))
        for panel in panels:
            builder.with_panel(panel.span(WIDTH // len(panels)))
    made = builder.build()
    for panel_id, each in enumerate(made.panels or [], start=1):
        each.id_val = panel_id
    for link in made.links or []:
        # The SDK would hide them in a menu.
        link.placement = None  # type: ignore[assignment]
    return made


def _datasource() -> grafana.DatasourceVariable:
    return grafana.DatasourceVariable("datasource").label("Prometheus").type("prometheus")


def _model() -> grafana.QueryVariable:
    return (
        grafana.QueryVariable("model")
        .label("Model")
        .datasource(SOURCE)
        .query("label_values(sluice_queue_depth, model)")
        .refresh(dashboard.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(dashboard.VariableSort.ALPHABETICAL_ASC)
        .multi(True)
        .include_all(True)
        .all_value(".*")
        .current(dashboard.VariableOption(selected=True, text=["All"], value=["$__all"]))
    )


def _links() -> grafana.DashboardLink:
    return (
        grafana.DashboardLink("Sluice")
        .type(dashboard.DashboardLinkType.DASHBOARDS)
        .tags(["sluice"])
        .include_vars(True)
        .keep_time(True)
    )
