"""Fixtures that every test may use."""

pytest_plugins = ["fixtures_simulator", "fixtures_store", "fixtures_microvm"]
