"""The requests that the process backend refuses, its agent command, and its reported capabilities."""

import importlib.metadata
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from hypercore_agents.api.ids import new_agent_id
from hypercore_agents.compute.base import SandboxError, SandboxRefused, SandboxRequest
from hypercore_agents.compute.host import users
from hypercore_agents.compute.process import ProcessBackend
from hypercore_agents.compute.process.admission import check
from hypercore_agents.compute.process.command import chosen_command, installed_agent
from hypercore_agents.kit.linux import cgroups

REQUEST = SandboxRequest(new_agent_id(), 4, 8192, "http://127.0.0.1:8090", "s" * 43)


def test_the_defaults_of_a_spawn_are_accepted() -> None:
    check(REQUEST)
    check(replace(REQUEST, gpu_quota_mb=0, environment={"LOG_LEVEL": "info", "_x1": "=\n"}))


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("agent_id", {"agent_id": "../../etc"}),
        ("agent_id", {"agent_id": f"{REQUEST.agent_id}\n"}),
        ("gpu_quota", {"gpu_quota_mb": 1}),
        ("cores", {"cores": 0}),
        ("memory", {"memory_mb": 0}),
        ("enrolment_secret", {"enrolment_secret": ""}),
        ("enrolment_secret", {"enrolment_secret": "x" * 5000}),
        ("gateway_url", {"gateway_url": "http://x\0"}),
        ("environment", {"environment": {"A=B": "x"}}),
        ("environment", {"environment": {"A": "x\0y"}}),
        ("environment", {"environment": {"AGENT_LISTEN_FD": "7"}}),
        ("environment", {"environment": {"HOME": "/"}}),
        ("environment", {"environment": {"A": "x" * 70_000}}),
        ("environment", {"environment": {"A": "\u20ac" * 20_000}}),
    ],
)
def test_an_invalid_request_is_refused_with_its_field(field: str, changes: dict[str, Any]) -> None:
    with pytest.raises(SandboxRefused, match=field) as refusal:
        check(replace(REQUEST, **changes))
    assert refusal.value.details == {"field": field}
    assert refusal.value.status == 400


def test_the_installed_agent_ignores_files_that_its_user_can_change() -> None:
    command = installed_agent()
    assert command.arguments == (sys.executable, "-I", "-m", "hypercore_agents", "agent")
    assert command.environment == {}


def test_a_source_checkout_is_found_by_its_path() -> None:
    with mock.patch("importlib.metadata.distribution", side_effect=importlib.metadata.PackageNotFoundError):
        command = installed_agent()
    assert command.arguments[1:] == ("-P", "-s", "-m", "hypercore_agents", "agent")
    source = Path(command.environment["PYTHONPATH"])
    assert (source / "hypercore_agents" / "compute").is_dir()


def test_a_chosen_command_must_exist() -> None:
    command = chosen_command(["sh", "-c", "true"])
    assert Path(command.arguments[0]).is_absolute()
    assert command.arguments[1:] == ("-c", "true")
    for missing in (["no-such-program"], []):
        with pytest.raises(SandboxRefused, match="is not an executable program"):
            chosen_command(missing)


async def test_a_host_without_privileges_reports_no_isolation(tmp_path: Path) -> None:
    with mock.patch.object(cgroups, "detect", return_value=None), mock.patch("os.geteuid", return_value=1000):
        opened = ProcessBackend(tmp_path)
    capabilities = opened.capabilities
    assert not capabilities.separates_agents
    assert not capabilities.separates_sessions
    assert not capabilities.gpu
    assert capabilities.enforced_limits == frozenset()
    assert "because the manager is not root" in capabilities.isolation
    await opened.close()


async def test_a_separate_user_limits_the_processes_of_an_agent(tmp_path: Path) -> None:
    with mock.patch.object(users, "why_no_separate_users", return_value=None):
        opened = ProcessBackend(tmp_path, enforce_limits=False)
    assert opened.capabilities.separates_agents
    assert opened.capabilities.enforced_limits == {"pids"}
    await opened.close()


def test_other_operating_systems_are_refused(tmp_path: Path) -> None:
    with mock.patch("sys.platform", "darwin"), pytest.raises(SandboxRefused, match="needs Linux"):
        ProcessBackend(tmp_path)


async def test_the_error_names_the_setting_of_an_impossible_state_directory(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    opened = ProcessBackend(tmp_path / "file" / "state", command=[sys.executable])
    with pytest.raises(SandboxError, match="Not a directory; check STATE_DIR"):
        await opened.start(REQUEST)
    assert await opened.list() == []
    await opened.close()


async def test_unreadable_state_is_an_error_and_not_an_empty_list(tmp_path: Path) -> None:
    opened = ProcessBackend(tmp_path, command=[sys.executable])
    (tmp_path / "sandboxes" / REQUEST.agent_id).mkdir(parents=True)
    broken = OSError(5, "Input/output error")
    with mock.patch.object(Path, "read_bytes", side_effect=broken), mock.patch("os.scandir", side_effect=broken):
        for look in (opened.list, lambda: opened.inspect(REQUEST.agent_id), lambda: opened.stop(REQUEST.agent_id)):
            with pytest.raises(SandboxError, match="Input/output error"):
                await look()
    await opened.stop(REQUEST.agent_id)
    await opened.close()
