"""Agents in microVMs on this machine: QEMU's `microvm` machine, with KVM where it works and TCG elsewhere.

`image` builds the guest image, and `backend` is the entry point for running it. The modules below `backend`, from the
bottom up:

- `syscalls`       system calls that Python has no function for
- `network`        the isolated network of a VM: a network namespace whose only link is the VM's
- `forwarding`     forwards TCP connections into and out of a VM's network
- `confinement`    restricts what QEMU can access on the host
- `helper_sandbox` restricts what the shim and the template holder can access
- `shim_protocol`  the messages between a shim and the backend
- `shim`           the process above every QEMU (a separate program). It, the modules above and `host.shims` are the
                   only code besides the manager that runs as root
- `sizes`          size classes of VMs
- `machine`        QEMU's command line
- `monitor`        QEMU's monitor, for snapshot and restore
- `shim_client`    the backend's side of the protocol with a shim
- `records`        the record, exit file and directory of a sandbox
- `disks`          scratch disks
- `boot`           boots a VM, and retries a boot that hangs
- `vm`             starts and ends QEMU under a shim
- `template_*`     a template: its memory, holder process, folder, control group, leases and creation
- `templates`      finds, creates and evicts templates
- `teardown`       removes a sandbox
- `launch`         starts the VM of an agent
- `admission`      the requests that are refused, and the accounting of this host's resources
- `accelerator`    chooses between KVM and TCG
- `host_facts`     figures of this host
- `requirements`   what this host lacks for microVMs
"""
