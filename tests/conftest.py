"""Fixtures that every test may use."""

import os

pytest_plugins = ["support.simulator_fixtures", "support.store_fixtures", "support.microvm_fixtures"]


def pytest_configure() -> None:
    """What `up` would choose by itself depends on the machine; a test that wants microVMs says so."""
    os.environ.setdefault("COMPUTE_BACKEND", "process")
