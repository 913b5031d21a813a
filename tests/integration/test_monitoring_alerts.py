"""A firing alert end to end: real metrics, Prometheus, shipped rules, Alertmanager and receivers."""

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from fastapi import FastAPI, Request, Response
from prometheus_client import CollectorRegistry

from hypercore_agents.observability.metrics import CONTENT_TYPE, AgentMetrics, render
from support.asgi_server import serving
from support.monitoring_servers import MONITORING, alertmanager, prometheus, query, quick_prometheus
from support.waiting import until

pytestmark = pytest.mark.prometheus
SECRET = "canary-routing-key-5d1f"


class World:
    """One agent's metrics page, and the alerts that Slack, PagerDuty and an operator's webhook received."""

    def __init__(self) -> None:
        self.agent = AgentMetrics(CollectorRegistry())
        self.received: dict[str, list[Any]] = {"slack": [], "pagerduty": [], "webhook": []}
        self.app = FastAPI()

        @self.app.get("/metrics")
        async def page() -> Response:
            return Response(render(self.agent.registry), media_type=CONTENT_TYPE)

        @self.app.post("/{receiver}")
        async def receive(receiver: str, request: Request) -> Response:
            self.received[receiver].append(json.loads(await request.body()))
            return Response("ok")

        @self.app.post("/pagerduty/v2/enqueue")
        async def enqueue(request: Request) -> Response:
            self.received["pagerduty"].append(json.loads(await request.body()))
            return Response('{"status": "success"}', 202, media_type="application/json")

    def webhook(self, name: str) -> dict[str, Any] | None:
        """The newest state of an alert that the webhook received."""
        alerts = [alert for received in self.received["webhook"] for alert in received["alerts"]]
        return next((alert for alert in reversed(alerts) if alert["labels"]["alertname"] == name), None)


def empty() -> FastAPI:
    """Metrics pages of a manager and a gateway, so that neither is down."""
    app = FastAPI()
    app.add_api_route("/metrics", lambda: Response("", media_type=CONTENT_TYPE))
    return app


def configured(folder: Path, receivers: str) -> Path:
    """The shipped alertmanager.yml without delays, with the test's secret files and receiver addresses."""
    (folder / "slack-url").write_text(f"{receivers}/slack")
    (folder / "pagerduty-key").write_text(SECRET)
    text = (MONITORING / "alertmanager.yml").read_text()
    text = text.replace("/etc/alertmanager/", f"{folder}/").replace(
        "http://127.0.0.1:9094/alerts", f"{receivers}/webhook"
    )
    configuration = yaml.safe_load(text)
    configuration["route"] |= {"group_wait": "0s", "group_interval": "1s"}
    configuration["global"] = {"pagerduty_url": f"{receivers}/pagerduty/v2/enqueue", "resolve_timeout": "5s"}
    path = folder / "alertmanager.yml"
    path.write_text(yaml.safe_dump(configuration))
    return path


async def test_every_receiver_gets_an_alert_and_its_end(tmp_path: Path) -> None:
    world = World()
    world.agent.active_sessions.set(12)
    async with contextlib.AsyncExitStack() as stack:
        url = await stack.enter_async_context(serving(world.app))
        manager = await stack.enter_async_context(alertmanager(configured(tmp_path, url)))
        other = await stack.enter_async_context(serving(empty()))
        targets = {"agents": url, "manager": other, "gateway": other}
        targets = {job: address.removeprefix("http://") for job, address in targets.items()}
        base = await stack.enter_async_context(prometheus(quick_prometheus(tmp_path, targets, alertmanager=manager)))
        await until(lambda: query(base, "hypercore:agent_sessions:sum == 12"), what="the recording rule")
        assert world.webhook("SessionsHigh") is None

        world.agent.active_sessions.set(9500)
        fired = await until(lambda: world.webhook("SessionsCritical"), what="the webhook")
        assert fired["status"] == "firing"
        assert fired["labels"]["severity"] == "critical"
        assert fired["annotations"] == {
            "summary": "9500 sessions are placed on agents",
            "runbook": "docs/runbooks/sessions-high.md",
        }
        paged = (await until(lambda: world.received["pagerduty"], what="PagerDuty"))[0]
        assert paged["routing_key"] == SECRET
        assert paged["event_action"] == "trigger"
        assert "9500 sessions" in paged["payload"]["summary"]
        said = await until(
            lambda: next((alert for alert in world.received["slack"] if "SessionsCritical" in str(alert)), None),
            what="Slack",
        )
        assert "docs/runbooks/sessions-high.md" in str(said)
        assert not any("SessionsHigh" in str(alert) for alert in world.received["pagerduty"])  # a warning does not page

        world.agent.active_sessions.set(12)
        await until(
            lambda: (alert := world.webhook("SessionsCritical")) and alert["status"] == "resolved", what="the end"
        )
