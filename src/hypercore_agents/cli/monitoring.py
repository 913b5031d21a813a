"""`up --monitoring`: run Prometheus, and Alertmanager if it is installed, together with the platform.

Both are programs of the host (Debian packages `prometheus` and `prometheus-alertmanager`). If one is missing, `up`
prints the installation command and continues without it. Configuration and data are in `STATE_DIR/monitoring`, with
the shipped rules (`monitoring/prometheus-agent-rules.yml`) and the addresses of this `up`. Alertmanager displays alerts
and sends no notifications; `monitoring/alertmanager.yml` is an example that does.

With `ENABLE_AUTH`, Prometheus receives a credential of scope `metrics` that is valid for `TOKEN_SECONDS`.
"""

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, MutableMapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from joserfc import jwt
from joserfc.jwk import OctKey
from pydantic import Field, field_validator
from pydantic_settings import BaseSettings

from hypercore_agents.cli.command_errors import CommandError
from hypercore_agents.cli.supervisor import Child
from hypercore_agents.kit.environment import SETTINGS

RULES = Path(__file__).parents[3] / "monitoring/prometheus-agent-rules.yml"
GATEWAY_OPERATOR_ADDR = "127.0.0.1:9092"
PROMETHEUS_URL = "http://127.0.0.1:9090"
TOKEN_SECONDS = 30 * 86_400
_INTERVAL = "5s"
_PROMETHEUS = ("prometheus",)
_ALERTMANAGER = ("prometheus-alertmanager", "alertmanager")


class MonitoringSettings(BaseSettings):
    """The address of Alertmanager. The address of Prometheus is PROMETHEUS_URL, which other roles read too."""

    model_config = SETTINGS

    alertmanager_url: str = Field(
        default="http://127.0.0.1:9093", description="URL at which `up --monitoring` runs Alertmanager"
    )

    @field_validator("alertmanager_url")
    @classmethod
    def _http_url(cls, value: str) -> str:
        parts = urlsplit(value)
        if parts.scheme != "http" or not parts.hostname or parts.path.strip("/") or "@" in parts.netloc:
            raise ValueError("must be http://HOST:PORT, without a user and a path")
        return value.rstrip("/")


def prepare(environment: MutableMapping[str, str]) -> None:
    """Set the variables that all roles need: the address of the gateway's metrics, and that of Prometheus."""
    environment.setdefault("GATEWAY_OPERATOR_ADDR", GATEWAY_OPERATOR_ADDR)
    environment.setdefault("PROMETHEUS_URL", PROMETHEUS_URL)


def children(
    environment: Mapping[str, str],
    state: Path,
    *,
    manager: str,
    autoscaler: str | None,
    token_secret: str | None,
    say: Callable[[str], None],
) -> list[Child]:
    """Write the configuration and return the processes to run. `manager` and `autoscaler` are HOST:PORT.

    Raises CommandError if an address is invalid or the rules are missing.
    """
    prometheus, alertmanager = _installed(_PROMETHEUS), _installed(_ALERTMANAGER)
    if prometheus is None:
        say("Prometheus is not installed; run: sudo apt-get install prometheus prometheus-alertmanager")
        return []
    if not RULES.is_file():
        raise CommandError(f"--monitoring needs the rules in {RULES}; run it from a checkout of the project")
    folder = state / "monitoring"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    url = environment["PROMETHEUS_URL"]
    alerts = MonitoringSettings().alertmanager_url
    alertmanagers = [] if alertmanager is None else [_alertmanager(alertmanager, folder, alerts)]
    if alertmanager is None:
        say(
            "Alertmanager is not installed (Prometheus shows alerts); run: sudo apt-get install prometheus-alertmanager"
        )
    credentials = _credentials(folder, token_secret)
    jobs = [
        {"job_name": "manager", "static_configs": [{"targets": [manager]}], **credentials},
        {"job_name": "gateway", "static_configs": [{"targets": [environment["GATEWAY_OPERATOR_ADDR"]]}]},
        {
            "job_name": "agents",
            "http_sd_configs": [
                {"url": f"http://{manager}/v1/prometheus/targets", "refresh_interval": _INTERVAL, **credentials}
            ],
            **credentials,
        },
    ]
    if autoscaler is not None:
        jobs.append({"job_name": "autoscaler", "static_configs": [{"targets": [autoscaler]}]})
    configuration: dict[str, Any] = {
        "global": {"scrape_interval": _INTERVAL, "scrape_timeout": _INTERVAL, "evaluation_interval": _INTERVAL},
        "rule_files": [str(RULES)],
        "scrape_configs": jobs,
    }
    if alertmanagers:
        configuration["alerting"] = {"alertmanagers": [{"static_configs": [{"targets": [_address(alerts)]}]}]}
    written = _write(folder / "prometheus.yml", configuration)
    say(f"Prometheus will be at {url}{f', Alertmanager at {alerts}' if alertmanagers else ''}")
    return [*alertmanagers, _prometheus(prometheus, folder, url, written)]


def _prometheus(program: str, folder: Path, url: str, configuration: Path) -> Child:
    arguments = [
        f"--config.file={configuration}",
        f"--storage.tsdb.path={folder / 'prometheus'}",
        "--storage.tsdb.retention.time=15d",
        f"--web.listen-address={_address(url)}",
        "--log.level=warn",
    ]
    return Child("Prometheus", arguments, _environment(), f"{url}/-/ready", program=program)


def _alertmanager(program: str, folder: Path, url: str) -> Child:
    configuration = _write(
        folder / "alertmanager.yml", {"route": {"receiver": "shown"}, "receivers": [{"name": "shown"}]}
    )
    arguments = [
        f"--config.file={configuration}",
        f"--storage.path={folder / 'alertmanager'}",
        f"--web.listen-address={_address(url)}",
        "--cluster.listen-address=",
        "--log.level=warn",
    ]
    return Child("Alertmanager", arguments, _environment(), f"{url}/-/ready", program=program)


def _credentials(folder: Path, secret: str | None) -> dict[str, Any]:
    if secret is None:
        return {}
    claims = {"sub": "prometheus", "scope": "metrics", "exp": int(time.time()) + TOKEN_SECONDS}
    path = folder / "token"
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(jwt.encode({"alg": "HS256"}, claims, OctKey.import_key(secret)))
    # Prometheus 2.42 sends no scheme in its discovery requests unless `type` names one.
    return {"authorization": {"type": "Bearer", "credentials_file": str(path)}}


def _write(path: Path, configuration: dict[str, Any]) -> Path:
    path.write_text(json.dumps(configuration, indent=2))  # JSON is YAML
    return path


def _installed(names: tuple[str, ...]) -> str | None:
    return next((path for name in names if (path := shutil.which(name)) is not None), None)


def _address(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme != "http" or not parts.hostname or parts.path.strip("/"):
        raise CommandError(f"{url} must be http://HOST:PORT (PROMETHEUS_URL, ALERTMANAGER_URL)")
    return f"{'127.0.0.1' if parts.hostname == 'localhost' else parts.hostname}:{parts.port or 80}"


def _environment() -> dict[str, str]:
    """Return an environment without secrets of the platform."""
    return {name: value for name, value in os.environ.items() if name in ("PATH", "HOME", "LANG", "TZ")}
