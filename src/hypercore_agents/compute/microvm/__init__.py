"""Agents in virtual machines of this host: QEMU's `microvm` machine, one kernel per agent.

`backend` is the only door. What runs as root is `shim`, a small program beside every VM, and the four modules that
it stands on; nothing else of the platform needs a privilege:

- `syscalls`    calls of the kernel that Python has no name for
- `network`     the VM's island: a network namespace whose only link is the VM's
- `confinement` what QEMU may see, do and use on the host
- `forwarding`  the two ways on and off the island
- `shim`        the process above every QEMU (a program of its own)
"""
