"""The dashboard's file is up to date, has no overlapping panels, and fits every installation."""

import json
from itertools import combinations
from typing import Any

import dashboard
from panels import ROWS


def panels() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(dashboard.FILE.read_text())["panels"]
    return found


def test_the_committed_dashboard_is_up_to_date() -> None:
    assert dashboard.FILE.read_text() == dashboard.build(), "run: python monitoring/dashboard.py"


def test_an_outdated_dashboard_is_reported(tmp_path: Any, monkeypatch: Any, capsys: Any) -> None:
    other = tmp_path / "dashboard.json"
    other.write_text("{}")
    monkeypatch.setattr(dashboard, "FILE", other)
    assert dashboard.main(["--check"]) == 1
    assert "python monitoring/dashboard.py" in capsys.readouterr().err
    assert dashboard.main([]) == 0
    assert dashboard.main(["--check"]) == 0


def test_data_source_and_pool_are_variables() -> None:
    board = json.loads(dashboard.FILE.read_text())
    variables = {variable["name"]: variable for variable in board["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    assert variables["datasource"]["query"] == "prometheus"
    assert variables["pool"]["query"] == "label_values(agent_active_sessions, kind)"
    for panel in panels():
        for target in panel.get("targets", ()):
            assert target["datasource"]["uid"] == "${datasource}"
    (annotation,) = board["annotations"]["list"]
    assert "hypercore_autoscaler_decisions_total" in annotation["expr"]


def test_all_panels_exist_and_none_overlap() -> None:
    shown = [panel for panel in panels() if panel["type"] != "row"]
    assert [panel["title"] for panel in shown] == [panel.title for row in ROWS for panel in row.panels]
    assert len({panel["id"] for panel in panels()}) == len(panels())
    for one, other in combinations((panel["gridPos"] for panel in panels()), 2):
        apart = (
            one["x"] + one["w"] <= other["x"]
            or other["x"] + other["w"] <= one["x"]
            or one["y"] + one["h"] <= other["y"]
            or other["y"] + other["h"] <= one["y"]
        )
        assert apart, (one, other)
        assert one["x"] + one["w"] <= 24
