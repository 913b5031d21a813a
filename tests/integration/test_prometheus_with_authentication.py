"""With ENABLE_AUTH, the real Prometheus discovers and scrapes agents with the shipped and the `up` configuration."""

import re
import time
from pathlib import Path

import pytest
import yaml
from joserfc import jwt
from joserfc.jwk import OctKey

from hypercore_agents.cli import monitoring
from support.manager_server import deployed
from support.monitoring_servers import MONITORING, prometheus, query
from support.ports import free_address
from support.waiting import until

pytestmark = pytest.mark.prometheus
SECRET = "a-secret-of-32-bytes-at-the-least"


def shipped(folder: Path, manager: str) -> Path:
    """The shipped file, changed as its header says: lines uncommented, token file and address set."""
    (folder / "token").write_text(
        jwt.encode(
            {"alg": "HS256"},
            {"sub": "prometheus", "scope": "metrics", "exp": int(time.time()) + 600},
            OctKey.import_key(SECRET),
        )
    )
    text, marks = re.subn(r"^(\s*)# (authorization:)", r"\1\2", (MONITORING / "prometheus.yml").read_text(), flags=re.M)
    assert marks == 3
    text = text.replace("/etc/prometheus/hypercore-agents.token", str(folder / "token")).replace(
        "127.0.0.1:8080", manager
    )
    configuration = yaml.safe_load(re.sub(r"(_interval|_timeout): \d+s", r"\1: 1s", text))
    del configuration["rule_files"], configuration["alerting"]
    path = folder / "prometheus.yml"
    path.write_text(yaml.safe_dump(configuration))
    return path


def written_by_up(folder: Path, manager: str) -> Path:
    environment = {"PROMETHEUS_URL": f"http://{free_address()}"}
    monitoring.prepare(environment)
    monitoring.children(environment, folder, manager=manager, autoscaler=None, token_secret=SECRET, say=lambda _: None)
    path = folder / "monitoring" / "prometheus.yml"
    path.write_text(path.read_text().replace('"5s"', '"1s"'))
    return path


async def test_agents_and_manager_are_scraped_with_a_credential(tmp_path: Path) -> None:
    async with deployed(tmp_path / "state", min_agents=1, enable_auth=True, jwt_secret=SECRET) as site:
        manager = site.url.removeprefix("http://")
        for made in (shipped, written_by_up):
            folder = tmp_path / made.__name__
            folder.mkdir()
            async with prometheus(made(folder, manager)) as base:
                for job in ("agents", "manager"):
                    await until(lambda: query(base, f'up{{job="{job}"}} == 1'), what=f"{made.__name__}: {job}")  # noqa: B023
