"""Shared parts of the tests: servers, stand-ins, fixtures."""
