"""Control groups for sandboxes of this host: those of `kit.linux.cgroups`, which a launcher uses for sessions too."""

from hypercore_agents.kit.linux.cgroups import Cgroups, Limits, detect, members, remove

__all__ = ["Cgroups", "Limits", "detect", "members", "remove"]
