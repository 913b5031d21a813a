"""Removes a sandbox of this backend; `host.teardown` has the order of the steps.

Three sources show which processes belong to a sandbox. The shim's own report usually makes the others unnecessary:

- the shim reports "clean": it reaps all descendants of the agent and has none left;
- the members of the sandbox's control groups (complete, unless the agent is root);
- all processes of the sandbox's user. If the agent shares the manager's user: the processes whose environment has the
  sandbox's AGENT_ID and AGENT_STATE_DIR. That is not complete: a process that clears its environment after its shim was
  killed, without a control group, cannot be recognised.
"""

import os
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

from hypercore_agents.compute.host import teardown
from hypercore_agents.compute.host.identity import boot_id, process_status
from hypercore_agents.compute.host.users import AgentUsers
from hypercore_agents.compute.process.records import ProcessDirectory, ProcessRecord
from hypercore_agents.compute.process.shim import stop_forks

_EXEC_SECONDS = 0.5


def destroy(directory: ProcessDirectory, record: ProcessRecord, users: AgentUsers) -> None:
    """Remove the sandbox. Blocks. Raises SandboxError if something cannot be killed or removed."""
    teardown.destroy(directory, record, users, partial(_kill_remaining, directory, record))


def _kill_remaining(directory: ProcessDirectory, record: ProcessRecord) -> None:
    if _is_clean(directory, record):
        return
    stop_forks([*record.cgroups])

    def find() -> set[int]:
        found = teardown.processes_on_record(record)
        if record.uid is None or record.shim is None:
            found.update(_marked(directory, record))
        return found

    teardown.kill_all(find, f"of {record.agent_id}")


def _is_clean(directory: ProcessDirectory, record: ProcessRecord) -> bool:
    if record.shim is not None and record.shim.boot != boot_id():
        return True
    ending = directory.read_exit()
    return ending is not None and ending.clean


def _marked(directory: ProcessDirectory, record: ProcessRecord) -> set[int]:
    """Return the processes, not older than the shim, whose environment names this sandbox."""
    marks = {f"AGENT_ID={record.agent_id}".encode(), b"AGENT_STATE_DIR=" + os.fsencode(directory.work)}
    oldest = record.shim.started if record.shim else 0
    deadline = time.monotonic() + _EXEC_SECONDS
    while True:
        found, undecided = set(), False
        for pid, environment in _environments(oldest):
            if marks <= set(environment.split(b"\0")):
                found.add(pid)
            # During an exec a process has no environment; look again, so that it is not missed.
            undecided |= not environment
        if not undecided or time.monotonic() > deadline:
            return found
        time.sleep(0.01)


def _environments(oldest: int) -> Iterator[tuple[int, bytes]]:
    """Yield the readable environments of processes that started at `oldest` or later."""
    for name in os.listdir("/proc"):
        if not name.isdigit() or int(name) == os.getpid():
            continue
        with suppress(OSError):
            status = process_status(int(name))
            if status and not status.ended and status.started >= oldest:
                # Fails for kernel threads, which run no program and have no environment.
                os.readlink(f"/proc/{name}/exe")
                yield int(name), Path(f"/proc/{name}/environ").read_bytes()
