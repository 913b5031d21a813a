"""Fixtures and markers that every test may use.

A test that needs more than Python packages has a marker (`pyproject.toml` lists them). The markers `root` and
`prometheus` skip a test where their requirement is missing; `qemu` and `postgres` follow from the fixtures that a test
uses, and those fixtures skip it.
"""

import os

import pytest

from support.monitoring_servers import installed

pytest_plugins = [
    "support.simulator_fixtures",
    "support.agent_fixtures",
    "support.launched_agent",
    "support.manager_fixtures",
    "support.store_fixtures",
    "support.microvm_fixtures",
]
_FIXTURES_WITH_MARKERS = {
    "postgres_socket": ("postgres",),
    "guest_image": ("qemu", "root"),
    "microvm_place": ("qemu", "root"),
    "small_disk": ("root",),
    "tiny_disk": ("root",),
}


def pytest_configure() -> None:
    """Let tests run agents as processes unless they name another backend; the automatic choice depends on the host."""
    os.environ.setdefault("COMPUTE_BACKEND", "process")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Add the markers that follow from fixtures, then skip the tests whose requirement is missing."""
    missing = {
        "root": "needs root" if os.geteuid() != 0 else None,
        "prometheus": None if installed() else "needs Debian's prometheus and prometheus-alertmanager",
    }
    for item in items:
        for name in _markers_by_fixture(item):
            item.add_marker(name)
        for name, reason in missing.items():
            if reason and item.get_closest_marker(name):
                item.add_marker(pytest.mark.skip(reason=reason))


def _markers_by_fixture(item: pytest.Item) -> set[str]:
    names = set(getattr(item, "fixturenames", ()))
    found = {marker for name in names & _FIXTURES_WITH_MARKERS.keys() for marker in _FIXTURES_WITH_MARKERS[name]}
    variant = getattr(item, "callspec", None)
    if variant is not None and variant.params.get("store_url") == "postgresql":
        found.add("postgres")
    return found
