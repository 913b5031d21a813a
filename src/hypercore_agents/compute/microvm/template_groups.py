"""The control group of each template, which is charged with the template's memory.

The kernel charges a page to the group of the process that writes it first. So the VM that becomes a template runs in
the template's group while it boots, and the keeper joins the group before it fills the holes of the memory. The
manager's own group is charged with neither.

A group has its template's name, so that groups which a killed manager left are found by the folder of the template.
A group that is removed while clones of its template run keeps its charges until the last clone ends.

All methods block. Where this host has no group for memory, there are no groups and all methods do nothing.
"""

import contextlib

from hypercore_agents.compute.base import SandboxError
from hypercore_agents.compute.microvm.teardown import clear_groups
from hypercore_agents.kit.linux.cgroups import Cgroups, Limits, charged_bytes


class TemplateGroups:
    """Makes and removes the groups of one state directory's templates. `scope` sets them apart from another's."""

    def __init__(self, groups: Cgroups | None, scope: str) -> None:
        base = groups.bases.get("memory") if groups else None
        self._groups = Cgroups({"memory": base}, groups.settings) if groups and base else None
        self._scope = scope

    def create(self, key: str, memory_mb: int) -> tuple[str, ...]:
        """Make the group of a template whose VM may take `memory_mb`; return its directory. Raises OSError."""
        if self._groups is None:
            return ()
        self.remove(key)
        self._groups.create(self._name(key), Limits(None, memory_mb, None))
        return self.paths(key)

    def paths(self, key: str) -> tuple[str, ...]:
        """Return the directory of a template's group, whether it exists or not."""
        return self._groups.paths(self._name(key)) if self._groups else ()

    def charged_bytes(self, key: str) -> int | None:
        """Return the memory that a template's group is charged with; None where no group counts it."""
        return charged_bytes(self.paths(key))

    @property
    def count(self) -> bool:
        """Whether this host has groups that count memory."""
        return self._groups is not None

    def remove(self, key: str) -> None:
        """Kill what still runs in a template's group and remove it; one that does not exist is fine."""
        with contextlib.suppress(OSError, SandboxError):
            clear_groups(self.paths(key))

    def _name(self, key: str) -> str:
        return f"hypercore-{self._scope}-template-{key}"
