"""`--json` output is flushed to a pipe immediately, because `up` continues to serve after it."""

import io
import sys

import pytest

from hypercore_agents.cli.remote import show_json


def test_json_output_is_flushed(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(pipe))
    show_json({"url": "http://127.0.0.1:8080"})
    assert b"8080" in pipe.getvalue()
