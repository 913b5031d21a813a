"""Fixtures that every test may use."""

import os

pytest_plugins = ["fixtures_simulator", "fixtures_store", "fixtures_microvm"]


def pytest_configure() -> None:
    """What `up` would choose by itself depends on the machine; a test that wants microVMs says so."""
    os.environ.setdefault("COMPUTE_BACKEND", "process")
