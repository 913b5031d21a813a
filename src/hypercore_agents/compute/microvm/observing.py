"""What is observed of a sandbox."""

from hypercore_agents.compute.host.observing import observe

__all__ = ["observe"]
