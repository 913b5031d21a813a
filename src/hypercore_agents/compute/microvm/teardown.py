"""Removes a sandbox of this backend; `host.teardown` has the order of the steps.

The end of the shim and of QEMU removes the VM's network, namespaces and rules.
"""

from functools import partial

from hypercore_agents.compute.host import teardown
from hypercore_agents.compute.host.users import AgentUsers
from hypercore_agents.compute.microvm.records import VmDirectory, VmRecord


def destroy(directory: VmDirectory, record: VmRecord, users: AgentUsers) -> None:
    """Remove the sandbox. Blocks. Raises SandboxError if something cannot be killed or removed."""

    def kill_remaining() -> None:
        teardown.kill_all(partial(teardown.processes_on_record, record), f"of {record.agent_id}")
        if record.uid is None:
            # The start may have been interrupted between claiming a user and recording it.
            users.release_unrecorded(directory.path)

    teardown.destroy(directory, record, users, kill_remaining)
