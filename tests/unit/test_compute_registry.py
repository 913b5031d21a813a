"""Backends are opened by name, with their options."""

import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

from hypercore_agents.compute import registry
from hypercore_agents.compute.base import SandboxRefused
from hypercore_agents.compute.registry import BACKEND_NAMES, open_backend


async def test_the_process_backend_opens_with_its_options(tmp_path: Path) -> None:
    backend = open_backend("process", tmp_path, {"enforce_limits": False, "agent_uids": None})
    assert backend.name == "process"
    assert backend.capabilities.enforced_limits == frozenset()
    await backend.close()


def test_an_unknown_name_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(SandboxRefused, match="process, microvm, hypercore") as refusal:
        open_backend("docker", tmp_path)
    assert refusal.value.details == {"field": "compute_backend"}


def test_an_unreleased_backend_is_refused(tmp_path: Path) -> None:
    with (
        mock.patch.dict(registry._BACKENDS, {"later": "hypercore_agents.compute.later:Later"}),
        pytest.raises(SandboxRefused, match="later is not part of this release"),
    ):
        open_backend("later", tmp_path)


def test_a_missing_extra_is_named(tmp_path: Path) -> None:
    gone = ModuleNotFoundError("No module named 'grpc'", name="grpc")
    with (
        mock.patch("importlib.import_module", side_effect=gone),
        pytest.raises(SandboxRefused, match=r"needs the module grpc: install hypercore-agents\[hypercore\]"),
    ):
        open_backend("hypercore", tmp_path)


def test_an_unknown_option_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(SandboxRefused, match=r"no option colour; it has command, agent_uids"):
        open_backend("process", tmp_path, {"colour": "red"})


def test_a_backend_is_imported_only_when_it_is_opened() -> None:
    program = (
        "import sys; import hypercore_agents.compute.registry; import hypercore_agents.compute.testing; "
        "print([name for name in sys.modules if name.split('.')[-1] in "
        f"{BACKEND_NAMES!r} or name == 'pytest'])"
    )
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"
