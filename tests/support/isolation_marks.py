"""Marks for tests that need the launcher's isolation of sessions."""

import pytest

from hypercore_agents.agent.launcher.sandbox import probe

WHY_NO_ISOLATION = probe()
"""Why the launcher cannot isolate sessions on this host, None where it can."""

needs_isolation = pytest.mark.skipif(
    WHY_NO_ISOLATION is not None, reason=f"sessions cannot be isolated here: {WHY_NO_ISOLATION}"
)
