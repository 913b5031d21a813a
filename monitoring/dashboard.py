"""Generates `grafana-agent-dashboard.json` from `panels.py` with the Grafana foundation SDK (for Grafana 11).

    python monitoring/dashboard.py          write the file
    python monitoring/dashboard.py --check  fail if the file is out of date

Import the file in Grafana (Dashboards, New, Import). The data source and the kind of agents (`pool`, `dedicated`) are
variables, so the file fits every installation. Edit `panels.py`, not the JSON and not the dashboard.
"""

import json
import sys
from pathlib import Path

from grafana_foundation_sdk.builders import common, dashboard, prometheus, stat, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import (
    LegendDisplayMode,
    LegendPlacement,
    StackingMode,
    TooltipDisplayMode,
)
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    DataSourceRef,
    VariableOption,
    VariableRefresh,
)

from panels import DECISIONS, ROWS, PanelSpec

FILE = Path(__file__).with_name("grafana-agent-dashboard.json")
_SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
_WIDTH = 24
_HEIGHT = 8
_MAX_PER_ROW = 4


def build() -> str:
    """Return the dashboard as JSON."""
    board = (
        dashboard.Dashboard("Hypercore Agents")
        .uid("hypercore-agents")
        .description("Agents, sessions, the model and the pool of a Hypercore Agents platform.")
        .tags(["hypercore-agents", "claude"])
        .refresh("10s")
        .time("now-1h", "now")
        .timezone("browser")
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .with_variable(dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus"))
        .with_variable(
            dashboard.QueryVariable("pool")
            .label("Pool")
            .datasource(_SOURCE)
            .query("label_values(agent_active_sessions, kind)")
            .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
            .include_all(True)
            .all_value(".*")
            .current(VariableOption(selected=True, text="All", value="$__all"))
            .multi(True)
        )
        .annotation(
            dashboard.AnnotationQuery()
            .name("Autoscaler's decisions")
            .datasource(_SOURCE)
            .enable(True)
            .icon_color("orange")
            .expr(DECISIONS)
        )
    )
    number = 0
    for row in ROWS:
        number += 1
        board = board.with_row(dashboard.Row(row.title).id(number))
        span = _WIDTH // min(len(row.panels), _MAX_PER_ROW)
        for spec in row.panels:
            number += 1
            board = board.with_panel((_stat(spec, span) if spec.stat else _series(spec, span)).id(number))
    made = json.loads(JSONEncoder().encode(board.build()))
    # The SDK's annotations lack the fields that Prometheus annotations are displayed with.
    made["annotations"]["list"][0] |= {"titleFormat": "{{action}}", "textFormat": "{{reason}}", "step": "15s"}
    return json.dumps(made, sort_keys=True, indent=2) + "\n"


def _targets(spec: PanelSpec) -> list[prometheus.Dataquery]:
    return [
        prometheus.Dataquery()
        .datasource(_SOURCE)
        .expr(query.expression)
        .legend_format(query.legend or "__auto")
        .ref_id(chr(ord("A") + number))
        for number, query in enumerate(spec.queries)
    ]


def _stat(spec: PanelSpec, span: int) -> stat.Panel:
    panel = stat.Panel().title(spec.title).description(spec.description).datasource(_SOURCE).unit(spec.unit)
    panel = panel.height(4).span(span)
    for target in _targets(spec):
        panel = panel.with_target(target.instant())
    return panel


def _series(spec: PanelSpec, span: int) -> timeseries.Panel:
    panel = (
        timeseries.Panel()
        .title(spec.title)
        .description(spec.description)
        .datasource(_SOURCE)
        .unit(spec.unit)
        .min(0)
        .height(_HEIGHT)
        .span(span)
        .fill_opacity(20 if spec.stacked else 0)
        .legend(
            common.VizLegendOptions()
            .display_mode(LegendDisplayMode.LIST)
            .placement(LegendPlacement.BOTTOM)
            .show_legend(True)
        )
        .tooltip(common.VizTooltipOptions().mode(TooltipDisplayMode.MULTI))
    )
    if spec.maximum is not None:
        panel = panel.max(spec.maximum)
    if spec.stacked:
        panel = panel.stacking(common.StackingConfig().mode(StackingMode.NORMAL))
    for target in _targets(spec):
        panel = panel.with_target(target)
    return panel


def main(arguments: list[str]) -> int:
    """Write the file, or check it. Returns the exit code."""
    made = build()
    if arguments == ["--check"]:
        if FILE.read_text() != made:
            sys.stderr.write(f"{FILE} is out of date; run: python monitoring/dashboard.py\n")
            return 1
        return 0
    FILE.write_text(made)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
