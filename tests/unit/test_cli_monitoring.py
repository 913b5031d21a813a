"""`up --monitoring`: files that the real tools accept, a credential, and notices about missing requirements."""

import stat
import subprocess
from pathlib import Path

import pytest
from joserfc import jwt
from joserfc.jwk import OctKey

from hypercore_agents.cli import monitoring
from hypercore_agents.cli.command_errors import CommandError

SECRET = "a-secret-of-32-bytes-at-the-least"


def children(state: Path, notices: list[str], *, secret: str | None = None, **environment: str) -> list[str]:
    monitoring.prepare(environment)
    found = monitoring.children(
        environment, state, manager="127.0.0.1:1", autoscaler="127.0.0.1:2", token_secret=secret, say=notices.append
    )
    for child in found:
        assert not set(child.environment) - {"PATH", "HOME", "LANG", "TZ"}
    return [child.name for child in found]


@pytest.mark.prometheus
@pytest.mark.parametrize("secret", [None, SECRET])
def test_generated_files_are_valid_for_the_real_tools(tmp_path: Path, secret: str | None) -> None:
    assert children(tmp_path, [], secret=secret) == ["Alertmanager", "Prometheus"]
    folder = tmp_path / "monitoring"
    for command in (("promtool", "check", "config", "prometheus.yml"), ("amtool", "check-config", "alertmanager.yml")):
        checked = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60, check=False)
        assert checked.returncode == 0, checked.stdout + checked.stderr
    token = folder / "token"
    assert token.exists() is (secret is not None)
    if secret is not None:
        assert stat.S_IMODE(token.stat().st_mode) == 0o600
        claims = jwt.decode(token.read_text(), OctKey.import_key(secret)).claims
        assert claims["scope"] == "metrics"
        assert token.read_text() not in (folder / "prometheus.yml").read_text()


def test_without_prometheus_the_package_to_install_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    notices: list[str] = []
    assert children(tmp_path, notices) == []
    assert "apt-get install prometheus" in notices[0]


@pytest.mark.prometheus
def test_unusable_addresses_are_rejected_with_the_variable(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="PROMETHEUS_URL"):
        children(tmp_path, [], PROMETHEUS_URL="https://elsewhere.example/prometheus")
