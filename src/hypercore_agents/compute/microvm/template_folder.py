"""The templates of a state directory on disk: their descriptions, and the end of a template.

    <state_dir>/microvm/templates/<key>/
        template.json   its holder, its size; the file's time is the time of its last use
        socket          where the holder hands out memory and state
        scratch         the scratch disk at the time of the snapshot

A template that is being created has a folder `.making-<key>`, whose description names the creating process and has the
size of its VM. All methods block.
"""

import contextlib
import json
import os
import shutil
import signal
from dataclasses import asdict, dataclass
from pathlib import Path

from hypercore_agents.compute.host.identity import ProcessIdentity, pidfd_of, reap, send_signal, wait_for_end
from hypercore_agents.compute.microvm.machine import Machine
from hypercore_agents.compute.microvm.template_groups import TemplateGroups
from hypercore_agents.compute.microvm.template_memory import TemplateInstance
from hypercore_agents.kit.linux.state_location import location_mark

_CREATING = ".making-"
_DESCRIPTION = "template.json"
_END_SECONDS = 10.0


@dataclass(frozen=True)
class Entry:
    """A template that exists or is being created."""

    path: Path
    instance: TemplateInstance
    used_at: float

    @property
    def key(self) -> str:
        """The template's key."""
        return self.path.name.removeprefix(_CREATING)

    @property
    def created(self) -> bool:
        """Whether the template exists; False while it is being created."""
        return not self.path.name.startswith(_CREATING)


class TemplateFolder:
    """The folder of all templates of one state directory, and their control groups."""

    def __init__(self, path: Path, groups: TemplateGroups) -> None:
        self.path = path
        self.groups = groups

    def template(self, key: str) -> Path:
        """Return the folder of a template."""
        return self.path / key

    def creation(self, key: str) -> Path:
        """Return the folder in which a template is created."""
        return self.path / f"{_CREATING}{key}"

    def entries(self) -> list[Entry]:
        """Return every template whose holder or creating process runs; remove the leftovers of a dead holder."""
        found = []
        for description in self.path.glob(f"*/{_DESCRIPTION}"):
            with contextlib.suppress(OSError, ValueError, KeyError):
                value = json.loads(description.read_text())
                instance = TemplateInstance(str(value["instance"]), int(value["size_mb"]))
                entry = Entry(description.parent, instance, description.stat().st_mtime)
                with pidfd_of(_holder_of(entry.path)) as alive:
                    if alive is not None:
                        found.append(entry)
                    elif entry.created:
                        self.end(entry.key)
        return found

    def remove_unfinished(self) -> None:
        """Remove the leftovers of creations that were interrupted. Only the holder of the creation lock may do this."""
        for leftover in self.path.glob(f"{_CREATING}*"):
            self.groups.remove(leftover.name.removeprefix(_CREATING))
            shutil.rmtree(leftover, ignore_errors=True)

    def end(self, key: str) -> None:
        """End a template's holder, unless the folder is a copy; remove the folder and the control group."""
        path = self.template(key)
        with contextlib.suppress(OSError, ValueError):
            holder = _holder_of(path)
            with pidfd_of(holder) as pidfd:
                if pidfd is not None:
                    send_signal(pidfd, signal.SIGTERM)
                    wait_for_end(pidfd, _END_SECONDS)
            reap(holder)
        shutil.rmtree(path, ignore_errors=True)
        self.groups.remove(key)

    def touch(self, key: str) -> None:
        """Record that a template is used now."""
        with contextlib.suppress(OSError):
            os.utime(self.template(key) / _DESCRIPTION)


def describe(path: Path, holder: ProcessIdentity | None, instance: TemplateInstance, machine: Machine) -> None:
    """Write the description of a template: the process that holds or creates it, and its size."""
    value = {
        "holder": holder and holder.to_json(),
        "instance": instance.name,
        "size_mb": instance.size_mb,
        "machine": asdict(machine),
        "origin": location_mark(path.parent),
    }
    new = path / "template.new"
    new.write_text(json.dumps(value, default=str))
    new.replace(path / _DESCRIPTION)


def _holder_of(path: Path) -> ProcessIdentity | None:
    """Return a template's holder, None in a copied folder: it belongs to the original. Raises OSError, ValueError."""
    description = json.loads((path / _DESCRIPTION).read_text())
    here = location_mark(path.parent)
    return ProcessIdentity.from_json(description.get("holder")) if description.get("origin", here) == here else None
