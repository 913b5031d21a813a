"""The isolated network of a VM: a network namespace whose only link is the VM's TAP device.

Guarantees, which follow from the construction and not only from rules:
- The namespace has no connection to other networks: no veth, bridge, route or forwarding. The VM can reach only the
  single address of the namespace, `HOST`.
- One TCP port of that address has a listener, the gateway's, and `forwarding` forwards it. The rules below drop all
  other packets before the kernel could answer them, including pings and resets.
- From the host, only the agent's port of the VM is reachable, also through `forwarding`.
- Nothing has to be cleaned up: the TAP device exists as long as QEMU's descriptor, the namespace as long as its
  processes, and the rules as long as the namespace. Whichever process is killed, the kernel removes all three.

All VMs have the same addresses, so a snapshot fits every clone, and the addresses cannot conflict with networks of the
host.

Uses the standard library only, because the shim imports it. Addresses are set by ioctl (netdevice(7)), the TAP device
by the interface in the kernel's `tuntap.rst`, the rules by nft(8).

Rejected: a veth into a bridge with isolated ports and DNAT (it involves the host's forwarding and rules and an address
range, the gateway would have to leave loopback, everything has to be removed, and a mistake opens the host);
`route_localnet` (opens every loopback service); named namespaces (files that outlive a crash).
"""

from __future__ import annotations

import fcntl
import os
import select
import signal
import socket
import struct

from hypercore_agents.compute.microvm import syscalls

HOST, GUEST, PREFIX = "10.0.77.1", "10.0.77.2", 30
"""The two addresses of the network: the host's end, with the gateway's port, and the VM."""

MAC = "52:54:00:48:43:02"
"""The VM's hardware address."""

AGENT_PORT = 8080
"""The only port of the VM that the host reaches; equals `api.guest.AGENT_PORT`, which is too large to import here."""

GATEWAY_PORT = 8090
"""The gateway's port in every VM's network, whatever its port on the host, so a template fits all gateways."""

_TAP, _HOST_MAC = "tap0", "52:54:00:48:43:01"
_TUNSETIFF = 0x400454CA
_RULES_SECONDS = 20
_IFF_TAP, _IFF_NO_PI, _IFF_VNET_HDR = 0x0002, 0x1000, 0x4000
_SIOCSIFFLAGS, _SIOCSIFADDR, _SIOCSIFNETMASK, _SIOCSIFHWADDR, _SIOCSARP = 0x8914, 0x8916, 0x891C, 0x8924, 0x8955
_IFF_UP, _ATF_COM, _ATF_PERM, _ARPHRD_ETHER = 1, 2, 4, 1
_NFT = ("/usr/sbin/nft", "/sbin/nft", "/usr/bin/nft")


def rules(*, gateway: bool) -> str:
    """Return the namespace's rules. Without `gateway`, for the VM of a template, no port answers."""
    gateway_rule = f"ip saddr {GUEST} ip daddr {HOST} tcp dport {GATEWAY_PORT} ct state new accept" if gateway else ""
    return f"""table inet agent {{
  chain input {{ type filter hook input priority 0; policy drop;
    iifname "{_TAP}" ct state established accept
    iifname "{_TAP}" {gateway_rule or "drop"}
  }}
  chain forward {{ type filter hook forward priority 0; policy drop; }}
  chain output {{ type filter hook output priority 0; policy drop;
    oifname "{_TAP}" ct state established accept
    oifname "{_TAP}" ip saddr {HOST} ip daddr {GUEST} tcp dport {AGENT_PORT} ct state new accept
  }}
}}
"""


def create_network(*, gateway: bool) -> tuple[int, socket.socket | None]:
    """Move the calling thread into a new network; return the TAP's descriptor and the gateway's listener there.

    Raises OSError.
    """
    syscalls.unshare(syscalls.CLONE_NEWNET)
    for setting in ("ipv4/ip_forward", "ipv6/conf/all/disable_ipv6", "ipv6/conf/default/disable_ipv6"):
        _write(f"/proc/sys/net/{setting}", "0" if setting.endswith("forward") else "1")
    _load(rules(gateway=gateway))
    tap = _open_tap()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        _ioctl(control, _SIOCSIFHWADDR, struct.pack("16sH6s8x", _name(), _ARPHRD_ETHER, _hardware(_HOST_MAC)))
        _ioctl(control, _SIOCSIFADDR, struct.pack("16s16s", _name(), _address(HOST)))
        _ioctl(control, _SIOCSIFNETMASK, struct.pack("16s16s", _name(), _address(_netmask())))
        _ioctl(control, _SIOCSIFFLAGS, struct.pack("16sH14x", _name(), _IFF_UP))
        # A permanent ARP entry: the VM cannot claim another address, and no packet waits for an ARP answer.
        fcntl.ioctl(
            control,
            _SIOCSARP,
            struct.pack(
                "=16sH14si16s16s", _address(GUEST), _ARPHRD_ETHER, _hardware(MAC), _ATF_COM | _ATF_PERM, b"", _name()
            ),
        )
    if not gateway:
        return tap, None
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.bind((HOST, GATEWAY_PORT))
    listener.listen(256)
    return tap, listener


def _open_tap() -> int:
    tap = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    fcntl.ioctl(tap, _TUNSETIFF, struct.pack("16sH22x", _name(), _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR))
    return tap


def _load(text: str) -> None:
    program = next((path for path in _NFT if os.path.exists(path)), None)
    if program is None:
        raise FileNotFoundError("nft is not installed: apt-get install -y nftables")
    # Not by `subprocess`, whose import would cost every shim half a megabyte.
    rules, output = (os.memfd_create(name, os.MFD_CLOEXEC) for name in ("rules", "output"))
    try:
        os.write(rules, text.encode())
        os.lseek(rules, 0, os.SEEK_SET)
        files = [(os.POSIX_SPAWN_DUP2, rules, 0), (os.POSIX_SPAWN_DUP2, output, 1), (os.POSIX_SPAWN_DUP2, output, 2)]
        process = os.posix_spawn(program, [program, "-f", "-"], {}, file_actions=files, setsigdef=[signal.SIGPIPE])
        if _status(process):
            raise OSError(f"nft rejected the rules: {os.pread(output, 500, 0).decode(errors='replace')}")
    finally:
        os.close(rules)
        os.close(output)


def _status(process: int) -> int:
    """Return the exit status of a child; kill it if it takes too long."""
    pidfd = os.pidfd_open(process)
    try:
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        if not poll.poll(_RULES_SECONDS * 1000):
            os.kill(process, signal.SIGKILL)
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    finally:
        os.close(pidfd)


def _ioctl(control: socket.socket, request: int, argument: bytes) -> None:
    fcntl.ioctl(control, request, argument.ljust(40, b"\0"))


def _name() -> bytes:
    return _TAP.encode()


def _hardware(address: str) -> bytes:
    return bytes.fromhex(address.replace(":", ""))


def _address(host: str) -> bytes:
    return struct.pack("HH4s8x", socket.AF_INET, 0, socket.inet_aton(host))


def _netmask() -> str:
    return socket.inet_ntoa(struct.pack("!I", (0xFFFFFFFF << (32 - PREFIX)) & 0xFFFFFFFF))


def _write(path: str, text: str) -> None:
    try:
        with open(path, "w") as file:
            file.write(text)
    except FileNotFoundError:
        return  # a kernel without IPv6
