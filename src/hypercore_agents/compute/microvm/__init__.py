"""Agents in microVMs on this machine: QEMU's `microvm` machine, KVM where it really works, TCG where it does not.

`image` makes what boots, `backend` is the door of what runs it. The modules below `backend`, from the bottom up:

- `syscalls`    calls of the kernel that Python has no name for
- `network`     the VM's island: a network namespace whose only link is the VM's
- `forwarding`  the two ways on and off the island
- `confinement` what QEMU may see, do and use on the host
- `conversation` what the shim says to the backend
- `shim`        the process above every QEMU (a program of its own); it, the four above and `host.shims` are all that
                runs as root beside the manager
- `sizes`       size classes
- `machine`     QEMU's command line
- `monitor`     QEMU's monitor, for snapshot and restore
- `link`        the conversation with a shim
- `records`     what a sandbox's directory holds
- `disks`       scratch disks
- `templates`   snapshots, kept by a `keeper` process each
- `vm`          how QEMU is started under a shim, and ended
- `freezing`    how a template is made
- `launch`      the one way in which a VM starts
- `teardown`    the one way in which anything is undone
- `admission`   what is refused, and what fits on this host
- `rights`      what this host lacks
"""
