"""TCP ports on loopback for servers under test."""

import socket


def free_port() -> int:
    """Return a port on which nothing listens now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def free_address() -> str:
    """Return 127.0.0.1 with a port on which nothing listens now."""
    return f"127.0.0.1:{free_port()}"
