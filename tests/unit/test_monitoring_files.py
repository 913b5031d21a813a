"""The shipped monitoring files are valid, every alert is tested both ways, and every metric name exists."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry

from hypercore_agents.observability.metrics import AgentMetrics, AutoscalerMetrics, GatewayMetrics, ManagerMetrics
from support.monitoring_servers import MONITORING, ROOT, RULES

TESTS = MONITORING / "tests/agent-rules.test.yml"
GIVEN = {
    "AgentErrorRateHigh",
    "AgentLatencyHigh",
    "SpawnFailures",
    "SessionsHigh",
    "SessionsCritical",
    "AgentSuccessRateLow",
}
FURTHER = {
    "AgentDown",
    "PoolBelowMinimum",
    "AutoscalerBlind",
    "MirrorErrors",
    "BudgetNearlySpent",
    "HourlyCostHigh",
    "KeyOld",
    "DiskLow",
}


def alerts() -> list[dict[str, Any]]:
    groups = yaml.safe_load(RULES.read_text())["groups"]
    return [rule for group in groups for rule in group["rules"] if "alert" in rule]


def exposed() -> set[str]:
    """Names of all samples that the roles expose."""
    registry = CollectorRegistry()
    AgentMetrics(registry)
    ManagerMetrics(registry)
    GatewayMetrics(registry, ["claude-sonnet-5"])
    AutoscalerMetrics(registry)
    return {sample.name for family in registry.collect() for sample in family.samples}


@pytest.mark.prometheus
@pytest.mark.parametrize(
    "command",
    [
        ("promtool", "check", "rules", str(RULES)),
        ("promtool", "test", "rules", str(TESTS)),
        ("promtool", "check", "config", str(MONITORING / "prometheus.yml")),
        ("amtool", "check-config", str(MONITORING / "alertmanager.yml")),
    ],
    ids=lambda command: " ".join(command[:3])[:40],
)
def test_the_real_tools_accept_the_files(command: tuple[str, ...]) -> None:
    checked = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr


@pytest.mark.prometheus
def test_the_rule_tests_can_fail(tmp_path: Path) -> None:
    tests = tmp_path / "tests/agent-rules.test.yml"
    tests.parent.mkdir()
    tests.write_text(TESTS.read_text())
    (tmp_path / RULES.name).write_text(RULES.read_text().replace("> 5000", "> 7000"))
    checked = subprocess.run(
        ["promtool", "test", "rules", str(tests)], capture_output=True, text=True, timeout=100, check=False
    )
    assert checked.returncode != 0
    assert "SessionsHigh" in checked.stderr


def test_every_alert_is_tested_firing_and_silent() -> None:
    names = {rule["alert"] for rule in alerts()}
    assert names >= GIVEN | FURTHER
    cases = [case for test in yaml.safe_load(TESTS.read_text())["tests"] for case in test["alert_rule_test"]]
    assert {case["alertname"] for case in cases if case["exp_alerts"]} == names
    assert {case["alertname"] for case in cases if not case["exp_alerts"]} == names


@pytest.mark.parametrize("rule", alerts(), ids=lambda rule: rule["alert"])
def test_every_alert_has_a_severity_and_a_runbook(rule: dict[str, Any]) -> None:
    assert rule["labels"]["severity"] in ("info", "warning", "critical")
    runbook = (ROOT / rule["annotations"]["runbook"]).read_text()
    assert rule["alert"] in runbook.splitlines()[0]
    for heading in ("## Symptom", "## Meaning", "## Check", "## Remedy"):
        assert heading in runbook


def test_runbooks_and_rules_use_only_exposed_metrics() -> None:
    texts = {path.name: path.read_text() for path in [RULES, *(ROOT / "docs/runbooks").glob("*.md")]}
    known = exposed()
    families = {re.sub(r"_(bucket|count|sum|total|created)$", "", name) for name in known}
    no_metrics = {"agent_id", "agent_unreachable"}
    for name, text in texts.items():
        found = set(re.findall(r"(?<![\w:/])(?:agent|hypercore)_[a-z0-9_]+", text)) - no_metrics
        assert not {metric for metric in found if metric not in known and metric not in families}, name


def test_the_files_contain_no_secret() -> None:
    text = (MONITORING / "alertmanager.yml").read_text() + (MONITORING / "prometheus.yml").read_text()
    assert not re.search(r"(?m)^\s*-?\s*(api_url|routing_key|service_key|credentials|password|bearer_token):", text)
