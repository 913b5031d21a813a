"""The VM's island: a network namespace of its own whose only link is the TAP of the VM.

What it guarantees, by how it is made and not only by rules:
- The namespace has no way out: no veth, no bridge, no route, no forwarding. What the VM sends can only reach
  addresses of the namespace itself, which are one: `HOST`.
- At that address one TCP port has a listener, the gateway's; `forwarding` carries it out. The rules below drop
  everything else before the kernel could answer, pings and resets included.
- From the host only the agent's port of the VM is reached, also by way of `forwarding`.
- Nothing to clean up: the TAP lives as long as QEMU's descriptor, the namespace as long as the processes in it, the
  rules as long as the namespace. Whoever is killed, at whatever moment, the kernel removes all three.

Every VM has the same addresses, so that a snapshot fits every clone, and no address of the host's own networks can
clash with ours.

Standard library only: the shim imports it; addresses are set by ioctl (netdevice(7)), the TAP by the kernel's
`tuntap.rst`, the rules by nft(8).

Rejected: a veth into a bridge with isolated ports and DNAT (the host's forwarding, its rules and an address range of
its own come into play, the gateway must leave loopback, all of it has to be removed, and a mistake opens the host);
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
"""The two addresses on the island: our end, where the gateway's port is, and the VM's."""

MAC = "52:54:00:48:43:02"
"""The VM's hardware address."""

AGENT_PORT = 8080
"""The one port of the VM that the host reaches; `api.guest.AGENT_PORT`, whose import would cost every shim dearly."""

GATEWAY_PORT = 8090
"""Where the gateway answers on every island, whatever its port on the host: so a template fits all gateways."""

_TAP, _HOST_MAC = "tap0", "52:54:00:48:43:01"
_TUNSETIFF = 0x400454CA
_RULES_SECONDS = 20
_IFF_TAP, _IFF_NO_PI, _IFF_VNET_HDR = 0x0002, 0x1000, 0x4000
_SIOCSIFFLAGS, _SIOCSIFADDR, _SIOCSIFNETMASK, _SIOCSIFHWADDR, _SIOCSARP = 0x8914, 0x8916, 0x891C, 0x8924, 0x8955
_IFF_UP, _ATF_COM, _ATF_PERM, _ARPHRD_ETHER = 1, 2, 4, 1
_NFT = ("/usr/sbin/nft", "/sbin/nft", "/usr/bin/nft")


def rules(*, gateway: bool) -> str:
    """Return the namespace's rules; without the gateway no port answers (a template's VM talks to nobody)."""
    answered = f"ip saddr {GUEST} ip daddr {HOST} tcp dport {GATEWAY_PORT} ct state new accept" if gateway else ""
    return f"""table inet island {{
  chain input {{ type filter hook input priority 0; policy drop;
    iifname "{_TAP}" ct state established accept
    iifname "{_TAP}" {answered or "drop"}
  }}
  chain forward {{ type filter hook forward priority 0; policy drop; }}
  chain output {{ type filter hook output priority 0; policy drop;
    oifname "{_TAP}" ct state established accept
    oifname "{_TAP}" ip saddr {HOST} ip daddr {GUEST} tcp dport {AGENT_PORT} ct state new accept
  }}
}}
"""


def make_island(*, gateway: bool) -> tuple[int, socket.socket | None]:
    """Move the calling thread to a new island; return the TAP's descriptor and the gateway's listener there.

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
        # Written down, so that the VM cannot claim to be somebody else and nobody waits for an answer.
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
    rules, said = (os.memfd_create(name, os.MFD_CLOEXEC) for name in ("rules", "said"))
    try:
        os.write(rules, text.encode())
        os.lseek(rules, 0, os.SEEK_SET)
        files = [(os.POSIX_SPAWN_DUP2, rules, 0), (os.POSIX_SPAWN_DUP2, said, 1), (os.POSIX_SPAWN_DUP2, said, 2)]
        process = os.posix_spawn(program, [program, "-f", "-"], {}, file_actions=files, setsigdef=[signal.SIGPIPE])
        if _status(process):
            raise OSError(f"nft refused the rules: {os.pread(said, 500, 0).decode(errors='replace')}")
    finally:
        os.close(rules)
        os.close(said)


def _status(process: int) -> int:
    """Return how a child ended; kill it when it takes too long."""
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
