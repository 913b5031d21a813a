"""The control group of each template, which is charged with the template's memory.

The kernel charges a page to the group of the process that writes it first. Therefore the VM of a snapshot runs in the
template's group while it boots, and the template holder joins the group before it fills the holes of the memory. The
manager's own group is charged with neither.

A group is named by its template's key, so the folder of a template leads to the group that a killed manager left. A
group that is removed while clones of its template run keeps its charges until the last clone ends.

All methods block. On a host without memory control groups they do nothing.
"""

import contextlib

from hypercore_agents.compute.base import SandboxError
from hypercore_agents.compute.host.teardown import clear_groups
from hypercore_agents.kit.linux.cgroups import Cgroups, Limits, charged_bytes


class TemplateGroups:
    """Creates and removes the groups of one state directory's templates; `scope` distinguishes them from others."""

    def __init__(self, groups: Cgroups | None, scope: str) -> None:
        base = groups.bases.get("memory") if groups else None
        self._groups = Cgroups({"memory": base}, groups.settings) if groups and base else None
        self._scope = scope

    @property
    def enabled(self) -> bool:
        """Whether this host has memory control groups."""
        return self._groups is not None

    def create(self, key: str, memory_mb: int) -> tuple[str, ...]:
        """Create the group of a template whose VM may take `memory_mb`; return its directory. Raises OSError."""
        if self._groups is None:
            return ()
        self.remove(key)
        self._groups.create(self._name(key), Limits(None, memory_mb, None))
        return self.paths(key)

    def paths(self, key: str) -> tuple[str, ...]:
        """Return the directory of a template's group, whether or not it exists."""
        return self._groups.paths(self._name(key)) if self._groups else ()

    def charged_bytes(self, key: str) -> int | None:
        """Return the memory that a template's group is charged with, None without a group."""
        return charged_bytes(self.paths(key))

    def remove(self, key: str) -> None:
        """Kill the remaining processes in a template's group and remove it. A missing group is not an error."""
        with contextlib.suppress(OSError, SandboxError):
            clear_groups(self.paths(key))

    def _name(self, key: str) -> str:
        return f"hypercore-{self._scope}-template-{key}"
