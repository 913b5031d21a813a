"""The secrets in the environment of each role that `up` starts."""

from dataclasses import replace
from pathlib import Path

import pytest

from hypercore_agents.cli import up
from hypercore_agents.cli.up_plan import plan

SECRETS = {
    "ANTHROPIC_API_KEY": {"gateway"},
    "JWT_SECRET": {"manager"},
    "DATABASE_URL": {"gateway", "manager"},
    "AUTOSCALER_TOKEN": {"autoscaler"},
    **{
        name: {"gateway", "manager"}
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE", "AWS_REGION")
    },
}


def test_each_secret_reaches_only_the_roles_that_use_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in SECRETS:
        monkeypatch.setenv(name, f"the-{name.lower()}-of-more-than-thirty-two-bytes")
    monkeypatch.setenv("DATABASE_URL", "postgresql+psycopg://user:secret@db/platform")
    monkeypatch.setenv("STATE_DIR", str(tmp_path))
    monkeypatch.setenv("COMPUTE_BACKEND", "process")
    intended = replace(plan(demo=False), simulated=True, no_autoscaler="", monitored=False)
    children = {child.name: child.environment for child in up._children(intended)}
    assert set(children) == {"simulator", "gateway", "manager", "autoscaler"}
    for name, roles in SECRETS.items():
        assert {role for role, environment in children.items() if name in environment} == roles, name
    assert all(environment["STATE_DIR"] == str(tmp_path) for environment in children.values())
